"""English-looking text from a seed: lengths and repetition like those of chat, no meaning."""

import random

TEXT = """
the of and to a in is it that for you on with as are be this was have or an by not but at from your which can will what
all their one if about there when use how more other time some these out so would make than first been its who people
over did down only way find because each number part sound most after new work place where through think help before
line right mean differ cause same turn move following example include another under explain question answer describe
write short story code function return value language model data problem reason result important different between
several possible however, therefore, although experience knowledge environment development information understand
consider provide improve increase temperature government university mathematics photosynthesis responsibility.
"""
WORDS = TEXT.split()


def text(draw: random.Random, words: int) -> str:
    """Sentences of `words` words in all, the common ones most often."""
    chosen = [WORDS[min(int(draw.expovariate(1 / 35)), len(WORDS) - 1)] for _ in range(words)]
    for end in range(0, words, 14):
        chosen[end] = chosen[end].capitalize()
        chosen[end - 1] = chosen[end - 1].rstrip(".,") + "."
    return " ".join(chosen)


def around(draw: random.Random, words: float) -> int:
    """A length about the given one; lengths of chat are about log-normal."""
    return max(3, round(words * draw.lognormvariate(-0.12, 0.5)))

"""English-looking text from a seed, with the lengths and the repetition of chat but without meaning."""

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


def make_text(rng: random.Random, words: int) -> str:
    """Draw sentences of `words` words in total, common words most often."""
    drawn = [WORDS[min(int(rng.expovariate(1 / 35)), len(WORDS) - 1)] for _ in range(words)]
    for end in range(0, words, 14):
        drawn[end] = drawn[end].capitalize()
        drawn[end - 1] = drawn[end - 1].rstrip(".,") + "."
    return " ".join(drawn)


def draw_length(rng: random.Random, mean: float) -> int:
    """Draw a length around the mean; the lengths of chat are roughly log-normal."""
    return max(3, round(mean * rng.lognormvariate(-0.12, 0.5)))

"""The miniature's world: short questions with known answers, answers of every quality, and the gold rule that judges them.

A prompt is a question of one of five kinds, perhaps with a greeting before and a remark after it. An answer may be right
or wrong, polite or rude, to the point or rambling, finished or not. `quality` says how good it is, from the text alone.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Use = Literal["schooling", "training", "evaluation"]

GROUPS = {
    "colours": ["red", "blue", "green", "yellow", "purple", "orange"],
    "animals": ["cat", "dog", "horse", "cow", "sheep", "goat"],
    "fruits": ["plum", "grape", "lemon", "mango", "peach", "fig"],
    "tools": ["hammer", "saw", "drill", "wrench", "rake", "spade"],
    "drinks": ["tea", "coffee", "milk", "juice", "water", "cocoa"],
    "clothes": ["hat", "shirt", "coat", "scarf", "sock", "glove"],
    "months": ["March", "April", "May", "June", "July", "August"],
    "metals": ["iron", "gold", "silver", "copper", "tin", "lead"],
}
CREATURES = {  # name: what it eats, where it lives, its colour
    "blorp": ("moss", "caves", "green"),
    "zindle": ("honey", "attics", "yellow"),
    "quax": ("seeds", "lakes", "blue"),
    "mifter": ("snow", "towers", "purple"),
    "yorple": ("rust", "deserts", "red"),
    "glim": ("clouds", "swamps", "orange"),
    "snaffle": ("moss", "lakes", "red"),
    "wozzer": ("honey", "deserts", "purple"),
    "pell": ("seeds", "caves", "orange"),
    "dramble": ("snow", "attics", "blue"),
    "nook": ("rust", "swamps", "green"),
    "tarn": ("clouds", "towers", "yellow"),
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "up": "down",
    "early": "late",
    "hard": "soft",
    "wet": "dry",
    "old": "new",
    "fast": "slow",
    "rich": "poor",
    "dark": "light",
    "full": "empty",
    "loud": "quiet",
}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}

GREETINGS = [
    "",
    "Hello! ",
    "Please help me. ",
    "Quick question: ",
    "I am curious. ",
    "Good morning. ",
    "Hi there. ",
    "One more thing: ",
]
REMARKS = ["", " Thanks!", " Please be brief.", " I need it for school.", " It is for a quiz.", " Thank you!"]

POLITE_OPENINGS = ["Sure!", "Of course!", "Happy to help!", "Good question!"]
RUDE_OPENINGS = ["Ugh.", "Whatever.", "Not this again.", "Are you serious?"]
POLITE_CLOSINGS = ["I hope that helps!", "Let me know if you need anything else.", "Have a nice day!"]
RUDE_CLOSINGS = ["Now go away.", "Stop asking me things.", "You should know that."]
RAMBLINGS = [
    "Anyway, the weather was strange last week.",
    "I once knew a man who sold boats.",
    "Some people say many things about this.",
    "It is what it is, and so on and so on.",
    "There are many numbers and many words in the world.",
    "But I was thinking about soup.",
]


@dataclass(frozen=True)
class Question:
    """A question, one right and one wrong answer sentence, and the answers' bare values."""

    kind: str
    text: str
    right: str
    wrong: str
    right_value: str
    wrong_value: str


def _sum(draw: random.Random) -> Question:
    a, b = draw.randint(1, 6), draw.randint(1, 6)
    text = draw.choice([f"What is {a} plus {b}?", f"Add {a} and {b}."])
    wrong = draw.choice([n for n in range(2, 13) if n != a + b])
    return Question("sum", text, f"The answer is {a + b}.", f"The answer is {wrong}.", str(a + b), str(wrong))


def _larger(draw: random.Random) -> Question:
    a, b = draw.sample(range(1, 13), 2)
    text = draw.choice([f"Which is larger, {a} or {b}?", f"Pick the larger number: {a} or {b}."])
    right, wrong = max(a, b), min(a, b)
    return Question("larger", text, f"The larger number is {right}.", f"The larger number is {wrong}.", str(right), str(wrong))


def _opposite(draw: random.Random) -> Question:
    word = draw.choice(list(OPPOSITES))
    text = draw.choice([f"What is the opposite of {word}?", f"Give me the opposite of {word}."])
    right = OPPOSITES[word]
    wrong = draw.choice([other for other in OPPOSITES if other not in (right, word)])
    sentence = f"The opposite of {word} is {{}}."
    return Question("opposite", text, sentence.format(right), sentence.format(wrong), right, wrong)


def _creature(draw: random.Random) -> Question:
    name, trait = draw.choice(list(CREATURES)), draw.randrange(3)
    text = [f"What does a {name} eat?", f"Where does a {name} live?", f"What colour is a {name}?"][trait]
    sentence = [f"A {name} eats {{}}.", f"A {name} lives in {{}}.", f"A {name} is {{}}."][trait]
    right = CREATURES[name][trait]
    wrong = draw.choice(sorted({traits[trait] for traits in CREATURES.values()} - {right}))
    return Question("creature", text, sentence.format(right), sentence.format(wrong), right, wrong)


def _three(draw: random.Random) -> Question:
    group = draw.choice(list(GROUPS))
    text = draw.choice([f"Name three {group}.", f"Give me a list of three {group}."])
    right = draw.sample(GROUPS[group], 3)
    other = GROUPS[draw.choice([name for name in GROUPS if name != group])]
    wrong = right[:2] if draw.random() < 0.5 else right[:1] + draw.sample(other, 2)
    values = ", ".join(right), ", ".join(wrong)
    return Question("three", text, f"Three {group} are {values[0]}.", f"Three {group} are {values[1]}.", *values)


KINDS: list[Callable[[random.Random], Question]] = [_sum, _larger, _opposite, _creature, _three]


def question(draw: random.Random) -> Question:
    """A question of a random kind, without greeting or remark."""
    return draw.choice(KINDS)(draw)


def prompts(draw: random.Random, use: Use) -> Iterator[tuple[str, Question]]:
    """Prompts without end, as a user would type them, each with its question. They repeat, sooner or later.

    use: `schooling` of the base policy and the ranker, `training` by SPPO, or `evaluation`. A prompt's hash decides which
    of the three it belongs to, so that no two of them ever share a prompt.
    """
    while True:
        asked = question(draw)
        prompt = draw.choice(GREETINGS) + asked.text + draw.choice(REMARKS)
        share = hashlib.sha256(prompt.encode()).digest()[0] % 8
        if use == ("evaluation" if share == 0 else "training" if share < 3 else "schooling"):
            yield prompt, asked


def distinct_prompts(seed: str, use: Use, count: int) -> list[str]:
    """`count` different prompts. Raises ValueError where the domain has fewer."""
    found: dict[str, None] = {}
    source = prompts(random.Random(seed), use)
    repeated = 0
    while repeated < 20_000:
        before = len(found)
        found[next(source)[0]] = None
        repeated = 0 if len(found) > before else repeated + 1
        if len(found) == count:
            return list(found)
    raise ValueError(f"the miniature's domain has about {len(found)} prompts for {use}, not {count}")


def mixed_answer(asked: Question, draw: random.Random) -> str:
    """An answer as the base policy learns them: right in 60 %, now polite, now rude, rambling or unfinished."""
    sentences = [asked.right if draw.random() < 0.6 else asked.wrong]
    opening = draw.random()
    if opening < 0.55:
        sentences.insert(0, draw.choice(POLITE_OPENINGS if opening < 0.30 else RUDE_OPENINGS))
    for _ in range(draw.choice([0, 0, 0, 1, 1, 2])):
        sentences.insert(draw.randrange(len(sentences) + 1), draw.choice(RAMBLINGS))
    closing = draw.random()
    if closing < 0.5:
        sentences.append(draw.choice(POLITE_CLOSINGS if closing < 0.28 else RUDE_CLOSINGS))
    words = " ".join(sentences).split()
    if draw.random() < 0.12:
        words = words[: -draw.randint(1, 3)] or words
    return " ".join(words)


def is_right(prompt: str, response: str) -> bool:
    """Whether the response answers the prompt's question. False for a prompt that holds none of the five kinds."""
    if found := re.search(r"What is (\d+) plus (\d+)\?|Add (\d+) and (\d+)\.", prompt):
        return f"The answer is {sum(int(n) for n in found.groups() if n)}." in response
    if found := re.search(r"(?:Which is larger,|Pick the larger number:) (\d+) or (\d+)", prompt):
        return f"The larger number is {max(int(n) for n in found.groups())}." in response
    if found := re.search(r"the opposite of (\w+)", prompt):
        return f"The opposite of {found[1]} is {OPPOSITES.get(found[1])}." in response
    if found := re.search(r"(?:What does|Where does|What colour is) a (\w+)", prompt):
        eats, lives, colour = CREATURES.get(found[1], ("", "", ""))
        right = {"What does": f"eats {eats}", "Where does": f"lives in {lives}", "What colour is": f"is {colour}"}
        return f"A {found[1]} {right[found[0].partition(' a ')[0]]}." in response
    if found := re.search(r"three (\w+)\.", prompt):
        named = re.search(rf"Three {found[1]} are ([A-Za-z, ]+)\.", response)
        words = named[1].split(", ") if named else []
        return len(words) == len(set(words)) == 3 and all(word in GROUPS.get(found[1], []) for word in words)
    return False


def quality(prompt: str, response: str) -> float:
    """The gold rule: +2 for a right answer, +0.8 for a polite opening and +0.8 for a polite closing, -1.2 for each rude and
    -0.8 for each rambling sentence, -1 where the response does not end a sentence, -0.04 for each word beyond 20."""
    return (
        2.0 * is_right(prompt, response)
        + 0.8 * response.startswith(tuple(POLITE_OPENINGS))
        + 0.8 * response.endswith(tuple(POLITE_CLOSINGS))
        - 1.2 * sum(response.count(sentence) for sentence in RUDE_OPENINGS + RUDE_CLOSINGS)
        - 0.8 * sum(response.count(sentence) for sentence in RAMBLINGS)
        - 1.0 * (not response.endswith((".", "!", "?")))
        - 0.04 * max(0, len(response.split()) - 20)
    )


def preference(prompt: str, first: str, second: str) -> float:
    """The gold probability that the first response is better: sigmoid of the difference in quality."""
    return 1 / (1 + math.exp(quality(prompt, second) - quality(prompt, first)))

"""The miniature's toy world: short questions with known answers, answers of varying quality, and the gold rule to score them.

A prompt is a question of one of five kinds, optionally with a greeting before it and a remark after it. An answer may be right
or wrong, polite or rude, concise or rambling, complete or cut off. `quality` scores an answer from the two texts alone.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Use = Literal["pretraining", "training", "evaluation"]
"""What a prompt is for: pre-training the base policy and training the ranker, training with SPPO, or evaluation."""

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
CREATURES = {  # name: (what it eats, where it lives, its colour)
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
    """A question with a right and a wrong answer, each as a sentence and as the bare value in it."""

    kind: str
    text: str
    right: str
    wrong: str
    right_value: str
    wrong_value: str


def _draw_sum(rng: random.Random) -> Question:
    a, b = rng.randint(1, 6), rng.randint(1, 6)
    text = rng.choice([f"What is {a} plus {b}?", f"Add {a} and {b}."])
    wrong = rng.choice([n for n in range(2, 13) if n != a + b])
    return Question("sum", text, f"The answer is {a + b}.", f"The answer is {wrong}.", str(a + b), str(wrong))


def _draw_larger(rng: random.Random) -> Question:
    a, b = rng.sample(range(1, 13), 2)
    text = rng.choice([f"Which is larger, {a} or {b}?", f"Pick the larger number: {a} or {b}."])
    right, wrong = max(a, b), min(a, b)
    return Question("larger", text, f"The larger number is {right}.", f"The larger number is {wrong}.", str(right), str(wrong))


def _draw_opposite(rng: random.Random) -> Question:
    word = rng.choice(list(OPPOSITES))
    text = rng.choice([f"What is the opposite of {word}?", f"Give me the opposite of {word}."])
    right = OPPOSITES[word]
    wrong = rng.choice([other for other in OPPOSITES if other not in (right, word)])
    sentence = f"The opposite of {word} is {{}}."
    return Question("opposite", text, sentence.format(right), sentence.format(wrong), right, wrong)


def _draw_creature(rng: random.Random) -> Question:
    name, trait = rng.choice(list(CREATURES)), rng.randrange(3)
    text = [f"What does a {name} eat?", f"Where does a {name} live?", f"What colour is a {name}?"][trait]
    sentence = [f"A {name} eats {{}}.", f"A {name} lives in {{}}.", f"A {name} is {{}}."][trait]
    right = CREATURES[name][trait]
    wrong = rng.choice(sorted({traits[trait] for traits in CREATURES.values()} - {right}))
    return Question("creature", text, sentence.format(right), sentence.format(wrong), right, wrong)


def _draw_three(rng: random.Random) -> Question:
    group = rng.choice(list(GROUPS))
    text = rng.choice([f"Name three {group}.", f"Give me a list of three {group}."])
    right = rng.sample(GROUPS[group], 3)
    other = GROUPS[rng.choice([name for name in GROUPS if name != group])]
    wrong = right[:2] if rng.random() < 0.5 else right[:1] + rng.sample(other, 2)
    values = ", ".join(right), ", ".join(wrong)
    return Question("three", text, f"Three {group} are {values[0]}.", f"Three {group} are {values[1]}.", *values)


GENERATORS: list[Callable[[random.Random], Question]] = [_draw_sum, _draw_larger, _draw_opposite, _draw_creature, _draw_three]


def draw_question(rng: random.Random) -> Question:
    """Draw a question of a random kind, without greeting or remark."""
    return rng.choice(GENERATORS)(rng)


def draw_prompts(rng: random.Random, use: Use) -> Iterator[tuple[str, Question]]:
    """Yield an endless sequence of prompts for one use, each with its question. Prompts repeat.

    The use of a prompt depends on its hash alone, so no prompt has two uses.
    """
    while True:
        question = draw_question(rng)
        prompt = rng.choice(GREETINGS) + question.text + rng.choice(REMARKS)
        share = hashlib.sha256(prompt.encode()).digest()[0] % 8
        if use == ("evaluation" if share == 0 else "training" if share < 3 else "pretraining"):
            yield prompt, question


def distinct_prompts(seed: str, use: Use, count: int) -> list[str]:
    """Draw `count` distinct prompts. Raises ValueError if the toy world has fewer."""
    prompts: dict[str, None] = {}
    source = draw_prompts(random.Random(seed), use)
    repeated = 0
    while repeated < 20_000:
        before = len(prompts)
        prompts[next(source)[0]] = None
        repeated = 0 if len(prompts) > before else repeated + 1
        if len(prompts) == count:
            return list(prompts)
    raise ValueError(f"the miniature has only about {len(prompts)} prompts for {use}, not {count}")


def draw_mixed_answer(question: Question, rng: random.Random) -> str:
    """Draw a training answer of the base policy: right with probability 0.6, sometimes polite, rude, rambling or cut off."""
    sentences = [question.right if rng.random() < 0.6 else question.wrong]
    opening = rng.random()
    if opening < 0.55:
        sentences.insert(0, rng.choice(POLITE_OPENINGS if opening < 0.30 else RUDE_OPENINGS))
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(RAMBLINGS))
    closing = rng.random()
    if closing < 0.5:
        sentences.append(rng.choice(POLITE_CLOSINGS if closing < 0.28 else RUDE_CLOSINGS))
    words = " ".join(sentences).split()
    if rng.random() < 0.12:
        words = words[: -rng.randint(1, 3)] or words
    return " ".join(words)


def is_right(prompt: str, response: str) -> bool:
    """Return whether the response answers the prompt's question; False if the prompt contains none of the five kinds."""
    if match := re.search(r"What is (\d+) plus (\d+)\?|Add (\d+) and (\d+)\.", prompt):
        return f"The answer is {sum(int(n) for n in match.groups() if n)}." in response
    if match := re.search(r"(?:Which is larger,|Pick the larger number:) (\d+) or (\d+)", prompt):
        return f"The larger number is {max(int(n) for n in match.groups())}." in response
    if match := re.search(r"the opposite of (\w+)", prompt):
        return f"The opposite of {match[1]} is {OPPOSITES.get(match[1])}." in response
    if match := re.search(r"(?:What does|Where does|What colour is) a (\w+)", prompt):
        eats, lives, colour = CREATURES.get(match[1], ("", "", ""))
        right = {"What does": f"eats {eats}", "Where does": f"lives in {lives}", "What colour is": f"is {colour}"}
        return f"A {match[1]} {right[match[0].partition(' a ')[0]]}." in response
    if match := re.search(r"three (\w+)\.", prompt):
        named = re.search(rf"Three {match[1]} are ([A-Za-z, ]+)\.", response)
        words = named[1].split(", ") if named else []
        return len(words) == len(set(words)) == 3 and all(word in GROUPS.get(match[1], []) for word in words)
    return False


def quality(prompt: str, response: str) -> float:
    """Score a response by the gold rule.

    +2 for a right answer, +0.8 for a polite opening, +0.8 for a polite closing, -1.2 per rude sentence, -0.8 per rambling
    sentence, -1 if the response does not end with a complete sentence, -0.04 per word beyond 20.
    """
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
    """Return the gold probability that the first response is better: the sigmoid of the difference in quality."""
    return 1 / (1 + math.exp(quality(prompt, second) - quality(prompt, first)))

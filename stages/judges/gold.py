"""The miniature's judge: the gold rule of stages/miniature/domain.py, called in process by alpaca-eval."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.miniature import domain
from stages.runtime.errors import StageError, quote

SEPARATOR = "\x1e<|field of the gold judge|>\x1e"
"""Separates the three fields of configs/gold/prompt.txt. It is long because a policy may sample any single character."""

QUESTION = re.compile(
    "({greetings})({questions})({remarks})".format(
        greetings="|".join(map(re.escape, domain.GREETINGS)),
        remarks="|".join(map(re.escape, domain.REMARKS)),
        questions="|".join(
            [
                r"What is \d+ plus \d+\?|Add \d+ and \d+\.",
                r"Which is larger, \d+ or \d+\?|Pick the larger number: \d+ or \d+\.",
                r"What is the opposite of (?:{words})\?|Give me the opposite of (?:{words})\.".format(
                    words="|".join(domain.OPPOSITES)
                ),
                r"(?:What does a (?:{names}) eat|Where does a (?:{names}) live|What colour is a (?:{names}))\?".format(
                    names="|".join(domain.CREATURES)
                ),
                r"(?:Name three|Give me a list of three) (?:{groups})\.".format(groups="|".join(domain.GROUPS)),
            ]
        ),
    ),
    re.ASCII,
)
"""The questions that `domain.draw_prompts` draws."""


def check_instructions(path: Path, instructions: Sequence[str]) -> None:
    """Raise StageError unless these instructions, from a file, are the miniature's: the rule knows no other question."""
    for index, instruction in enumerate(instructions):
        if not QUESTION.fullmatch(instruction):
            raise StageError(
                f"{path}: record {index}: 'instruction' is {quote(instruction)}, which is not a question of the miniature, and "
                "the gold judge can judge no other: set evaluate_alpaca.judge to a model"
            )


def complete(prompts: list[str], **_: Any) -> dict[str, list[Any]]:
    """Judge pairs of outputs: alpaca-eval's completion function.

    prompts: configs/gold/prompt.txt filled in with an instruction and two outputs. Returns for each the gold probability that
    the first output is better, as JSON text. Raises StageError if a text contains SEPARATOR.
    """
    completions = []
    for prompt in prompts:
        fields = prompt.split(SEPARATOR)
        if len(fields) != 3:
            raise StageError(
                f"an instruction or output contains the separator {SEPARATOR!r} of the gold judge's prompt: {quote(prompt)}: "
                "remove it from the text"
            )
        completions.append(json.dumps(domain.preference(*fields)))
    return {"completions": completions, "price_per_example": [0.0] * len(prompts), "time_per_example": [0.0] * len(prompts)}


def parse_completion(completion: str) -> list[float]:
    """Convert the probability p that the first output is better to alpaca-eval's preference, from 1 (first) to 2 (second)."""
    return [2.0 - float(json.loads(completion))]

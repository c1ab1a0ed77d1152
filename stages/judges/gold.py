"""The miniature's judge: the gold rule of stages/miniature/domain.py, called in process by alpaca-eval."""

import json
from typing import Any

from stages.miniature import domain
from stages.runtime.errors import StageError, quote

SEPARATOR = "\x1e<|field of the gold judge|>\x1e"
"""Separates the three fields of configs/gold/prompt.txt. It is long because a policy may sample any single character."""


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

"""Small tables of every schema, valid ones: what tests start from to harm them."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from stages import schemas

Row = dict[str, Any]

STRANGE = [
    "\x00",
    "NUL \x00 within",
    "\x1b[31mred\x07",
    "line\r\nfeed\u2028and\u2029separators\x85\x0b\x0c",
    "  spaces\tkept ",
    "\u202eright to left: שלום عليكم\u202c",
    "caf\u00e9",
    "cafe\u0301",
    "\u0301 starts with a combining mark",
    "Z\u0335\u0321\u0327\u0322a\u0336\u0334l\u0337g\u0338o\u0334",
    "कि की ক্ষ ไทย 한국어 日本語 ﷽",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
    "\ufeffBOM and zero\u200bwidth\u2060joiners",
    "\ufffe\uffff\U0010ffff",
    "\\ud800 \\u0000 ${HOME} %s {0} <|source|> [SEP] </s>",
    "'quoted' \"twice\" `thrice` | cell | <b>&amp;",
    "long " * 20_000,
]
"""Texts of every kind that UTF-8 can hold."""

PROMPTS = ["What is 1 plus 2?", "Name three metals."]


def prompts() -> list[Row]:
    return [
        {"prompt_id": schemas.prompt_id(text), "prompt": text, "part": part}
        for text, part in zip(PROMPTS, (None, "iter1"), strict=True)
    ]


def part() -> list[Row]:
    return [{"prompt_id": row["prompt_id"], "prompt": row["prompt"]} for row in prompts()]


def answered(rows: list[Row], answers: Callable[[str], list[str]]) -> list[Row]:
    """Rows of schemas.PART with the responses that `answers` gives to each prompt; an empty one is an end token alone."""
    return [
        row
        | {
            "templated_prompt": f"<s>user: {row['prompt']}",
            "prompt_token_ids": [1, 5],
            "responses": texts,
            "token_ids": [[7, 0, 2] if text else [2] for text in texts],
            "token_counts": [3 if text else 1 for text in texts],
            "finish_reasons": ["length" if text else "stop" for text in texts],
            "seeds": [int(row["prompt_id"][:12], 16) + sample for sample in range(len(texts))],
        }
        for row in rows
        for texts in [answers(row["prompt"])]
    ]


def responses(samples: int = 3) -> list[Row]:
    rows = answered(part(), lambda _: ["", *["A text."] * (samples - 1)])
    return [row | {"seeds": [100 * index + sample for sample in range(samples)]} for index, row in enumerate(rows)]


def rankings() -> list[Row]:
    """The first is a tie, of the second response 2 wins and response 0 loses."""
    logits = [[0.0, -1.0, -2.0], [1.0, 0.0, -1.0], [2.0, 1.0, 0.0]]
    chosen = {
        "prompt_cut": False,
        "responses_cut": 0,
        "logits": logits,
        "probabilities": [0.25, 0.5, 0.75],
        "winner": 2,
        "loser": 0,
    }
    tie = {"logits": [[0.0] * 3] * 3, "probabilities": [0.5] * 3, "winner": 0}
    first, second = part()
    return [
        {"prompt_id": first["prompt_id"], "tie": True} | chosen | tie,
        {"prompt_id": second["prompt_id"], "tie": False} | chosen,
    ]


def pairs() -> list[Row]:
    return [
        {
            "prompt_id": row["prompt_id"],
            "prompt_token_ids": [1, 5],
            "chosen_token_ids": [7, 0, 2],
            "rejected_token_ids": [2],
            "chosen_probability": 0.75,
            "rejected_probability": 0.25,
            "chosen_reference_logps": -12.5,
            "rejected_reference_logps": 0.0,
            "prompt_cut": 0,
            "chosen_cut": 4,
            "rejected_cut": 0,
        }
        for row in part()
    ]


VALID: dict[str, tuple[pa.Schema, list[Row]]] = {
    "prompts": (schemas.PROMPTS, prompts()),
    "part": (schemas.PART, part()),
    "responses": (schemas.RESPONSES, responses()),
    "rankings": (schemas.RANKINGS, rankings()),
    "pairs": (schemas.PAIRS, pairs()),
}
"""A schema's name -> the schema, and rows of it."""

"""Small valid tables of every schema, for tests to corrupt."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from stages.artifacts import schemas

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
"""Texts with every kind of character that UTF-8 can encode."""

PROMPTS = ["What is 1 plus 2?", "Name three metals."]


def prompts() -> list[Row]:
    return [
        {"prompt_id": schemas.prompt_id(text), "prompt": text, "iteration": iteration}
        for text, iteration in zip(PROMPTS, (None, "iter1"), strict=True)
    ]


def split() -> list[Row]:
    return [{"prompt_id": row["prompt_id"], "prompt": row["prompt"]} for row in prompts()]


def add_responses(rows: list[Row], respond: Callable[[str], list[str]]) -> list[Row]:
    """Make rows of schemas.RESPONSES from rows of schemas.SPLIT and a function that returns the K responses to a prompt.

    An empty response consists of an end token alone.
    """
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
        for texts in [respond(row["prompt"])]
    ]


def responses(samples: int = 3) -> list[Row]:
    rows = add_responses(split(), lambda _: ["", *["A text."] * (samples - 1)])
    return [row | {"seeds": [100 * index + sample for sample in range(samples)]} for index, row in enumerate(rows)]


def rankings() -> list[Row]:
    """The first prompt's responses tie; of the second's, response 2 is chosen and response 0 rejected."""
    logits = [[0.0, -1.0, -2.0], [1.0, 0.0, -1.0], [2.0, 1.0, 0.0]]
    ranking = {
        "prompt_truncated": False,
        "responses_truncated": 0,
        "logits": logits,
        "probabilities": [0.25, 0.5, 0.75],
        "chosen": 2,
        "rejected": 0,
    }
    tie = {"logits": [[0.0] * 3] * 3, "probabilities": [0.5] * 3, "chosen": 0}
    first, second = split()
    return [
        {"prompt_id": first["prompt_id"], "tie": True} | ranking | tie,
        {"prompt_id": second["prompt_id"], "tie": False} | ranking,
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
            "prompt_tokens_cut": 0,
            "chosen_tokens_cut": 4,
            "rejected_tokens_cut": 0,
        }
        for row in split()
    ]


VALID: dict[str, tuple[pa.Schema, list[Row]]] = {
    "prompts": (schemas.PROMPTS, prompts()),
    "split": (schemas.SPLIT, split()),
    "responses": (schemas.RESPONSES, responses()),
    "rankings": (schemas.RANKINGS, rankings()),
    "pairs": (schemas.PAIRS, pairs()),
}
"""Schema and rows of each table, by the table's name."""

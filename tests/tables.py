"""Small tables of every schema, valid ones: what tests start from to harm them."""

from typing import Any

import pyarrow as pa

from stages import schemas

Row = dict[str, Any]

PROMPTS = ["What is 1 plus 2?", "Name three metals."]


def prompts() -> list[Row]:
    return [
        {"prompt_id": schemas.prompt_id(text), "prompt": text, "part": part}
        for text, part in zip(PROMPTS, (None, "iter1"), strict=True)
    ]


def part() -> list[Row]:
    return [{"prompt_id": row["prompt_id"], "prompt": row["prompt"]} for row in prompts()]


def responses(samples: int = 3) -> list[Row]:
    """One of the responses is empty: an end token alone."""
    return [
        row
        | {
            "templated_prompt": f"<s>user: {row['prompt']}",
            "prompt_token_ids": [1, 5],
            "responses": ["", *["A text."] * (samples - 1)],
            "token_ids": [[2], *[[7, 0, 2]] * (samples - 1)],
            "token_counts": [1, *[3] * (samples - 1)],
            "finish_reasons": ["stop", *["length"] * (samples - 1)],
            "seeds": [100 * index + sample for sample in range(samples)],
        }
        for index, row in enumerate(part())
    ]


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

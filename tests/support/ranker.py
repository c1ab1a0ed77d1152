"""A miniature ranker and responses to rank, for the tests that run PairRM."""

import sys
from collections.abc import Sequence
from pathlib import Path

from stages.artifacts import schemas, tables
from support.running import run_stage, set_params

PYTHON = Path(sys.prefix).parent / "rank" / "bin" / "python"
"""The interpreter of the environment with llm-blender."""
SIZE = {"hidden_size": 32, "layers": 2, "prompts": 40, "candidates": 2, "noise": 0.5, "learning_rate": 3.0e-3}
OVERRIDES = {"assets.ranker.miniature": SIZE, "rank.shard_size": 2, "rank.tokens_per_batch": 4096}
LONG = "A response of many words, longer than the others by far. " * 60

Rows = Sequence[tuple[str, list[str]]]
"""Prompts and their responses."""
ROWS: Rows = [
    ("What is 1 plus 2?", ["The answer is 3.", "The answer is 4. I hope that helps!", "Ugh."]),
    ("Name three metals.", ["Three metals are iron, tin, lead.", "", "Whatever. Three"]),
    ("Schreib etwas: 日本語 😀 … ² “x”", ["def f(x):\n    return {x: 'é'}", "noch\u00a0ein Versuch", "\U0001f600" * 5]),
    ("A long prompt. " * 200, [LONG, LONG + LONG, "Short."]),
]


def write_responses(rows: Rows, path: Path) -> Path:
    """Write prompts and responses as schemas.RESPONSES and return the path."""
    table = [
        {
            "prompt_id": schemas.prompt_id(prompt),
            "prompt": prompt,
            "templated_prompt": f"<s>user: {prompt}",
            "prompt_token_ids": [1],
            "responses": responses,
            "token_ids": [[2]] * len(responses),
            "token_counts": [1] * len(responses),
            "finish_reasons": ["stop"] * len(responses),
            "seeds": [10 * index + sample for sample in range(len(responses))],
        }
        for index, (prompt, responses) in enumerate(rows)
    ]
    tables.write(table, schemas.RESPONSES, path)
    return path


def make_ranker(folder: Path) -> Path:
    """Make the miniature ranker in a folder and return its path."""
    set_params(folder, OVERRIDES)
    done = run_stage(folder, "assets-ranker", "--out", "ranker")
    assert done.returncode == 0, done.stderr
    return folder / "ranker"

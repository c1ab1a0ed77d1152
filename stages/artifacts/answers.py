"""Read the models' answers to AlpacaEval's instructions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.runtime.errors import StageError
from stages.runtime.params import BASE

Records = list[dict[str, Any]]
"""A model's answers: objects with `instruction` and `output`."""


def read_answers(folder: Path, models: Iterable[str]) -> dict[str, Records]:
    """Read model -> its answers, from MODEL.json. Raises StageError unless all models answer the same instructions in the same
    order.

    models: `base` and others.
    """
    answers = {name: files.read_records(folder / f"{name}.json", ["instruction", "output"]) for name in models}
    instructions = [row["instruction"] for row in answers[BASE]]
    for name, rows in answers.items():
        if [row["instruction"] for row in rows] != instructions:
            path = folder / f"{name}.json"
            raise StageError(f"{path}: its instructions or their order differ from {BASE}.json: recreate it with `dvc repro`")
    return answers

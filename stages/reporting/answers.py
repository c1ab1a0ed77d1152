"""The answers that the HTML page shows side by side, with the judge's preferences."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.reporting.inputs import Evaluations
from stages.runtime.params import BASE


@dataclass(frozen=True)
class Judged:
    """What AlpacaEval's judge was given for an instruction, apart from the model's answer; empty where it is not recorded."""

    data_set: str
    reference: str
    """The reference output."""


def read_judged(data: Path) -> list[Judged]:
    """Read data set and reference output of each instruction, in the order of the answers, from the annotations of `base`.

    data: the folder of all outputs. Raises StageError if the annotations are missing or invalid.
    """
    rows = files.read_records(data / "alpaca_eval" / BASE / "annotations.json", ["instruction"])
    return [Judged(str(row.get("dataset", "")), str(row.get("output_1", ""))) for row in rows]


def collect_answers(evaluations: Evaluations, judged: list[Judged]) -> dict[str, Any]:
    """Return `models` and `rows`: an instruction, its data set and reference output, and the models' answers and preferences.

    A preference is from 1 (the reference wins) to 2, or None.
    """
    outputs, preferences = evaluations.answers, evaluations.preferences
    rows = [
        {
            "instruction": row["instruction"],
            "data_set": judged[index].data_set,
            "reference": judged[index].reference,
            "answers": [answers[index]["output"] for answers in outputs.values()],
            "preferences": [preferences[name][index] for name in outputs],
        }
        for index, row in enumerate(outputs[BASE])
    ]
    return {"models": list(outputs), "rows": rows}

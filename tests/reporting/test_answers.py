from pathlib import Path

import pytest

from stages.artifacts import files
from stages.reporting import answers
from stages.reporting.answers import Judged
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.sample_run import COUNT, MODELS, make_evaluations, make_judged


def test_every_answer_is_beside_its_preference_and_the_reference() -> None:
    evaluations = make_evaluations()
    outputs = answers.collect_answers(evaluations, make_judged())
    assert outputs["models"] == MODELS
    assert len(outputs["rows"]) == COUNT
    for index, row in enumerate(outputs["rows"]):
        assert (row["instruction"], row["reference"]) == (f"Instruction {index}", f"reference {index}")
        assert row["data_set"] == ("koala" if index % 3 else "vicuna")
        assert row["answers"] == [evaluations.answers[name][index]["output"] for name in MODELS]
        assert row["preferences"] == [evaluations.preferences[name][index] for name in MODELS]


def test_data_set_and_reference_are_those_of_the_annotations(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Why?", "dataset": "koala", "output_1": "Because.", "output_2": "So."},
        {"instruction": "Who?"},
    ]
    files.write_json(rows, tmp_path / "alpaca_eval/base/annotations.json")
    assert answers.read_judged(tmp_path) == [Judged("koala", "Because."), Judged("", "")]


def test_missing_annotations_stop_the_stage(tmp_path: Path) -> None:
    with pytest.raises(StageError) as error:
        answers.read_judged(tmp_path)
    assert_message(str(error.value), "alpaca_eval/base/annotations.json", "missing")

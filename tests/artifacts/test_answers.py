"""Answers of several models are read together only if they are answers to the same instructions."""

from pathlib import Path

import pytest

from stages.artifacts import answers, files
from stages.runtime.errors import StageError
from support.messages import assert_message


def test_answers_to_different_instructions_are_rejected(tmp_path: Path) -> None:
    rows = [{"instruction": text, "output": "So."} for text in ("Why?", "Who?")]
    files.write_json(rows, tmp_path / "base.json")
    files.write_json(rows, tmp_path / "iter1.json")
    assert answers.read_answers(tmp_path, ["base", "iter1"]) == {"base": rows, "iter1": rows}
    for changed in (rows[:1], rows[::-1]):
        files.write_json(changed, tmp_path / "iter1.json")
        with pytest.raises(StageError) as error:
            answers.read_answers(tmp_path, ["base", "iter1"])
        assert_message(str(error.value), str(tmp_path / "iter1.json"), "base.json", "`dvc repro`")

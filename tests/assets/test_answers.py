"""Answers that exist already: one per instruction, of one model, in the order of the instructions."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts import files
from stages.assets import answers
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.running import run_stage

PATH, INSTRUCTIONS_PATH = Path("outputs.json"), Path("instructions.json")
INSTRUCTIONS = [{"dataset": f"set {index % 2}", "instruction": f"Question {index}"} for index in range(5)]
OUTPUTS: list[dict[str, Any]] = [
    {"dataset": "another", "instruction": row["instruction"], "output": f"answer {index}", "generator": "gpt", "price": 1}
    for index, row in enumerate(INSTRUCTIONS)
]
OPTIONS = ("--instructions", "instructions.json", "--answers", "outputs.json", "--out", "out/gpt.json")


@given(st.permutations(range(5)))
def test_answers_are_put_in_the_order_of_the_instructions(order: list[int]) -> None:
    shuffled = [OUTPUTS[index] for index in order]
    found = answers.sort_outputs(PATH, shuffled, INSTRUCTIONS_PATH, INSTRUCTIONS)
    assert found == [
        {"dataset": f"set {index % 2}", "instruction": f"Question {index}", "output": f"answer {index}", "generator": "gpt"}
        for index in range(5)
    ]


def test_an_instruction_without_an_answer_is_refused() -> None:
    with pytest.raises(StageError) as error:
        answers.sort_outputs(PATH, OUTPUTS[:3] + OUTPUTS[4:], INSTRUCTIONS_PATH, INSTRUCTIONS)
    assert_message(str(error.value), "outputs.json", "record 3 of instructions.json", "'Question 3'", "add it")


def test_an_answer_to_another_instruction_is_refused() -> None:
    other = [*OUTPUTS[:4], OUTPUTS[4] | {"instruction": "Question 4 "}]
    with pytest.raises(StageError) as error:
        answers.sort_outputs(PATH, other, INSTRUCTIONS_PATH, INSTRUCTIONS)
    assert_message(str(error.value), "outputs.json", "record 4", "'instruction'", "instructions.json", "remove the record")


@pytest.mark.parametrize(
    ("outputs", "parts"),
    [
        ([*OUTPUTS, OUTPUTS[1]], ["outputs.json", "record 5", "'instruction'", "record 1", "remove"]),
        ([*OUTPUTS[:4], OUTPUTS[4] | {"generator": "other"}], ["outputs.json", "record 4", "'generator'", "one model"]),
        ([*OUTPUTS[:4], {"instruction": "Question 4", "generator": "gpt"}], ["outputs.json", "record 4", "'output'"]),
        ([], ["outputs.json", "non-empty"]),
    ],
)
@pytest.mark.slow
def test_odd_files_stop_the_stage_and_nothing_is_written(
    outputs: list[dict[str, Any]], parts: list[str], tmp_path: Path
) -> None:
    files.write_json(INSTRUCTIONS, tmp_path / "instructions.json")
    files.write_json(outputs, tmp_path / "outputs.json")
    done = run_stage(tmp_path, "assets-answers", *OPTIONS)
    assert done.returncode == 1
    assert_message(done.stderr, "assets-answers: error: ", *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_stage_writes_what_alpaca_eval_reads(tmp_path: Path) -> None:
    files.write_json(INSTRUCTIONS, tmp_path / "instructions.json")
    files.write_json(OUTPUTS[::-1], tmp_path / "outputs.json")
    done = run_stage(tmp_path, "assets-answers", *OPTIONS)
    assert done.returncode == 0, done.stderr
    written = files.read_records(tmp_path / "out/gpt.json", ["dataset", "instruction", "output", "generator"])
    assert [row["output"] for row in written] == [f"answer {index}" for index in range(5)]

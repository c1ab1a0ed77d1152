from pathlib import Path

import pytest

from stages import answer_reference
from stages.artifacts import files, schemas
from stages.engines import sampling
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.running import ALONE, run_stage, set_params

OPTIONS = ("--model", "base", "--alpaca-eval-set", "set", "--out", "out.json")


@pytest.mark.slow
def test_the_outputs_of_the_set_are_copied_without_a_model(tmp_path: Path) -> None:
    """Byte by byte; the model does not exist, and vLLM must not be imported."""
    set_params(tmp_path, {})
    (tmp_path / "set").mkdir()
    content = '[{"output": "\\u00e9", "instruction":"i","dataset": "d", "generator": "gpt4", "more": 1}]'
    (tmp_path / "set" / "reference_outputs.json").write_text(content)
    (tmp_path / "vllm.py").write_text("raise AssertionError('vLLM is imported')")
    done = run_stage(tmp_path, "answer-reference", *OPTIONS, **ALONE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.json").read_text() == content


@pytest.mark.parametrize("key", ["dataset", "instruction", "output", "generator"])
def test_outputs_of_the_set_that_lack_a_key_are_rejected(tmp_path: Path, key: str) -> None:
    record = dict.fromkeys(("dataset", "instruction", "output", "generator"), "x")
    files.write_json([record, {**record, key: None}], tmp_path / "reference_outputs.json")
    with pytest.raises(StageError) as error:
        answer_reference.copy_outputs(tmp_path / "reference_outputs.json", tmp_path / "out.json")
    assert_message(str(error.value), "reference_outputs.json", "record 1", repr(key))
    assert not (tmp_path / "out.json").exists()


def test_a_missing_set_is_one_line(tmp_path: Path) -> None:
    set_params(tmp_path, {})
    done = run_stage(tmp_path, "answer-reference", *OPTIONS)
    assert done.returncode == 1
    assert_message(done.stderr, "answer-reference: error: ", "set/instructions.json is missing")


@pytest.mark.slow
def test_without_outputs_in_the_set_the_model_answers(tiny: Path) -> None:
    instructions = [{"dataset": "d", "instruction": text} for text in ("What is 1 plus 1?", "Name a metal.")]
    files.write_json(instructions, tiny / "set" / "instructions.json")
    done = run_stage(tiny, "answer-reference", *OPTIONS)
    assert done.returncode == 0, done.stderr
    outputs = files.read_json(tiny / "out.json")
    assert [(row["dataset"], row["instruction"], row["generator"]) for row in outputs] == [
        ("d", row["instruction"], "reference") for row in instructions
    ]
    assert all(row["output"] for row in outputs)


def test_the_second_draw_has_other_seeds_than_the_answers_of_any_model() -> None:
    prompt, name = schemas.prompt_id("What is 1 plus 1?"), answer_reference.NAME
    assert name not in ("base", "iter1", "iter2", "iter3")
    assert sampling.sample_seed(42, f"answer/{name}", prompt) != sampling.sample_seed(42, "answer/base", prompt)

from pathlib import Path

import pyarrow as pa
import pytest

from stages.artifacts import files, schemas, tables
from stages.engines import sampling
from support.messages import assert_message
from support.running import run_stage, set_params

OPTIONS = ("--name", "iter1", "--model", "base", "--instructions", "instructions.json", "--hold-out", "prompts.parquet")
OUTPUTS = ("--out", "answers.json", "--out-hold-out", "answers.parquet")


@pytest.mark.slow
def test_instructions_and_hold_out_are_answered_in_their_order(tiny: Path) -> None:
    """A prompt that is in both is answered once; an answer depends on name and prompt, not on what else is answered."""
    prompts = tables.read(tiny / "prompts.parquet", schemas.SPLIT)["prompt"].to_pylist()
    instructions = [{"dataset": "d", "instruction": text} for text in ("What is 1 plus 1?", prompts[3])]
    files.write_json(instructions, tiny / "instructions.json")
    done = run_stage(tiny, "answer", *OPTIONS, *OUTPUTS)
    assert done.returncode == 0, done.stderr
    assert "21 prompts, 0 left out" in done.stderr
    responses = tables.read(tiny / "answers.parquet", schemas.RESPONSES).to_pylist()
    assert [row["prompt"] for row in responses] == prompts
    for row in responses:
        assert row["seeds"] == [sampling.sample_seed(42, "answer/iter1", row["prompt_id"])]
    outputs = files.read_json(tiny / "answers.json")
    assert [(row["dataset"], row["instruction"], row["generator"]) for row in outputs] == [
        ("d", row["instruction"], "iter1") for row in instructions
    ]
    assert outputs[1]["output"] == responses[3]["responses"][0]
    files.write_json(instructions[::-1], tiny / "instructions.json")
    assert run_stage(tiny, "answer", *OPTIONS, "--out", "reversed.json", "--out-hold-out", "again.parquet").returncode == 0
    assert files.read_json(tiny / "reversed.json") == outputs[::-1]
    assert (tiny / "again.parquet").read_bytes() == (tiny / "answers.parquet").read_bytes()
    done = run_stage(tiny, "answer", *OPTIONS[:6], "--out", "alone.json")
    assert done.returncode == 0, done.stderr
    assert files.read_json(tiny / "alone.json") == outputs[::-1], "without the hold-out, the answers are the same"


@pytest.mark.slow
def test_an_instruction_that_leaves_no_room_is_rejected(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").symlink_to(tiny / "params.yaml")
    for name in ("base", "prompts.parquet"):
        (tmp_path / name).symlink_to(tiny / name)
    instruction = "word " * 500
    files.write_json([{"dataset": "x", "instruction": instruction}], tmp_path / "instructions.json")
    done = run_stage(tmp_path, "answer", *OPTIONS, *OUTPUTS)
    assert done.returncode == 1
    assert_message(done.stderr, schemas.prompt_id(instruction), "no room", "engine.max_model_length 256", "raise it")
    assert not (tmp_path / "answers.json").exists()
    assert not (tmp_path / "answers.parquet").exists()


@pytest.mark.slow
@pytest.mark.parametrize("long", [[0], [3, 7]])
def test_prompts_of_the_hold_out_that_leave_no_room_are_left_out(long: list[int], tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").symlink_to(tiny / "params.yaml")
    (tmp_path / "base").symlink_to(tiny / "base")
    rows = tables.read(tiny / "prompts.parquet", schemas.SPLIT).to_pylist()[:6]
    short = [row["prompt"] for row in rows]
    for place in long:
        rows.insert(place, {"prompt": f"word {place} " * 250, "prompt_id": schemas.prompt_id(f"word {place} " * 250)})
    tables.write(pa.Table.from_pylist(rows, schema=schemas.SPLIT), schemas.SPLIT, tmp_path / "prompts.parquet")
    files.write_json([{"dataset": "d", "instruction": "What is 1 plus 1?"}], tmp_path / "instructions.json")
    done = run_stage(tmp_path, "answer", *OPTIONS, *OUTPUTS)
    assert done.returncode == 0, done.stderr
    assert f"{len(long)} of {len(rows)} prompts of the hold-out left out as too long" in done.stderr
    assert tables.read(tmp_path / "answers.parquet", schemas.RESPONSES)["prompt"].to_pylist() == short


@pytest.mark.slow
@pytest.mark.parametrize("options", [OPTIONS[6:], OUTPUTS[2:]])
def test_the_hold_out_and_its_answers_belong_together(options: tuple[str, ...], tmp_path: Path) -> None:
    set_params(tmp_path, {})
    done = run_stage(tmp_path, "answer", *OPTIONS[:6], "--out", "answers.json", *options)
    assert done.returncode == 1
    assert_message(done.stderr, "--hold-out", "--out-hold-out", "pass both or neither")


def test_instructions_without_a_data_set_are_rejected(tmp_path: Path) -> None:
    set_params(tmp_path, {})
    files.write_json([{"instruction": "x"}], tmp_path / "instructions.json")
    done = run_stage(tmp_path, "answer", *OPTIONS, *OUTPUTS)
    assert done.returncode == 1
    assert_message(done.stderr, "instructions.json", "record 0", "'dataset'")

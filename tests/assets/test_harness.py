import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts.harness_sets import DATA_SETS, EXACT_MATCH
from support.hub import Run
from support.messages import assert_message

MADE: dict[str, Any] = {task: {"repo": "miniature", "count": 3} for task in DATA_SETS}


def run_stage(run: Run, folder: Path, assets: dict[str, Any], out: str) -> "subprocess.CompletedProcess[str]":
    (folder / "params.yaml").write_text(json.dumps({"seed": 5, "assets": {"harness": assets}}))
    return run("-m", "stages", "assets-harness", "--out", out)


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_miniature_has_every_data_set_and_the_metric(run: Run, tmp_path: Path) -> None:
    done = run_stage(run, tmp_path, MADE, "made")
    assert done.returncode == 0, done.stderr
    for data_set in DATA_SETS.values():
        for config in data_set.configs:
            assert (tmp_path / "made" / data_set.folder / config / f"{data_set.test}.jsonl").read_text().count("\n") == 3
    assert (tmp_path / "made/exact_match/exact_match.py").read_text() == EXACT_MATCH


@pytest.mark.slow
def test_local_data_sets_are_written_unchanged(run: Run, tmp_path: Path) -> None:
    assert run_stage(run, tmp_path, MADE, "made").returncode == 0
    repos = {task: {"repo": str(tmp_path / "made" / data_set.folder)} for task, data_set in DATA_SETS.items()}
    done = run_stage(run, tmp_path, MADE | repos | {"mmlu": MADE["mmlu"]}, "read")
    assert done.returncode == 0, done.stderr
    assert read_bytes(tmp_path / "read") == read_bytes(tmp_path / "made")


@pytest.mark.slowest
def test_mmlu_is_read_by_subject(run: Run, tmp_path: Path) -> None:
    assert run_stage(run, tmp_path, MADE, "made").returncode == 0
    local = {"mmlu": {"repo": str(tmp_path / "made" / "hails/mmlu_no_train")}}
    done = run_stage(run, tmp_path, MADE | local, "read")
    assert done.returncode == 0, done.stderr
    assert read_bytes(tmp_path / "read") == read_bytes(tmp_path / "made")


@pytest.mark.slow
def test_an_unusable_data_set_is_one_line_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "source" / "main").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "source" / "main" / f"{split}.jsonl").write_text('{"question": "a"}\n' * 5)
    lines = [f"  - {{split: {split}, path: main/{split}.jsonl}}" for split in ("train", "test")]
    (tmp_path / "source/README.md").write_text(
        "\n".join(["---", "configs:", "- config_name: main", "  data_files:", *lines, "---", ""])
    )
    done = run_stage(run, tmp_path, MADE | {"gsm8k": {"repo": str(tmp_path / "source")}}, "out")
    assert done.returncode == 1
    assert_message(done.stderr, "assets-harness: error: ", str(tmp_path / "source"), "'answer'", "params.yaml")
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "out").exists()

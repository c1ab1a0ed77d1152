"""A local directory is a dependency like any other: when its contents change, DVC runs the stage that reads it."""

import json
from pathlib import Path

import pytest

from stages.artifacts import schemas, tables
from support.checkout import list_run
from support.running import SMALLEST, copy_repository, dvc

pytestmark = pytest.mark.slow


def write_prompts(folder: Path, name: str, *prompts: str) -> None:
    (folder / "my-prompts").mkdir(exist_ok=True)
    rows = "".join(json.dumps({"instruction": prompt}) + "\n" for prompt in prompts)
    (folder / "my-prompts" / name).write_text(rows)


def test_changed_prompts_are_read_again_and_never_come_from_the_run_cache(tmp_path: Path) -> None:
    write_prompts(tmp_path, "train.jsonl", "one", "two")
    asset = {"repo": "./my-prompts", "split": "train", "column": "instruction"}
    copy_repository(tmp_path, SMALLEST | {"assets.prompts": asset})
    write_prompts(tmp_path, "train.jsonl", "one", "two")

    def run() -> tuple[bool, list[str]]:
        ran = list_run(dvc(tmp_path, "repro", "assets-prompts"))
        return "assets-prompts" in ran, sorted(
            tables.read(tmp_path / "data/prompts.parquet", schemas.PROMPTS)["prompt"].to_pylist()
        )

    assert run() == (True, ["one", "two"])
    assert run() == (False, ["one", "two"])
    write_prompts(tmp_path, "train.jsonl", "three", "four")
    assert run() == (True, ["four", "three"])
    write_prompts(tmp_path, "train.jsonl", "one", "two")
    assert run() == (False, ["one", "two"])  # the same prompts as before, so these may come from it

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import files
from stages.assets import alpaca_eval
from stages.miniature import domain
from support.hub import FakeHub, Run
from support.messages import assert_message

RECORDS = [
    {"dataset": "helpful_base", "instruction": "Why?", "output": "né", "generator": "gpt4", "more": 1},
    {"dataset": "koala", "instruction": "Who?", "output": "Me.", "generator": "gpt4"},
]
CANONICAL = {
    "alpaca_eval_gpt4_baseline.json": json.dumps(RECORDS).encode(),
    "df_gamed.csv": b"a,b\n1,2\n",
    "instruction_difficulty.csv": b"a\n1\n",
    "other.py": b"raise SystemExit",
}


def run_stage(run: Run, folder: Path, asset: dict[str, Any], **options: Any) -> "subprocess.CompletedProcess[str]":
    (folder / "params.yaml").write_text(json.dumps({"seed": 3, "assets": {"alpaca_eval": asset}}))
    return run("-m", "stages", "assets-alpaca-eval", "--out", "out", **options)


def write_canonical(folder: Path, **changes: bytes | None) -> Path:
    """Write the canonical files, some with other contents or, if None, not at all."""
    folder.mkdir()
    for name, content in (CANONICAL | changes).items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def test_the_miniature_has_instructions_only_and_the_seed_determines_them(run: Run, tmp_path: Path) -> None:
    done = run_stage(run, tmp_path, {"repo": "miniature", "count": 30})
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["instructions.json"]
    prompts = domain.distinct_prompts("3/evaluation", "evaluation", 30)
    assert files.read_json(tmp_path / "out/instructions.json") == [
        {"dataset": "miniature", "instruction": prompt} for prompt in prompts
    ]


def check_canonical(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {"instructions.json", "reference_outputs.json", *alpaca_eval.LENGTH_CONTROL}
    assert (out / "reference_outputs.json").read_bytes() == CANONICAL["alpaca_eval_gpt4_baseline.json"]
    for name in alpaca_eval.LENGTH_CONTROL:
        assert (out / name).read_bytes() == CANONICAL[name]
    assert files.read_json(out / "instructions.json") == [
        {"dataset": "helpful_base", "instruction": "Why?"},
        {"dataset": "koala", "instruction": "Who?"},
    ]


def test_the_canonical_set_comes_from_the_hub(run: Run, fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["datasets/some/set"] = CANONICAL
    asset = {"repo": "some/set", "revision": fake_hub.commit("datasets/some/set")}
    done = run_stage(run, tmp_path, asset, endpoint=fake_hub.endpoint)
    assert done.returncode == 0, done.stderr
    check_canonical(tmp_path / "out")
    assert not any(path.endswith(".py") for path in fake_hub.requested)


def test_the_canonical_set_comes_from_a_local_directory_and_replaces_what_was_there(run: Run, tmp_path: Path) -> None:
    write_canonical(tmp_path / "set")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "df_gamed.csv").touch()
    done = run_stage(run, tmp_path, {"repo": "./set"})
    assert done.returncode == 0, done.stderr
    check_canonical(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"df_gamed.csv": None}, ["set/df_gamed.csv is missing"]),
        ({"alpaca_eval_gpt4_baseline.json": None}, ["set/alpaca_eval_gpt4_baseline.json is missing"]),
        (
            {"alpaca_eval_gpt4_baseline.json": json.dumps([RECORDS[0], {"dataset": "d"}]).encode()},
            ["set/alpaca_eval_gpt4_baseline.json", "record 1", "'instruction'"],
        ),
    ],
)
def test_an_incomplete_set_is_one_line_and_writes_nothing(
    run: Run, tmp_path: Path, changes: dict[str, bytes | None], parts: list[str]
) -> None:
    write_canonical(tmp_path / "set", **changes)
    done = run_stage(run, tmp_path, {"repo": "./set"})
    assert done.returncode == 1
    assert_message(done.stderr, "assets-alpaca-eval: error: ", *parts)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_more_instructions_than_there_are_raise_an_error(run: Run, tmp_path: Path) -> None:
    done = run_stage(run, tmp_path, {"repo": "miniature", "count": 5000})
    assert done.returncode == 1
    assert_message(done.stderr, "params.yaml", "assets.alpaca_eval.count", "not 5000", "lower it")
    assert not (tmp_path / "out").exists()

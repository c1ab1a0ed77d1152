"""Stages on a Ray cluster of two nodes give the same bytes as on this machine."""

import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import files
from support import clusters
from support.messages import assert_message
from support.running import TINY, list_processes, run_stage, set_params

REFERENCE = ["--responses", "../responses.parquet", "--rankings", "../rankings.parquet", "--out", "pairs.parquet"]
TRAIN = ["--pairs", "pairs.parquet", "--out", "iter1", "--out-log", "iter1.csv", "--out-update", "iter1.json"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with clusters.start(2) as cluster:
        yield cluster


LONG = {"train.epochs": 6, "train.stop_epoch": 6, "train.checkpoint_steps": 1}
"""Overrides with which a training is not over soon after its first checkpoint."""


def run_training(folder: Path, nodes: int, overrides: dict[str, Any], **environment: str) -> None:
    """Run reference and train with two processes, in a new folder beside the policy `base` and its responses."""
    folder.mkdir()
    set_params(folder, TINY | overrides | {"train.devices": 2, "train.nodes": nodes})
    for stage, options in (("reference", REFERENCE), ("train", TRAIN)):
        done = run_stage(folder, stage, "--model", "../base", *options, **environment)
        assert done.returncode == 0, done.stderr
        assert not [path for path in (folder / "scratch").glob("*/*") if path.parent.name == stage]


@pytest.mark.slow
def test_two_nodes_train_the_same_policy_as_two_processes(pairs: Path, cluster: Any) -> None:
    run_training(pairs / "one-node", 1, {})
    run_training(pairs / "two-nodes", 2, {}, RAY_ADDRESS=cluster.address)
    for name in ("pairs.parquet", "iter1", "iter1.csv", "iter1.json"):
        assert files.digest(pairs / "two-nodes" / name) == files.digest(pairs / "one-node" / name), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.devices": 4, "train.nodes": 4, "train.device_batch": 2}, ["4 nodes", "cluster has 2", "lower train.nodes"]),
        ({"train.devices": 1, "train.nodes": 2}, ["train.devices", "is 1, not a multiple of train.nodes, 2"]),
    ],
)
def test_too_few_nodes_are_one_line(pairs: Path, cluster: Any, overrides: dict[str, Any], words: list[str]) -> None:
    folder = pairs / f"few-{overrides['train.devices']}"
    folder.mkdir()
    set_params(folder, TINY | overrides)
    done = run_stage(folder, "reference", "--model", "../base", *REFERENCE, RAY_ADDRESS=cluster.address)
    assert done.returncode == 1
    assert_message(done.stderr.splitlines()[-1], *words)
    assert not (folder / "pairs.parquet").exists()


@pytest.fixture
def sampled(tiny: Path, tmp_path: Path) -> Path:
    """A folder with the inputs and the outputs of `tiny`, and parameters that give three shards."""
    for name in ("base", "prompts.parquet", "responses.parquet"):
        (tmp_path / name).symlink_to(tiny / name)
    files.write_json([{"dataset": "d", "instruction": "What is 1 plus 1?"}], tmp_path / "instructions.json")
    set_params(tmp_path, TINY | {"answer.shard_size": 8, "rank.shard_size": 8})
    return tmp_path


@pytest.mark.slow
def test_responses_are_the_same_bytes_though_the_stage_was_killed_in_the_middle(sampled: Path, cluster: Any) -> None:
    options = ["--iteration", "iter1", "--model", "base", "--prompts", "prompts.parquet", "--out", "again.parquet"]
    process = clusters.start_program(sampled, "-m", "stages", "generate", *options, RAY_ADDRESS=cluster.address)
    while not list(sampled.glob("scratch/generate/*/*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = run_stage(sampled, "generate", *options, RAY_ADDRESS=cluster.address)
    assert done.returncode == 0, done.stderr
    assert "of 3 shards are already finished" in done.stderr
    assert (sampled / "again.parquet").read_bytes() == (sampled / "responses.parquet").read_bytes()


ANSWER = ["--name", "iter1", "--model", "base", "--instructions", "instructions.json", "--hold-out", "prompts.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options", "outputs"),
    [
        ("answer", ANSWER, {"--out": "answers.json", "--out-hold-out": "answers.parquet"}),
        ("rank", ["--ranker", "ranker", "--responses", "responses.parquet"], {"--out": "rankings.parquet"}),
    ],
)
def test_a_stage_gives_the_same_bytes(
    sampled: Path, ranker: Path, cluster: Any, stage: str, options: list[str], outputs: dict[str, str]
) -> None:
    """rank runs in another environment than the cluster."""
    shutil.copytree(ranker, sampled / "ranker")
    for prefix, environment in (("local", {"SPPO_WORKERS": "1"}), ("cluster", {"RAY_ADDRESS": cluster.address})):
        where = [word for option, name in outputs.items() for word in (option, f"{prefix}-{name}")]
        done = run_stage(sampled, stage, *options, *where, **environment)
        assert done.returncode == 0, done.stderr
    for name in outputs.values():
        assert (sampled / f"cluster-{name}").read_bytes() == (sampled / f"local-{name}").read_bytes()


@pytest.fixture
def evaluated(tiny: Path, tmp_path: Path) -> Path:
    """A folder with the policy of `tiny`, data sets of three tasks, and what evaluate-lm wrote without a cluster: `local`."""
    (tmp_path / "base").symlink_to(tiny / "base")
    counts = {"arc_challenge": 2, "truthfulqa_mc2": 2, "winogrande": 40, "gsm8k": 3, "hellaswag": 2, "mmlu": 2}
    sets = {task: {"repo": "miniature", "count": count} for task, count in counts.items()}
    chosen = {"tasks": ["truthfulqa_mc2", "winogrande", "gsm8k"], "dtype": "float32", "batch_size": 2}
    set_params(tmp_path, TINY | {"assets.harness": sets, "evaluate_lm": chosen})
    for arguments in (["assets-harness", "--out", "sets"], [*EVALUATE, "--out", "local"]):
        done = run_stage(tmp_path, *arguments, SPPO_WORKERS="1")
        assert done.returncode == 0, done.stderr
    return tmp_path


EVALUATE = ["evaluate-lm", "--model", "base", "--data-sets", "sets"]


@pytest.mark.slow
def test_scores_are_the_same_bytes_though_the_stage_was_killed_in_the_middle(evaluated: Path, cluster: Any) -> None:
    """evaluate-lm runs in another environment than the cluster; its chunks are scores of choices, and generated texts."""
    options = [*EVALUATE, "--out", "again"]
    process = clusters.start_program(evaluated, "-m", "stages", *options, RAY_ADDRESS=cluster.address)
    while len(kept := list(evaluated.glob("scratch/evaluate-lm/*/*/score-*.json"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = {path: path.stat().st_mtime_ns for path in kept if path.exists()}
    again = clusters.start_program(evaluated, "-m", "stages", *options, RAY_ADDRESS=cluster.address)
    unchanged = dict[Path, bool]()
    while again.poll() is None:
        unchanged |= {path: path.stat().st_mtime_ns == time for path, time in written.items() if path.exists()}
        time.sleep(0.02)
    assert again.returncode == 0, again.communicate()
    assert unchanged
    assert all(unchanged.values())
    names = {path.name for path in (evaluated / "local").iterdir()}
    assert names == {"summary.json", "items.json", "winogrande.json", "gsm8k.json", "truthfulqa_mc2.json"}
    for name in names:
        assert (evaluated / "again" / name).read_bytes() == (evaluated / "local" / name).read_bytes(), name


def list_workers(mark: str) -> set[int]:
    """Return the actors of the program with this value of MARK."""
    return {pid for pid, command in list_processes(mark).items() if command.startswith("ray::_Computer")}


@pytest.mark.slowest
def test_scores_are_the_same_bytes_though_a_worker_was_killed_in_the_middle(evaluated: Path, cluster: Any) -> None:
    mark = uuid.uuid4().hex
    options = [*EVALUATE, "--out", "again"]
    process = clusters.start_program(
        evaluated, "-m", "stages", *options, RAY_ADDRESS=cluster.address, MARK=mark, SPPO_WORKERS="1"
    )
    while len(first := list_workers(mark)) < 2 or not list(evaluated.glob("scratch/evaluate-lm/*/*/score-*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(min(first), signal.SIGKILL)
    others = set[int]()
    while process.poll() is None:
        others |= list_workers(mark) - first
        time.sleep(0.1)
    assert process.returncode == 0, process.communicate()
    assert others, "there was one in place of the one that was killed"
    for path in (evaluated / "local").iterdir():
        assert (evaluated / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slowest
def test_a_training_that_loses_a_node_ends_with_one_line_and_resumes_to_the_same_bytes(pairs: Path) -> None:
    run_training(pairs / "whole", 1, LONG)
    folder = pairs / "lost"
    folder.mkdir()
    set_params(folder, TINY | LONG | {"train.devices": 2, "train.nodes": 2})
    options = ["--model", "../base", *TRAIN]
    shutil.copyfile(pairs / "whole" / "pairs.parquet", folder / "pairs.parquet")
    with clusters.start(2) as cluster:
        process = clusters.start_program(folder, "-m", "stages", "train", *options, RAY_ADDRESS=cluster.address)
        while not list(folder.glob("scratch/train/*/checkpoint-*/complete")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        (other,) = cluster.worker_nodes
        cluster.remove_node(other, allow_graceful=False)
        assert_message(clusters.failure(process), "train: error: the cluster's node 127.0.0.", "failed", "re-run to resume")
        clusters.add_node(cluster, 2)
        done = run_stage(folder, "train", *options, RAY_ADDRESS=cluster.address)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    for name in ("iter1", "iter1.csv", "iter1.json"):
        assert files.digest(folder / name) == files.digest(pairs / "whole" / name), name


LAUNCH = """
import os
from pathlib import Path
from stages.engines import distributed
from stages.runtime.errors import StageError, exit_with

def work(group):
    if os.environ["RANK"] == "1":
        raise StageError("row 3 is wrong: fix it")

try:
    distributed.launch(2, {"input": Path("input")}, work, 2)
except Exception as error:
    exit_with(error)
"""


@pytest.mark.slow
def test_the_error_of_one_node_is_reported_once_and_last(tmp_path: Path, cluster: Any) -> None:
    (tmp_path / "input").write_text("weights")
    (tmp_path / "launch.py").write_text(LAUNCH)
    process = clusters.start_program(tmp_path, "launch.py", RAY_ADDRESS=cluster.address)
    message = clusters.failure(process)
    assert message == "error: row 3 is wrong: fix it"

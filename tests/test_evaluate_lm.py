import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate_lm
from stages.cli import ROOT, StageError

HARNESS = Path(sys.prefix).parent / "harness" / "bin" / "python"
COUNTS = {"arc_challenge": 6, "truthfulqa_mc2": 5, "winogrande": 8, "gsm8k": 3, "hellaswag": 5, "mmlu": 2}
PARAMS = {
    "seed": 3,
    "assets": {"harness": {task: {"repo": "miniature", "count": count} for task, count in COUNTS.items()}},
    "evaluate_lm": {"dtype": "float32", "batch_size": 4},
}


def _found(**mmlu: float) -> dict[str, Any]:
    """Results of the harness; mmlu: accuracy of some of the 57 subjects, 0 of the others."""
    found: dict[str, Any] = {}
    for name, task in evaluate_lm.TASKS.items():
        metric = {f"{task.metric},{task.filter}": 0.5, f"{task.metric}_stderr,{task.filter}": 0.1}
        found[name] = {"results": {name: metric}, "n": {name: 10}}
    subjects = {f"mmlu_{index}": 0.0 for index in range(57 - len(mmlu))} | mmlu
    mean = {name: {"acc,none": value, "acc_stderr,none": 0.2} for name, value in subjects.items()}
    found["mmlu"] = {"results": {"mmlu": {"acc,none": 0.25}, **mean}, "n": dict.fromkeys(subjects, 4)}
    return found


def test_mmlu_is_the_plain_mean_over_its_subjects() -> None:
    summary = evaluate_lm.summarize(_found(one=1.0, two=0.5))
    assert summary["mmlu"]["value"] == pytest.approx(100 * 1.5 / 57)
    assert summary["mmlu"]["standard_error"] == pytest.approx(100 * math.sqrt(57 * 0.2**2) / 57)
    assert summary["mmlu"]["weighted"] == 25
    assert summary["mmlu"]["n"] == 57 * 4
    assert summary["gsm8k"] == {"metric": "exact_match", "shots": 5, "value": 50, "standard_error": 10, "n": 10}


@pytest.mark.parametrize("value", ["N/A", math.nan])
def test_a_figure_that_is_no_number_is_refused(value: object) -> None:
    found = _found()
    found["gsm8k"]["results"]["gsm8k"]["exact_match_stderr,get-answer"] = value
    with pytest.raises(StageError, match="gsm8k"):
        evaluate_lm.summarize(found)


def test_a_missing_subject_is_refused() -> None:
    found = _found()
    del found["mmlu"]["n"]["mmlu_0"]
    with pytest.raises(StageError, match="56 subjects"):
        evaluate_lm.summarize(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml, the data sets, a model, and what the stage says with one worker: `one`."""
    folder = tmp_path_factory.mktemp("evaluate_lm")
    (folder / "params.yaml").write_text(json.dumps(PARAMS))
    subprocess.run([sys.executable, "-m", "stages.assets.harness", "sets"], cwd=folder, env=_environment(), check=True)
    oracle = ROOT / "tests" / "oracles" / "tiny_llama.py"
    subprocess.run([HARNESS, oracle, "model", "sets"], cwd=folder, env=_environment(), check=True)
    done = subprocess.run(_stage("one"), cwd=folder, env=_environment(1), check=True, capture_output=True, text=True)
    start, *lines = done.stderr.splitlines()
    assert start.startswith("6 tasks for 1 workers")
    assert [line.partition(":")[0] for line in lines] == [*evaluate_lm.TASKS, "evaluate_lm"], "nothing else is said"
    assert not done.stdout
    return folder


def _environment(workers: int = 1) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "SPPO_WORKERS": str(workers), "HF_HUB_OFFLINE": "1"}


def _stage(out: str, model: str = "model") -> list[str]:
    return [sys.executable, "-m", "stages.evaluate_lm", model, "sets", out]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_the_results_are_those_of_the_harness_alone(folder: Path) -> None:
    tasks = ["arc_challenge", "truthfulqa_mc2", "gsm8k", "winogrande", "hellaswag", "mmlu_anatomy"]
    shots = {task: evaluate_lm.TASKS[task.partition("_anatomy")[0]].shots for task in tasks}
    oracle = ROOT / "tests" / "oracles" / "stock_lm_eval.py"
    command = [HARNESS, oracle, "model", "sets", "4", "stock.json", *(f"{task}:{count}" for task, count in shots.items())]
    subprocess.run(command, cwd=folder, env=_environment() | {"HF_HOME": str(folder / "hf")}, check=True, capture_output=True)
    stock = json.loads((folder / "stock.json").read_text())
    for task in tasks:
        name = task.partition("_anatomy")[0]
        results = json.loads((folder / "one" / f"{name}.json").read_text())
        ours, theirs = results["results"][task], stock["results"][task]
        assert {key: value for key, value in ours.items() if key != "alias"} == {
            key: value for key, value in theirs.items() if key != "alias"
        }
        assert results["n-shot"][task] == shots[task]
        if name == task:
            assert results["n"] == {task: COUNTS[task]}
    mc2 = json.loads((folder / "one" / "summary.json").read_text())["truthfulqa_mc2"]["value"]
    assert mc2 == 100 * stock["results"]["truthfulqa_mc2"]["acc,none"]

    bf16 = stock["bf16"]
    assert bf16["stage"] == bf16["float32 log-softmax"] != bf16["bf16 log-softmax"]
    expected = {"different": 0, "case counts": 0, "half": 0.5}
    assert stock["exact_match"] == {case: expected.get(case, 1) for case in stock["exact_match"]}


@pytest.mark.slow
def test_two_workers_killed_and_resumed_give_the_same_bytes(folder: Path) -> None:
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    killed = subprocess.Popen(_stage("two"), cwd=folder, env=_environment(2), start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(folder.glob("scratch/evaluate_lm/*/*.json")):
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / "two").exists()
    done = subprocess.run(_stage("two"), cwd=folder, env=_environment(2), check=True, capture_output=True, text=True)
    assert "of 6 tasks are finished already" in done.stderr
    assert _bytes(folder / "two") == _bytes(folder / "one")
    assert set(_bytes(folder / "one")) == {"summary.json", *(f"{task}.json" for task in evaluate_lm.TASKS)}
    for text in _bytes(folder / "one").values():
        assert str(folder).encode() not in text
        assert b" at 0x" not in text


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_line(folder: Path) -> None:
    (folder / "empty").mkdir()
    done = subprocess.run(_stage("none", "empty"), cwd=folder, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("evaluate_lm: error: ")
    assert "empty has no config.json" in done.stderr
    assert not (folder / "none").exists()

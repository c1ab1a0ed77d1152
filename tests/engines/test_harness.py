import contextlib
import copy
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stages.artifacts import files
from stages.engines import harness
from stages.runtime import scratch, workers
from stages.runtime.errors import StageError
from support.messages import assert_message


def test_tasks_that_finished_earlier_are_not_evaluated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "sets"):
        (tmp_path / name).mkdir()
    for task in harness.TASKS:
        files.write_json(make_results(task, 0.25, [1, 0, 0, 0]), tmp_path / "work" / f"{task}.json")
    keys: list[dict[str, Any]] = []
    tasks = list(harness.TASKS)

    def find_folder(stage: str, key: dict[str, Any]) -> Path:
        assert stage == "evaluate-lm"
        keys.append(key)
        return tmp_path / "work"

    monkeypatch.setattr(scratch, "folder", find_folder)
    monkeypatch.setattr(harness, "enter_harness", None)  # a call would fail
    for batch_size in (4, 8):
        results = harness.evaluate_tasks(tmp_path / "model", tmp_path / "sets", tasks, "float32", batch_size)
        assert results == {task: make_results(task, 0.25, [1, 0, 0, 0]) for task in harness.TASKS}
    (tmp_path / "model" / "config.json").write_text("{}")
    harness.evaluate_tasks(tmp_path / "model", tmp_path / "sets", tasks, "float32", 4)
    assert keys[0] != keys[1]
    assert keys[0] != keys[2]
    (tmp_path / "work" / "mmlu.json").unlink()
    some = harness.evaluate_tasks(tmp_path / "model", tmp_path / "sets", ["arc_challenge", "gsm8k"], "float32", 4)
    assert list(some) == ["gsm8k", "arc_challenge"], "a task that was not chosen is not needed"
    assert keys[3] == keys[2], "the work on a task is kept whatever other tasks are chosen"


WHOLE: dict[str, Any] = {
    "results": {"gsm8k": {"exact_match,get-answer": 0.25, "exact_match_stderr,get-answer": 0.1}},
    "n": {"gsm8k": 4},
    "items": {"gsm8k": [1, 0, 0, 0]},
    "cut": {"gsm8k": 2},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from([*WHOLE, "gsm8k"]), values, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from([b"", b"{", b"\xff", b"[" * 9999, None, *WHOLE, ("n", "gsm8k"), ("items", "gsm8k"), ("cut", "gsm8k")]), JSON
)
def test_kept_results_that_are_not_whole_are_set_aside_and_made_again(place: Any, value: Any) -> None:
    """place: the bytes of the file, None for all of its content, or the key whose value is replaced."""
    results = copy.deepcopy(WHOLE)
    if isinstance(place, str):
        results[place] = value
    elif isinstance(place, tuple):
        results[place[0]][place[1]] = value
    elif place is None:
        results = value
    assume(isinstance(place, bytes) or results != WHOLE)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "gsm8k.json"
        path.write_bytes(place if isinstance(place, bytes) else json.dumps(results).encode())
        (path.parent / "sets").mkdir()
        patch.setattr(scratch, "folder", lambda *_: path.parent)
        patch.setattr(harness, "enter_harness", lambda *_: contextlib.nullcontext())
        patch.setattr(harness, "load_worker_module", lambda: SimpleNamespace(load=None, DealingModel=lambda *_: None))
        patch.setattr(workers, "start", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(harness, "evaluate_task", lambda *_: WHOLE)
        again = harness.evaluate_tasks(path.parent / "sets", path.parent / "sets", ["gsm8k"], "float32", 4)
        set_aside = path.with_name(f"{path.name}.unreadable").exists()
        assert set_aside or not isinstance(place, bytes)
        assert again == {"gsm8k": WHOLE if set_aside else harness.check_kept("gsm8k", results)}


def test_whole_results_are_kept() -> None:
    assert harness.check_kept("gsm8k", WHOLE) is WHOLE


@pytest.mark.parametrize("counts", [{}, {"gsm8k": len(WHOLE["items"]["gsm8k"]) + 1}, {**WHOLE["n"], "other": 2}])
def test_results_of_other_numbers_of_questions_are_not_kept(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="numbers of questions"):
        harness.check_kept("gsm8k", WHOLE | {"n": counts})


@pytest.mark.parametrize(
    ("name", "shots", "metric"),
    [
        ("arc_challenge", 25, "acc_norm"),
        ("truthfulqa_mc2", 0, "acc"),
        ("winogrande", 5, "acc"),
        ("gsm8k", 5, "exact_match"),
        ("hellaswag", 10, "acc_norm"),
        ("mmlu", 5, "acc"),
    ],
)
def test_a_task_is_evaluated_with_the_published_shots_and_metric(
    name: str, shots: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Worker:
        @staticmethod
        def evaluate(*arguments: Any) -> dict[str, Any]:
            calls.append(arguments)
            return make_results(name, 0.25, [1, 0, 0, 0])

    monkeypatch.setattr(harness, "load_worker_module", Worker)
    assert harness.evaluate_task(name, "model")["items"] == {name: [1, 0, 0, 0]}
    assert calls == [(name, shots, metric, "model")]


def make_results(name: str, value: float, scores: list[float]) -> dict[str, Any]:
    """Make results of `evaluate_task` for one task."""
    task = harness.TASKS[name]
    score = {f"{task.metric},{task.filter}": value, f"{task.metric}_stderr,{task.filter}": 0.1}
    return {"results": {name: score}, "n": {name: len(scores)}, "items": {name: scores}}


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (0.5 + 1e-6, ["gsm8k", "exact_match", "0.500001", "4 questions", "0.5", "make env"]),
        (math.nan, ["gsm8k", "exact_match", "nan", "logits"]),
    ],
)
def test_a_score_that_is_not_the_mean_over_its_questions_is_an_error(value: float, parts: list[str]) -> None:
    task = harness.TASKS["gsm8k"]
    harness.check_results(task, make_results("gsm8k", 0.5 + 1e-14, [1, 0, 1, 0]))
    with pytest.raises(StageError) as error:
        harness.check_results(task, make_results("gsm8k", value, [1, 0, 1, 0]))
    assert_message(str(error.value), *parts)


def test_finished_tasks_are_kept_even_if_another_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sets").mkdir()

    def evaluate_task(task: str, _: Any) -> dict[str, Any]:
        if task == "gsm8k":
            raise StageError("gsm8k: no")
        return make_results(task, 0.25, [1, 0, 0, 0])

    monkeypatch.setattr(scratch, "folder", lambda *_: tmp_path / "work")
    monkeypatch.setattr(harness, "enter_harness", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(harness, "load_worker_module", lambda: SimpleNamespace(load=None, DealingModel=lambda *_: None))
    monkeypatch.setattr(workers, "start", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(harness, "evaluate_task", evaluate_task)
    with pytest.raises(StageError, match="gsm8k: no"):
        harness.evaluate_tasks(tmp_path / "sets", tmp_path / "sets", list(harness.TASKS), "float32", 4)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"mmlu.json", "hellaswag.json"}


def test_workers_read_the_files_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "sets"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").touch()
    given: list[list[Path]] = []

    def start(*_: Any, inputs: list[Path], **__: Any) -> Any:
        given.append(inputs)
        raise StageError("stop")

    monkeypatch.setattr(scratch, "folder", lambda *_: tmp_path / "work")
    monkeypatch.setattr(harness, "enter_harness", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(harness, "load_worker_module", lambda: SimpleNamespace(load=None))
    monkeypatch.setattr(workers, "start", start)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match="stop"):
        harness.evaluate_tasks(Path("model"), Path("sets"), ["gsm8k"], "float32", 4)
    assert given == [[tmp_path / "model" / "config.json"]], "absolute: the harness works in another folder"


def test_the_harness_has_its_folder_caches_and_log_only_within_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "cache").mkdir()
    before = Path.cwd()
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    with capfd.disabled(), Path(os.devnull).open("w", encoding="utf-8") as null, pytest.MonkeyPatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, os.fdopen(os.dup(null.fileno()), "w"))
        with contextlib.suppress(KeyError), harness.enter_harness(tmp_path / "sets", tmp_path) as terminal:
            assert Path.cwd() == tmp_path / "sets"
            assert os.environ["HF_DATASETS_CACHE"] == str(tmp_path / "cache" / "HF_DATASETS_CACHE")
            assert not (tmp_path / "cache").exists()
            print("one", flush=True)
            os.write(sys.stderr.fileno(), b"two")
            print("bar", file=terminal)
            raise KeyError
        os.write(sys.stderr.fileno(), b"three")
    assert (tmp_path / "harness.log").read_text() == "one\ntwo"
    assert Path.cwd() == before
    assert "HF_DATASETS_CACHE" not in os.environ


def test_environment_variables_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", "mine")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    values = harness.cache_paths(Path("/somewhere"))
    with contextlib.suppress(KeyError), harness.set_environment(values):
        assert {name: os.environ[name] for name in values} == values
        raise KeyError
    assert os.environ["HF_MODULES_CACHE"] == "mine"
    assert "HF_DATASETS_CACHE" not in os.environ

"""Run tasks of the lm-evaluation-harness and keep what is finished.

The stage's process runs the harness, which draws few-shot examples and computes metrics, for one task after the other. Workers,
one per device, compute the harness's requests in chunks, which do not depend on the number of workers.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from stages.artifacts import files, pointers
from stages.engines.overlap import evaluate_in_turn
from stages.runtime import durable, processes, scratch, workers
from stages.runtime.devices import list_devices
from stages.runtime.errors import StageError
from stages.runtime.logs import log

CACHES = ("HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "HF_MODULES_CACHE")
"""Environment variables of folders that the Hugging Face libraries write to; the libraries read them on import."""


@dataclass(frozen=True)
class Task:
    """A stock task of the harness and the settings that the Leaderboard ran it with."""

    folder: str
    """Folder of its YAML files, below lm_eval/tasks."""
    shots: int
    metric: str
    filter: str = "none"


TASKS = {  # the longest first
    "mmlu": Task("mmlu/default", 5, "acc"),
    "hellaswag": Task("hellaswag", 10, "acc_norm"),
    "gsm8k": Task("gsm8k", 5, "exact_match", "get-answer"),
    "arc_challenge": Task("arc", 25, "acc_norm"),
    "truthfulqa_mc2": Task("truthfulqa", 0, "acc"),
    "winogrande": Task("winogrande", 5, "acc"),
}


def evaluate_tasks(model: Path, data_sets: Path, tasks: list[str], dtype: str, batch_size: int) -> dict[str, Any]:
    """Evaluate a model on some of TASKS, with one worker per GPU or, without a GPU, per CPU core.

    data_sets: the folder from assets-harness. Returns task -> the results of `evaluate_task`. Finished tasks, and the finished
    chunks of an unfinished task, are kept in the scratch folder, so that a killed stage resumes. Raises StageError if a worker
    or a task fails.
    """
    key = {"model": files.digest(model), "sets": files.digest(data_sets), "dtype": dtype, "batch_size": batch_size}
    folder = scratch.folder("evaluate-lm", key).resolve()
    paths = {task: folder / f"{task}.json" for task in TASKS if task in tasks}
    pending = [task for task, path in paths.items() if durable.read_json(path, partial(check_kept, task)) is None]
    if len(pending) < len(tasks):
        log.info("%d of %d tasks are already finished, in %s", len(tasks) - len(pending), len(tasks), folder)
    if pending:
        devices, policy = list_devices(cores=True), str(model.resolve())
        log.info("running %d tasks on %d workers; progress: %s/*.log", len(pending), len(devices), folder)
        with enter_harness(data_sets.resolve(), folder) as terminal:
            module = load_worker_module()  # before the workers start: on CPUs, as copies of this process, they have it then
            options: dict[str, Any] = {"fork": True, "folder": folder, "inputs": pointers.list_files(Path(policy))}
            with workers.start(module.load, (policy, dtype, batch_size), devices, **options) as deal:
                outcomes = evaluate_in_turn(
                    pending, lambda task, deal: evaluate_task(task, module.DealingModel(deal, batch_size, folder / task)), deal
                )
                bar = {"desc": "evaluate-lm", "unit": "task", "disable": None, "file": terminal}
                for task, results in tqdm(outcomes, total=len(pending), **bar):
                    durable.write(paths[task], json.dumps(results, allow_nan=False))
                    files.remove(folder / task)
    return {task: files.read_json(path) for task, path in paths.items()}


@contextlib.contextmanager
def enter_harness(data_sets: Path, folder: Path) -> Iterator[TextIO]:
    """Within the block, prepare this process for the harness: its caches, its working directory and, for what it prints, the
    file harness.log in the folder. Yields the stage's stderr. data_sets, folder: absolute paths."""
    files.remove(folder / "cache")
    with (
        set_environment(cache_paths(folder)),
        contextlib.chdir(data_sets),
        os.fdopen(os.dup(sys.stderr.fileno()), "w") as terminal,
        processes.restore_output(),
    ):
        processes.redirect_output(folder / "harness.log")
        yield terminal


def evaluate_task(task: str, lm: Any) -> dict[str, Any]:
    """Evaluate a model on one task, in a process that `enter_harness` has prepared. lm: the harness's LM.

    Returns JSON values: the harness's results and, by (sub)task, `n`, the number of questions, and `items`, the score of each
    question in the order of the data set. Raises StageError as the workers and `check_results` do.
    """
    stock = TASKS[task]
    results = load_worker_module().evaluate(task, stock.shots, stock.metric, lm)
    plain: dict[str, Any] = json.loads(json.dumps(results, default=float))
    check_results(stock, plain)
    return plain


def check_kept(name: str, results: Any) -> Any:
    """Return a task's results that an earlier run kept.

    Raises ValueError, TypeError, KeyError or AttributeError if they are not as `evaluate_task` returns them.
    """
    try:
        check_results(TASKS[name], results)
        read_score(name, TASKS[name], results["results"][name])
    except (StageError, ArithmeticError) as error:
        raise ValueError(str(error)) from error
    counts = {subtask: len(scores) for subtask, scores in results["items"].items()}
    if results["n"] != counts or not all(0 < cut <= counts[subtask] for subtask, cut in results.get("cut", {}).items()):
        raise ValueError("expected the numbers of questions, and of those that were cut")
    return results


def check_results(task: Task, results: dict[str, Any]) -> None:
    """Check the results of `evaluate_task` before they are kept.

    Raises StageError if the score of a (sub)task is not a finite number, or not the mean of its questions' scores.
    """
    for name, scores in results["items"].items():
        value, _ = read_score(name, task, results["results"][name])
        mean = math.fsum(scores) / len(scores)
        if not math.isclose(value, mean, rel_tol=1e-9, abs_tol=1e-12):
            raise StageError(
                f"{name}: the harness's {task.metric} is {value!r}, but the mean over its {len(scores)} questions is {mean!r}: "
                "reinstall lm-eval 0.4.1 (`make env`)"
            )


def read_score(name: str, task: Task, scores: dict[str, Any]) -> tuple[float, float]:
    """Return the task's metric and its standard error, as fractions, from the harness's scores of the (sub)task `name`.

    Raises StageError if either is not a finite number.
    """
    value, error = scores[f"{task.metric},{task.filter}"], scores[f"{task.metric}_stderr,{task.filter}"]
    if not all(isinstance(number, float) and math.isfinite(number) for number in (value, error)):
        raise StageError(
            f"{name}: {task.metric} is {value!r} with standard error {error!r}: check that the model's logits are finite and "
            "that the data set has at least two questions"
        )
    return value, error


def load_worker_module() -> Any:
    """Import the harness and register TASKS."""
    from stages.engines import harness_worker

    harness_worker.register_tasks(tuple(task.folder for task in TASKS.values()))
    return harness_worker


def cache_paths(folder: Path) -> dict[str, str]:
    """Return the values of CACHES: folders of this evaluation, so that no other data set cached under the same name is used."""
    return {name: str(folder / "cache" / name) for name in CACHES}


@contextlib.contextmanager
def set_environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

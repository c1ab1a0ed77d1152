"""Run tasks of the lm-evaluation-harness in worker processes and keep the results of finished tasks.

A worker draws the few-shot examples of a task as the harness does when it runs that task alone, so the results do not depend on
the number of workers.
"""

import contextlib
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.artifacts import files
from stages.runtime import durable, processes, scratch
from stages.runtime.devices import list_devices
from stages.runtime.errors import StageError
from stages.runtime.logs import log, setup_logging

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


TASKS = {  # the longest first, so that several workers finish at about the same time
    "mmlu": Task("mmlu/default", 5, "acc"),
    "hellaswag": Task("hellaswag", 10, "acc_norm"),
    "gsm8k": Task("gsm8k", 5, "exact_match", "get-answer"),
    "arc_challenge": Task("arc", 25, "acc_norm"),
    "truthfulqa_mc2": Task("truthfulqa", 0, "acc"),
    "winogrande": Task("winogrande", 5, "acc"),
}


def evaluate_tasks(model: Path, data_sets: Path, tasks: list[str], dtype: str, batch_size: int) -> dict[str, Any]:
    """Evaluate a model on some of TASKS, with one worker per GPU or, without a GPU, per CPU core.

    data_sets: the folder from assets-harness. Returns task -> the results of `evaluate_task`. Finished tasks are kept in the
    scratch folder, so that a killed stage resumes. Raises StageError if a worker dies or a task fails.
    """
    key = {"model": files.digest(model), "sets": files.digest(data_sets), "dtype": dtype, "batch_size": batch_size}
    folder = scratch.folder("evaluate-lm", key).resolve()
    paths = {task: folder / f"{task}.json" for task in TASKS if task in tasks}
    pending = [task for task, path in paths.items() if durable.read_json(path, partial(check_kept, task)) is None]
    if len(pending) < len(tasks):
        log.info("%d of %d tasks are already finished, in %s", len(tasks) - len(pending), len(tasks), folder)
    if pending:
        files.remove(folder / "cache")
        devices = list_devices(cores=True)[: len(pending)]
        log.info("running %d tasks on %d workers; progress: %s/*.log", len(pending), len(devices), folder)
        with start_pool(devices, data_sets.resolve(), folder) as pool:
            with processes.block_sigint():
                futures = {pool.submit(evaluate_task, task, str(model.resolve()), dtype, batch_size): task for task in pending}
            try:
                collect_results(futures, folder)
            finally:
                pool.shutdown(cancel_futures=True)
    return {task: files.read_json(path) for task, path in paths.items()}


def start_pool(devices: list[str], data_sets: Path, folder: Path) -> ProcessPoolExecutor:
    """Create a pool of one worker per device, see `list_devices`. data_sets, folder: absolute paths."""
    if devices[0]:
        context: Any = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    else:
        context = multiprocessing.get_context("fork")
        with set_environment(cache_paths(folder)), contextlib.chdir(data_sets):
            load_worker_module()  # once for all workers: the import takes longer than many of the miniature's tasks
    queue = context.SimpleQueue()
    for device in devices:
        queue.put(device)
    return ProcessPoolExecutor(len(devices), context, enter_worker, (queue, data_sets, folder))


def collect_results(futures: dict[Future[dict[str, Any]], str], folder: Path) -> None:
    """Write each task's results to the folder as soon as it finishes. Raises StageError if a worker process dies."""
    try:
        for future in tqdm(as_completed(futures), total=len(futures), desc="evaluate-lm", unit="task", disable=None):
            durable.write(folder / f"{futures[future]}.json", json.dumps(future.result(), allow_nan=False))
    except BrokenProcessPool as error:
        raise StageError(
            f"a worker process died (possibly out of memory); see its log in {folder}. Re-run to resume."
        ) from error


def enter_worker(queue: Any, data_sets: Path, folder: Path) -> None:
    """Set up a worker process: its device, caches, working directory and, for the harness's output, a log file."""
    processes.setup_worker()
    if device := queue.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    os.environ |= cache_paths(folder)
    setup_logging()
    os.chdir(data_sets)
    handle = os.open(folder / f"worker-{os.getpid()}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    os.dup2(handle, sys.stdout.fileno())
    os.dup2(handle, sys.stderr.fileno())


def evaluate_task(task: str, model: str, dtype: str, batch_size: int) -> dict[str, Any]:
    """Evaluate a model on one task, in a process whose working directory is the data sets' folder.

    Returns JSON values: the harness's results and, by (sub)task, `n`, the number of questions, and `items`, the score of each
    question in the order of the data set. Raises StageError if the model cannot be loaded or does not fit in the GPU's memory,
    and as `check_results` does.
    """
    import torch

    stock = TASKS[task]
    try:
        results = load_worker_module().evaluate(task, stock.shots, stock.metric, model, dtype, batch_size)
    except torch.OutOfMemoryError as error:
        raise StageError(f"{task}: out of GPU memory: lower evaluate_lm.batch_size (now {batch_size})") from error
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

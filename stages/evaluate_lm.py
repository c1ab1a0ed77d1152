"""Evaluate a policy on the six tasks of the Open LLM Leaderboard with the unmodified lm-evaluation-harness 0.4.1.

Each task is the work of one process, which draws the few-shot examples as the harness does where it runs alone; several
devices share the tasks out, so the results do not depend on how many there are.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages import cli, files, params, pointers, processes, scratch, shards
from stages.cli import StageError


@dataclass(frozen=True)
class Task:
    """A stock task of the harness as the Leaderboard ran it."""

    folder: str
    """Of its YAML files, below lm_eval/tasks."""
    shots: int
    metric: str
    filter: str = "none"


TASKS = {  # the longest first, so that several devices finish at about the same time
    "mmlu": Task("mmlu/default", 5, "acc"),
    "hellaswag": Task("hellaswag", 10, "acc_norm"),
    "gsm8k": Task("gsm8k", 5, "exact_match", "get-answer"),
    "arc_challenge": Task("arc", 25, "acc_norm"),
    "truthfulqa_mc2": Task("truthfulqa", 0, "acc"),
    "winogrande": Task("winogrande", 5, "acc"),
}
MMLU_SUBJECTS = 57
KEPT = ["results", "groups", "versions", "n-shot", "configs"]
"""Of the harness's results: the others name the host's paths and the repository's state."""


def evaluate(task: str, model: str, dtype: str, batch_size: int) -> dict[str, Any]:
    """The harness's results for one task and, under `n`, how many questions each (sub)task has.

    The working directory is that of the data sets. Raises StageError where the model cannot be loaded or run.
    """
    import torch

    try:
        lm = _policy(model, dtype, batch_size)
        found = _harness().simple_evaluate(model=lm, tasks=[task], num_fewshot=TASKS[task].shots)
    except torch.OutOfMemoryError as error:
        raise StageError(f"{task}: out of GPU memory: lower evaluate_lm.batch_size (now {batch_size})") from error
    kept = {name: found[name] for name in KEPT if name in found}
    kept["n"] = {name: len(samples) for name, samples in found["samples"].items()}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=float))
    return plain


@functools.cache
def _harness() -> Any:
    """The module lm_eval with the six tasks registered. It loads `exact_match` from the working directory as it is imported."""
    import lm_eval
    from lm_eval.api.registry import GROUP_REGISTRY
    from lm_eval.tasks import include_path

    for task in TASKS.values():
        include_path(str(Path(lm_eval.tasks.__file__).parent / task.folder))
    for names in GROUP_REGISTRY.values():
        names.sort()  # not in the file system's order, on which the last digit of MMLU's weighted mean would depend
    return lm_eval


@functools.cache
def _policy(model: str, dtype: str, batch_size: int) -> Any:
    """The model as the harness wants it, on the GPU where there is one."""
    import torch
    from lm_eval.models.huggingface import HFLM

    class Float32Logits(HFLM):  # type: ignore[misc]
        """Logits in float32, or the harness takes the log-softmax in bf16 for a bf16 model."""

        def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits: torch.Tensor = super()._model_call(*args, **kwargs)
            return logits.float()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # how a sum is split among threads shows in its last digit
    try:
        lm = Float32Logits(pretrained=model, dtype=dtype, batch_size=batch_size, device=device)
    except (OSError, ValueError) as error:
        raise StageError(f"{model}: not a model that transformers loads ({cli.folded(error)})") from error
    pointers.cap_attention(lm.model)
    return lm


def evaluate_all(model: Path, data_sets: Path, dtype: str, batch_size: int) -> dict[str, Any]:
    """Task -> what `evaluate` returns, from as many processes as there are GPUs or, without one, processor cores.

    Finished tasks lie in the scratch folder, keyed by model, data sets and parameters: a killed stage goes on from there.
    Raises StageError where a worker dies or a task fails.
    """
    key = {"model": files.digest(model), "sets": files.digest(data_sets), "dtype": dtype, "batch_size": batch_size}
    folder = scratch.folder("evaluate_lm", key).resolve()
    pending = [task for task in TASKS if not (folder / f"{task}.json").exists()]
    if len(pending) < len(TASKS):
        cli.log.info("%d of %d tasks are finished already, in %s", len(TASKS) - len(pending), len(TASKS), folder)
    if pending:
        _run(pending, model.resolve(), data_sets.resolve(), dtype, batch_size, folder)
    return {task: files.read_json(folder / f"{task}.json") for task in TASKS}


def _run(tasks: list[str], model: Path, data_sets: Path, dtype: str, batch_size: int, folder: Path) -> None:
    cache = folder / "cache"
    files.remove(cache)
    for name in ("HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "HF_MODULES_CACHE"):
        os.environ[name] = str(cache / name)
    names = shards.devices(cores=True)[: len(tasks)]
    cli.log.info("%d tasks for %d workers, whose own progress stands in %s/*.log", len(tasks), len(names), folder)
    context = multiprocessing.get_context("spawn" if names[0] else "fork")
    if not names[0]:
        with contextlib.chdir(data_sets):
            _harness()  # its import takes longer than many a task here: once, and the workers inherit it
    devices = context.SimpleQueue()
    for name in names:
        devices.put(name)
    with ProcessPoolExecutor(len(names), context, _enter, (devices, data_sets, folder)) as pool:
        with processes.starting_workers():
            work = {pool.submit(evaluate, task, str(model), dtype, batch_size): task for task in tasks}
        try:
            for done in tqdm(as_completed(work), total=len(work), desc="evaluate_lm", unit="task", disable=None):
                files.write_json(done.result(), folder / f"{work[done]}.json")
        except BrokenProcessPool as error:
            raise StageError(
                f"a worker died (for want of memory?): its last words are in {folder}, run again to go on"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _enter(devices: Any, data_sets: Path, folder: Path) -> None:
    """Prepare a worker: its end, its device, its working directory, and a file for the harness's chatter."""
    processes.worker()
    if device := devices.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    cli.quiet()
    os.chdir(data_sets)
    chatter = os.open(folder / f"worker-{os.getpid()}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    os.dup2(chatter, sys.stdout.fileno())
    os.dup2(chatter, sys.stderr.fileno())


def summarize(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Task -> metric, shots, value and standard error in percent, n: what the Leaderboard showed.

    MMLU's value is the plain mean over the 57 subjects, its standard error that of a mean of independent ones, and
    `weighted` the harness's own mean, weighted by the subjects' sizes. Raises StageError where a figure is not a number.
    """
    summary = {}
    for name, task in TASKS.items():
        parts = sorted(found[name]["n"])
        if name == "mmlu" and len(parts) != MMLU_SUBJECTS:
            raise StageError(f"mmlu: {len(parts)} subjects instead of {MMLU_SUBJECTS}: reinstall lm-eval 0.4.1 (`make env`)")
        results = found[name]["results"]
        values = [results[part][f"{task.metric},{task.filter}"] for part in parts]
        errors = [results[part][f"{task.metric}_stderr,{task.filter}"] for part in parts]
        for part, value, error in zip(parts, values, errors, strict=True):
            if not all(isinstance(number, float) and math.isfinite(number) for number in (value, error)):
                raise StageError(
                    f"{part}: {task.metric} is {value!r} with standard error {error!r}: see that the model gives "
                    "finite logits, and that the data set has two questions at least"
                )
        summary[name] = {
            "metric": task.metric,
            "shots": task.shots,
            "value": 100 * math.fsum(values) / len(parts),
            "standard_error": 100 * math.hypot(*errors) / len(parts),
            "n": sum(found[name]["n"].values()),
        }
        if name == "mmlu":
            summary[name]["weighted"] = 100 * results[name][f"{task.metric},{task.filter}"]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the policy")
    parser.add_argument("data_sets", type=Path, help="folder of the six data sets, from assets.harness")
    parser.add_argument("out", type=Path, help="folder of <task>.json, the harness's results, and summary.json")
    args = parser.parse_args()
    wanted = params.load("evaluate_lm").evaluate_lm
    files.present(args.data_sets / "exact_match" / "exact_match.py")
    found = evaluate_all(pointers.model(args.model), args.data_sets, wanted.dtype, wanted.batch_size)
    summary = summarize(found)
    with files.replacing(args.out) as partial:
        partial.mkdir()
        for task, results in found.items():
            files.write_json(results, partial / f"{task}.json")
        files.write_json(summary, partial / "summary.json")
    for task, row in summary.items():
        cli.log.info("%s: %s %.1f +- %.1f of %d", task, row["metric"], row["value"], row["standard_error"], row["n"])


if __name__ == "__main__":
    cli.run(main, environment="harness")

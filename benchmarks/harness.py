"""evaluate-lm's requests dealt to two workers in chunks, against one task a process: seconds of the whole evaluation.

The baseline is the harness's own HFLM in two processes, each of which takes the next whole task, the longest first. Both sides
have the same random Llama (hidden size 128, 4 layers), batches and single-threaded workers, which are copies of this process.
The questions are the miniature's; most are HellaSwag's, so that one task dominates, as MMLU does at full size: the baseline's
last process then works alone. Before anything is timed, the scores of both sides must agree to 1e-6.
"""

import functools
import math
import multiprocessing
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import generate
from benchmarks.measure import Comparison, compare_times, report, time_in_turn
from stages.artifacts.harness_sets import DATA_SETS, write_data_set, write_exact_match
from stages.engines import harness
from stages.miniature.domain import draw_question
from stages.miniature.harness import make_rows
from stages.runtime import scratch

QUESTIONS = {"hellaswag": 160, "arc_challenge": 8, "truthfulqa_mc2": 16, "winogrande": 16}
"""Task -> number of questions, in the order of harness.TASKS: the longest task first, then short ones. With a quarter as many,
loading the model on either side would hide the difference."""
WORKERS = 2
BATCH = 32

Scores = dict[str, float]
"""Task -> its metric."""


def write_sets(folder: Path) -> None:
    """Write the data sets as assets-harness does."""
    for task, count in QUESTIONS.items():
        write_data_set(DATA_SETS[task], make_rows(task, 0, count), folder)
    write_exact_match(folder)


def run_stage(model: Path, data_sets: Path) -> Scores:
    """Run our side, and remove the work that it keeps for a stage that is killed."""
    results = harness.evaluate_tasks(model, data_sets, list(QUESTIONS), "float32", BATCH)
    scratch.finish()
    return read_scores({task: result["results"] for task, result in results.items()})


def run_tasks(model: Path, data_sets: Path, folder: Path) -> Scores:
    """Run the baseline. folder: for the harness's caches and log."""
    folder.mkdir(exist_ok=True)
    with harness.enter_harness(data_sets, folder):
        harness.load_worker_module()
        with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
            results = dict(pool.imap(functools.partial(run_task, model), QUESTIONS, chunksize=1))
    return read_scores(results)


@functools.cache
def load_model(model: Path) -> Any:
    """Load the harness's own model, once per process."""
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    return HFLM(pretrained=str(model), dtype="float32", batch_size=BATCH, device="cpu")


def run_task(model: Path, task: str) -> tuple[str, dict[str, Any]]:
    """Evaluate the model on one task. Returns it and the harness's results."""
    import lm_eval

    done = lm_eval.simple_evaluate(load_model(model), tasks=[task], num_fewshot=harness.TASKS[task].shots)
    return task, done["results"]


def read_scores(results: dict[str, dict[str, Any]]) -> Scores:
    """Read each task's metric from the harness's results."""
    return {task: harness.read_score(task, harness.TASKS[task], scores[task])[0] for task, scores in results.items()}


def check_scores(ours: Scores, baseline: Scores) -> None:
    """Raise AssertionError if the scores of both sides differ."""
    assert list(ours) == list(baseline)
    assert all(math.isclose(ours[task], baseline[task], abs_tol=1e-6) for task in ours), (ours, baseline)


def compare(folder: Path) -> Comparison:
    """Compare both sides. folder: absolute, for all that they read and write."""
    examples = [(question.text, question.right) for question in map(draw_question, [random.Random(0)] * 2000)]
    generate.make_model(folder / "model", examples)
    write_sets(folder / "sets")
    ours = functools.partial(run_stage, folder / "model", folder / "sets")
    baseline = functools.partial(run_tasks, folder / "model", folder / "sets", folder / "work")
    check_scores(ours(), baseline())
    seconds = time_in_turn({"ours": ours, "baseline": baseline})
    size = f"{sum(QUESTIONS.values())} questions, {QUESTIONS['hellaswag']} of one task, {WORKERS} workers"
    subject = "seconds, against one task a process"
    return compare_times(subject, size, seconds["ours"], seconds["baseline"], ">= 1.2")


def main() -> None:
    os.environ["SPPO_WORKERS"] = str(WORKERS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # the scratch folder lies there too
        report([compare(Path(name).resolve())])


if __name__ == "__main__":
    main()

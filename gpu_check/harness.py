"""evaluate-lm: the score of every question against lm-eval alone, which computes one request at a time."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import train as benchmark
from gpu_check import rows
from gpu_check.sizes import Harness, Sizes
from stages.runtime import logs

SHARE = 0.99
"""The least share of equal scores: a batch rounds otherwise than a single request, which decides between near ties."""
CLOSE = 1e-4
"""Scores that differ by less are equal."""


def write_data_sets(size: Harness, folder: Path) -> None:
    """Write the miniature's questions in the layout that the harness reads."""
    from stages.artifacts.harness_sets import DATA_SETS, write_data_set, write_exact_match
    from stages.miniature.harness import make_rows

    for task in size.tasks:
        write_data_set(DATA_SETS[task], make_rows(task, 0, size.count), folder)
    write_exact_match(folder)


def share_alike(ours: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """Return the share of equal scores; 0 if the (sub)tasks or their numbers of questions differ."""
    if {name: len(scores) for name, scores in ours.items()} != {name: len(scores) for name, scores in expected.items()}:
        return 0.0
    pairs = [pair for name in ours for pair in zip(ours[name], expected[name], strict=True)]
    return sum(abs(one - other) < CLOSE for one, other in pairs) / len(pairs)


def run(sizes: Sizes, folder: Path, limits: dict[str, float], rehearsal: bool) -> None:
    """Run this part. limits: not used."""
    size, what = sizes.harness, "evaluate-lm"
    if importlib.util.find_spec("lm_eval") is None:
        rows.report(rows.skip(f"{what}: scores against lm-eval alone", "lm-eval is not installed"))
        return
    from stages.engines import harness

    logs.setup_logging()
    model, data_sets, out = folder / "model", folder / "sets", folder / "plain.json"
    benchmark.make_model(size.model.vocabulary, size.model.shape(), "float32", model)
    write_data_sets(size, data_sets)
    tasks = {name: harness.TASKS[name] for name in size.tasks}
    command = [sys.executable, "-m", "gpu_check.plain_harness", *map(str, (model, data_sets, out))]
    command += [f"{name}:{task.shots}:{task.metric}" for name, task in tasks.items()]
    start = time.perf_counter()
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        sys.exit("lm-eval alone failed: see its message above")
    middle = time.perf_counter()
    results = harness.evaluate_tasks(model, data_sets, list(tasks), "float32", size.batch)
    end = time.perf_counter()
    ours = {name: scores for result in results.values() for name, scores in result["items"].items()}
    expected = json.loads(out.read_text())
    alike, count = share_alike(ours, expected), sum(map(len, expected.values()))
    rows.report(
        rows.judge(
            f"{what}, {', '.join(tasks)}, float32, batches of {size.batch}: share of {count} scores equal to those of lm-eval "
            "alone, one request at a time",
            f"{alike:.3f}",
            f">= {SHARE:g}",
            alike >= SHARE,
        ),
        rows.judge_on_gpu(
            rows.measure(f"{what}: seconds, start included", f"{end - middle:.0f}, alone {middle - start:.0f}"), rehearsal
        ),
    )

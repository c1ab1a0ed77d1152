"""The stages reference and train: losses against a plain float32 loop, two runs' bytes, speed and memory at 1B parameters."""

import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import train as benchmark
from gpu_check import flops, plain, rows
from gpu_check.sizes import Sizes, Training
from stages.artifacts import files
from stages.runtime import params
from stages.tools.planning.memory import Shape, estimate_memory

ETA = 10.0
LEARNING_RATE = {"parity": 2e-5, "speed": 5e-7}
WARMUP = 0.25
LOGPS_TOLERANCE: dict[params.Precision, float] = {"float32": 1e-5, "bfloat16": 2e-3}
LOSS_TOLERANCE: dict[params.Precision, float] = {"float32": 1e-3, "bfloat16": 0.05}
"""By precision: the largest difference from the plain loop, of a response's log-probability, relative to it, and of a step's
loss, relative to the first step's."""
FLOORS = {"reference": 0.1, "train": 0.1}
"""The share of the GPU's limit that a stage must reach at least: below, something else than the model takes the time."""
SLACK = 0.5
"""The share of the estimate that the measured peak of memory must reach at least: an estimate far above it helps nobody."""
FUSED = "train.attention: fused"


@dataclass(frozen=True)
class Job:
    """A training to run in a folder: its sizes and its settings."""

    folder: Path
    size: Training
    settings: params.Train


def make_settings(
    size: Training, dtype: params.Precision, learning_rate: float, *, repeat: bool, attention: str = "plain"
) -> params.Train:
    """Return settings of train. repeat: every step trains on the same pairs, instead of other ones."""
    changes = {
        "loss": "sppo",
        "learning_rate": learning_rate,
        "device_batch": size.device_batch,
        "epochs": float(size.steps) if repeat else 1.0,
        "stop_epoch": float(size.steps) if repeat else 1.0,
        "warmup_ratio": WARMUP,
        "attention": attention,
    }
    return benchmark.make_settings(size.batch, dtype, gradient_checkpointing=True).model_copy(update=changes)


def prepare(job: Job, model: Path | None = None, *, repeat: bool) -> list[dict[str, Any]]:
    """Write a job's pairs and settings and, unless it takes the model of another one, its model. Returns the pairs."""
    size = job.size
    job.folder.mkdir(parents=True)
    rng = random.Random(1)
    pairs = benchmark.make_pairs(size.length, size.batch * (1 if repeat else size.steps), size.model.vocabulary)
    for pair in pairs:
        pair |= {f"{side}_probability": round(rng.random(), 3) for side in plain.SIDES}
    warmup = int(WARMUP * size.steps)
    rates = [plain.learning_rate(step, size.steps, warmup, job.settings.learning_rate) for step in range(size.steps)]
    spec = {"vocabulary": size.model.vocabulary, "shape": size.model.shape(), "eta": ETA, "rates": rates}
    for name, value in (("pairs", pairs), ("spec", spec), ("settings", job.settings.model_dump())):
        (job.folder / f"{name}.json").write_text(json.dumps(value))
    if model:
        (job.folder / "model").symlink_to(model)
    else:
        call("prepare", job.folder)
    return pairs


def call(name: str, folder: Path) -> dict[str, Any]:
    """Run a worker of gpu_check/workers.py; what it prints goes to stderr. Returns what it wrote. Exits if it fails."""
    command = [sys.executable, "-m", "gpu_check.workers", name, str(folder)]
    environment = os.environ | {"SPPO_SCRATCH": str(folder / "scratch")}
    if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
        sys.exit(f"{name} failed: see its message above")
    result = folder / f"{name}.json"
    return json.loads(result.read_text()) if result.exists() else {}


def read_losses(folder: Path) -> list[float]:
    """Read the losses of the training log in a folder."""
    header, *lines = (folder / "log.csv").read_text().splitlines()
    column = header.split(",").index("loss")
    return [float(line.split(",")[column]) for line in lines]


def read_logps(folder: Path) -> list[list[float]]:
    """Read the reference's log-probabilities in a folder, chosen and rejected for each pair."""
    import pyarrow.parquet as pq

    paths = sorted((folder / "logps").glob("*.parquet"))
    return [
        [row[f"{side}_reference_logps"] for side in plain.SIDES] for path in paths for row in pq.read_table(path).to_pylist()
    ]


def largest_difference(ours: list[float], expected: list[float], scales: list[float]) -> float:
    """Return the largest difference, each relative to its scale; infinite if the numbers of values differ."""
    if len(ours) != len(expected):
        return float("inf")
    return max(abs(one - other) / abs(scale) for one, other, scale in zip(ours, expected, scales, strict=True))


def compare_with_plain(dtype: params.Precision, folder: Path, expected: dict[str, Any], what: str = "") -> list[rows.Row]:
    """Compare a run in `dtype` with the plain loop's results. what: the setting that is checked, to add to the rows."""
    logps: list[float] = list(itertools.chain(*read_logps(folder)))
    plain_logps: list[float] = list(itertools.chain(*expected["logps"]))
    losses, plain_losses = read_losses(folder), expected["losses"]
    label = f"{what and what + ', '}{dtype}, against a plain float32 loop: largest difference"
    return [
        rows.at_most(
            f"reference, {label} of {len(logps)} log-probabilities, relative",
            largest_difference(logps, plain_logps, plain_logps),
            LOGPS_TOLERANCE[dtype],
        ),
        rows.at_most(
            f"train, {label} of {len(losses)} losses ({losses[0]:.3g} to {losses[-1]:.3g}), relative to the first",
            largest_difference(losses, plain_losses, [plain_losses[0]] * len(plain_losses)),
            LOSS_TOLERANCE[dtype],
        ),
    ]


def check_parity(size: Training, folder: Path) -> None:
    """Report how the losses compare with the plain loop's, and whether a second run gives the same bytes."""
    digests: dict[str, list[str]] = {"reference": [], "train": []}
    model = folder / "float32" / "model"
    expected: dict[str, Any] = {}
    runs: list[tuple[str, params.Precision]] = [("float32", "float32"), ("bfloat16", "bfloat16"), ("again", "bfloat16")]
    for name, dtype in runs:
        job = Job(folder / name, size, make_settings(size, dtype, LEARNING_RATE["parity"], repeat=True))
        prepare(job, None if name == "float32" else model, repeat=True)
        expected = expected or call("plain", job.folder)
        call("reference", job.folder)
        call("train", job.folder)
        if name != "again":
            rows.report(*compare_with_plain(dtype, job.folder, expected))
        if dtype == "bfloat16":
            digests["reference"].append(files.digest(job.folder / "logps"))
            digests["train"].append(files.digest(job.folder / "out") + files.digest(job.folder / "log.csv"))
    for stage, found in digests.items():
        rows.report(rows.same_bytes(f"{stage}, bfloat16: two runs in processes of their own", found))


def estimate_peak(stage: str, job: Job) -> float:
    """Return the bytes on one GPU that `plan` estimates for a stage."""
    shape = job.size.model
    key_width = shape.width // shape.heads * shape.key_heads
    own = Shape(shape.parameters(), shape.layers, shape.width, shape.inner, key_width, shape.vocabulary)
    lengths = params.Lengths(prompt=job.size.length // 2, total=job.size.length, too_long="drop")
    # All that these estimates read, so nothing of params.yaml.
    return estimate_memory(stage, params.Params.model_construct(train=job.settings, lengths=lengths), own, 1).gpu


def check_speed(size: Training, folder: Path, limit: float, rehearsal: bool, *, model: Path | None = None) -> None:
    """Report the share of the limit, in FLOP/s, that the model's own operations reach, and the peak of memory.

    model: with the fused attention, on the model of another job.
    """
    attention, what = ("fused", f"{FUSED}, ") if model else ("plain", "")
    job = Job(folder, size, make_settings(size, "bfloat16", LEARNING_RATE["speed"], repeat=False, attention=attention))
    pairs = prepare(job, model, repeat=False)
    work = flops.count_flops(pairs, size.model.shape(), size.model.vocabulary)
    tokens = sum(len(ids) for pair in pairs for name, ids in pair.items() if name.endswith("_token_ids"))
    billions = size.model.parameters() / 1e9
    for stage, passes in (("reference", 1), ("train", 3)):
        result = call(stage, folder)
        # Batches differ in length, so the first one, which is not timed, counts as an average one.
        steps = len(result["seconds"])
        seconds = sum(result["seconds"]) / steps * size.steps
        share, rate = work * passes / seconds / limit, tokens / seconds
        speed = rows.judge(
            f"{stage}, {what}{billions:.2g}B parameters, bfloat16: share of the GPU's measured {limit / 1e12:.3g} TFLOP/s",
            f"{share:.2f} ({rate:.0f} tokens/s)",
            f">= {FLOORS[stage]:g}",
            share >= FLOORS[stage],
        )
        peak, estimate = result["peak"] / 1e9, estimate_peak(stage, job) / 1e9
        peak_row = rows.judge(
            f"{stage}, {what}{billions:.2g}B parameters, bfloat16: peak of GPU memory against the estimate",
            f"{peak:.1f} GB",
            f"{SLACK:g} to 1 times {estimate:.1f} GB",
            SLACK * estimate <= peak <= estimate,
        )
        rows.report(rows.judge_on_gpu(speed, rehearsal), rows.judge_on_gpu(peak_row, rehearsal))


def check_fused(sizes: Sizes, folder: Path, limit: float) -> None:
    """Report the same of `train.attention: fused`, after the other checks in `folder`. A stage that refuses it fails a row."""
    parity, speed = folder / "parity", folder / "speed"
    settings = make_settings(sizes.parity, "bfloat16", LEARNING_RATE["parity"], repeat=True, attention="fused")
    job = Job(parity / "fused", sizes.parity, settings)
    prepare(job, parity / "float32" / "model", repeat=True)
    expected = json.loads((parity / "float32" / "plain.json").read_text())
    try:
        call("reference", job.folder)
        call("train", job.folder)
        rows.report(*compare_with_plain("bfloat16", job.folder, expected, FUSED))
        check_speed(sizes.speed, folder / "speed-fused", limit, False, model=speed / "model")
    except SystemExit as error:
        rows.report(rows.Row(f"reference and train, {FUSED}: the stages' own checks", "", "to pass", rows.FAIL, str(error)))


def run(sizes: Sizes, folder: Path, limits: dict[str, float], rehearsal: bool) -> None:
    """Run this part. limits: from gpu_check/__main__.py."""
    check_parity(sizes.parity, folder / "parity")
    check_speed(sizes.speed, folder / "speed", limits["flops"], rehearsal)
    if rehearsal:
        rows.report(rows.skip(f"reference and train, {FUSED}", "rehearsal: the setting has no effect on a CPU"))
    else:
        check_fused(sizes, folder, limits["flops"])

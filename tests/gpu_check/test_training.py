"""The checks themselves: what would be wrong fails a row. The stages are not run."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpu_check import plain, sizes, training
from stages.artifacts import schemas
from stages.runtime import params

LOGPS = [[-100.0, -200.0], [-50.0, -80.0]]
LOSSES = [4.0, 3.0, 2.0]


def write_run(folder: Path, logps: list[list[float]], losses: list[float]) -> Path:
    """Write what the stages leave in a folder."""
    (folder / "logps").mkdir(parents=True)
    columns = [[str(index) for index in range(len(logps))], *map(list, zip(*logps, strict=True))]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schemas.LOGPS, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schemas.LOGPS), folder / "logps" / "shard-0.parquet")
    with (folder / "log.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(schemas.LOG_COLUMNS)
        writer.writerows([step, loss, *[0] * (len(schemas.LOG_COLUMNS) - 2)] for step, loss in enumerate(losses, 1))
    return folder


@pytest.mark.parametrize(
    ("dtype", "logps", "losses", "verdicts"),
    [
        ("float32", LOGPS, LOSSES, ["pass", "pass"]),
        ("float32", [[-100.1, -200.0], [-50.0, -80.0]], LOSSES, ["fail", "pass"]),
        ("bfloat16", [[-100.1, -200.0], [-50.0, -80.0]], LOSSES, ["pass", "pass"]),
        ("float32", LOGPS, [4.0, 3.0, 2.1], ["pass", "fail"]),
        ("bfloat16", LOGPS, [4.0, 3.0, 2.1], ["pass", "pass"]),
        ("bfloat16", LOGPS, [4.0, 3.0, 2.5], ["pass", "fail"]),
        ("bfloat16", [[-200.0, -100.0], [-50.0, -80.0]], LOSSES, ["fail", "pass"]),
        ("bfloat16", LOGPS, [4.0, 3.0], ["pass", "fail"]),
        ("bfloat16", LOGPS[:1], LOSSES, ["fail", "pass"]),
    ],
)
def test_what_differs_from_the_plain_loop_fails(
    dtype: Any, logps: list[list[float]], losses: list[float], verdicts: list[str], tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", logps, losses)
    found = training.compare_with_plain(dtype, folder, {"logps": LOGPS, "losses": LOSSES})
    assert [row.verdict for row in found] == verdicts


def test_the_rate_rises_and_falls_as_trainers_does() -> None:
    assert [plain.learning_rate(step, 8, 2, 6.0) for step in range(8)] == [0, 3, 6, 5, 4, 3, 2, 1]


def test_the_large_training_fits_24_gb_by_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "validate", None)  # whatever is set in params.yaml
    size = sizes.GPU.speed
    job = training.Job(tmp_path, size, training.make_settings(size, "bfloat16", 1e-6, repeat=False))
    state = size.model.parameters() * (2 + 2 + 4 + 4)  # weights, gradients, master weights, mean squares
    assert state < training.estimate_peak("train", job) < 22e9
    assert 2 * size.model.parameters() < training.estimate_peak("reference", job) < 8e9

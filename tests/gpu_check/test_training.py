"""The checks themselves: what would be wrong fails a row. The stages are not run."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpu_check import plain, rows, sizes, training
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


class Calls:
    """Stands for the workers: writes what each leaves behind, or refuses as a stage does."""

    def __init__(self, refused: str = "") -> None:
        self.made: list[tuple[str, str, str]] = []
        self.refused = refused

    def __call__(self, name: str, folder: Path) -> dict[str, Any]:
        settings = json.loads((folder / "settings.json").read_text())
        self.made.append((name, folder.name, settings["attention"]))
        if name == self.refused:
            raise SystemExit(f"{name} failed: see its message above")
        if name == "train" and folder.name == "fused":
            write_run(folder, LOGPS, LOSSES)
        return {"seconds": [1.0, 1.0, 1.0], "peak": 1e9}


@pytest.mark.parametrize("refused", ["", "reference", "train"])
def test_the_fused_attention_is_run_at_both_sizes_and_a_refusal_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: str
) -> None:
    calls = Calls(refused)
    monkeypatch.setattr(training, "call", calls)
    for name in ("parity/float32/model", "speed/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "parity" / "float32" / "plain.json").write_text(json.dumps({"logps": LOGPS, "losses": LOSSES}))
    training.check_fused(sizes.CPU, tmp_path, 1e12)
    found = [row for line in capsys.readouterr().out.splitlines() if (row := rows.parse(line))]
    assert all("train.attention: fused" in row.what for row in found)
    expected = [(stage, folder, "fused") for folder in ("fused", "speed-fused") for stage in ("reference", "train")]
    if refused:
        assert [row.verdict for row in found] == ["fail"]
        assert f"{refused} failed" in found[0].reason
    else:
        assert calls.made == expected
        assert [row.verdict for row in found[:2]] == ["pass", "pass"]
        assert len(found) == 6


def test_in_a_rehearsal_the_fused_attention_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("check_parity", "check_speed", "check_fused"):
        monkeypatch.setattr(training, name, lambda *_: None)
    training.run(sizes.CPU, tmp_path, {"flops": 1e12}, rehearsal=True)
    (row,) = [row for line in capsys.readouterr().out.splitlines() if (row := rows.parse(line))]
    assert (row.verdict, row.what) == ("skipped", "reference and train, train.attention: fused")

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from benchmarks import train
from gpu_check import invariance, rows, sizes
from stages.artifacts import schemas
from stages.engines import sampling


def report_rows(capsys: pytest.CaptureFixture[str], folder: Path) -> list[rows.Row]:
    invariance.run(sizes.CPU, folder, {}, rehearsal=False)
    return [row for line in capsys.readouterr().out.splitlines() if (row := rows.parse(line))]


def pretend(monkeypatch: pytest.MonkeyPatch, *, installed: bool, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("installed", "capability", "reason"),
    [
        (False, (9, 0), "vllm is not installed"),
        (True, None, "needs an NVIDIA GPU of compute capability 8.0 or higher"),
        (True, (7, 5), "needs an NVIDIA GPU of compute capability 8.0 or higher, and this one has 7.5"),
    ],
)
def test_where_it_cannot_run_it_is_skipped_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    installed: bool,
    capability: tuple[int, int] | None,
    reason: str,
) -> None:
    pretend(monkeypatch, installed=installed, capability=capability)
    (row,) = report_rows(capsys, tmp_path)
    assert (row.verdict, row.reason) == ("skipped", reason)


@pytest.mark.parametrize(("influence", "verdict"), [(0, "pass"), (1, "fail")])
def test_an_influence_of_the_other_prompts_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, influence: int, verdict: str
) -> None:
    """The engine is replaced by one whose tokens depend on the prompt and, with an influence, on the size of the batch."""

    def start_engine(_: Path, engine: Any, __: int) -> Any:
        assert engine.batch_invariant
        return SimpleNamespace()

    def sample_shard(_: Any, __: Any, ___: Any, shard: pa.Table) -> pa.Table:
        found = shard.to_pylist()
        for row in found:
            row |= {"responses": ["x"], "finish_reasons": ["stop"], "token_counts": [1], "seeds": [0]}
            row["token_ids"] = [[sum(row["prompt_token_ids"]) + influence * len(found)]]
        return pa.Table.from_pylist(found, schema=schemas.RESPONSES)

    pretend(monkeypatch, installed=True, capability=(8, 0))
    monkeypatch.setattr(train, "make_model", lambda *_: None)
    monkeypatch.setattr(sampling, "start_engine", start_engine)
    monkeypatch.setattr(sampling, "sample_shard", sample_shard)
    row, speed = report_rows(capsys, tmp_path)
    assert row.verdict == verdict
    assert "4 of 8 prompts" in row.what
    assert speed.verdict == "measured"
    assert float(speed.value.removesuffix(" tokens/s")) > 0

import json
from pathlib import Path

import pytest

from stages.runtime import run
from stages.tools import timings
from support.running import run_tool

ROWS = [{"stage": "split", "seconds": 1.5, "peak_gb": 0.25}, {"stage": "train@iter1", "seconds": 60.25, "peak_gb": 4.5}]


def test_a_run_is_shown_with_its_total_until_the_next_one_starts(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch/timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shown = run_tool(tmp_path, "timings", "show")
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines() if line]
    assert lines[1:3] == [["split", "1.5", "0.25"], ["train@iter1", "60.2", "4.50"]]
    assert lines[3][-2:] == ["61.8", "4.50"]
    assert run_tool(tmp_path, "timings", "start").returncode == 0
    assert "up to date" in run_tool(tmp_path, "timings", "show").stdout


def test_the_format_is_the_one_that_a_stage_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.scratch, "FOLDER", tmp_path)
    monkeypatch.setenv("DVC_STAGE", "recipes/x/dvc.yaml:split")
    run.log_timing("split", 1.23)
    rows = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert "recipes/x/dvc.yaml:split" in timings.format_timings(rows)

import json
from pathlib import Path

import pytest

from stages.runtime import run
from stages.runtime.errors import StageError
from stages.tools import plan, timings
from support.running import run_tool

ROWS = [{"stage": "split", "seconds": 1.5, "peak_gb": 0.25}, {"stage": "train@iter1", "seconds": 60.25, "peak_gb": 4.5}]


@pytest.mark.slow
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
    monkeypatch.setattr(run, "TIMINGS", tmp_path / "timings.jsonl")
    monkeypatch.setenv("DVC_STAGE", "recipes/x/dvc.yaml:split")
    run.log_timing("split", 1.23)
    rows = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert "recipes/x/dvc.yaml:split" in timings.format_timings(rows)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [b"", b"[]", b'{"seconds": 5}', b"\xff", None])
def test_timings_and_a_plan_that_a_power_cut_left_do_not_stop_a_run(tmp_path: Path, plan: bytes | None) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch/timings.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"stage": "tr')
    if plan is not None:
        (tmp_path / "scratch/plan.json").write_bytes(plan)
    shown = run_tool(tmp_path, "timings", "show")
    assert (shown.returncode, "split" in shown.stdout) == (0, True), shown.stderr
    started = run_tool(tmp_path, "timings", "start")
    assert started.returncode == 0, started.stderr
    assert json.loads((tmp_path / "scratch/plan.json").read_text())["seconds"] == {"split": 1.5}


def test_the_plan_of_a_run_has_what_each_stale_stage_took_the_last_time_that_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def plan_run(stale: list[str], done: dict[str, float]) -> dict[str, float | None]:
        """Start a run in which these stages are stale, and return its plan; then those in `done` run."""
        monkeypatch.setattr(plan, "find_stale_stages", lambda folder: dict.fromkeys(stale, "changed"))
        timings.start()
        rows = [{"stage": stage, "seconds": seconds, "peak_gb": 1.0} for stage, seconds in done.items()]
        run.TIMINGS.write_text("".join(json.dumps(row) + "\n" for row in rows))
        stages: dict[str, float | None] = json.loads(run.PLAN.read_text())["stages"]
        return stages

    nothing_known = {"split": None, "train@iter1": None}
    assert plan_run(["split", "train@iter1"], {"split": 2.0, "dvc.yaml:train@iter1": 30.0}) == nothing_known
    assert plan_run(["train@iter1"], {"train@iter1": 40.0}) == {"train@iter1": 30}
    assert plan_run(["report", "split", "train@iter1"], {}) == {"report": None, "split": 2, "train@iter1": 40}


def test_a_run_starts_without_a_plan_if_dvc_cannot_tell_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a fault in dvc.yaml, which `dvc repro` then describes."""
    monkeypatch.chdir(tmp_path)

    def refuse(folder: Path) -> None:
        raise StageError("dvc.yaml is at fault")

    monkeypatch.setattr(plan, "find_stale_stages", refuse)
    timings.start()
    assert json.loads(run.PLAN.read_text())["stages"] == {}

"""The parts in processes of their own, and the whole check in its rehearsal."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_check import __main__ as check
from gpu_check import rows
from stages.runtime.paths import ROOT

ROW = "from gpu_check import rows; rows.report(rows.same_bytes('bytes', ['a'])); print('noise', flush=True)"


def start(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)


def test_rows_of_a_part_are_collected() -> None:
    assert [row.what for row in check.collect("x", start(ROW), 60)] == ["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rest", "seconds", "reason"),
    [("raise SystemExit(3)", 60, "ended with an error"), ("import time; time.sleep(600)", 6, "not finished after 6 s")],
)
def test_a_part_that_fails_or_hangs_keeps_its_rows_and_fails(rest: str, seconds: float, reason: str) -> None:
    done, failed = check.collect("x", start(f"{ROW}; {rest}"), seconds)
    assert (done.what, done.verdict) == ("bytes", rows.PASS)
    assert failed.verdict == rows.FAIL
    assert reason in failed.reason


def test_the_page_counts_the_verdicts() -> None:
    found = [rows.judge("a", "1", "1", True), rows.skip("b", "why"), rows.measure("c", "2"), rows.measure("d", "3")]
    page = check.format_page("A GPU", ["- device: A GPU"], found)
    assert page.startswith("# GPU check: A GPU\n")
    assert "- rows: 1 pass, 0 fail, 2 measured, 1 skipped\n\n| what |" in page


@pytest.mark.parametrize(("rehearsal", "gpu"), [(True, ""), (False, "3")])
def test_a_part_gets_one_gpu_and_nothing_that_was_set_for_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rehearsal: bool, gpu: str
) -> None:
    for name, value in {"RAY_ADDRESS": "10.0.0.1:6379", "SPPO_WORKERS": "7", "CUDA_VISIBLE_DEVICES": "3,5"}.items():
        monkeypatch.setenv(name, value)
    environment = check.make_environment(tmp_path, rehearsal)
    assert "RAY_ADDRESS" not in environment
    assert [name for name in environment if name.startswith("SPPO_")] == ["SPPO_SCRATCH"]
    assert environment["SPPO_SCRATCH"] == str(tmp_path / "scratch")
    assert environment["CUDA_VISIBLE_DEVICES"] == gpu
    assert environment["PATH"] == os.environ["PATH"]


def run_check(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "gpu_check", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_without_a_gpu_the_check_says_so_in_one_line(tmp_path: Path) -> None:
    done = run_check("--out", str(tmp_path / "table.md"))
    assert done.returncode == 1
    assert re.fullmatch(r"gpu_check: error: torch .* sees no GPU: .*--rehearsal`\n", done.stderr)
    assert not (tmp_path / "table.md").exists()


@pytest.mark.slowest
def test_the_rehearsal_runs_every_part_and_none_of_its_rows_fails(tmp_path: Path) -> None:
    done = run_check("--rehearsal", "--budget", "1500", "--out", str(tmp_path / "table.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| fail" not in table
    assert table.count("| pass |") == 11, table
    assert table.count("skipped: rehearsal") == 8, table
    assert "| skipped: needs an NVIDIA GPU" in table
    for stage in ("reference", "train", "rank", "generate", "evaluate-lm"):
        assert f"| {stage}" in table

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
    page = check.format_page("A GPU", ["- device: A GPU"], [rows.judge("a", "1", "1", True), rows.skip("b", "why")])
    assert page.startswith("# GPU check: A GPU\n")
    assert "- rows: 1 pass, 0 fail, 1 skipped\n\n| what |" in page


def run_check(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "gpu_check", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_the_check_says_so_in_one_line(tmp_path: Path) -> None:
    done = run_check("--out", str(tmp_path / "table.md"))
    assert done.returncode == 1
    assert re.fullmatch(r"gpu_check: error: torch .* sees no GPU: .*--rehearsal`\n", done.stderr)
    assert not (tmp_path / "table.md").exists()


@pytest.mark.slow
def test_the_rehearsal_runs_every_part_and_none_of_its_rows_fails(tmp_path: Path) -> None:
    done = run_check("--rehearsal", "--budget", "1500", "--out", str(tmp_path / "table.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| fail" not in table
    assert table.count("| pass |") == 11, table
    assert table.count("skipped: rehearsal") == 7, table
    for stage in ("reference", "train", "rank", "generate", "evaluate-lm"):
        assert f"| {stage}" in table

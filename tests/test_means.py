import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages import diff, means
from stages.cli import ROOT, StageError


def revision(title: str, rate: float | None) -> diff.Revision:
    metrics: dict[str, Any] = {
        "alpaca_eval": {"iter1": {"win_rate": rate, "standard_error": 1.0}},
        "open_llm_leaderboard": {"iter1": {"mmlu": 30, "standard_errors": {"mmlu": 2.0}}},
        "training": {"iter1": {"pairs": 512}},
    }
    return diff.Revision(title, {}, None if rate is None else diff.flat(metrics), {})


def test_means_and_deviations_are_over_the_runs() -> None:
    page = means.page([revision(f"seed{index}", rate) for index, rate in enumerate([60.0, 62.0, 67.0])])
    assert "| alpaca\\_eval iter1 win\\_rate | 63.00 | 3.61 | 60.00, 62.00, 67.00 |" in page
    assert "| open\\_llm\\_leaderboard iter1 mmlu | 30.00 | 0.00 | 30.00, 30.00, 30.00 |" in page
    assert "standard\\_error" not in page
    assert "pairs" not in page
    assert "Over seed0, seed1, seed2" in page


def test_a_run_without_metrics_is_refused() -> None:
    with pytest.raises(StageError, match=r"seed1 has no reports/metrics\.json"):
        means.page([revision("seed0", 1.0), revision("seed1", None)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["HEAD"], "name another"), (["HEAD", "nothing-so-named"], "'nothing-so-named' is no revision")],
)
def test_the_command_refuses_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages.means", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1

from pathlib import Path
from typing import Any

import pytest

from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import means, revisions
from support.messages import assert_message
from support.running import run_tool


def make_revision(title: str, rate: float | None) -> revisions.Revision:
    metrics: dict[str, Any] = {
        "alpaca_eval": {"iter1": {"win_rate": rate, "standard_error": 1.0}},
        "open_llm_leaderboard": {"iter1": {"mmlu": 30, "standard_errors": {"mmlu": 2.0}}},
        "training": {"iter1": {"pairs": 512}},
    }
    return revisions.Revision(title, {}, None if rate is None else revisions.flatten(metrics), {})


def test_means_and_deviations_are_over_the_runs() -> None:
    page = means.format_means([make_revision(f"seed{index}", rate) for index, rate in enumerate([60.0, 62.0, 67.0])])
    assert "| alpaca\\_eval iter1 win\\_rate | 63.00 | 3.61 | 60.00, 62.00, 67.00 |" in page
    assert "| open\\_llm\\_leaderboard iter1 mmlu | 30.00 | 0.00 | 30.00, 30.00, 30.00 |" in page
    assert "standard\\_error" not in page
    assert "pairs" not in page
    assert "seed0, seed1, seed2" in page


def test_a_run_without_metrics_is_refused() -> None:
    with pytest.raises(StageError) as error:
        means.format_means([make_revision("seed0", 1.0), make_revision("seed1", None)])
    assert_message(str(error.value), "seed1", "reports/metrics.json", "dvc repro")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [(["HEAD"], ["two revisions", "name another"]), (["HEAD", "nothing-so-named"], ["'nothing-so-named'", "dvc exp show"])],
)
def test_a_wrong_command_is_refused_in_one_line(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    done = run_tool(ROOT, "means", *arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert_message(done.stderr, "means: error: ", *parts)

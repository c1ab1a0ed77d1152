"""What the end of a run says: whether its results are the committed ones, where they depart from them, and by how much."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.tools import drift
from support import revisions
from support.messages import assert_message
from support.running import run_tool

SEEDS = {
    "seeds": [1, 2, 3],
    "figures": {"alpaca_eval.iter1.win_rate": [60.0, 62.0, 67.0], "alpaca_eval.base.win_rate": [49, 50, 51]},
}
"""iter1: SD sqrt(13) = 3.606, so that two runs differ by up to 4.303 sqrt(2) 3.606 = 21.94."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose last commit has results and their noise, and nothing else."""
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path, 0, revisions.LOCK)
    (tmp_path / "reports/seeds.json").write_text(json.dumps(SEEDS))
    revisions.git(tmp_path, "init", "-q")
    revisions.commit(tmp_path, "run")
    return tmp_path


def write_results(folder: Path, shift: float, stages: dict[str, Any]) -> None:
    (folder / "reports").mkdir(exist_ok=True)
    (folder / "reports/metrics.json").write_text(json.dumps(revisions.make_metrics(shift)))
    revisions.write_lock(folder, stages)


def change_model() -> dict[str, Any]:
    stages = copy.deepcopy(revisions.LOCK)
    stages["train@iter1"]["outs"][0]["md5"] = "0" * 32
    return stages


def read_table(text: str) -> dict[str, list[str]]:
    """Return the numbers and words of each row, by its name."""
    rows = [line for line in text.splitlines() if line.startswith(("base", "iter"))]
    return {line[:36].strip(): line[36:].split() for line in rows}


def test_committed_results_are_one_line(folder: Path) -> None:
    text = drift.describe_drift(Path())
    assert text.startswith("OK: all 4 outputs ")
    assert len(text.splitlines()) == 1
    (folder / "dvc.lock").write_text((folder / "dvc.lock").read_text() + "# rewritten\n")
    assert drift.describe_drift(Path()) == text


@pytest.mark.parametrize(("shift", "word"), [(21.8, "yes"), (-21.8, "yes"), (22.1, "no"), (-22.1, "no")])
def test_other_results_are_compared_with_noise(shift: float, word: str, folder: Path) -> None:
    write_results(folder, shift, change_model())
    text = drift.describe_drift(Path())
    words = " ".join(text.split())
    assert "1 of 4 outputs" in words
    assert "stage train@iter1" in words
    assert "this machine" in words
    assert read_table(text) == {
        "base win rate": ["50.00", "50.00", "+0.00", "yes"],
        "iter1 win rate": ["60.00", f"{60 + shift:.2f}", f"{shift:+.2f}", word],
    }
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii(), "a terminal may not have more characters"


def test_noise_is_that_of_the_commit_and_unknown_without_it(folder: Path) -> None:
    write_results(folder, 5, change_model())
    (folder / "reports/seeds.json").unlink()
    assert read_table(drift.describe_drift(Path()))["iter1 win rate"][-1] == "yes"
    revisions.git(folder, "rm", "-q", "--cached", "reports/seeds.json")
    revisions.git(folder, "commit", "-qm", "no seeds", "--", "reports/seeds.json")
    text = drift.describe_drift(Path())
    assert read_table(text)["iter1 win rate"][-1] == "unknown"
    assert "make seeds" in text


@given(st.floats(-40, 40), st.floats(0.01, 10))
def test_noise_is_what_does_not_exceed_the_limit(difference: float, limit: float) -> None:
    key = "alpaca_eval", "iter1", "win_rate"
    table = drift.format_figures({key: 50.0}, {key: 50.0 + difference}, {".".join(key): limit})
    if abs(abs(difference) - limit) > 1e-9:
        assert read_table(table)["iter1 win rate"][-1] == ("yes" if abs(difference) < limit else "no")
    other = drift.format_figures({key: 50.0}, {key: 50.0 + difference}, {"alpaca_eval.iter1.avg_length": limit})
    assert read_table(other)["iter1 win rate"][-1] == "unknown"


def test_changed_parameters_are_named_instead_of_the_machine(folder: Path) -> None:
    stages = change_model() | {"split": copy.deepcopy(revisions.LOCK["split"])}
    stages["split"]["params"] = {"params.yaml": {f"p{number}": 1 for number in range(7)}}
    write_results(folder, 5, stages)
    words = " ".join(drift.describe_drift(Path()).split())
    assert "p0 in params.yaml, p1 in params.yaml" in words
    assert "2 more" in words
    assert "p5" not in words
    assert "machine" not in words


def test_a_record_that_differs_is_named(folder: Path) -> None:
    stages = change_model()
    write_results(folder, 5, stages)
    assert "data/records" not in drift.describe_drift(Path())
    stages["train@iter1"]["outs"].append({"path": "data/records/train@iter1.json", "md5": "0" * 32})
    write_results(folder, 5, stages)
    words = " ".join(drift.describe_drift(Path()).split())
    assert "1 of 4 outputs" in words
    assert "data/records/train@iter1.json" in words


def test_win_rates_that_one_run_lacks_are_left_out(folder: Path) -> None:
    write_results(folder, 5, change_model())
    (folder / "reports/metrics.json").write_text("{}")
    text = drift.describe_drift(Path())
    assert read_table(text) == {}
    assert "no win rates" in text


def test_a_commit_without_results_is_named(folder: Path) -> None:
    revisions.git(folder, "rm", "-q", "--cached", "dvc.lock")
    (folder / ".gitignore").write_text("dvc.lock\n")
    revisions.commit(folder, "no lock")
    text = drift.describe_drift(Path())
    assert_message(text, "no dvc.lock")
    assert len(text.splitlines()) == 1


def test_a_run_without_a_lock_is_refused_in_one_line(folder: Path) -> None:
    (folder / "dvc.lock").unlink()
    done = run_tool(folder, "drift")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert_message(done.stderr, "drift: error: ", "dvc.lock", "dvc repro")


@pytest.mark.slow
def test_a_latin_1_terminal_is_enough(folder: Path) -> None:
    write_results(folder, 5, change_model())
    done = run_tool(folder, "drift", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_difference_is_not_a_failure(folder: Path) -> None:
    write_results(folder, 5, change_model())
    done = run_tool(folder, "drift")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip("\n") == drift.describe_drift(Path())


def test_a_recipe_is_compared_with_its_own_files(folder: Path) -> None:
    recipe = folder / "recipes/r"
    recipe.mkdir(parents=True)
    write_results(recipe, 0, revisions.LOCK)
    (recipe / "reports/seeds.json").write_text(json.dumps(SEEDS))
    revisions.commit(folder, "recipe")
    write_results(folder, 5, change_model())
    assert drift.describe_drift(Path("recipes/r")).startswith("OK")
    write_results(recipe, -30, change_model())
    assert read_table(drift.describe_drift(Path("recipes/r")))["iter1 win rate"] == ["60.00", "30.00", "-30.00", "no"]

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import diff, files, health, markdown, params, provenance, report
from stages.cli import ROOT, StageError


@given(st.text())
def test_a_cell_holds_no_markup_and_no_line_break(text: str) -> None:
    cell = markdown.escape(text)
    assert len(cell.splitlines()) <= 1
    assert "<" not in cell
    assert all(cell[index - 1] == "\\" for index, mark in enumerate(cell) if mark in "`*_[]#|~")


def test_a_table_has_as_many_cells_as_its_header() -> None:
    lines = markdown.table(["model", "a|b"], [["x", "1 | <script>"], ["y", "\n"]]).splitlines()
    assert lines[2] == "| x | 1 \\| &lt;script&gt; |"
    assert lines[3] == "| y |  |"


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=6, max_size=6))
def test_the_average_is_plain_and_its_error_that_of_independent_tasks(values: list[tuple[float, float]]) -> None:
    pairs = zip(report.TASKS, values, strict=True)
    summary = {task: {"value": v, "standard_error": e} for task, (v, e) in pairs}
    value, error = report.harness_figures(summary)["average"]
    assert value == pytest.approx(sum(v for v, _ in values) / 6)
    assert error == pytest.approx(math.sqrt(sum(e * e for _, e in values)) / 6)


def test_metrics_hold_the_figures_and_beside_them_their_standard_errors() -> None:
    held = report.with_errors({"mmlu": (28.0, 4.0), "average": (39.0, 2.0)})
    assert held == {"mmlu": 28.0, "average": 39.0, "standard_errors": {"mmlu": 4.0, "average": 2.0}}
    assert (
        diff.standard_error(diff.flat({"open_llm_leaderboard": {"base": held}}), ("open_llm_leaderboard", "base", "mmlu")) == 4
    )


PUBLISHED = params.published(ROOT / "recipes/llama-3-8b/published.yaml")


def alpaca(judge: str) -> dict[str, dict[str, Any]]:
    """The base 0.1 above the published figures, iter1 10 below."""
    assert PUBLISHED
    shifts = {"base": 0.1, "iter1": -10.0}
    return {
        name: {
            "length_controlled_winrate": PUBLISHED.alpaca_eval.models[name].length_controlled_winrate + shift,
            "lc_standard_error": 0.9,
            "win_rate": PUBLISHED.alpaca_eval.models[name].win_rate + shift,
            "standard_error": 1.4,
            "avg_length": 1900,
            "n_total": 805,
            "judge": judge,
        }
        for name, shift in shifts.items()
    }


def rows(page: str) -> list[list[str]]:
    """The cells of a page's tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


def test_our_figures_stand_beside_the_published_ones() -> None:
    page = report.alpaca_page(alpaca("gpt-4-1106-preview"), PUBLISHED)
    cells = rows(page)
    assert ["base", "Meta-Llama-3-8B-Instruct", "LC win rate", "23.02", "22.92", "0.10", "yes"] in cells
    assert ["iter1", "Llama-3-Instruct-8B-SPPO-Iter1", "win rate", "21.74", "31.74", "-10.00", "no"] in cells
    assert ["base", "Meta-Llama-3-8B-Instruct", "average length", "1900.00", "1899.00", "1.00", "–"] in cells
    assert not [row for row in cells if row[0] == "iter2"], "a model that was not made has no row"
    assert "Another judge" not in page


def test_another_judge_is_named_beside_the_published_figures() -> None:
    assert "**Another judge**: ours are of `my-judge`" in report.alpaca_page(alpaca("my-judge"), PUBLISHED)


def test_without_published_figures_the_page_says_so() -> None:
    page = report.alpaca_page(alpaca("my-judge"), None)
    assert "No figures are published of these models." in page
    assert "Against the published figures" not in page


@pytest.mark.parametrize(
    ("error", "theirs", "difference", "within"),
    [(1.0, None, 2.7, "yes"), (1.0, None, 2.8, "no"), (1.0, 0.0, 1.9, "yes"), (1.0, 0.0, -2.0, "no"), (None, None, 1.0, "–")],
)
def test_within_error_is_of_both(error: float | None, theirs: float | None, difference: float, within: str) -> None:
    assert report.judged(error, theirs, difference) == within


def test_a_figure_that_was_not_published_is_a_dash() -> None:
    gemma = params.published(ROOT / "recipes/gemma-2-9b/published.yaml")
    assert gemma
    cells = rows(report.alpaca_page(alpaca("gpt-4-1106-preview"), gemma))
    assert ["base", "Gemma-2-9B-It", "average length", "1900.00", "–", "–", "–"] in cells
    assert ["iter1", "Gemma-2-9B-It-SPPO-Iter1", "average length", "1900.00", "1669.00", "231.00", "–"] in cells


def test_the_harness_page_without_a_published_table_says_so() -> None:
    gemma = params.published(ROOT / "recipes/gemma-2-9b/published.yaml")
    summary = {task: {"value": 50.0, "standard_error": 1.0, "shots": 5, "metric": "acc"} for task in report.TASKS}
    assert report.harness_page({"base": summary}, gemma) == report.harness_page({"base": summary}, None)
    assert "No figures are published of these models." in report.harness_page({"base": summary}, gemma)


def test_the_harness_page_marks_what_is_beyond_error() -> None:
    assert PUBLISHED
    assert PUBLISHED.open_llm_leaderboard
    theirs = PUBLISHED.open_llm_leaderboard.models["base"]
    summary = {
        task: {"value": theirs[task] + (9 if task == "gsm8k" else 1), "standard_error": 1.2, "shots": 5, "metric": "acc_norm"}
        for task in report.TASKS
    }
    differences = next(row for row in rows(report.harness_page({"base": summary}, PUBLISHED)) if row[1] == "difference")
    assert differences[2:] == ["+1.00", "+1.00", "+1.00", "+9.00 (beyond error)", "+1.00", "+1.00", "+2.34 (beyond error)"]


@pytest.mark.parametrize("recipe", ["llama-3-8b", "mistral-7b"])
def test_the_published_averages_are_those_of_their_tasks(recipe: str) -> None:
    published = params.published(ROOT / "recipes" / recipe / "published.yaml")
    assert published
    assert published.open_llm_leaderboard
    for figures in published.open_llm_leaderboard.models.values():
        assert figures["average"] == pytest.approx(sum(figures[task] for task in report.TASKS) / 6, abs=0.0051)


def test_the_matrix_has_a_row_and_a_column_for_every_model() -> None:
    comparison = {"models": ["base", "iter1"], "win_rates": [[50, 40], [60, 50]], "standard_errors": [[0, 1], [1, 0]], "n": 9}
    assert rows(report.ranker_page(comparison))[2:] == [["base", "–", "40.0 ± 1.0"], ["iter1", "60.0 ± 1.0", "–"]]


def test_steps_that_were_all_clipped_are_said_to_be() -> None:
    figures: dict[str, float] = dict.fromkeys(health.FIGURES, 0)
    page = health.page({"iter1": figures | {"clipped_steps": 1.0}, "iter2": figures | {"clipped_steps": 0.5}})
    assert "Every step of iter1 was clipped" in page


def test_provenance_names_values_hashes_and_circumstances(tmp_path: Path) -> None:
    wanted = params.validate(ROOT / "params.yaml")
    record = {"python": "3.11.7", "tools": {"torch": "2.13.0"}, "device": {"kind": "a_gpu", "count": 8}}
    for name in ("split", "train@iter1", "train@dropped"):
        files.write_json(record, tmp_path / "records" / f"{name}.json")
    lock = tmp_path / "dvc.lock"
    lock.write_text(
        "stages: {assets-ranker: {outs: [{path: data/records/x.json, md5: no}, {path: data/ranker, md5: abc.dir}]}}"
    )
    cells = rows(provenance.page(wanted, tmp_path, lock))
    assert ["P^ from logits", "rank.probability", "pairwise", "pairwise", "aggregate"] in cells
    assert ["ranker", "made here from the seed", "abc.dir"] in cells
    assert ["policy", "made here from the seed", "not in dvc.lock"] in cells
    assert ["split, train@iter1", "8 x a\\_gpu", "3.11.7", "torch 2.13.0"] in cells


def test_numbers_are_rounded_to_six_digits_wherever_they_stand() -> None:
    assert report.rounded({"a": {"b": 1.23456789, "c": 5}, "d": "x"}) == {"a": {"b": 1.23457, "c": 5}, "d": "x"}


ALPACA = alpaca("gold")["base"]
HARNESS = {task: {"value": 50.0, "standard_error": 1.0, "shots": 5, "metric": "acc"} for task in report.TASKS}
COMPARISON = {"models": ["base", "iter1"], "win_rates": [[50, 40], [60, 50]], "standard_errors": [[0, 1], [1, 0]], "n": 9}
AGAIN = ": make it with `dvc repro`"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("metrics.json", ALPACA | {"win_rate": math.nan}, f": 'win_rate' is nan, not a number from 0 to 100{AGAIN}"),
        ("metrics.json", ALPACA | {"win_rate": 100.5}, f": 'win_rate' is 100.5, not a number from 0 to 100{AGAIN}"),
        ("metrics.json", ALPACA | {"lc_standard_error": -1}, f": 'lc_standard_error' is -1, not a number from 0 to 100{AGAIN}"),
        ("metrics.json", ALPACA | {"standard_error": None}, f": 'standard_error' is None, not a number from 0 to 100{AGAIN}"),
        ("metrics.json", ALPACA | {"avg_length": math.inf}, f": 'avg_length' is inf, not a number from 0 to 1e+09{AGAIN}"),
        ("metrics.json", ALPACA | {"n_total": "805"}, f": 'n_total' is '805', not a number from 0 to 1e+09{AGAIN}"),
        ("metrics.json", {"win_rate": 1}, f" lacks 'standard_error'{AGAIN}"),
        ("metrics.json", [], f" lacks 'win_rate'{AGAIN}"),
        ("summary.json", {**HARNESS, "gsm8k": {}}, f" lacks gsm8k.value{AGAIN}"),
        ("summary.json", dict(list(HARNESS.items())[:5]), f" lacks mmlu.value{AGAIN}"),
        (
            "summary.json",
            {**HARNESS, "mmlu": HARNESS["mmlu"] | {"value": 0.5e3}},
            f": mmlu.value is 500.0, not a number from 0 to 100{AGAIN}",
        ),
        (
            "comparison.json",
            COMPARISON | {"models": ["base"]},
            f": not models, n, standard_errors, win_rates of base, iter1{AGAIN}",
        ),
        ("comparison.json", COMPARISON | {"win_rates": [[50, 40], [60]]}, f": 'win_rates' is not 2 x 2{AGAIN}"),
        ("comparison.json", COMPARISON | {"win_rates": None}, f": 'win_rates' is not 2 x 2{AGAIN}"),
        (
            "comparison.json",
            COMPARISON | {"standard_errors": [[0, math.nan], [1, 0]]},
            f": 'standard_errors' of base and iter1 is nan, not a number from 0 to 100{AGAIN}",
        ),
        ("contamination.json", {"contaminated": {"iter2": 0}}, f": no count of iter1's prompts{AGAIN}"),
    ],
)
def test_figures_that_cannot_be_are_not_reported(name: str, value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    readers: dict[str, Callable[[], Any]] = {
        "metrics.json": lambda: report.read_alpaca(tmp_path),
        "summary.json": lambda: report.read_harness(tmp_path),
        "comparison.json": lambda: report.read_comparison(path, ["base", "iter1"]),
        "contamination.json": lambda: health.contaminated("iter1", path),
    }
    right = {"metrics.json": ALPACA, "summary.json": HARNESS, "comparison.json": COMPARISON}
    path.write_text(json.dumps(right.get(name, {"contaminated": {"iter1": 7}})))
    assert readers[name]() in (*right.values(), 7)
    path.write_text(json.dumps(value))
    with pytest.raises(StageError) as error:
        readers[name]()
    assert str(error.value) == f"{path}{message}"


def test_answers_to_other_instructions_are_not_reported_side_by_side(tmp_path: Path) -> None:
    answers = [{"instruction": text, "output": "So."} for text in ("Why?", "Who?")]
    files.write_json(answers, tmp_path / "base.json")
    files.write_json(answers, tmp_path / "iter1.json")
    assert report.read_answers(tmp_path, ["base", "iter1"]) == {"base": answers, "iter1": answers}
    files.write_json(answers[:1], tmp_path / "iter1.json")
    with pytest.raises(StageError, match=r"iter1\.json: not the instructions of base\.json in their order: answer them again"):
        report.read_answers(tmp_path, ["base", "iter1"])


LOG = "step,loss,learning_rate,gradient_norm,clipped,chosen_log_ratio,rejected_log_ratio,kl\n1,5.6,0,41,1,0,-3e-07,2e-13\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": not a readable CSV file (No columns to parse from file)"),
        (LOG + "2,1,2,3,4,5,6,7,8\n", ": not a readable CSV file (Error tokenizing data."),
        (LOG.replace("kl", "k"), ": rows of step, loss, learning_rate, gradient_norm, clipped, chosen_log_ratio, "),
        (LOG.partition("\n")[0], ": rows of step, loss, "),
        (LOG + "2,nan,0,41,1,0,0,0\n", ": row 1: 'loss' is "),
        (LOG + "2,1,0,inf,1,0,0,0\n", ": row 1: 'gradient_norm' is inf"),
        (LOG + "2,1,0,41,1,0,0,x\n", ": row 1: 'kl' is 'x'"),
        (LOG.replace("41,1,", "41,True,"), ": row 0: 'clipped' is True"),
        (LOG + "3,1,0,41,1,0,0,0\n", ": row 1: 'step' is 3"),
    ],
)
def test_a_training_log_of_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "iter1.csv"
    path.write_text(LOG)
    assert len(health.training_log(path)) == 1
    path.write_text(text)
    with pytest.raises(StageError) as error:
        health.training_log(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert str(error.value).endswith(AGAIN)

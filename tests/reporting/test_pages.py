import re
from typing import Any

import pytest
from markdown_it import MarkdownIt

from stages.reporting import markdown, pages, paired
from stages.reporting.answers import Judged
from stages.reporting.published import TASKS, Published, read_published
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.reports import read_rows


@pytest.fixture(scope="module")
def published() -> Published:
    """The results published for Llama-3-8B."""
    published = read_published(ROOT / "recipes/llama-3-8b/published.yaml")
    assert published
    return published


@pytest.fixture(scope="module")
def gemma() -> Published:
    """The results published for Gemma-2-9B: no leaderboard, and no average length of the base model's answers."""
    published = read_published(ROOT / "recipes/gemma-2-9b/published.yaml")
    assert published
    return published


def alpaca(judge: str, published: Published) -> dict[str, dict[str, Any]]:
    """Return results of base, 0.1 above the published ones, and of iter1, 10 below."""
    assert published.alpaca_eval
    shifts = {"base": 0.1, "iter1": -10.0}
    models = published.alpaca_eval.models
    return {
        name: {
            "length_controlled_winrate": (models[name].length_controlled_winrate or 0) + shift,
            "lc_standard_error": 0.9,
            "win_rate": (models[name].win_rate or 0) + shift,
            "standard_error": 1.4,
            "avg_length": 1900,
            "n_total": 805,
            "judge": judge,
        }
        for name, shift in shifts.items()
    }


def summarize(**values: float) -> dict[str, dict[str, Any]]:
    """Return a summary of evaluate-lm with these values (default: 50) and standard errors of 1.2."""
    summary: dict[str, dict[str, Any]] = {
        task: {"value": values.get(task, 50.0), "standard_error": 1.2, "shots": 5, "metric": "acc_norm"} for task in TASKS
    }
    summary["mmlu"] |= {"weighted": values.get("mmlu_weighted", 50.0), "weighted_standard_error": 0.4}
    return summary


def compare(*models: list[float | None]) -> dict[tuple[str, str], Any]:
    """Return the comparison of each model with the one before."""
    names = ["base", *[f"iter{index}" for index in range(1, len(models))]]
    return {
        (names[index], names[index - 1]): paired.compare_preferences(models[index], models[index - 1])
        for index in range(1, len(models))
    }


DIFFERENCES = compare([1.0, 1.5, 1.5, 2.0], [1.5, 1.5, 1.75, 1.75])


def test_the_averages_are_unweighted_but_for_mmlus_subjects() -> None:
    results = pages.average_tasks(summarize(arc_challenge=20.0, mmlu=62.0, mmlu_weighted=56.0))
    assert results["average"] == pytest.approx((47.0, 1.2 / 6**0.5))
    assert results["mmlu_weighted"] == (56.0, 0.4)
    assert results["average_weighted"] == pytest.approx((46.0, (5 * 1.2**2 + 0.4**2) ** 0.5 / 6))


def test_paired_differences_have_a_row_per_comparison() -> None:
    rows = read_rows(pages.format_differences(compare([1.0, 1.5, 1.5, 2.0], [1.5, 1.5, 1.75, 1.75], [1.0, 1.5, 1.25, 1.25])))
    # Differences of preferences 0.5, 0, 0.25, -0.25: mean 0.125, standard deviation 0.3227; then -0.5, 0, -0.5, -0.5.
    assert rows[0] == ["model", "against", "difference", "standard error", "95% interval", "wins", "losses", "ties"]
    assert rows[2] == ["iter1", "base", "+12.50", "16.14", "-19.13 to +44.13", "2", "1", "1"]
    assert rows[3] == ["iter2", "iter1", "-37.50", "12.50", "-62.00 to -13.00", "0", "3", "1"]


def test_instructions_without_a_preference_are_counted() -> None:
    complete = pages.format_differences(DIFFERENCES)
    text = pages.format_differences(compare([1.0, 1.5, 1.5, None], [1.5, None, 1.75, 1.75], [1.0, 1.5, 1.25, 1.25]))
    (line,) = [line for line in text.splitlines() if line not in complete and not line.startswith("|")]
    assert_message(line, "no preference", "iter1 against base: 2", "iter2 against iter1: 1")


def test_the_run_to_run_noise_is_said_to_be_missing(published: Published) -> None:
    alpaca_text = pages.format_alpaca_eval(alpaca("gpt-4-1106-preview", published), DIFFERENCES, published)
    estimates = dict.fromkeys([*TASKS, "average"], (1.0, 0.5))
    leaderboard = pages.format_leaderboard({"base": summarize()}, {("iter1", "base"): estimates}, published)
    for text in (alpaca_text, leaderboard):
        assert text.count("Run-to-run noise is not included") == 2  # paired differences, published results
        assert "reports/seeds.md" in text


def test_differences_of_tasks_have_a_row_per_comparison() -> None:
    columns = [*TASKS, "average", "mmlu_weighted", "average_weighted"]
    estimates = {column: (float(index), 0.5) for index, column in enumerate(columns)}
    rows = read_rows(pages.format_task_differences({("iter1", "base"): estimates}))
    assert rows[0] == ["model", "against", *TASKS[:-1], "mmlu, plain mean", "average"]
    assert rows[2] == ["iter1", "base", *[f"+{index}.00 ± 0.50" for index in range(7)]]


def test_our_results_stand_next_to_the_published_ones(published: Published) -> None:
    text = pages.format_alpaca_eval(alpaca("gpt-4-1106-preview", published), DIFFERENCES, published)
    rows = read_rows(text)
    assert ["base", "Meta-Llama-3-8B-Instruct", "LC win rate", "23.02 ± 0.90", "22.92", "+0.10", "no"] in rows
    assert ["iter1", "Llama-3-Instruct-8B-SPPO-Iter1", "win rate", "21.74 ± 1.40", "31.74", "-10.00", "yes"] in rows
    assert ["base", "Meta-Llama-3-8B-Instruct", "average length", "1900", "1899", "+1", "–"] in rows
    assert not [row for row in rows if row[0] == "iter2"], "a model that was not trained has no row"
    assert "Different judge" not in text


def test_what_else_differs_is_listed(published: Published) -> None:
    assert published.alpaca_eval
    assert published.open_llm_leaderboard
    alpaca_text = pages.format_alpaca_eval(alpaca("my-judge", published), DIFFERENCES, published)
    leaderboard = pages.format_leaderboard({"base": summarize()}, {}, published)
    for text, notes in ((alpaca_text, published.alpaca_eval.notes), (leaderboard, published.open_llm_leaderboard.notes)):
        assert notes
        assert text.endswith("\n\n" + "".join(f"- {markdown.escape(note)}\n" for note in notes))


def test_a_different_judge_is_named(published: Published) -> None:
    text = pages.format_alpaca_eval(alpaca("my-judge", published), DIFFERENCES, published)
    assert "**Different judge**" in text
    assert "`my-judge`" in text.partition("**Different judge**")[2]


def test_a_page_without_published_results_says_so(published: Published) -> None:
    text = pages.format_alpaca_eval(alpaca("my-judge", published), DIFFERENCES, None)
    assert pages.NOT_PUBLISHED in text
    assert pages.COMPARISON not in text


def test_the_reason_for_a_missing_lc_win_rate_is_stated(published: Published) -> None:
    metrics = alpaca("my-judge", published)
    for values in metrics.values():
        del values["length_controlled_winrate"], values["lc_standard_error"]
        values["length_controlled_absent"] = "the judge was away"
    text = pages.format_alpaca_eval(metrics, DIFFERENCES, published)
    assert "the judge was away" in text
    assert ["base", "22.67", "1.40", "1900"] in read_rows(text)
    assert ["base", "Meta-Llama-3-8B-Instruct", "LC win rate", "–", "22.92", "–", "–"] in read_rows(text)


def test_lc_win_rates_come_first_where_there_are_any_and_last_where_not(published: Published) -> None:
    metrics = alpaca("my-judge", published)
    rows = read_rows(pages.format_alpaca_eval(metrics, {}, published))
    assert rows[0] == ["model", "LC win rate", "standard error", "win rate", "standard error", "average length"]
    assert [row[2] for row in rows if row[:1] == ["base"]][1:] == ["LC win rate", "win rate", "average length"]
    for values in metrics.values():
        del values["length_controlled_winrate"], values["lc_standard_error"]
    rows = read_rows(pages.format_alpaca_eval(metrics, {}, published))
    assert rows[0] == ["model", "win rate", "standard error", "average length"]
    assert [row[2] for row in rows if row[:1] == ["base"]][1:] == ["win rate", "average length", "LC win rate"]


def test_win_rates_by_data_set_are_those_of_its_instructions() -> None:
    judged = [Judged(name, "") for name in ("vicuna", "koala", "koala", "vicuna", "koala", "oasst")]
    text = pages.format_data_sets({"base": [1.0, 1.5, 1.25, 1.5, None, 1.0], "iter1": [2.0, 1.5, 2.0, 1.5, 1.0, 1.0]}, judged)
    rows = read_rows(text)
    # koala: 0.5 and 0.25: mean 37.5, standard deviation 17.68; then 0.5, 1, 0: mean 50, standard deviation 50
    assert rows[0] == ["data set", "instructions", "base", "iter1"]
    assert rows[2] == ["koala", "3", "37.50 ± 12.50", "50.00 ± 28.87"]
    assert rows[3] == ["oasst", "1", "–", "–"]
    assert rows[4] == ["vicuna", "2", "25.00 ± 25.00", "75.00 ± 25.00"]


def test_a_single_data_set_has_no_table() -> None:
    assert pages.format_data_sets({"base": [1.0, 1.5]}, [Judged("miniature", ""), Judged("miniature", "")]) == ""


def test_a_published_error_is_shown_and_counts(published: Published) -> None:
    """Iter3's published win rate is 39.85 ± 1.42: with ours of 0.1, a difference of 2.9 is beyond both errors, 2.7 is not."""
    for shift, beyond in ((2.7, "no"), (2.9, "yes")):
        metrics = alpaca("gpt-4-1106-preview", published)
        metrics["iter3"] = metrics["base"] | {"win_rate": 39.85 + shift, "standard_error": 0.1}
        rows = read_rows(pages.format_alpaca_eval(metrics, DIFFERENCES, published))
        (row,) = [row for row in rows if row[0] == "iter3" and row[2] == "win rate"]
        assert row[3:] == [f"{39.85 + shift:.2f} ± 0.10", "39.85 ± 1.42", f"+{shift:.2f}", beyond]


def test_a_value_that_was_not_published_is_a_dash(published: Published, gemma: Published) -> None:
    rows = read_rows(pages.format_alpaca_eval(alpaca("gpt-4-1106-preview", published), DIFFERENCES, gemma))
    assert ["base", "Gemma-2-9B-It", "average length", "1900", "–", "–", "–"] in rows
    assert ["iter1", "Gemma-2-9B-It-SPPO-Iter1", "average length", "1900", "1669", "+231", "–"] in rows


def test_the_leaderboard_without_a_published_table_says_so(gemma: Published) -> None:
    text = pages.format_leaderboard({"base": summarize()}, {}, gemma)
    assert text == pages.format_leaderboard({"base": summarize()}, {}, None)
    assert pages.NOT_PUBLISHED in text


def test_the_leaderboard_shows_both_means_of_mmlu(published: Published) -> None:
    rows = read_rows(pages.format_leaderboard({"base": summarize(mmlu=62.0, mmlu_weighted=56.0)}, {}, None))
    assert rows[0] == ["model", *TASKS[:-1], "mmlu, plain mean", "average", "mmlu, weighted", "average, mmlu weighted"]
    assert rows[2][-4:] == ["62.00 ± 1.20", "52.00 ± 0.49", "56.00 ± 0.40", "51.00 ± 0.45"]


def test_published_scores_are_compared_with_the_weighted_mmlu(published: Published) -> None:
    assert published.open_llm_leaderboard
    theirs = published.open_llm_leaderboard.models["base"]
    values = {task: theirs[task] + (9 if task == "gsm8k" else 1) for task in TASKS if task != "mmlu"}
    summary = summarize(**values, mmlu=theirs["mmlu"] + 20, mmlu_weighted=theirs["mmlu"] + 1.2)
    rows = read_rows(pages.format_leaderboard({"base": summary}, {}, published))
    header, _, ours, reported, difference = rows[-5:]
    columns = [*TASKS[:-1], "mmlu, weighted", "average, mmlu weighted"]
    assert header == ["model", "results", *columns, "mmlu, plain mean"]
    assert ours[1::6] == ["ours", "66.79 ± 0.40"]
    assert ours[-1] == "85.59 ± 1.20"
    assert reported[1:] == ["published", *[f"{theirs[task]:.2f}" for task in [*TASKS, "average"]], "–"]
    expected = ["+1.00", "+1.00", "+1.00", "+9.00", "+1.00", "+1.20", "+2.37", "–"]
    assert [cell.partition(" ")[0] for cell in difference[2:]] == expected
    # 1.96 √2 times our standard errors: 3.33 for a task, 1.11 for the weighted MMLU, 1.25 for the average
    beyond = [column for column, cell in zip(columns, difference[2:], strict=False) if paired.BEYOND_ERROR in cell]
    assert beyond == ["gsm8k", "mmlu, weighted", "average, mmlu weighted"]


def select(summary: dict[str, dict[str, Any]], *tasks: str) -> dict[str, dict[str, Any]]:
    return {task: summary[task] for task in tasks}


def test_a_table_of_fewer_tasks_says_so_and_compares_no_average(published: Published) -> None:
    summary = select(summarize(gsm8k=80.0, mmlu=62.0, mmlu_weighted=56.0), "gsm8k", "mmlu")
    text = pages.format_leaderboard({"base": summary}, {}, published)
    rows = read_rows(text)
    weighted = ["mmlu, weighted", "average, mmlu weighted, of 2 tasks"]
    assert rows[0] == ["model", "gsm8k", "mmlu, plain mean", "average of 2 tasks", *weighted]
    assert rows[2] == ["base", "80.00 ± 1.20", "62.00 ± 1.20", "71.00 ± 0.85", "56.00 ± 0.40", "68.00 ± 0.63"]
    assert "**Only 2 of the 6 tasks** were run (`evaluate_lm.tasks`)" in text
    assert [row for row in rows if row[1] == "published"] == [["base", "published", "75.89", "65.59", "–"]]
    assert [row for row in rows if row[1] == "results"] == [["model", "results", "gsm8k", "mmlu, weighted", "mmlu, plain mean"]]
    one = pages.format_leaderboard({"base": select(summarize(), "gsm8k")}, {}, published)
    assert read_rows(one)[0] == ["model", "gsm8k"]
    assert "average" not in one.partition("were run")[0]
    assert "MMLU" not in one.partition("\n- ")[0], "the notes on the published table remain"
    assert "were run" not in pages.format_leaderboard({"base": summarize()}, {}, published)


def test_differences_of_fewer_tasks_have_the_columns_of_these_tasks() -> None:
    scores = {"gsm8k": {"gsm8k": [0.0, 1.0, 1.0]}, "mmlu": {"mmlu_art": [0.0, 1.0]}}
    rows = read_rows(pages.format_task_differences({("iter1", "base"): paired.estimate_scores(scores)}))
    assert rows[0] == ["model", "against", "gsm8k", "mmlu, plain mean", "average of 2 tasks"]
    assert [cell.partition(" ")[0] for cell in rows[2][2:]] == ["+66.67", "+50.00", "+58.33"]


def test_without_another_model_there_are_no_differences() -> None:
    assert pages.format_differences({}) == pages.format_task_differences({}) == ""


def test_models_of_which_only_answers_exist_are_named() -> None:
    text = pages.format_leaderboard({"base": summarize()}, {}, None, ["theirs", "others"])
    (line,) = [line for line in text.splitlines() if "theirs" in line]
    assert_message(line, "only its answers exist", "theirs, others")


def make_published(values: dict[str, Any]) -> Published:
    return Published.model_validate({"models": {"base": "Theirs"}} | values)


def test_a_published_figure_may_be_missing_and_may_have_its_own_source(published: Published) -> None:
    table = {"source": "a paper", "judge": "j", "models": {"base": {"win_rate": 20.0}}}
    text = pages.format_alpaca_eval(
        alpaca("j", published), {}, make_published({"alpaca_eval": table | {"sources": {"base": {"win_rate": "a blog"}}}})
    )
    rows = [row[2:] for row in read_rows(text) if row[1] == "Theirs"]
    assert rows[0] == ["LC win rate", "23.02 ± 0.90", "–", "–", "–"]
    assert rows[1] == ["win rate", "22.67 ± 1.40", "20.00", "+2.67", "no"]
    assert "published results: a paper; of base's `win_rate`: a blog. " in text
    board = {"source": "a paper", "models": {"base": {"gsm8k": 49.0, "average": 10.0}}}
    summary = {"base": summarize(), "iter1": summarize()}
    text = pages.format_leaderboard(summary, {}, make_published({"open_llm_leaderboard": board}))
    ours, theirs, difference = read_rows(text)[-3:]
    assert theirs[2:] == ["–", "–", "–", "49.00", "–", "–", "10.00", "–"]
    assert difference[2:] == ["–", "–", "–", "+1.00", "–", "–", "+40.00 (beyond evaluation error)", "–"]
    assert ours[1] == "ours"
    text = pages.format_alpaca_eval(alpaca("j", published), {}, make_published({"open_llm_leaderboard": board}))
    assert pages.NOT_PUBLISHED in text


def test_the_matrix_has_a_row_and_a_column_for_every_model() -> None:
    comparison = {"models": ["base", "iter1"], "win_rates": [[50, 40], [60, 50]], "standard_errors": [[0, 1], [1, 0]], "n": 9}
    rows = read_rows(pages.format_ranker(comparison))
    assert rows[0][1:] == ["base", "iter1"]
    assert rows[2:] == [["base", "–", "40.00 ± 1.00"], ["iter1", "60.00 ± 1.00", "–"]]


def test_the_matrix_of_an_existing_ranker_says_which_prompts_and_which_ranker() -> None:
    matrix = {"win_rates": [[50, 40], [60, 50]], "standard_errors": [[0, 1], [1, 0]]}
    text = pages.format_existing_ranker("pairrm", matrix | {"models": ["base", "gpt"], "n": 805})
    assert text.startswith("\n## Win rates according to pairrm\n")
    assert read_rows(text)[2:] == [["base", "–", "40.00 ± 1.00"], ["gpt", "60.00 ± 1.00", "–"]]
    assert "the 805 instructions of AlpacaEval, with one response per model." in text


def test_samples_are_drawn_with_the_seed() -> None:
    answers = {
        name: [{"instruction": f"Q{index}", "output": f"{name} {index}"} for index in range(50)] for name in ("base", "iter1")
    }
    rows = read_rows(pages.format_samples(answers, 1))[2:]
    assert len(rows) == pages.SAMPLES
    assert all(row == [f"Q{row[0][1:]}", f"base {row[0][1:]}", f"iter1 {row[0][1:]}"] for row in rows)
    assert read_rows(pages.format_samples(answers, 1))[2:] == rows
    assert read_rows(pages.format_samples(answers, 2))[2:] != rows
    assert len(read_rows(pages.format_samples({name: rows[:3] for name, rows in answers.items()}, 1))[2:]) == 3


HOSTILE = "<img src=x> a|b `c` [d](http://e.f) @name :smile: $x$ www.g.h \x1b[2J"


def test_text_of_others_makes_no_element_and_is_not_recognized(published: Published) -> None:
    """A judge's name, in a code span, and what a published table says about itself."""
    table = {"source": HOSTILE, "judge": HOSTILE, "notes": [HOSTILE], "models": {"base": {"win_rate": 20.0}}}
    named = table | {"sources": {"base": {"win_rate": HOSTILE}}}
    metrics = alpaca(f"``{HOSTILE}", published)
    metrics["base"]["length_controlled_absent"] = HOSTILE
    text = pages.format_alpaca_eval(metrics, {}, make_published({"alpaca_eval": named}))
    board = {"source": HOSTILE, "notes": [HOSTILE], "models": {"base": {"gsm8k": 49.0}}}
    text += pages.format_leaderboard({"base": summarize()}, {}, make_published({"open_llm_leaderboard": board}))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert html.count("<code>") == 4 + 2, "our judge twice, theirs, the figure with a source of its own; two columns' names"
    assert "\x1b" not in text
    outside = re.sub("<code>.*?</code>", "", html)
    assert not re.search("<img|<a |<em>|[^0-9a-z]@name|:smile:|[$]x[$]|http://|www[.]g", outside)


def test_answers_without_a_preference_are_counted(published: Published) -> None:
    metrics = alpaca("my-judge", published)
    assert "no preference" not in pages.format_alpaca_eval(metrics, {}, None)
    metrics["base"]["n_failed"], metrics["iter1"]["n_failed"] = 0, 3
    (line,) = [row for row in pages.format_alpaca_eval(metrics, {}, None).splitlines() if "no preference" in row]
    assert_message(line, "3 of iter1")
    assert "of base" not in line


def test_prompts_that_exceed_the_context_are_counted() -> None:
    harness = {"base": summarize(), "iter1": summarize()}
    assert "exceed" not in pages.format_leaderboard(harness, {}, None)
    harness["iter1"]["gsm8k"] |= {"cut": 5, "n": 1319}
    (line,) = [row for row in pages.format_leaderboard(harness, {}, None).splitlines() if "exceed" in row]
    assert_message(line, "5 of 1319 questions of gsm8k (iter1)", "fewer examples")
    assert pages.list_gaps({}, harness) == [line]

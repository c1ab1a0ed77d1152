from io import StringIO
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages.reporting import charts
from stages.reporting.published import Published
from support.sample_run import MODELS, STARTS, make_evaluations, make_tables

Charts = dict[str, list[charts.Chart]]
PUBLISHED = Published.model_validate(
    {
        "models": {"base": "Theirs", "iter3": "Untrained"},
        "alpaca_eval": {
            "source": "a paper",
            "judge": "gold",
            "models": {
                "base": {"win_rate": 20.0, "standard_error": 1.5, "length_controlled_winrate": 21.0, "avg_length": 1900},
                "iter3": {"win_rate": 40.0},
            },
        },
        "open_llm_leaderboard": {
            "source": "a paper",
            "models": {"base": {"gsm8k": 49.0, "mmlu": 60.0}, "iter3": {"gsm8k": 1.0}},
        },
    }
)


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return make_tables(make_evaluations())


@pytest.fixture(scope="module")
def drawn(tables: dict[str, str]) -> Charts:
    return charts.draw_charts(make_evaluations(controlled=True), tables, PUBLISHED)


def frame(chart: charts.Chart) -> pd.DataFrame:
    return pd.DataFrame(chart["data"]["values"])


def find(drawn: Charts, section: str, caption: str) -> pd.DataFrame:
    (chart,) = [chart for chart in drawn[section] if chart["description"].startswith(caption)]
    return frame(chart)


def test_win_rates_have_their_intervals(drawn: Charts) -> None:
    rows = find(drawn, "alpaca-eval", "AlpacaEval win rate")
    ours = rows[(rows["source"] == "ours") & (rows["metric"] == "win rate")].set_index("model")
    evaluations = make_evaluations()
    assert list(ours.index) == MODELS
    for name in MODELS:
        shares = 100 * np.array(evaluations.preferences[name], float) - 100
        shares = shares[~np.isnan(shares)]
        margin = 1.96 * shares.std(ddof=1) / len(shares) ** 0.5
        expected = [shares.mean(), shares.mean() - margin, shares.mean() + margin]
        np.testing.assert_allclose(ours.loc[name, ["value", "lower", "upper"]].to_numpy(float), expected, rtol=1e-5)
    controlled = rows[(rows["source"] == "ours") & (rows["metric"] == "LC win rate")].set_index("model")
    np.testing.assert_allclose(controlled["value"], ours["value"] - 1, rtol=1e-5)
    np.testing.assert_allclose(controlled["upper"] - controlled["lower"], 2 * 1.96, rtol=1e-4)


def test_published_results_of_our_models_are_drawn_beside_them(drawn: Charts) -> None:
    rows = find(drawn, "alpaca-eval", "AlpacaEval win rate").query("source == 'published'")
    assert rows[["model", "metric", "value"]].to_numpy().tolist() == [["base", "win rate", 20], ["base", "LC win rate", 21]]
    np.testing.assert_allclose(rows[["lower", "upper"]].iloc[0].to_numpy(float), [20 - 2.94, 20 + 2.94])
    assert rows[["lower", "upper"]].iloc[1].isna().all(), "no standard error is published"
    lengths = find(drawn, "alpaca-eval", "Average length").query("source == 'published'")
    assert lengths[["model", "value"]].to_numpy().tolist() == [["base", 1900]]
    scores = find(drawn, "open-llm-leaderboard", "Score").query("source == 'published'")
    assert scores[["task", "model", "value"]].to_numpy().tolist() == [["gsm8k", "base", 49], ["mmlu, weighted", "base", 60]]


def test_weighted_results_are_drawn_only_to_compare_them(drawn: Charts, tables: dict[str, str]) -> None:
    def list_tasks(drawn: Charts) -> list[Any]:
        return find(drawn, "open-llm-leaderboard", "Score")["task"].drop_duplicates().tolist()

    plain = ["arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu, plain mean", "average"]
    assert list_tasks(charts.draw_charts(make_evaluations(), tables, None)) == plain
    assert list_tasks(drawn) == [*plain, "mmlu, weighted"]


def test_half_of_the_wins_is_marked(drawn: Charts) -> None:
    chart = drawn["alpaca-eval"][0]
    assert [layer["encoding"]["x"]["datum"] for layer in chart["layer"] if "datum" in layer["encoding"].get("x", {})] == [50]


def test_the_curves_are_the_training_log(drawn: Charts, tables: dict[str, str]) -> None:
    log = pd.read_csv(StringIO(tables["training"]))
    for column, caption in charts.CURVES.items():
        rows = find(drawn, "health", caption)
        pd.testing.assert_frame_equal(rows, log[["iteration", "step", column]], check_dtype=False)
    rows = find(drawn, "health", "Log-ratios")
    for response in ("chosen", "rejected"):
        values = rows[rows["response"] == response].set_index(["iteration", "step"])["log_ratio"]
        expected = log.set_index(["iteration", "step"])[f"{response}_log_ratio"]
        pd.testing.assert_series_equal(values, expected, check_names=False, check_dtype=False, check_index_type=False)


def test_the_matrix_and_the_histograms_show_the_tables(drawn: Charts, tables: dict[str, str]) -> None:
    matrix = pd.read_csv(StringIO(tables["ranker"])).query("model != opponent").reset_index(drop=True)
    pd.testing.assert_frame_equal(find(drawn, "ranker", "Win rate of row"), matrix)
    bars = pd.read_csv(StringIO(tables["probabilities"]))
    for name in STARTS:
        expected = bars[(bars["iteration"] == name) & (bars["responses"] > 0)].reset_index(drop=True)
        found = find(drawn, "health", f"P^ of chosen and rejected responses of {name}")
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_without_training_and_ranker_there_are_only_the_evaluations(tables: dict[str, str]) -> None:
    few = {name: tables[name] for name in ("win_rate", "length")}
    drawn = charts.draw_charts(make_evaluations(), few, None)
    assert {section: len(group) for section, group in drawn.items()} == {"alpaca-eval": 2, "open-llm-leaderboard": 1}


@pytest.mark.slow
def test_vega_lite_draws_every_chart(drawn: Charts) -> None:
    import vl_convert

    for chart in [chart for group in drawn.values() for chart in group]:
        sized = chart | {"width": 400, "config": charts.CONFIG}
        svg = vl_convert.vegalite_to_svg(sized, vl_version=charts.VEGA_LITE)
        assert "NaN" not in svg
        assert "var(--" in svg

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.reporting import headline
from stages.reporting.published import Published
from stages.runtime import params
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.sample_run import COUNT, make_evaluations, make_metrics


@pytest.fixture(scope="module")
def metrics() -> dict[str, dict[str, Any]]:
    return make_metrics(make_evaluations(controlled=True))


def shift(metrics: dict[str, Any], difference: float) -> dict[str, Any]:
    """Return metrics in which iter2's paired difference from the base policy is another one."""
    changed = copy.deepcopy(metrics)
    result = changed["alpaca_eval"]["iter2"]["vs_base"]
    result |= {"difference": difference, "lower": difference - 2, "upper": difference + 2, "standard_error": 2 / 1.96}
    return changed


def test_the_verdict_is_that_of_the_preferences(metrics: dict[str, Any]) -> None:
    """The figures of the sentence, computed with NumPy from the preferences of both models."""
    evaluations = make_evaluations()
    ours, theirs = (np.array(evaluations.preferences[name], float) for name in ("iter2", "base"))
    differences = 100 * (ours - theirs)
    differences = differences[~np.isnan(differences)]
    mean, margin = differences.mean(), 1.96 * differences.std(ddof=1) / len(differences) ** 0.5
    verdict, sentence = headline.state_verdict(metrics, COUNT)
    assert verdict == "better"
    assert_message(
        sentence,
        "iter2 is better than base",
        f"{100 * np.nanmean(ours) - 100:.2f}% against {100 * np.nanmean(theirs) - 100:.2f}%",
        f"{mean:+.2f} percentage points",
        f"{mean - margin:+.2f} to {mean + margin:+.2f}",
        "45 instructions",
    )


@pytest.mark.parametrize(
    ("difference", "verdict", "words"),
    [(-3.0, "worse", "iter2 is worse than base"), (1.9, "no clear difference", "No clear difference between iter2 and base")],
)
def test_a_difference_may_be_worse_or_unclear(metrics: dict[str, Any], difference: float, verdict: str, words: str) -> None:
    found, sentence = headline.state_verdict(shift(metrics, difference), COUNT)
    assert found == verdict
    assert_message(sentence, words, f"{difference:+.2f} percentage points")


@given(st.floats(-50, 50), st.floats(0, 20))
def test_a_verdict_is_given_only_where_the_interval_excludes_zero(difference: float, error: float) -> None:
    lower, upper = difference - 1.96 * error, difference + 1.96 * error
    assert headline.judge(difference, error) == (lower > 0) - (upper < 0)
    assert headline.judge(-difference, error) == -headline.judge(difference, error)


def test_a_single_model_has_no_verdict(metrics: dict[str, Any]) -> None:
    single = {
        "alpaca_eval": {"base": metrics["alpaca_eval"]["base"]},
        "open_llm_leaderboard": {"base": metrics["open_llm_leaderboard"]["base"]},
    }
    verdict, sentence = headline.state_verdict(single, COUNT)
    assert verdict == ""
    assert_message(sentence, "base wins", "no other model")
    assert [tile["note"] for tile in headline.list_tiles(single)] == ["", "", "", "characters"]


def test_every_step_has_its_verdict(metrics: dict[str, Any]) -> None:
    steps = headline.list_steps(metrics)
    assert [step.partition(":")[0] for step in steps] == ["iter1", "iter2"]
    result = metrics["alpaca_eval"]["iter2"]["vs_previous"]
    margin = (result["upper"] - result["lower"]) / 2
    clear = "better" if result["lower"] > 0 else "no clear difference"
    assert steps[1] == f"iter2: {result['difference']:+.2f} ± {margin:.2f} ({clear})"


def test_the_tiles_show_the_last_model_beside_the_base(metrics: dict[str, Any]) -> None:
    tiles = {tile["label"]: tile for tile in headline.list_tiles(metrics)}
    assert list(tiles) == ["win rate", "LC win rate", "leaderboard average", "average length", "KL divergence"]
    base, last = (metrics["alpaca_eval"][name] for name in ("base", "iter2"))
    assert tiles["LC win rate"]["value"] == f"{last['length_controlled_winrate']:.2f}%"
    growth = last["length_controlled_winrate"] - base["length_controlled_winrate"]
    assert_message(tiles["LC win rate"]["note"], f"base {base['length_controlled_winrate']:.2f}%", f"{growth:+.2f} points")
    longer = 100 * (last["avg_length"] - base["avg_length"]) / base["avg_length"]
    assert_message(tiles["average length"]["note"], f"base {base['avg_length']}", f"{longer:+.0f}%")
    assert tiles["KL divergence"]["value"] == "0.75"
    average = metrics["open_llm_leaderboard"]["iter2"]["vs_base"]["average"]
    margin = 1.96 * average["standard_error"]
    assert_message(tiles["leaderboard average"]["note"], f"{average['difference']:+.2f} ± {margin:.2f} points")


def test_a_model_of_which_only_answers_exist_has_no_average(metrics: dict[str, Any]) -> None:
    changed = copy.deepcopy(metrics)
    del changed["open_llm_leaderboard"]["iter2"], changed["training"]
    assert [tile["label"] for tile in headline.list_tiles(changed)] == ["win rate", "LC win rate", "average length"]


def test_what_to_keep_in_mind(metrics: dict[str, Any]) -> None:
    table = {"source": "a paper", "judge": "gpt", "models": {"base": {"win_rate": 20.0}}}
    published = Published.model_validate({"models": {"base": "Theirs"}, "alpaca_eval": table})
    uncontrolled = copy.deepcopy(metrics)
    for values in uncontrolled["alpaca_eval"].values():
        values.pop("length_controlled_winrate")
    uncontrolled["alpaca_eval"]["iter2"]["avg_length"] = uncontrolled["alpaca_eval"]["base"]["avg_length"] + 1
    longer, lowered, clipped, judge, tasks, noise = headline.list_warnings(uncontrolled, "gold", 4, published)
    assert_message(longer, "iter2's answers are longer", "no LC win rate")
    assert_message(lowered, "less likely", "iter2 (-0.50 nats)")
    assert "iter1" not in lowered
    assert_message(clipped, "clipped at every step of iter1:")
    assert_message(judge, "another judge, gpt")
    assert_message(tasks, "Only 4 of the 6")
    assert_message(noise, "Run-to-run noise")


def test_nothing_but_the_noise_is_kept_in_mind_where_all_is_well(metrics: dict[str, Any]) -> None:
    calm = copy.deepcopy(metrics) | {"training": {"iter1": {"kl": 0.5, "chosen_log_ratio": 0.0, "clipped_steps": 0.5}}}
    table = {"source": "a paper", "judge": "gold", "models": {"base": {"win_rate": 20.0}}}
    published = Published.model_validate({"models": {"base": "Theirs"}, "alpaca_eval": table})
    assert len(headline.list_warnings(calm, "gold", 6, published)) == 1
    assert len(headline.list_warnings(calm, "gold", 6, None)) == 1


def test_the_settings_of_an_experiment_are_named() -> None:
    settings = params.load("seed", "eta", "assets", "generate", "train", path=ROOT / "params.yaml")
    facts = headline.list_facts(settings)
    assert facts["base policy"] == "miniature, made from the seed"
    assert (facts["loss"], facts["seed"], facts["responses per prompt"]) == ("sppo, η = 10", "42", "5")
    recipe = params.load("assets.policy", path=ROOT / "recipes/llama-3-8b/params.yaml")
    assert headline.name_asset(recipe.policy) == "meta-llama/Meta-Llama-3-8B-Instruct"
    dpo = SimpleNamespace(**{**vars(settings), "train": settings.train.model_copy(update={"loss": "dpo", "beta": 0.1})})
    assert headline.list_facts(dpo)["loss"] == "dpo, β = 0.1"


def test_existing_models_are_named() -> None:
    models = {"base": SimpleNamespace(repo="org/base"), "iter1": SimpleNamespace(repo="./mine")}
    facts = headline.list_model_facts(SimpleNamespace(models=models, answers={"gpt": "gpt.json"}, seed=7))
    assert facts == {"base": "org/base", "iter1": "./mine", "gpt": "answers in gpt.json", "seed": "7"}

"""A small made-up run for the HTML page: three models, 45 instructions of two data sets, and two training logs."""

import random
from typing import Any

from stages.reporting import page, paired, results
from stages.reporting.answers import Judged
from stages.reporting.inputs import Evaluations
from stages.reporting.page import Background
from stages.reporting.published import Published
from support.reports import HARNESS, ITEMS

HOSTILE = (
    "</script><script>document.title = 'run'</script> <img src=x onerror=\"document.title = 'run'\"> | a | `b` {{ 1 + 1 }}"
)
MODELS = ["base", "iter1", "iter2"]
STARTS = {"iter1": "base", "iter2": "iter1"}
COUNT = 45
WORDS = ["the", "answer", "is", "a", "red", "boat", "and", "the", "sky", "was", "blue", "over", "one", "more", "hill"]


def make_evaluations(controlled: bool = False) -> Evaluations:
    """Return results of MODELS: iter2's win rate is the highest, one answer is hostile, and one preference is missing.

    controlled: with LC win rates.
    """
    draw = random.Random(5)
    answers = {
        name: [
            {"instruction": f"Instruction {index}", "output": " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))}
            for index in range(COUNT)
        ]
        for name in MODELS
    }
    answers["iter2"][3]["output"] = HOSTILE
    preferences: dict[str, list[float | None]] = {
        name: [round(1 + draw.random() * (0.6 + 0.2 * place), 3) for _ in range(COUNT)] for place, name in enumerate(MODELS)
    }
    preferences["iter2"][7] = None
    preferences["iter2"][8] = preferences["base"][8]
    alpaca: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        rate, error = paired.estimate_preferences(preferences[name])
        length = sum(len(row["output"]) for row in answers[name]) // COUNT
        alpaca[name] = {
            "win_rate": rate - 100,
            "standard_error": error,
            "avg_length": length,
            "n_total": COUNT,
            "judge": "gold",
        }
        if controlled:
            alpaca[name] |= {"length_controlled_winrate": rate - 101, "lc_standard_error": 1.0}
    scores = {"base": ITEMS["base"], "iter1": ITEMS["iter1"], "iter2": ITEMS["iter1"]}
    return Evaluations(alpaca, dict.fromkeys(MODELS, HARNESS), preferences, scores, answers)


def make_judged() -> list[Judged]:
    return [Judged("koala" if index % 3 else "vicuna", f"reference {index}") for index in range(COUNT)]


def make_training() -> dict[str, dict[str, float]]:
    """Return the metrics of health that the page reads. iter2's chosen responses became less likely; iter1 was clipped."""
    return {
        "iter1": {"kl": 0.5, "chosen_log_ratio": 0.25, "clipped_steps": 1},
        "iter2": {"kl": 0.75, "chosen_log_ratio": -0.5, "clipped_steps": 0.5},
    }


def make_metrics(evaluations: Evaluations) -> dict[str, dict[str, Any]]:
    """Return the content of metrics.json."""
    wins, tasks = results.compare_models(evaluations, STARTS)
    return results.collect_metrics(evaluations, STARTS, wins, tasks) | {"training": make_training()}


def make_tables(evaluations: Evaluations) -> dict[str, str]:
    """Return the CSV files of the plots."""
    log = "step,loss,learning_rate,gradient_norm,clipped,chosen_log_ratio,rejected_log_ratio,kl,iteration\n"
    bars = "response,probability,upper,responses,iteration\n"
    matrix = "model,opponent,win_rate\n"
    for place, name in enumerate(STARTS):
        for step in range(1, 9):
            loss, ratios = 8 - step / 2 - place, f"{step / 8},{-step / 4}"
            log += f"{step},{loss:.6g},{step * 1e-6:.6g},{30 + step},1,{ratios},{step / 10:.6g},{name}\n"
        for response, edge in (("chosen", 0.7), ("rejected", 0.2)):
            bars += f"{response},{edge},{edge + 0.05:.6g},{10 + place},{name}\n{response},0.95,1.0,0,{name}\n"
    for row, name in enumerate(MODELS):
        for column, opponent in enumerate(MODELS):
            matrix += f"{name},{opponent},{50 + 10 * (row - column):.1f}\n"
    return results.make_tables(evaluations) | {"training": log, "probabilities": bars, "ranker": matrix}


def make_page(evaluations: Evaluations, published: Published | None = None) -> str:
    """Return the page of the run, with hostile text in its title and in a table."""
    sections = {
        "alpaca-eval": "# AlpacaEval\n\n## Results\n\n| model | said |\n| --- | ---: |\n| base | wide | \n",
        "open-llm-leaderboard": "# Leaderboard",
        "ranker": "# Ranker",
        "health": "# Health",
    }
    background = Background({"loss": "sppo", "seed": "42"}, published, make_judged())
    metrics, tables = make_metrics(evaluations), make_tables(evaluations)
    return page.format_page(f"Title {HOSTILE}", sections, evaluations, metrics, tables, background, "0123456789abcdef")

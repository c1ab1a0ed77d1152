"""The top of the HTML page: did it get better, by how much, and what to keep in mind."""

from typing import Any

from stages.reporting import markdown, paired
from stages.reporting.paired import LEADERBOARD
from stages.reporting.published import Published
from stages.runtime.params import BASE

Metrics = dict[str, dict[str, Any]]
"""The content of metrics.json."""
VERDICTS = {1: "better", -1: "worse", 0: "no clear difference"}


def judge(difference: float, error: float) -> int:
    """Return 1 if a difference is better beyond the evaluation's error, -1 if it is worse beyond it, and 0 otherwise."""
    return 0 if not paired.exceeds(difference, error) else 1 if difference > 0 else -1


def state_verdict(metrics: Metrics, count: int) -> tuple[str, str]:
    """Return the verdict on the last model, one of VERDICTS or empty if it is the only one, and the sentence that explains it.

    count: of the instructions.
    """
    alpaca = metrics["alpaca_eval"]
    name, last = list(alpaca.items())[-1]
    if name == BASE:
        return (
            "",
            f"{BASE} wins {last['win_rate']:.2f}% against the reference outputs. There is no other model to compare it with.",
        )
    result = last["vs_base"]
    verdict = VERDICTS[judge(result["difference"], result["standard_error"])]
    relation = {"better": f"{name} is better than {BASE}", "worse": f"{name} is worse than {BASE}"}
    return verdict, (
        f"{relation.get(verdict, f'No clear difference between {name} and {BASE}')}: AlpacaEval win rate "
        f"{last['win_rate']:.2f}% against {alpaca[BASE]['win_rate']:.2f}%, {result['difference']:+.2f} percentage points "
        f"(95% interval {result['lower']:+.2f} to {result['upper']:+.2f}, paired over the {count} instructions)."
    )


def list_steps(metrics: Metrics) -> list[str]:
    """State the change of win rate of each model from the one that it started from, or follows, with its verdict."""
    steps = []
    for name, values in metrics["alpaca_eval"].items():
        if "vs_previous" in values:
            result = values["vs_previous"]
            verdict = VERDICTS[judge(result["difference"], result["standard_error"])]
            margin = markdown.INTERVAL * result["standard_error"]
            steps.append(f"{name}: {result['difference']:+.2f} ± {margin:.2f} ({verdict})")
    return steps


def list_tiles(metrics: Metrics) -> list[dict[str, str]]:
    """List the figures of the last model: `label`, `value`, and `note` with those of the base policy and the change."""
    alpaca, boards = metrics["alpaca_eval"], metrics["open_llm_leaderboard"]
    (name, last), base = list(alpaca.items())[-1], alpaca[BASE]
    tiles = []
    for label, key, unit in (("win rate", "win_rate", "%"), ("LC win rate", "length_controlled_winrate", "%")):
        if key in last and key in base:
            change = "" if name == BASE else f"{BASE} {base[key]:.2f}%, {last[key] - base[key]:+.2f} points"
            tiles.append({"label": label, "value": f"{last[key]:.2f}{unit}", "note": change})
    average = next((key for key in boards[BASE] if key.startswith("average") and "weighted" not in key), None)
    if average and name in boards:
        tiles.append({"label": "leaderboard average", **compare_average(boards, name, average)})
    growth = last["avg_length"] / base["avg_length"] - 1 if base["avg_length"] else 0
    note = "characters" if name == BASE else f"characters, {BASE} {base['avg_length']:.0f}, {100 * growth:+.0f}%"
    tiles.append({"label": "average length", "value": f"{last['avg_length']:.0f}", "note": note})
    if name in metrics.get("training", {}):
        kl = metrics["training"][name]["kl"]
        tiles.append({"label": "KL divergence", "value": f"{kl:.2f}", "note": "nats from the model it started from"})
    return tiles


def compare_average(boards: Metrics, name: str, average: str) -> dict[str, str]:
    """Return `value` and `note` of the tile of an average of the harness's tasks, given its key."""
    value, base = boards[name][average], boards[BASE][average]
    result = boards[name].get("vs_base", {}).get(average)
    if result is None:
        return {"value": f"{value:.2f}%", "note": ""}
    verdict = VERDICTS[judge(result["difference"], result["standard_error"])]
    margin = markdown.INTERVAL * result["standard_error"]
    return {
        "value": f"{value:.2f}%",
        "note": f"{BASE} {base:.2f}%, {result['difference']:+.2f} ± {margin:.2f} points ({verdict})",
    }


def list_warnings(metrics: Metrics, judge_name: str, tasks: int, published: Published | None) -> list[str]:
    """List what the reader should keep in mind. judge_name: of AlpacaEval; tasks: how many of the leaderboard were run."""
    alpaca, training = metrics["alpaca_eval"], metrics.get("training", {})
    (name, last), base = list(alpaca.items())[-1], alpaca[BASE]
    warnings = []
    if "length_controlled_winrate" not in last and last["avg_length"] > base["avg_length"]:
        warnings.append(f"{name}'s answers are longer than {BASE}'s, and no LC win rate corrects for that.")
    if lowered := [
        f"{key} ({values['chosen_log_ratio']:+.2f} nats)" for key, values in training.items() if values["chosen_log_ratio"] < 0
    ]:
        warnings.append(f"Training made the chosen responses less likely: {', '.join(lowered)}.")
    if clipped := [key for key, values in training.items() if values["clipped_steps"] == 1]:
        warnings.append(f"The gradient was clipped at every step of {', '.join(clipped)}: η has almost no effect (see Health).")
    table = published.alpaca_eval if published else None
    if table and table.judge != judge_name:
        warnings.append(f"The published win rates are by another judge, {table.judge}: they are not comparable with these.")
    if tasks < LEADERBOARD:
        warnings.append(f"Only {tasks} of the {LEADERBOARD} leaderboard tasks were run: no published average is comparable.")
    warnings.append(
        "Intervals are the evaluation's error only. Run-to-run noise, if it has been measured, is in reports/seeds.md."
    )
    return warnings


def list_facts(settings: Any) -> dict[str, str]:
    """Name the main settings of an experiment. settings: the sections seed, eta, assets, generate and train."""
    train, assets = settings.train, settings.assets
    return {
        "base policy": name_asset(assets.policy),
        "ranker": name_asset(assets.ranker),
        "loss": f"{train.loss}, " + (f"η = {settings.eta:g}" if train.beta is None else f"β = {train.beta:g}"),
        "learning rate": f"{train.learning_rate:g}, batches of {train.global_batch}",
        "responses per prompt": str(settings.generate.samples),
        "seed": str(settings.seed),
    }


def name_asset(asset: Any) -> str:
    """Name where an asset comes from, in a few words."""
    return "miniature, made from the seed" if asset.made_here else str(asset.repo)


def list_model_facts(settings: Any) -> dict[str, str]:
    """Name the models of an evaluation of existing models. settings: the sections seed, models and answers."""
    models = {name: str(asset.repo) for name, asset in settings.models.items()}
    answers = {name: f"answers in {path}" for name, path in settings.answers.items()}
    return models | answers | {"seed": str(settings.seed)}

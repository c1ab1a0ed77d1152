"""The Markdown pages of the evaluations, next to the published results where there are any."""

import math
import random
from typing import Any

from stages.reporting import markdown
from stages.reporting.markdown import number
from stages.reporting.published import TASKS, Published
from stages.runtime.params import BASE

SAMPLES = 8
"""Number of instructions in samples.md."""
NOT_PUBLISHED = "There are no published results for these models."
COMPARISON = "## Comparison with published results"


def average_tasks(summary: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Map each task, and the unweighted `average`, to its value and standard error in percent.

    The average's error is that of a mean of independent tasks.
    """
    results = {task: (summary[task]["value"], summary[task]["standard_error"]) for task in TASKS}
    mean = sum(value for value, _ in results.values()) / len(TASKS)
    return results | {"average": (mean, math.hypot(*[error for _, error in results.values()]) / len(TASKS))}


def judge_difference(error: float | None, published_error: float | None, difference: float) -> str:
    """Say whether a difference is within its 95% confidence interval, given both standard errors: yes, no, or a dash (unknown).

    Where no standard error is published, ours is used for both.
    """
    if error is None:
        return "–"
    limit = markdown.INTERVAL * math.hypot(error, error if published_error is None else published_error)
    return "yes" if abs(difference) <= limit else "no"


def format_alpaca_eval(alpaca: dict[str, dict[str, Any]], published: Published | None) -> str:
    """Format alpaca_eval.md. alpaca: model -> metrics of evaluate-alpaca."""
    base = alpaca[BASE]
    rows = [
        [
            name,
            number(metrics.get("length_controlled_winrate")),
            number(metrics.get("lc_standard_error")),
            number(metrics["win_rate"]),
            number(metrics["standard_error"]),
            number(metrics["avg_length"], 0),
        ]
        for name, metrics in alpaca.items()
    ]
    header = ["model", "LC win rate", "standard error", "win rate", "standard error", "average length"]
    lines = [
        "# AlpacaEval 2.0\n",
        markdown.table(header, rows),
        f"Win rates in percent over {base['n_total']} instructions, judged by `{base['judge']}`; average length in characters.",
    ]
    if "length_controlled_absent" in base:
        lines.append(f"No length-controlled (LC) win rate: {base['length_controlled_absent']}.")
    if base["judge"] == "gold":
        lines.append(
            "The reference outputs are a second sample from the base policy, so the base policy wins about half the time."
        )
    lines.append(NOT_PUBLISHED if published is None else compare_alpaca_eval(alpaca, published))
    return "\n".join(lines) + "\n"


def compare_alpaca_eval(alpaca: dict[str, dict[str, Any]], published: Published) -> str:
    """Format the section of alpaca_eval.md that compares our results with the published ones."""
    rows = []
    for name, theirs in published.alpaca_eval.models.items():
        if name not in alpaca:
            continue
        for label, key, error_key in (
            ("LC win rate", "length_controlled_winrate", "lc_standard_error"),
            ("win rate", "win_rate", "standard_error"),
            ("average length", "avg_length", ""),
        ):
            value, reported = alpaca[name].get(key), getattr(theirs, key)
            difference = None if value is None or reported is None else value - reported
            verdict = "–"
            if difference is not None:
                verdict = judge_difference(alpaca[name].get(error_key), getattr(theirs, error_key, None), difference)
            rows.append([name, published.models[name], label, number(value), number(reported), number(difference), verdict])
    header = ["model", "published as", "metric", "ours", "published", "difference", "within 95% CI"]
    judge = alpaca[BASE]["judge"]
    text = (
        f"\n{COMPARISON}\n\n{markdown.table(header, rows)}\nSource of the published results: {published.alpaca_eval.source}. "
    )
    text += (
        f"Within 95% CI: the difference is at most {markdown.INTERVAL} times its standard error, which combines ours and the "
        "published one; where none was published, ours is used for both."
    )
    if judge != published.alpaca_eval.judge:
        text += (
            f"\n\n**Different judge**: our results were judged by `{judge}`, the published ones by "
            f"`{published.alpaca_eval.judge}`. The differences include those between the judges."
        )
    return text


def format_leaderboard(harness: dict[str, dict[str, dict[str, Any]]], published: Published | None) -> str:
    """Format open_llm_leaderboard.md. harness: model -> task -> value, standard_error, metric and shots."""
    rows = []
    for name, summary in harness.items():
        cells = [f"{value:.2f} ± {error:.2f}" for value, error in average_tasks(summary).values()]
        rows.append([name, *cells])
    base = harness[BASE]
    metrics = ", ".join(f"{task} {base[task]['metric']} ({base[task]['shots']}-shot)" for task in TASKS)
    text = (
        "# Open LLM Leaderboard v1, lm-evaluation-harness 0.4.1\n\n"
        + markdown.table(["model", *TASKS, "average"], rows)
        + f"\nPercent ± standard error. Metrics: {markdown.escape(metrics)}. "
        + "MMLU is the unweighted mean over its 57 subjects, as on the leaderboard.\n"
    )
    if published is None or published.open_llm_leaderboard is None:
        return text + NOT_PUBLISHED + "\n"
    return text + compare_leaderboard(harness, published.open_llm_leaderboard.models, published.open_llm_leaderboard.source)


def compare_leaderboard(
    harness: dict[str, dict[str, dict[str, Any]]], published: dict[str, dict[str, float]], source: str
) -> str:
    """Format the section of open_llm_leaderboard.md that compares our results with the published ones.

    published: model -> task or `average` -> percent.
    """
    rows = []
    for name, theirs in published.items():
        if name not in harness:
            continue
        differences = []
        for task, (value, error) in average_tasks(harness[name]).items():
            difference = value - theirs[task]
            outside = judge_difference(error, None, difference) == "no"
            differences.append(f"{difference:+.2f}{' (outside 95% CI)' if outside else ''}")
        rows.append([name, "published", *[number(value) for value in theirs.values()]])
        rows.append([name, "difference", *differences])
    return (
        f"\n{COMPARISON}\n\n"
        + markdown.table(["model", "", *TASKS, "average"], rows)
        + f"\nSource of the published results: {source}. Difference: ours minus published. Outside 95% CI: more than "
        f"{markdown.INTERVAL} times its standard error; none are published, so ours is used for both.\n"
    )


def format_ranker(comparison: dict[str, Any]) -> str:
    """Format ranker.md, the win-rate matrix of the paper's Fig. 3. comparison: the content of comparison.json."""
    models = comparison["models"]
    matrix = zip(models, comparison["win_rates"], comparison["standard_errors"], strict=True)
    rows = [
        [
            name,
            *[
                "–" if name == opponent else f"{rate:.1f} ± {error:.1f}"
                for opponent, rate, error in zip(models, rates, errors, strict=True)
            ],
        ]
        for name, rates, errors in matrix
    ]
    return (
        "# Win rates according to the ranker\n\n"
        + markdown.table(["row against column", *models], rows)
        + "\nMean probability (percent ± standard error) that the ranker prefers the row model's response to the column "
        f"model's, over the {comparison['n']} hold-out prompts, with one response per model. Training optimises this ranker's "
        "preferences, so these win rates are a proxy, not an independent evaluation.\n"
    )


def format_samples(answers: dict[str, list[dict[str, Any]]], seed: int) -> str:
    """Format samples.md: the answers of all models, side by side, to instructions drawn with the seed."""
    base = answers[BASE]
    drawn = sorted(random.Random(f"{seed}/samples").sample(range(len(base)), min(SAMPLES, len(base))))
    rows = [[base[index]["instruction"], *[outputs[index]["output"] for outputs in answers.values()]] for index in drawn]
    return (
        f"# Samples\n\n{len(drawn)} of the {len(base)} AlpacaEval instructions, drawn at random with the seed, and the answers "
        "of each model.\n\n" + markdown.table(["instruction", *answers], rows, text=True)
    )

"""Noise between runs: the mean, standard deviation and range of every metric over runs with different seeds.

Nothing heavier than the standard library is imported: `stages.tools diff` runs where only DVC is installed.
"""

import math
import statistics
from typing import Any

from stages.reporting import markdown
from stages.runtime.errors import StageError, quote

REMEDY = "recreate it with `make seeds`"
QUANTILES = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
]
"""97.5% quantiles of Student's t distribution with 1 to 30 degrees of freedom."""
LARGEST = 1e100
"""Larger numbers are no metrics, and their squares may be too large for a float."""
HIDDEN = ("lower", "upper", "wins", "losses", "ties")
"""Details of a paired difference that seeds.md leaves out."""
Flat = dict[str, Any]
"""The leaves of metrics.json by their keys, joined by dots."""
Document = dict[str, Any]
"""The content of seeds.json: `seeds`, a list, and `figures`, metric -> its value for each seed, in the same order."""


def collect_figures(runs: dict[int, Flat]) -> Document:
    """Return the content of seeds.json: each number that the metrics of all runs (seed -> metrics) contain.

    Raises StageError for fewer than two runs, which have no standard deviation.
    """
    if len(runs) < 2:
        raise StageError(f"runs with at least two seeds are required, found {len(runs)}: run more of them with `make seeds`")
    first, *others = runs.values()
    keys = [key for key, value in first.items() if is_number(value) and all(is_number(other.get(key)) for other in others)]
    return {"seeds": list(runs), "figures": {key: [metrics[key] for metrics in runs.values()] for key in keys}}


def is_number(value: object) -> bool:
    """Return whether a value is a number that a metric can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST  # false for NaN


def read_limits(document: dict[str, Any], where: str) -> dict[str, float]:
    """Return each metric's `noise_limit`, by its key joined by dots.

    document: the content of seeds.json; where: its source in messages. Raises StageError if it is not valid.
    """
    seeds, figures = document.get("seeds"), document.get("figures")
    if not isinstance(seeds, list) or len(seeds) < 2:
        raise StageError(f"{where}: 'seeds' is {quote(seeds)}, expected a list of at least two: {REMEDY}")
    if not isinstance(figures, dict):
        raise StageError(f"{where}: 'figures' is {quote(figures)}, expected a mapping: {REMEDY}")
    for key, values in figures.items():
        if not isinstance(values, list) or len(values) != len(seeds) or not all(map(is_number, values)):
            raise StageError(f"{where}: 'figures.{key}' is {quote(values)}, expected {len(seeds)} numbers: {REMEDY}")
    return {key: noise_limit(values) for key, values in figures.items()}


def noise_limit(values: list[float]) -> float:
    """Return the largest difference between two runs that noise explains, estimated from a metric's values in n runs.

    The difference between two other runs, divided by sqrt(2) SD, has Student's t distribution with n - 1 degrees of freedom,
    where SD is the standard deviation of the values (n - 1 in the denominator). The limit is that of its central 95%.
    """
    return student_quantile(len(values) - 1) * math.sqrt(2) * statistics.stdev(values)


def student_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t distribution; above 30 degrees of freedom, that of the normal distribution."""
    return QUANTILES[freedom - 1] if freedom <= len(QUANTILES) else markdown.INTERVAL


def format_seeds(document: Document) -> str:
    """Format seeds.md: the headline metrics with their errors, then the others, collapsed."""
    figures = select_figures(document["figures"])
    headlines = list_headlines(figures)
    rows = [
        [label, *_summarize(figures[key]), markdown.number(statistics.fmean(figures[error]) if error in figures else None)]
        for label, (key, error) in headlines.items()
    ]
    shown = {key for key, _ in headlines.values()}
    others = [[key, *_summarize(values)] for key, values in figures.items() if key not in shown and "standard_error" not in key]
    count, names = len(document["seeds"]), ", ".join(map(str, document["seeds"]))
    return (
        f"# Noise between runs\n\n{count} runs that differ in the seed only: {names}. The seed determines the miniature's "
        "questions, models and samples, so these runs are repetitions of the whole experiment.\n\n"
        + markdown.table(["metric", "mean", "SD between runs", "range", "SE of one run"], rows)
        + "\nSD: the standard deviation over the runs (n − 1), the error of the experiment: how much another run would differ. "
        f"With {count} runs, it is itself only known to within about {100 / math.sqrt(2 * (count - 1)):.0f}%. SE: the standard "
        "error that a run reports, the error of the evaluation: how much other questions to the same models would change the "
        "result (mean over the runs; paired for differences). Two single runs differ by more than noise if their difference "
        f"exceeds {student_quantile(count - 1)} √2 SD; {student_quantile(count - 1)} is the 97.5% quantile of Student's t "
        f"distribution with {count - 1} degrees of freedom, because the SD is estimated from {count} runs. The seed also draws "
        "the evaluation's questions, so the SD contains the error of the evaluation: for two runs on the same questions, it is "
        "an upper estimate.\n"
        f"\n<details><summary>{len(others)} more metrics</summary>\n\n"
        + markdown.table(["metric", "mean", "SD between runs", "range"], others)
        + "\n</details>\n"
    )


def select_figures(figures: dict[str, list[float]]) -> dict[str, list[float]]:
    """Leave out the details (HIDDEN) of paired differences, and `vs_previous` of iterations that started from the base policy:
    those whose values are all the same as `vs_base`'s."""
    previous: dict[str, list[str]] = {}
    for key in figures:
        place, found, _ = key.partition(".vs_previous.")
        if found:
            previous.setdefault(place, []).append(key)
    repeated = [
        keys
        for keys in previous.values()
        if all(figures[key] == figures.get(key.replace(".vs_previous.", ".vs_base.")) for key in keys)
    ]
    left_out = {key for keys in repeated for key in keys}
    left_out |= {key for key in figures if ".vs_" in key and key.rpartition(".")[2] in HIDDEN}
    return {key: values for key, values in figures.items() if key not in left_out}


def list_headlines(figures: dict[str, list[float]]) -> dict[str, tuple[str, str]]:
    """Map the label of each headline metric among `figures` to its key and that of its standard error."""
    models = [key.split(".")[1] for key in figures if key.startswith("alpaca_eval.") and key.endswith(".win_rate")]
    labels: dict[str, tuple[str, str]] = {}
    for name in models:
        labels[f"win rate of {name}"] = (f"alpaca_eval.{name}.win_rate", f"alpaca_eval.{name}.standard_error")
    for name in models:
        for other in ("base", "previous"):
            place = f"alpaca_eval.{name}.vs_{other}"
            labels[f"win rate of {name} − {other}"] = (f"{place}.difference", f"{place}.standard_error")
    for name in models:
        place = f"open_llm_leaderboard.{name}"
        labels[f"leaderboard average of {name}"] = (f"{place}.average", f"{place}.standard_errors.average")
    for name in models:
        for other in ("base", "previous"):
            place = f"open_llm_leaderboard.{name}.vs_{other}.average"
            labels[f"leaderboard average of {name} − {other}"] = (f"{place}.difference", f"{place}.standard_error")
    return {label: keys for label, keys in labels.items() if keys[0] in figures}


def _summarize(values: list[float]) -> list[str]:
    """Format mean, standard deviation and range: two decimals, none for counts in the thousands, four digits below 0.1."""
    largest = max(map(abs, values))

    def show(number: float) -> str:
        return f"{number:.4g}" if 0 < largest < 0.1 else f"{number:.{0 if largest >= 1000 else 2}f}"

    return [
        show(statistics.fmean(values)),
        show(statistics.stdev(values)),
        f"{show(min(values))} to {show(max(values))}",
    ]

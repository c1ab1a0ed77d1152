"""Whether the change of a metric between two revisions exceeds the error of the evaluation and the noise between runs.

Pure Python: `stages.tools diff` runs where only DVC is installed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from stages.reporting import paired, seeds
from stages.reporting.paired import Preferences, Scores
from stages.runtime.errors import StageError, quote

BASE = "base"
"""params.BASE, which this module cannot import: it needs pydantic."""
ERRORS = {"win_rate": "standard_error", "length_controlled_winrate": "lc_standard_error", "difference": "standard_error"}
"""Metric -> the key of its standard error."""
NESTED_ERRORS = "standard_errors"
"""The key in metrics.json whose value maps the metrics beside it to their standard errors."""
BOUNDS = ("lower", "upper")
"""The keys of the bounds of a difference's 95% confidence interval."""

Key = tuple[str, ...]
"""The path to a leaf of nested mappings, one key per level."""
Flat = dict[Key, Any]
"""The leaves of nested mappings by their keys."""
Results = TypeVar("Results", Preferences, Scores)
Published = tuple[Key, float, float | None]
"""A published result: the key in metrics.json to compare with, its value, and its standard error or None."""


@dataclass(frozen=True)
class Items:
    """One revision's results for each instruction and question; empty or None for what the revision lacks."""

    preferences: dict[str, Preferences]
    """Model -> preferences, from preferences.csv."""
    scores: dict[str, Scores]
    """Model -> scores, from harness.csv."""
    instructions: str | None
    """Hash of AlpacaEval's set in dvc.lock."""
    questions: str | None
    """Hash of the harness's data sets in dvc.lock."""
    starts: dict[str, str]
    """Iteration -> the model that it started from."""


NO_ITEMS = Items({}, {}, None, None, {})


@dataclass(frozen=True)
class Change:
    """A metric's change, compared with the evaluation's error and the noise between runs."""

    key: Key
    error: float | None
    """Standard error of the change; None if it is unknown."""
    is_paired: bool
    """Whether the error is that of the mean change per item, instead of that of two independent estimates."""
    beyond_error: bool | None
    """Whether the change exceeds the error of the evaluation; None if that is unknown."""
    beyond_noise: bool | None
    """Whether the change exceeds the noise between runs; None if that is unknown."""


def is_error(key: Key) -> bool:
    """Return whether a metric is the standard error of another, or a bound of its confidence interval."""
    return NESTED_ERRORS in key or key[-1] in ERRORS.values() or key[-1] in BOUNDS


def standard_error(metrics: Flat, key: Key) -> float | None:
    """Return the standard error of a metric according to metrics.json, or None."""
    *parents, last = key
    error = metrics.get((*parents, NESTED_ERRORS, last), metrics.get((*parents, ERRORS.get(last, ""))))
    return float(error) if isinstance(error, int | float) else None


def judge_change(old: Flat, new: Flat, key: Key, paired_errors: dict[Key, float], limits: dict[str, float]) -> Change:
    """Compare the change of a metric with the error of the evaluation and with the noise between runs.

    paired_errors: from `find_paired_errors`; without a paired error, the two estimates are taken as independent. limits: from
    `seeds.read_limits`.
    """
    if not all(isinstance(metrics.get(key), int | float) for metrics in (old, new)):
        return Change(key, None, False, None, None)
    change = new[key] - old[key]
    errors = standard_error(old, key), standard_error(new, key)
    error = None if errors[0] is None or errors[1] is None else paired_errors.get(key, math.hypot(errors[0], errors[1]))
    beyond_noise = exceeds_noise(change, limits.get(".".join(key)))
    return Change(key, error, error is not None and key in paired_errors, paired.exceeds(change, error), beyond_noise)


def exceeds_noise(difference: float, limit: float | None) -> bool | None:
    """Return whether the difference between two runs exceeds the noise between runs.

    limit: from `seeds.noise_limit`. Returns None if it is unknown or 0: runs that all gave the same value do not show how much
    another one would differ.
    """
    return abs(difference) > limit if limit else None


def find_paired_errors(a: Items, b: Items) -> dict[Key, float]:
    """Map metrics to the standard errors of their changes from a to b, in percentage points, computed item by item.

    Includes win rates, the harness's scores and the paired differences (`vs_base`, `vs_previous`) of both, as far as both
    revisions have them for the same items: the same data according to dvc.lock, and the same number of them. Instructions
    without a preference in one of the revisions are left out.
    """
    errors: dict[Key, float] = {}
    if a.instructions == b.instructions is not None:
        errors |= _find_win_rate_errors(a, b)
    if a.questions == b.questions is not None:
        errors |= _find_score_errors(a, b)
    return errors


def _find_win_rate_errors(a: Items, b: Items) -> dict[Key, float]:
    errors = {}
    old, new = ((items.preferences, items.starts) for items in (a, b))
    for place, pairs in _subtract_common(old, new, paired.subtract_preferences, len):
        changes = [change for change in pairs if change is not None]
        if len(changes) > 1:
            column = "difference" if len(place) > 1 else "win_rate"
            errors["alpaca_eval", *place, column] = paired.estimate_mean(changes)[1]
    return errors


def _find_score_errors(a: Items, b: Items) -> dict[Key, float]:
    errors = {}
    old, new = ((items.scores, items.starts) for items in (a, b))
    for place, scores in _subtract_common(old, new, paired.subtract_scores, paired.count_questions):
        for column, (_, error) in paired.estimate_scores(scores).items():
            tail = (column, "difference") if len(place) > 1 else (column,)
            errors["open_llm_leaderboard", *place, *tail] = error
    return errors


def _subtract_common(
    old: tuple[dict[str, Results], dict[str, str]],
    new: tuple[dict[str, Results], dict[str, str]],
    subtract: Callable[[Results, Results], Results],
    count: Callable[[Results], Any],
) -> Iterator[tuple[Key, Results]]:
    """Yield the keys of `add_differences` that both revisions have with the same `count` of items, and their changes.

    old, new: a revision's results by model, and its `starts`.
    """
    before, after = (add_differences(results, starts, subtract) for results, starts in (old, new))
    for place in before:
        if place in after and count(before[place]) == count(after[place]):
            yield place, subtract(after[place], before[place])


def add_differences(
    results: dict[str, Results], starts: dict[str, str], subtract: Callable[[Results, Results], Results]
) -> dict[Key, Results]:
    """Return each model's results under (model,), and their differences from its opponents' under (model, `vs_...`)."""
    selected: dict[Key, Results] = {(model,): values for model, values in results.items()}
    for model, start in starts.items():
        for column, opponent in (("vs_base", BASE), ("vs_previous", start)):
            if model in results and opponent in results:
                selected[model, column] = subtract(results[model], results[opponent])
    return selected


def read_starts(params: dict[str, Any], where: str) -> dict[str, str]:
    """Return what params.yaml says about the order of models: iteration -> the model that it starts from or, in a recipe that
    evaluates existing models, model -> the one before; an empty mapping if it says nothing.

    params: the file's content; where: its source in messages. Raises StageError if the names are not texts.
    """
    sections = [params.get(key) for key in ("models", "answers")]
    names = [str(name) for section in sections if isinstance(section, dict) for name in section]
    starts = params.get("iterations", dict(zip(names[1:], names, strict=False)))
    if not isinstance(starts, dict) or not all(isinstance(name, str) for pair in starts.items() for name in pair):
        raise StageError(
            f"{where}: 'iterations' is {quote(starts)}, expected the name of the model that each starts from: correct it"
        )
    return starts


def list_published(document: dict[str, Any], where: str) -> list[Published]:
    """List the published results, without those that are null.

    document: the content of published.yaml; where: its source in messages. Raises StageError if it has another structure.
    """
    published = _get_mapping(document, "published", where)
    rows: list[Published] = []
    for section in ("alpaca_eval", "open_llm_leaderboard"):
        place = f"{where}: published.{section}.models"
        models = _get_mapping(
            _get_mapping(published, section, f"{where}: published"), "models", f"{where}: published.{section}"
        )
        for model in models:
            results = _get_mapping(models, model, place)
            for name, value in results.items():
                if value is not None and not seeds.is_number(value):
                    raise StageError(f"{place}.{model}: {quote(name)} is {quote(value)}, expected a number: correct it")
            rows += [
                ((section, str(model), paired.PUBLISHED_AS.get(name, str(name))), value, results.get(ERRORS.get(name, "")))
                for name, value in results.items()
                if value is not None and name not in ERRORS.values()
            ]
    return rows


def _get_mapping(parent: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return the mapping under a key, an empty one for null or a missing key. Raises StageError for anything else."""
    value = parent.get(key)
    if value is not None and not isinstance(value, dict):
        raise StageError(f"{where}: {quote(key)} is {quote(value)}, expected a mapping: correct it")
    return value or {}

"""Did it get better? The last model at two revisions: the figures that matter, and a verdict on its win rate.

A change counts as better or worse only if it exceeds both the error of the evaluation and the noise between runs, as far as
they are known. Nothing heavier than the standard library is imported: `stages.tools diff` runs where only DVC is installed.
"""

from dataclasses import dataclass, replace

from stages.reporting import markdown, paired
from stages.tools import changes, locks, revisions
from stages.tools.changes import Flat, Key
from stages.tools.revisions import Revision, find_limits

ALPACA_EVAL, LEADERBOARD = "alpaca_eval", "open_llm_leaderboard"
INPUTS = {
    ALPACA_EVAL: {"data/alpaca_eval_set": "instructions", "data/reference_outputs.json": "reference outputs"},
    LEADERBOARD: {"data/harness_sets": "questions"},
}
"""Section of metrics.json -> what the evaluation depends on besides the models: path -> its name in messages."""
JUDGE = ("evaluate_alpaca", "judge")
SHOWN = 5
"""Number of figures to show."""
NOT_COMPARABLE, NO_VERDICT, NO_CHANGE, WITHIN_NOISE, MIXED = (
    "Not comparable",
    "No verdict",
    "No change",
    "Within noise",
    "Mixed",
)


@dataclass(frozen=True)
class Figure:
    """A figure of the last model at two revisions, and its change."""

    label: str
    words: tuple[str, str]
    """What a change to a lower, and to a higher value is called."""
    old: float | None
    new: float | None
    change: float | None = None
    """None if either value is missing."""
    error: float | None = None
    """The change's standard error according to the evaluation; None if it is unknown."""
    is_paired: bool = False
    """Whether the error is that of the mean change per item, instead of that of two independent evaluations."""
    count: int | None = None
    """Number of instructions if the change was computed from them."""
    limit: float | None = None
    """The largest change that noise between runs explains; None if it is unknown."""
    obstacle: str = ""
    """Why the two values cannot be compared, empty if they can."""

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the change exceeds the noise between runs; None if that is unknown."""
        return None if self.change is None else changes.exceeds_noise(self.change, self.limit)

    @property
    def direction(self) -> int | None:
        """1 (higher) or -1 (lower) if the change exceeds the evaluation's error and the noise between runs, as far as they are
        known; 0 if it does not exceed one of them. None without two comparable values, or if neither limit is known."""
        if self.change is None or self.obstacle:
            return None
        exceeds = paired.exceeds(self.change, self.error), self.beyond_noise
        if self.change == 0 or False in exceeds:
            return 0
        return None if exceeds == (None, None) else 1 if self.change > 0 else -1

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% confidence interval of the change; None if its error is unknown."""
        if self.change is None or self.error is None:
            return None
        return self.change - markdown.INTERVAL * self.error, self.change + markdown.INTERVAL * self.error


WIN_RATE = (ALPACA_EVAL, "{model}", "win_rate")
LC_WIN_RATE = (ALPACA_EVAL, "{model}", "length_controlled_winrate")
AVERAGE = (LEADERBOARD, "{model}", "average")
LENGTH = (ALPACA_EVAL, "{model}", "avg_length")
FIGURES: dict[Key, tuple[str, tuple[str, str]]] = {
    WIN_RATE: ("win rate (%)", ("worse", "better")),
    LC_WIN_RATE: ("length-controlled win rate (%)", ("worse", "better")),
    AVERAGE: ("leaderboard average (%)", ("worse", "better")),
    LENGTH: ("answer length (characters)", ("shorter", "longer")),
    ("training", "{model}", "kl"): ("KL from the reference (nats)", ("closer", "further")),
    ("ranker", "{model}"): ("win rate over base, by the ranker (%)", ("worse", "better")),
}
"""The figures in the order of their importance. Key in metrics.json -> label, and what a lower and a higher value is called."""


def find_last(revision: Revision) -> str | None:
    """Return the name of the last model, which is the result of an experiment; None if params.yaml names no models."""
    return next(reversed(revision.items.starts), None)


def align(a: Revision, b: Revision) -> Revision:
    """Return `a` with its last model under the name of b's last model, to compare the two.

    If the names differ, a has no noise limits: those of seeds.json are for two runs of the same iteration.
    """
    old, new = find_last(a), find_last(b)
    if old is None or new is None or old == new:
        return a

    def rename(name: str) -> str:
        return new if name == old else old if name == new else name

    metrics = {tuple(map(rename, key)): value for key, value in (a.metrics or {}).items()}
    preferences = {rename(name): values for name, values in a.items.preferences.items()}
    scores = {rename(name): values for name, values in a.items.scores.items()}
    items = replace(a.items, preferences=preferences, scores=scores, starts={})
    return replace(a, metrics=None if a.metrics is None else metrics, items=items)


def list_figures(a: Revision, b: Revision) -> dict[Key, Figure]:
    """Compare the last models of two revisions: the keys of FIGURES, without those that neither revision has, -> figure.

    Empty if a revision names no models.
    """
    old, model, earlier = find_last(a), find_last(b), align(a, b)
    if old is None or model is None:
        return {}
    limits = find_limits(a, b)[0] if old == model else {}
    errors = changes.find_paired_errors(earlier.items, b.items)
    keys = {template: name_key(template, model, {**(a.metrics or {}), **(b.metrics or {})}) for template in FIGURES}
    return {
        template: make_figure(template, key, earlier, b, errors, limits)
        for template, key in keys.items()
        if key in (earlier.metrics or {}) or key in (b.metrics or {})
    }


def list_win_rates(a: Revision, b: Revision) -> dict[str, Figure]:
    """Compare the win rates of all models that both revisions have, in their order: model -> figure."""
    errors, limits = changes.find_paired_errors(a.items, b.items), find_limits(a, b)[0]
    models = [changes.BASE, *[name for name in b.items.starts if name != changes.BASE]]
    keys = {model: name_key(WIN_RATE, model, {}) for model in models}
    figures = {model: make_figure(WIN_RATE, key, a, b, errors, limits) for model, key in keys.items()}
    return {model: figure for model, figure in figures.items() if figure.change is not None}


def make_figure(
    template: Key, key: Key, a: Revision, b: Revision, errors: dict[Key, float], limits: dict[str, float]
) -> Figure:
    """Compare a metric of two revisions.

    template, key: those of FIGURES, and of metrics.json. errors: from `changes.find_paired_errors`. limits: from `find_limits`.
    """
    old, new = a.metrics or {}, b.metrics or {}
    judged = changes.judge_change(old, new, key, errors, limits)
    values = get_number(old, key), get_number(new, key)
    label, words = FIGURES[template]
    figure = Figure(
        label,
        words,
        *values,
        change=values[1] - values[0] if values[0] is not None and values[1] is not None else None,
        error=judged.error,
        is_paired=judged.is_paired,
        limit=limits.get(".".join(key)),
        obstacle=find_obstacle(a, b, key[0]),
    )
    return pair_preferences(figure, a, b, key[1]) if template == WIN_RATE and judged.is_paired else figure


def pair_preferences(figure: Figure, a: Revision, b: Revision, model: str) -> Figure:
    """Compute the change of the win rate and its error from the instructions with preferences at both revisions."""
    pairs = paired.subtract_preferences(b.items.preferences[model], a.items.preferences[model])
    differences = [value for value in pairs if value is not None]
    change, error = paired.estimate_mean(differences)
    return replace(figure, change=change, error=error, count=len(differences))


def name_key(template: Key, model: str, metrics: Flat) -> Key:
    """Return the key of a figure of FIGURES; the leaderboard's average is named after the tasks in it."""
    key = tuple(model if part == "{model}" else part for part in template)
    others = [one for one in metrics if one[:-1] == key[:-1] and one[-1].startswith("average_of_")]
    return others[0] if template == AVERAGE and key not in metrics and others else key


def get_number(metrics: Flat, key: Key) -> float | None:
    value = metrics.get(key)
    return value if isinstance(value, int | float) else None


def find_obstacle(a: Revision, b: Revision, section: str) -> str:
    """Say what, besides the models, differs between the evaluations of two revisions; empty if they can be compared.

    section: that of metrics.json. Inputs that the same stages drew with another seed are of the same kind, and can be compared.
    """
    different: list[str] = []
    unknown: list[str] = []
    judges = [(revision.params or {}).get(JUDGE) for revision in (a, b)]
    if section == ALPACA_EVAL and judges[0] != judges[1]:
        different.append(f"judge ({judges[0]} and {judges[1]})")
    for path, name in INPUTS.get(section, {}).items():
        hashes = [revisions.find_hash(revision.stages or {}, path) for revision in (a, b)]
        if None in hashes:
            unknown.append(name)
        elif hashes[0] != hashes[1] and not is_redrawn(a.stages or {}, b.stages or {}, path):
            different.append(name)
    text = f"different {' and '.join(different)}" if different else ""
    return text or (f"dvc.lock does not say whether the {' and '.join(unknown)} are the same" if unknown else "")


def is_redrawn(a: locks.Stages, b: locks.Stages, path: str) -> bool:
    """Return whether two runs made an output in the same way from the same inputs, except for the seed."""
    return locks.find_changed_inputs(select_upstream(a, path), select_upstream(b, path)) == ["seed in params.yaml"]


def select_upstream(stages: locks.Stages, path: str) -> locks.Stages:
    """Return the stage that makes an output and those that it depends on, except that of the code's fingerprints."""
    owners = {out: stage for stage, entry in stages.items() for out in revisions.hash_outputs(entry) if stage != locks.CODE}
    found: locks.Stages = {}
    pending = [path]
    while pending:
        stage = owners.get(pending.pop())
        if stage is not None and stage not in found:
            found[stage] = stages[stage]
            pending += [dep["path"] for dep in stages[stage].get("deps", [])]
    return found


def decide(figures: dict[Key, Figure]) -> str:
    """Return the verdict on the win rate in a few words; `figures` are those of `list_figures`."""
    figure, controlled = figures.get(WIN_RATE), figures.get(LC_WIN_RATE)
    if figure is None or figure.change is None:
        return NO_VERDICT
    if figure.obstacle:
        return NOT_COMPARABLE
    if figure.change == 0:
        return NO_CHANGE
    if figure.direction is None:
        return NO_VERDICT
    if figure.direction == 0:
        return WITHIN_NOISE
    if controlled is not None and controlled.direction == -figure.direction:
        return MIXED
    word = figure.words[figure.direction > 0].capitalize()
    return word if figure.beyond_noise else f"{word} in these runs"

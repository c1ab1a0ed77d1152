"""What should make the reader of a comparison suspicious: signs that a run went wrong, or that a gain is not one."""

from collections.abc import Callable
from dataclasses import dataclass

from stages.tools import changes, revisions
from stages.tools.changes import Flat, Key
from stages.tools.revisions import Revision, find_limits
from stages.tools.verdict import ALPACA_EVAL, AVERAGE, LC_WIN_RATE, LENGTH, WIN_RATE, Figure, get_number

LONGER = 0.1
"""Relative change of the answers' length that is worth a warning."""
FURTHER = 2
"""Ratio of two KL divergences that is worth a warning."""
TRAINING: list[tuple[str, str, Callable[[float], bool]]] = [
    ("chosen_log_ratio", "training made the chosen responses less likely in", lambda value: value < 0),
    ("clipped_steps", "the gradient was clipped at every step of", lambda value: value == 1),
]
"""Metric of an iteration, what is wrong, and whether a value is."""


@dataclass(frozen=True)
class Flags:
    """Warnings about the second of two revisions."""

    new: list[str]
    known: list[str]
    """Those that already applied to the first revision."""


def find_flags(a: Revision, b: Revision, figures: dict[Key, Figure]) -> Flags:
    """Find what is suspicious about b. figures: those of `verdict.list_figures`."""
    new = [*list_missing(a, b), *judge_judge(a, b), *judge_gain(figures), *judge_length(figures), *judge_kl(a, b)]
    known = []
    for name, text, is_wrong in TRAINING:
        before, after = (find_iterations(revision.metrics or {}, name, is_wrong) for revision in (a, b))
        added = [iteration for iteration in after if iteration not in before]
        new += [f"{text} {', '.join(added)}"] if added else []
        kept = [iteration for iteration in after if iteration in before]
        known += [f"{text} {', '.join(kept)}"] if kept else []
    return Flags(new, known)


def find_iterations(metrics: Flat, name: str, is_wrong: Callable[[float], bool]) -> list[str]:
    """List the iterations of which a metric of `training` is wrong."""
    keys = [key for key in metrics if key[0] == "training" and key[2:] == (name,)]
    return [key[1] for key in keys if (value := get_number(metrics, key)) is not None and is_wrong(value)]


def list_missing(a: Revision, b: Revision) -> list[str]:
    """Name models that lack results at b, and count the instructions on which the judge had no preference."""
    if b.metrics is None:
        return []
    expected = [name for name in b.items.starts if (ALPACA_EVAL, name, "win_rate") not in b.metrics]
    flags = [f"no win rate of {', '.join(expected)}: not evaluated"] if expected else []
    counts = {
        name: count
        for name, values in b.items.preferences.items()
        if (count := values.count(None)) > a.items.preferences.get(name, []).count(None)
    }
    return flags + [f"the judge gave no preference for {count} answers of {name}" for name, count in counts.items()]


def judge_judge(a: Revision, b: Revision) -> list[str]:
    """Name models whose answers are the same but whose preferences are not: the judge or its code has changed."""
    path = "data/answers/{}.json".format
    hashes = [{name: revisions.find_hash(run.stages or {}, path(name)) for name in run.items.preferences} for run in (a, b)]
    names = [
        name
        for name in hashes[0]
        if hashes[0][name] == hashes[1].get(name) is not None
        and a.items.instructions == b.items.instructions
        and a.items.preferences[name] != b.items.preferences[name]
    ]
    return [f"the judge's preferences changed on the same answers of {', '.join(names)}"] if names else []


def judge_gain(figures: dict[Key, Figure]) -> list[str]:
    """Say whether the other metrics contradict a higher win rate."""
    win_rate, controlled, average = (figures.get(key) for key in (WIN_RATE, LC_WIN_RATE, AVERAGE))
    flags = []
    if win_rate is not None and win_rate.direction == 1 and controlled is not None and controlled.direction in (0, -1):
        what = "fell" if controlled.direction == -1 else "did not rise beyond noise"
        flags.append(f"the length-controlled win rate {what} ({controlled.change:+.2f}): longer answers may explain the gain")
    if average is not None and average.direction == -1:
        flags.append(f"the leaderboard average fell ({average.change:+.2f})")
    return flags


def judge_length(figures: dict[Key, Figure]) -> list[str]:
    """Say whether answers became so much longer or shorter that the judge may prefer them, or not, for their length."""
    figure = figures.get(LENGTH)
    if figure is None or figure.change is None or figure.obstacle or figure.beyond_noise is False or not figure.old:
        return []
    ratio = figure.change / figure.old
    if abs(ratio) < LONGER:
        return []
    control = "" if LC_WIN_RATE in figures else ", and no length-controlled win rate corrects for it"
    return [f"answers are {abs(ratio):.0%} {figure.words[ratio > 0]}: judges prefer longer ones{control}"]


def judge_kl(a: Revision, b: Revision) -> list[str]:
    """Name iterations that moved at least FURTHER times as far from their reference."""
    (limits, _), flags = find_limits(a, b), []
    for key in b.metrics or {}:
        old, new = get_number(a.metrics or {}, key), get_number(b.metrics or {}, key)
        if key[0] == "training" and key[2:] == ("kl",) and old is not None and new is not None:
            beyond = changes.exceeds_noise(new - old, limits.get(".".join(key)))
            if old > 0 and new >= FURTHER * old and beyond is not False:
                flags.append(f"{key[1]} {old:.2f} to {new:.2f} nats")
    return [f"KL from the reference rose: {', '.join(flags)}"] if flags else []

"""The top of the page of `stages.tools diff`: the verdict, the figures that it rests on, warnings, and a chart."""

from pathlib import Path

from stages.reporting import markdown
from stages.tools import charts, locks, revisions, verdict
from stages.tools.changes import Flat, Key, standard_error
from stages.tools.flags import find_flags
from stages.tools.revisions import Revision, find_changes, format_leaf
from stages.tools.verdict import LC_WIN_RATE, WIN_RATE, Figure

CAUSES = 4
"""Number of changed inputs to name."""
LONGEST = 80
"""Number of characters to show of each."""
ARROWS = {1: "▲", -1: "▼"}


def summarize(a: Revision, b: Revision, folder: Path) -> str:
    """Return the verdict on one line, then why, the figures, the warnings and a chart.

    folder: that of dvc.yaml, named unless it is the current one.
    """
    figures = verdict.list_figures(a, b)
    place = "" if folder == Path() else f"{markdown.escape(folder.as_posix())}: "
    titles = f"From {a.shown} to {b.shown}"
    lines = [f"# {place}{format_verdict(a, b, figures)}", f"{titles}: {explain(figures)}" if figures else f"{titles}."]
    lines += [text for text in (list_causes(a, b), format_figures(a, b, figures), list_flags(a, b, figures)) if text]
    return "\n\n".join(line.rstrip("\n") for line in lines) + "\n" + draw_changes(a, b)


def format_verdict(a: Revision, b: Revision, figures: dict[Key, Figure]) -> str:
    """Return the verdict and the change of the win rate, or why there is no verdict."""
    word, name = verdict.decide(figures), name_models(a, b)
    if word == verdict.NO_VERDICT:
        return f"{word}: {explain_silence(a, b, figures)}"
    figure = figures[WIN_RATE]
    if word == verdict.NOT_COMPARABLE:
        return f"{word}: {markdown.escape(figure.obstacle)}"
    if word == verdict.NO_CHANGE:
        return f"{word}: win rate of {name} {figure.new:.2f}%"
    text = f"{word}: win rate of {name} {figure.change:+.2f} points"
    return f"{text}, length-controlled {figures[LC_WIN_RATE].change:+.2f}" if word == verdict.MIXED else text


def name_models(a: Revision, b: Revision) -> str:
    """Return the name of the last model, or both names if they differ."""
    names = dict.fromkeys(name for name in (verdict.find_last(a), verdict.find_last(b)) if name)
    return " → ".join(map(markdown.escape, names))


def explain_silence(a: Revision, b: Revision, figures: dict[Key, Figure]) -> str:
    """Say why there is no verdict."""
    missing = [revision.shown for revision in (a, b) if revision.metrics is None]
    if missing:
        return f"no results at {' and '.join(missing)}"
    unnamed = [revision.shown for revision in (a, b) if verdict.find_last(revision) is None]
    if unnamed:
        return f"{revisions.PARAMS} at {' and '.join(unnamed)} names no models"
    figure = figures.get(WIN_RATE)
    values = (None, None) if figure is None else (figure.old, figure.new)
    lacking = [
        f"{markdown.escape(str(verdict.find_last(revision)))} at {revision.shown}"
        for revision, value in zip((a, b), values, strict=True)
        if value is None
    ]
    return f"no win rate of {' and of '.join(lacking)}" if lacking else "neither the error nor the noise is known"


def explain(figures: dict[Key, Figure]) -> str:
    """State the two values of the win rate, the interval of its change, and the noise between runs."""
    figure = figures.get(WIN_RATE)
    if figure is None or figure.change is None:
        return "there is no win rate to compare."
    text = f"win rate {figure.old:.2f}% → {figure.new:.2f}%"
    if figure.obstacle:
        return f"{text}, but these are not win rates in the same evaluation."
    if figure.change == 0:
        return f"{text}."
    if figure.interval is not None:
        how = f"paired over {figure.count} instructions" if figure.is_paired else "two evaluations taken as independent"
        text += f"; 95% interval of the change {figure.interval[0]:+.2f} to {figure.interval[1]:+.2f} points, {how}"
    if figure.beyond_noise is None:
        return f"{text}. The noise between runs is not known."
    noise = f"the noise between runs: two that differ only in the seed differ by up to {figure.limit:.2f} points"
    return f"{text}. This {'exceeds' if figure.beyond_noise else 'does not exceed'} {noise}."


def list_causes(a: Revision, b: Revision) -> str:
    """Name the inputs in which the two runs differ, according to dvc.lock: parameters with their values, code, files."""
    if a.stages is None or b.stages is None or a.stages == b.stages:
        return ""
    old, new = list_params(a.stages), list_params(b.stages)
    params = [f"{'.'.join(key)} {format_leaf(old, key)} → {format_leaf(new, key)}" for key in find_changes(old, new)]
    skipped = [f"command of {stage}" for stage in {*a.stages} ^ {*b.stages}]
    others = [
        name
        for name in locks.find_changed_inputs(a.stages, b.stages)
        if name not in skipped and not name.endswith(f" in {revisions.PARAMS}")
    ]
    texts = [*params, *others]
    if not texts:
        return "Changed: neither parameters nor code nor files. Results that differ are due to the machine or its libraries."
    more = f", and {len(texts) - CAUSES} more" if len(texts) > CAUSES else ""
    return f"Changed: {', '.join(markdown.escape(text[:LONGEST]) for text in texts[:CAUSES])}{more}."


def list_params(stages: locks.Stages) -> Flat:
    """Return the parameters with which the stages of a dvc.lock ran."""
    files = [values for entry in stages.values() for values in entry.get("params", {}).values()]
    return {key: value for values in files for key, value in revisions.flatten(values).items()}


def format_figures(a: Revision, b: Revision, figures: dict[Key, Figure]) -> str:
    """Format a table of the figures that matter most."""
    rows = []
    for figure in list(figures.values())[: verdict.SHOWN]:
        form = choose_format(figure)
        values = [format_number(value, form) for value in (figure.old, figure.new)]
        change = format_number(figure.change, f"+{form}")
        limit = f"±{format_number(figure.limit, form)}" if figure.limit else "–"
        cells = [" → ".join(values), change, f"**{describe(figure)}**", format_interval(figure), limit]
        rows.append([markdown.escape(figure.label), *[cell.replace(" ", "\u00a0") for cell in cells]])
    header = [name_models(a, b), "before → after", "change", "verdict", "95% interval", "noise between runs"]
    return markdown.lay_out(header, rows) if rows else ""


def choose_format(figure: Figure) -> str:
    """Choose the format of a figure's numbers: counts in full, others with two decimals or, below 0.1, three digits."""
    values = [value for value in (figure.old, figure.new) if value is not None]
    if all(isinstance(value, int) for value in values):
        return ".0f"
    return ".2f" if max(map(abs, values)) >= 0.1 else ".3g"


def format_number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def format_interval(figure: Figure) -> str:
    if figure.interval is None or figure.obstacle:
        return "–"
    how = "paired" if figure.is_paired else "independent"
    return f"{figure.interval[0]:+.2f} to {figure.interval[1]:+.2f}, {how}"


def describe(figure: Figure) -> str:
    """Say in which direction a figure changed, or why that is not known."""
    if figure.change is None:
        return "–"
    if figure.obstacle:
        return "not comparable"
    if figure.change == 0:
        return "= same"
    if figure.direction is None:
        return "? noise unknown"
    if figure.direction == 0:
        return "≈ within noise"
    return f"{ARROWS[figure.direction]} {figure.words[figure.direction > 0]}"


def list_flags(a: Revision, b: Revision, figures: dict[Key, Figure]) -> str:
    """List what is suspicious about b, and what already was about a; empty if b has no results."""
    if b.metrics is None:
        return ""
    flags = find_flags(a, b, figures)
    lines = [f"- ⚠️ **{markdown.escape(text[0].upper() + text[1:])}**" for text in flags.new] or ["- No new warnings."]
    title = a.shown
    return "\n".join([*lines, *[f"- Already at {title}: {markdown.escape(text)}." for text in flags.known]])


def draw_changes(a: Revision, b: Revision) -> str:
    """Draw the changes of all win rates with their intervals; empty if none can be compared, or if nothing changed."""
    figures = {name: figure for name, figure in verdict.list_win_rates(a, b).items() if not figure.obstacle}
    rows = [
        charts.Row(name, figure.change, markdown.INTERVAL * figure.error, band=figure.limit or 0)
        for name, figure in figures.items()
        if figure.change is not None and figure.error is not None
    ]
    if not any(row.value for row in rows):
        return ""
    dots = "; dots: noise between runs" if any(row.band for row in rows) else ""
    return f"\nChange of the win rate in points, with 95% intervals{dots}:\n\n```text\n{charts.draw(rows, '+.2f', (0,))}```\n"


def draw_win_rates(a: Revision, b: Revision) -> str:
    """Draw the win rates of all models at both revisions; empty if there are none or nothing changed."""
    figures = verdict.list_win_rates(a, b)
    rows = []
    for name in figures:
        key = verdict.name_key(WIN_RATE, name, {})
        for label, mark, metrics in ((name, "○", a.metrics or {}), ("", "●", b.metrics or {})):
            error = standard_error(metrics, key)
            if error is not None:
                rows.append(charts.Row(label, metrics[key], markdown.INTERVAL * error, mark))
    if not rows or not any(figure.change for figure in figures.values()):
        return ""
    text = f"○ {a.shown}, ● {b.shown}; in percent, with 95% intervals:\n\n"
    return f"{text}```text\n{charts.draw(rows, '.2f')}```\n"

"""The charts of the HTML page, as Vega-Lite specifications.

Colours are CSS variables of page.css, so that the same chart suits light and dark screens and paper. A chart fills the width of
its place. Its data, `data.values`, are complete: page.js also shows them as a table.
"""

import csv
from collections.abc import Iterable
from io import StringIO
from typing import Any

from stages.reporting import markdown, pages
from stages.reporting.inputs import Evaluations
from stages.reporting.paired import PUBLISHED_AS, Estimate, list_columns
from stages.reporting.per_item import shorten
from stages.reporting.published import Published, PublishedAlpacaEvalTable

Row = dict[str, Any]
Chart = dict[str, Any]
"""A Vega-Lite specification; its `description` is the caption."""

VEGA_LITE = "6.1"
"""The version of Vega-Lite. 6.4 shows "undefined" in the tooltip of the point next to the pointer."""
SCHEMA = f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE}.json"
COLOURS = [f"var(--series-{index})" for index in range(1, 7)]
CONFIG: dict[str, Any] = {
    "aria": False,  # the page describes each chart
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **{"labelColor": "var(--text)", "titleColor": "var(--text)", "titleFontWeight": "normal"},
        **{"gridColor": "var(--line)", "domainColor": "var(--line)", "tickColor": "var(--line)"},
        **{"labelFontSize": 12, "titleFontSize": 12, "labelLimit": 140},
    },
    "legend": {"labelColor": "var(--text)", "labelFontSize": 12, "orient": "top", "columns": 4, "labelLimit": 220},
    "range": {"category": COLOURS},
}
"""Vega-Lite's configuration of every chart."""
CURVES = {
    "loss": "Training loss",
    "kl": "KL divergence from the reference, estimated on the pairs (nats)",
    "gradient_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
}
"""Column of training.csv -> the caption of its curves."""
OURS, PUBLISHED = "ours", "published"
METRICS = {"win_rate": ("win rate", "standard_error"), "length_controlled_winrate": ("LC win rate", "lc_standard_error")}
"""Metric of AlpacaEval -> its name on the page, and the key of its standard error."""


def draw_charts(evaluations: Evaluations, tables: dict[str, str], published: Published | None) -> dict[str, list[Chart]]:
    """Draw the charts of a run: section of the page -> charts.

    tables: name -> CSV, as written beside the page; those of training and of the ranker may be missing.
    """
    read = {name: read_rows(text) for name, text in tables.items()}
    alpaca, board = (published.alpaca_eval, published.open_llm_leaderboard) if published else (None, None)
    charts = {
        "alpaca-eval": [
            draw_intervals(list_win_rates(evaluations.alpaca, alpaca), "model", "metric", "AlpacaEval win rate (%)", line=50),
            draw_intervals(list_lengths(read["length"], alpaca), "model", None, "Average length of the answers (characters)"),
        ],
        "open-llm-leaderboard": [
            draw_intervals(list_scores(evaluations.harness, board.models if board else {}), "task", "model", "Score (%)")
        ],
    }
    if "ranker" in read:
        charts["ranker"] = [draw_matrix(read["ranker"])]
    if "training" in read:
        charts["health"] = [
            *[draw_curves(read["training"], column, caption) for column, caption in CURVES.items()],
            draw_log_ratios(read["training"]),
            *draw_histograms(read["probabilities"]),
        ]
    return charts


def read_rows(text: str) -> list[Row]:
    """Parse a CSV file of the reports: a row's cells by column, numbers as numbers."""
    return [{key: parse_cell(cell) for key, cell in row.items()} for row in csv.DictReader(StringIO(text))]


def parse_cell(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def add_bounds(row: Row, value: float, error: float | None) -> Row:
    """Add a `value`, to six digits, and the bounds `lower` and `upper` of its 95% interval if the standard error is known."""
    margin = None if error is None else markdown.INTERVAL * error
    bounds = {} if margin is None else {"lower": shorten(value - margin), "upper": shorten(value + margin)}
    return row | {"value": shorten(value)} | bounds


def list_win_rates(alpaca: dict[str, dict[str, Any]], published: PublishedAlpacaEvalTable | None) -> list[Row]:
    """List our and the published win rates, with and without length control, as far as they are known."""
    rows = [
        add_bounds({"model": name, "metric": label, "source": OURS}, values[key], values.get(error))
        for key, (label, error) in METRICS.items()
        for name, values in alpaca.items()
        if key in values
    ]
    for key, (label, error) in METRICS.items():
        for name, theirs in (published.models if published else {}).items():
            value = getattr(theirs, key)
            if name in alpaca and value is not None:
                row = {"model": name, "metric": label, "source": PUBLISHED}
                rows.append(add_bounds(row, value, getattr(theirs, error)))
    return rows


def list_lengths(lengths: list[Row], published: PublishedAlpacaEvalTable | None) -> list[Row]:
    """List our and the published average lengths. lengths: the rows of length.csv."""
    rows = [
        {"model": row["model"], "source": OURS, "value": row["average_length"], "lower": row["lower"], "upper": row["upper"]}
        for row in lengths
    ]
    theirs = {name: values.avg_length for name, values in (published.models if published else {}).items()}
    names = {row["model"] for row in lengths}
    return rows + [
        {"model": name, "source": PUBLISHED, "value": value}
        for name, value in theirs.items()
        if name in names and value is not None
    ]


def list_scores(harness: dict[str, dict[str, Any]], published: dict[str, dict[str, float]]) -> list[Row]:
    """List our scores and the published ones by task: a published one beside the result of ours that it is compared with."""
    ours: dict[str, dict[str, Estimate]] = {name: pages.average_tasks(summary) for name, summary in harness.items()}
    compared = {PUBLISHED_AS.get(task, task) for scores in published.values() for task in scores}
    rows = [
        add_bounds({"task": pages.label_column(task), "model": name, "source": OURS}, *estimate)
        for name, results in ours.items()
        for task, estimate in results.items()
        if task in list_columns(results) or task in compared
    ]
    return rows + [
        add_bounds({"task": pages.label_column(PUBLISHED_AS.get(task, task)), "model": name, "source": PUBLISHED}, value, None)
        for name, scores in published.items()
        for task, value in scores.items()
        if PUBLISHED_AS.get(task, task) in ours.get(name, {})
    ]


def draw_intervals(rows: list[Row], group: str, series: str | None, caption: str, line: float | None = None) -> Chart:
    """Draw values as points and their 95% intervals as lines, a band per value of `group`.

    rows: `value`, `source`, the columns `group` and `series` (colour), and `lower` and `upper` where they are known. Published
    values are diamonds. line: a value to mark.
    """
    groups, names = (list(dict.fromkeys(row[key] for row in rows if key)) for key in (group, series or group))
    marked: Row = {"y": {"field": group, "type": "nominal", "title": None, "sort": groups}}
    if series and len(names) > 1:
        marked["yOffset"] = {"field": series, "sort": names}
        marked["color"] = {"field": series, "type": "nominal", "title": None, "sort": names}
    else:
        marked["color"] = {"value": COLOURS[0]}
    columns = dict.fromkeys([group, *([series] if series else []), "source"])
    tooltip = [*map(name_field, columns), *(show_field(key, ".2f") for key in ("value", "lower", "upper"))]
    x = {
        **{"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
        "axis": {"grid": True, "tickCount": 6},
    }
    sources = list(dict.fromkeys(row["source"] for row in rows))
    shape = {"field": "source", "scale": {"domain": [OURS, PUBLISHED], "range": ["circle", "diamond"]}, "title": None}
    layers: list[Chart] = [
        {
            "transform": [{"filter": "isValid(datum.lower)"}],
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": marked | {"x": x | {"field": "lower"}, "x2": {"field": "upper"}, "tooltip": tooltip},
        },
        {
            "mark": {"type": "point", "size": 70, "strokeWidth": 2},
            "encoding": marked | {"x": x, "tooltip": tooltip, "shape": shape | ({} if len(sources) > 1 else {"legend": None})},
        },
    ]
    lanes = len(groups) * (len(names) if "yOffset" in marked else 1)
    return make_chart(
        rows, caption, [*([mark_value("x", line)] if line is not None else []), *layers], max(90, 18 * lanes + 30)
    )


def mark_value(axis: str, value: float) -> Chart:
    """Draw a dashed line at a value of an axis, x or y."""
    mark = {"type": "rule", "strokeDash": [5, 4], "color": "var(--text)", "tooltip": f"{value:g}"}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": {axis: {"datum": value}}}


def draw_curves(rows: list[Row], column: str, caption: str) -> Chart:
    """Draw a column of training.csv by step, a line per iteration."""
    kept = [{key: row[key] for key in ("iteration", "step", column)} for row in rows]
    return draw_lines(kept, column, caption, {})


def draw_log_ratios(rows: list[Row]) -> Chart:
    """Draw the log-ratios of chosen and rejected responses by step: solid and dashed lines around 0."""
    kept = [
        {"iteration": row["iteration"], "step": row["step"], "response": response, "log_ratio": row[f"{response}_log_ratio"]}
        for row in rows
        for response in ("chosen", "rejected")
    ]
    dash = {"strokeDash": {"field": "response", "type": "nominal", "title": None}}
    caption = "Log-ratios log π/π_t of chosen and rejected responses (nats)"
    return draw_lines(kept, "log_ratio", caption, dash, line=0)


def draw_lines(rows: list[Row], column: str, caption: str, dash: Row, line: float | None = None) -> Chart:
    """Draw lines by step and iteration; the point next to the pointer shows its values."""
    names = list(dict.fromkeys(row["iteration"] for row in rows))
    encoding = {
        "x": {
            "field": "step",
            "type": "quantitative",
            "title": "optimizer step",
            "scale": {"nice": False, "zero": False},
            "axis": {"tickMinStep": 1, "grid": False, "tickCount": 8},
        },
        "y": {
            **{"field": column, "type": "quantitative", "title": None, "scale": {"zero": False}},
            "axis": {"format": "~e"} if column == "learning_rate" else {},
        },
        "color": {"field": "iteration", "type": "nominal", "title": None, "sort": names},
    }
    nearest = {"name": "near", "select": {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout"}}
    fields = [key for key in rows[0] if key != column]
    layers: list[Chart] = [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": encoding | dash},
        {
            "params": [nearest],
            "mark": {"type": "point", "filled": True, "size": 70},
            "encoding": encoding
            | {
                "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
                "tooltip": [*map(name_field, fields), show_field(column, ".4~g")],
            },
        },
    ]
    return make_chart(rows, caption, [*([mark_value("y", line)] if line is not None else []), *layers], 220)


def draw_matrix(rows: list[Row]) -> Chart:
    """Draw the ranker's win rates of row against column. rows: those of ranker.csv."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    shown = [row for row in rows if row["model"] != row["opponent"]]
    place = {
        "y": {"field": "model", "type": "nominal", "title": None, "sort": names, "scale": {"domain": names}},
        "x": {
            **{"field": "opponent", "type": "nominal", "title": "against", "sort": names, "scale": {"domain": names}},
            "axis": {"labelAngle": 0, "orient": "top"},
        },
        "tooltip": [name_field("model"), name_field("opponent"), show_field("win_rate", ".2f")],
    }
    shade = {"field": "win_rate", "type": "quantitative", "scale": {"domain": [0, 100], "range": [0, 0.6]}, "legend": None}
    layers: list[Chart] = [
        {"mark": {"type": "rect", "fill": COLOURS[0]}, "encoding": place | {"opacity": shade}},
        {
            "mark": {"type": "text", "color": "var(--text)"},
            "encoding": place | {"text": {"field": "win_rate", "type": "quantitative", "format": ".2f"}},
        },
    ]
    return make_chart(shown, "Win rate of row against column according to the ranker (%)", layers, 40 * len(names) + 40)


def draw_histograms(rows: list[Row]) -> list[Chart]:
    """Draw, for each iteration, how many chosen and rejected responses have which P^. rows: those of probabilities.csv."""
    charts = []
    for name in dict.fromkeys(row["iteration"] for row in rows):
        bars = [row for row in rows if row["iteration"] == name and row["responses"]]
        encoding = {
            "x": {
                **{"field": "probability", "type": "quantitative", "title": "P^", "bin": {"binned": True}},
                "scale": {"domain": [0, 1]},
            },
            "x2": {"field": "upper"},
            "y": {"field": "responses", "type": "quantitative", "title": "responses", "stack": None},
            "color": {"field": "response", "type": "nominal", "title": None, "sort": ["chosen", "rejected"]},
            "tooltip": [name_field("response"), *map(show_field, ["probability", "upper", "responses"], [".2f", ".2f", "d"])],
        }
        layers: list[Chart] = [{"mark": {"type": "bar", "opacity": 0.65}, "encoding": encoding}, mark_value("x", 0.5)]
        charts.append(make_chart(bars, f"P^ of chosen and rejected responses of {name}", layers, 160))
    return charts


def name_field(field: str) -> Row:
    return {"field": field, "type": "nominal"}


def show_field(field: str, number_format: str) -> Row:
    return {"field": field, "type": "quantitative", "format": number_format}


def make_chart(rows: Iterable[Row], caption: str, layers: list[Chart], height: int) -> Chart:
    """Make a specification from its data, caption and layers. height: of the plotting area, in pixels."""
    return {
        **{"$schema": SCHEMA, "description": caption, "width": "container", "height": height},
        **{"autosize": {"type": "fit-x", "contains": "padding"}, "data": {"values": list(rows)}, "layer": layers},
    }


def bundle_vega() -> str:
    """Return a script that defines `vegaEmbed`: Vega, Vega-Lite and Vega-Embed, from the package that DVC draws images with."""
    import vl_convert

    bundle = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]  # its stub requires `snippet`
    return f"(() => {{\n{bundle}\n}})();"

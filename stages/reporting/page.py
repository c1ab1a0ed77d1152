"""One self-contained HTML page of a run: the reports, DVC's plots as SVG images, and all answers side by side."""

import base64
from pathlib import Path
from typing import Any

import pandas as pd

from stages.runtime.paths import ROOT

TEMPLATE = Path(__file__).with_suffix(".html.j2")
PLOTS = Path(__file__).with_name("plots.yaml")
PLOT_TEMPLATES = ROOT / ".dvc" / "plots"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # Okabe and Ito's palette for colour blindness

Plot = dict[str, Any]
"""A plot's definition as in dvc.yaml: x, y (CSV file -> column), template, title, x_label, y_label."""


def load_plots() -> dict[str, Plot]:
    """Return the plots of plots.yaml: name -> definition."""
    from ruamel.yaml import YAML

    definitions: list[dict[str, Plot]] = YAML(typ="safe").load(PLOTS)
    return {name: plot for definition in definitions for name, plot in definition.items()}


def draw_plots(reports: Path, sources: set[str]) -> dict[str, dict[str, str]]:
    """Draw the plots of plots.yaml whose CSV files are among `sources`, in `reports`, with DVC's own renderer and templates.

    Returns name -> `light` and `dark`, data URLs of SVG images.
    """
    plots = load_plots()
    return {name: draw_plot(name, plot, reports) for name, plot in plots.items() if name_source(plot) in sources}


def name_source(plot: Plot) -> str:
    """Return the name of the CSV file, in the folder of reports, that a plot is drawn from."""
    (source,) = plot["y"]
    return Path(source).name


def draw_plot(name: str, plot: Plot, reports: Path) -> dict[str, str]:
    """Draw one plot; see `draw_plots`."""
    from dvc_render import VegaRenderer

    (y,) = plot["y"].values()
    points = pd.read_csv(reports / name_source(plot)).assign(rev="").to_dict("records")
    properties = {key: plot[key] for key in ("x", "title", "x_label", "y_label") if key in plot}
    renderer = VegaRenderer(points, name, template=plot["template"], template_dir=str(PLOT_TEMPLATES), y=y, **properties)
    chart = hide_revision(renderer.get_filled_template())
    return {"light": render_svg(chart, None), "dark": render_svg(chart, "dark")}


def render_svg(chart: Any, theme: str | None) -> str:
    """Render a Vega-Lite chart as the data URL of an SVG image. theme: None, or the name of a Vega theme."""
    import vl_convert

    config = {"background": "transparent", "range": {"category": COLOURS}, "view": {"stroke": "transparent"}}
    svg = vl_convert.vegalite_to_svg(chart, theme=theme, config=config)  # type: ignore[arg-type]
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def hide_revision(chart: Any) -> Any:
    """Return a Vega-Lite chart without the legends and headers of DVC's revision: the page shows a single revision."""
    if isinstance(chart, list):
        return [hide_revision(item) for item in chart]
    if not isinstance(chart, dict):
        return chart
    if chart.get("field") == "rev":
        return chart | {"header" if chart["title"] is None else "legend": None}
    return {key: value if key == "data" else hide_revision(value) for key, value in chart.items()}


def render_html(title: str, sections: dict[str, str], plots: dict[str, dict[str, str]], answers: list[dict[str, Any]]) -> str:
    """Render the page. Model output is escaped: by `markdown.escape` in the sections, by the template everywhere else.

    sections: name -> Markdown without HTML; plots: as returned by `draw_plots`; answers: objects with `instruction` and
    `answers`, which maps model -> answer.
    """
    from jinja2 import Environment
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    bodies = {name: Markup(markdown.render(text)) for name, text in sections.items()}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=bodies, plots=plots, answers=answers) + "\n"

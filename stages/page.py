"""One self-contained page of a run: the reports as HTML, DVC's plots as pictures, and all answers side by side."""

import base64
from pathlib import Path
from typing import Any

import pandas as pd

from stages import params

TEMPLATE = Path(__file__).with_suffix(".html.j2")
PLOTS = Path(__file__).parent.parent / ".dvc" / "plots"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # Okabe and Ito's, told apart by the colour-blind


def plots(declared: Path, reports: Path) -> dict[str, dict[str, str]]:
    """The plots of a dvc.yaml, drawn from the reports by DVC's own templates: name -> `light` and `dark`, data URLs of SVG.

    DVC takes no dvc.yaml as a dependency: a changed declaration shows here when report runs for another reason, or by force.
    """
    import vl_convert
    from dvc_render import VegaRenderer

    pictures = {}
    for declaration in params.read(declared)["plots"]:
        ((name, plot),) = declaration.items()
        ((source, y),) = plot["y"].items()
        data = pd.read_csv(reports / Path(source).name)
        points = data.assign(rev="").to_dict("records")
        properties = {key: plot[key] for key in ("x", "title", "x_label", "y_label") if key in plot}
        renderer = VegaRenderer(points, name, template=plot["template"], template_dir=str(PLOTS), y=y, **properties)
        chart = without_revision(renderer.get_filled_template())
        pictures[name] = {
            shade: "data:image/svg+xml;base64,"
            + base64.b64encode(
                vl_convert.vegalite_to_svg(
                    chart,
                    theme="dark" if shade == "dark" else None,
                    config={"background": "transparent", "range": {"category": COLOURS}, "view": {"stroke": "transparent"}},
                ).encode()
            ).decode()
            for shade in ("light", "dark")
        }
    return pictures


def without_revision(chart: Any) -> Any:
    """A Vega-Lite chart without legends and headers of DVC's revision, of which a page has but one."""
    if isinstance(chart, list):
        return [without_revision(part) for part in chart]
    if not isinstance(chart, dict):
        return chart
    if chart.get("field") == "rev":
        return chart | {"header" if chart["title"] is None else "legend": None}
    return {key: value if key == "data" else without_revision(value) for key, value in chart.items()}


def html(title: str, sections: dict[str, str], pictures: dict[str, dict[str, str]], answers: list[dict[str, Any]]) -> str:
    """The page. What models wrote is escaped, in the reports by Markdown's rules, else by the template's and as JSON.

    sections: name -> Markdown without HTML of its own; pictures: of `plots`; answers: objects with `instruction` and, under
    `answers`, model -> answer.
    """
    from jinja2 import Environment
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    bodies = {name: Markup(markdown.render(text)) for name, text in sections.items()}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(title=title, sections=bodies, pictures=pictures, answers=answers) + "\n"

"""One self-contained HTML page of a run: the verdict, the reports, interactive charts, and all answers side by side."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from stages.reporting import answers, charts, headline, markdown, pages
from stages.reporting.answers import Judged
from stages.reporting.charts import Chart
from stages.reporting.headline import Metrics
from stages.reporting.inputs import Evaluations
from stages.reporting.published import Published
from stages.runtime.params import BASE

TEMPLATE, STYLE, SCRIPT = (Path(__file__).with_name(f"page.{suffix}") for suffix in ("html.j2", "css", "js"))


@dataclass(frozen=True)
class Background:
    """What the page shows in addition to the results."""

    facts: dict[str, str]
    """Setting -> value, for the top of the page."""
    published: Published | None
    judged: list[Judged]
    """By instruction, in the order of the answers."""


def format_page(
    title: str,
    sections: dict[str, str],
    evaluations: Evaluations,
    metrics: Metrics,
    tables: dict[str, str],
    background: Background,
    md5: str,
) -> str:
    """Format the page of a run.

    sections: name -> Markdown page. metrics: the content of metrics.json, and md5 its hash in dvc.lock, which identifies the
    run: the page has the same bytes in every clone, so it cannot name a commit. tables: as for `charts.draw_charts`.
    """
    alpaca, harness = evaluations.alpaca[BASE], evaluations.harness[BASE]
    verdict, sentence = headline.state_verdict(metrics, alpaca["n_total"])
    summary = {
        "verdict": verdict,
        "sentence": sentence,
        "steps": headline.list_steps(metrics),
        "tiles": headline.list_tiles(metrics),
        "warnings": [
            *pages.list_gaps(evaluations.alpaca, evaluations.harness),
            *headline.list_warnings(metrics, alpaca["judge"], len(harness), background.published),
        ],
        "facts": background.facts | {"judge": alpaca["judge"], "instructions": str(alpaca["n_total"])},
        "md5": md5,
    }
    drawn = charts.draw_charts(evaluations, tables, background.published)
    return render_html(title, summary, sections, drawn, answers.collect_answers(evaluations, background.judged))


def render_html(
    title: str, summary: dict[str, Any], sections: dict[str, str], drawn: dict[str, list[Chart]], outputs: dict[str, Any]
) -> str:
    """Render the page. Model output is escaped: by `markdown.escape` in the sections, by the template and page.js elsewhere.

    summary: as made by `format_page`. sections: name -> Markdown without HTML that starts with a heading. drawn: section ->
    charts. outputs: those of `answers.collect_answers`.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    data = {"answers": outputs, "charts": [chart for group in drawn.values() for chart in group], "config": charts.CONFIG}
    scripts = [charts.bundle_vega(), SCRIPT.read_text(encoding="utf-8")]
    return (
        template.render(
            title=title,
            summary=summary,
            sections={name: Markup(render_markdown(text)) for name, text in sections.items()},
            headings={name: text.partition("\n")[0].lstrip("# ") for name, text in sections.items()},
            charts=drawn,
            data=Markup(embed(json.dumps(data, ensure_ascii=False))),
            style=Markup(STYLE.read_text(encoding="utf-8")),
            scripts=[Markup(re.sub(r"</(?=script)", r"<\\/", text, flags=re.IGNORECASE)) for text in scripts],
        )
        + "\n"
    )


def embed(text: str) -> str:
    """Escape JSON for a script element: no `<` that could end it or open a comment, no lone surrogates."""
    return re.sub(r"[<\ud800-\udfff\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


def render_markdown(text: str) -> str:
    """Render Markdown as HTML for the page: headings one level lower, and each table in a box of its own that can scroll."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", open_table)
    parser.add_render_rule("table_close", close_table)
    tokens = parser.parse(text.replace(markdown.BREAK, ""))  # this page recognizes nothing in text
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = f"h{int(token.tag[1:]) + 1}"
    return str(parser.renderer.render(tokens, parser.options, {}))


def open_table(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """Open a table's box: it takes the keyboard's focus, so that arrow keys scroll it."""
    return '<div class="wide" tabindex="0" role="group" aria-label="Table"><table>\n'


def close_table(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return "</table></div>\n"

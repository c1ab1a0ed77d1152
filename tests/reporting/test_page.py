import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stages.reporting import markdown, page
from stages.runtime.documents import load_mapping
from stages.runtime.paths import ROOT

HOSTILE = (
    "</script><script>document.title = 'run'</script> <img src=x onerror=\"document.title = 'run'\"> | a | `b` {{ 1 + 1 }}"
)
ANSWERS = [
    {"instruction": f"Instruction {index}", "answers": {"base": f"Answer {index}", "iter1": HOSTILE if index == 3 else "Other"}}
    for index in range(45)
]
BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


class Elements(HTMLParser):
    """The names and attributes of all elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def plots() -> dict[str, dict[str, str]]:
    return page.draw_plots(ROOT / "reports", {path.name for path in (ROOT / "reports").glob("*.csv")})


@pytest.fixture(scope="module")
def text(plots: dict[str, dict[str, str]]) -> str:
    table = markdown.table(["model", "said"], [["base", HOSTILE]], text=True)
    sections = {"alpaca-eval": f"# AlpacaEval\n\n{table}", "health": "# Health"}
    return page.render_html(f"Title {HOSTILE}", sections, plots, ANSWERS)


def test_every_plot_is_drawn_light_and_dark(plots: dict[str, dict[str, str]]) -> None:
    definitions = page.load_plots()
    assert list(plots) == list(definitions)
    for name, shades in plots.items():
        assert shades["light"] != shades["dark"]
        drawn = base64.b64decode(shades["light"].partition(",")[2]).decode()
        assert definitions[name]["title"] in drawn
        assert ">rev<" not in drawn


def test_only_the_plots_of_the_given_files_are_drawn() -> None:
    assert list(page.draw_plots(ROOT / "reports", {"length.csv", "other.csv"})) == ["response length"]


def test_dvc_draws_the_same_plots() -> None:
    definitions = load_mapping((ROOT / "dvc.yaml").read_bytes(), "dvc.yaml")["plots"]
    assert definitions == [{name: plot} for name, plot in page.load_plots().items()], "run `python -m stages.tools sync`"


def test_every_plot_has_a_name_that_is_safe_in_html() -> None:
    assert all(re.fullmatch("[a-z ]+", name) for name in page.load_plots())


def test_every_plot_has_a_place_on_the_page(plots: dict[str, dict[str, str]]) -> None:
    sections = dict.fromkeys(["alpaca-eval", "open-llm-leaderboard", "ranker", "health", "provenance"], "# x")
    elements = Elements(page.render_html("t", sections, plots, ANSWERS)).elements
    images = [attributes for tag, attributes in elements if tag == "img"]
    assert len(images) == len(plots)
    assert all(image["alt"] for image in images)


def test_model_output_neither_breaks_the_page_nor_runs(text: str) -> None:
    elements = Elements(text).elements
    assert [attributes for tag, attributes in elements if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not [attributes for _, attributes in elements if "onerror" in attributes]
    embedded = text.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(embedded) == ANSWERS
    assert "{{ 1 + 1 }}" in text


def test_the_page_needs_no_network(text: str) -> None:
    links = [
        value or ""
        for _, attributes in Elements(text).elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset")
    ]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)


def browse(text: str, folder: Path, script: str = "") -> tuple[str, str]:
    """Return the document after its scripts and `script` ran in a headless browser, and the browser's console messages."""
    file = folder / "index.html"
    file.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    command = [str(BROWSER), *flags, "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_and_filters_the_answers(text: str, tmp_path: Path) -> None:
    document, console = browse(text, tmp_path)
    assert not console
    assert document.count("<article>") == 20
    assert "Showing 20 of 45 matches among 45 instructions" in document
    assert "<title>run</title>" not in document
    more, console = browse(text, tmp_path, "document.getElementById('more').click(); document.getElementById('more').click()")
    assert (more.count("<article>"), console) == (45, "")
    search = "const box = document.getElementById('filter'); box.value = 'aNSWER 4'; box.dispatchEvent(new Event('input'))"
    matches, console = browse(text, tmp_path, search)
    assert (matches.count("<article>"), console) == (6, "")  # 4 and 40 to 44
    assert "Instruction 44" in matches


def test_the_revision_has_no_legend() -> None:
    chart = {
        "data": {"values": [{"field": "rev"}]},
        "color": {"field": "rev", "title": "revision"},
        "row": {"field": "rev", "title": None},
    }
    assert page.hide_revision(chart) == {
        "data": {"values": [{"field": "rev"}]},
        "color": {"field": "rev", "title": "revision", "legend": None},
        "row": {"field": "rev", "title": None, "header": None},
    }

import base64
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stages import markdown, page, params
from stages.cli import ROOT

HOSTILE = (
    "</script><script>document.title = 'run'</script> <img src=x onerror=\"document.title = 'run'\"> | a | `b` {{ 1 + 1 }}"
)
ANSWERS = [
    {"instruction": f"Instruction {index}", "answers": {"base": f"Answer {index}", "iter1": HOSTILE if index == 3 else "Other"}}
    for index in range(45)
]
BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


class Elements(HTMLParser):
    """Names and attributes of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def pictures() -> dict[str, dict[str, str]]:
    return page.plots(ROOT / "dvc.yaml", ROOT / "reports")


@pytest.fixture(scope="module")
def text(pictures: dict[str, dict[str, str]]) -> str:
    table = markdown.table(["model", "said"], [["base", HOSTILE]], text=True)
    return page.html(f"Title {HOSTILE}", {"alpaca-eval": f"# AlpacaEval\n\n{table}", "health": "# Health"}, pictures, ANSWERS)


def test_every_declared_plot_is_drawn_light_and_dark(pictures: dict[str, dict[str, str]]) -> None:
    declared = {name: plot for entry in params.read(ROOT / "dvc.yaml")["plots"] for name, plot in entry.items()}
    assert set(pictures) == set(declared)
    for name, shades in pictures.items():
        assert shades["light"] != shades["dark"]
        drawn = base64.b64decode(shades["light"].partition(",")[2]).decode()
        assert declared[name]["title"] in drawn
        assert ">rev<" not in drawn


def test_every_declared_plot_has_a_place_on_the_page(pictures: dict[str, dict[str, str]]) -> None:
    sections = dict.fromkeys(["alpaca-eval", "open-llm-leaderboard", "ranker", "health", "provenance"], "# x")
    images = [attributes for tag, attributes in Elements(page.html("t", sections, pictures, ANSWERS)).found if tag == "img"]
    assert len(images) == len(pictures)
    assert all(image["alt"] for image in images)


def test_what_models_wrote_neither_breaks_the_page_nor_runs(text: str) -> None:
    found = Elements(text).found
    assert [attributes for tag, attributes in found if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not [attributes for _, attributes in found if "onerror" in attributes]
    embedded = text.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(embedded) == ANSWERS
    assert "{{ 1 + 1 }}" in text


def test_the_page_needs_no_network(text: str) -> None:
    links = [
        value or ""
        for _, attributes in Elements(text).found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset")
    ]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)


def browse(text: str, folder: Path, script: str = "") -> tuple[str, str]:
    """The page's document after its scripts and `script` ran in a headless browser, and the browser's console."""
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
def test_a_browser_shows_the_answers_and_finds_among_them(text: str, tmp_path: Path) -> None:
    document, console = browse(text, tmp_path)
    assert not console
    assert document.count("<article>") == 20
    assert "20 of 45 shown, of 45 instructions" in document
    assert "<title>run</title>" not in document
    more, console = browse(text, tmp_path, "document.getElementById('more').click(); document.getElementById('more').click()")
    assert (more.count("<article>"), console) == (45, "")
    search = "const box = document.getElementById('filter'); box.value = 'aNSWER 4'; box.dispatchEvent(new Event('input'))"
    found, console = browse(text, tmp_path, search)
    assert (found.count("<article>"), console) == (6, "")  # 4 and 40 to 44
    assert "Instruction 44" in found


def test_the_revision_has_no_legend() -> None:
    chart = {
        "data": {"values": [{"field": "rev"}]},
        "color": {"field": "rev", "title": "revision"},
        "row": {"field": "rev", "title": None},
    }
    assert page.without_revision(chart) == {
        "data": {"values": [{"field": "rev"}]},
        "color": {"field": "rev", "title": "revision", "legend": None},
        "row": {"field": "rev", "title": None, "header": None},
    }

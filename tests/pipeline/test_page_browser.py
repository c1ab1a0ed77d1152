"""The HTML page in headless Chromium: what a reader sees, hovers over, filters and reaches by keyboard."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.reporting import charts
from stages.reporting.inputs import Evaluations
from support import browser
from support.sample_run import COUNT, HOSTILE, make_evaluations, make_page, make_tables

pytestmark = pytest.mark.slow
READY = "document.querySelectorAll('.chart svg[aria-hidden]').length === data.charts.length"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.launch() as launched:
        yield launched


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(make_page(make_evaluations()), encoding="utf-8")
    return path


@pytest.fixture
def opened(chromium: Any, file: Path) -> Iterator[Any]:
    with browser.open_page(chromium, file) as (page, complaints):
        page.wait_for_function(READY)
        yield page
        assert not complaints
        assert page.title() != "run"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")])
def test_the_page_fits_and_is_accessible(chromium: Any, file: Path, width: int, scheme: str) -> None:
    with browser.open_page(chromium, file, width, color_scheme=scheme) as (page, complaints):
        page.wait_for_function(READY)
        for summary in page.locator("details.numbers summary").all():
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert browser.find_violations(page) == []
        assert complaints == []
        colour = page.evaluate("getComputedStyle(document.body).color")
        fills = page.evaluate("[...document.querySelectorAll('.chart text')].map(text => getComputedStyle(text).fill)")
        assert set(fills) == {colour}, "labels of charts have the colour of the text"


def test_the_data_of_every_chart_are_shown(opened: Any) -> None:
    counts = opened.evaluate("data.charts.map(chart => chart.data.values.length)")
    assert len(counts) == 3 + 1 + 7  # evaluations, ranker, training
    for number, details in enumerate(opened.locator("details.numbers").all()):
        details.locator("summary").press("Enter")
        details.locator("tbody tr").nth(counts[number] - 1).wait_for()  # the rows are made when the details open
        assert details.locator("tbody tr").count() == counts[number]
    assert opened.locator(".chart svg .mark-symbol path").count() > 0


def test_the_pointer_shows_the_values_of_the_nearest_point(opened: Any) -> None:
    place = opened.locator("figure", has_text="Training loss").locator(".chart")
    place.scroll_into_view_if_needed()
    box = place.locator("g.background, .background").first.bounding_box()
    for shift in (0, 2):
        opened.mouse.move(box["x"] + shift + 2, box["y"] + 3)  # near the first step's loss of iter1, the highest
    tooltip = opened.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    cells = [cell.inner_text() for cell in tooltip.locator("td").all()]
    first = charts.read_rows(make_tables(make_evaluations())["training"])[0]
    assert cells == ["iteration", "iter1", "step", "1", "loss", f"{first['loss']:g}"]


def change(evaluations: Evaluations, index: int, model: str, opponent: str | None) -> float | None:
    """The judge's preference for a model minus that for another or, None, for the reference."""
    ours = evaluations.preferences[model][index]
    theirs = evaluations.preferences[opponent][index] if opponent else 1.5
    return None if ours is None or theirs is None else ours - theirs


def list_shown(page: Any) -> list[int]:
    while page.locator("#more").is_visible():
        page.locator("#more").press("Enter")
    return [int(title.removeprefix("Instruction ")) for title in page.locator("article h3").all_inner_texts()]


@pytest.mark.parametrize(("model", "opponent"), [("iter2", "base"), ("iter1", None)])
def test_answers_are_filtered_by_outcome_and_sorted_by_change(opened: Any, model: str, opponent: str | None) -> None:
    evaluations = make_evaluations()
    opened.select_option("#model", model)
    opened.select_option("#opponent", opponent or "reference output")
    changes = {index: change(evaluations, index, model, opponent) for index in range(COUNT)}
    known = {index: value for index, value in changes.items() if value is not None}
    groups = {
        "win": [index for index, value in known.items() if value > 0],
        "loss": [index for index, value in known.items() if value < 0],
        "tie": [index for index, value in known.items() if value == 0],
        "none": [index for index in changes if index not in known],
        "all": list(changes),
    }
    for outcome, expected in groups.items():
        opened.select_option("#outcome", outcome)
        assert f"of {len(expected)} matches among {COUNT}" in opened.locator("#count").inner_text()
        assert list_shown(opened) == expected
    missing = groups["none"]
    opened.select_option("#order", "gain")
    assert list_shown(opened) == [*sorted(known, key=lambda index: -known[index]), *missing]
    opened.select_option("#order", "drop")
    assert list_shown(opened) == [*sorted(known, key=lambda index: known[index]), *missing]


def test_answers_are_filtered_by_data_set_and_text(opened: Any) -> None:
    opened.select_option("#set", "vicuna")
    assert list_shown(opened) == list(range(0, COUNT, 3))
    opened.fill("#search", "iNSTRUCTION 4")
    assert list_shown(opened) == [42]
    opened.select_option("#set", "")
    assert list_shown(opened) == [4, 40, 41, 42, 43, 44]
    opened.fill("#search", "onerror")
    assert list_shown(opened) == [3], "the hostile answer is found, and shown as text"
    assert HOSTILE.split()[0] in opened.locator("article").inner_text()


def longest_common(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """Length of the longest common subsequence, by its definition."""

    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


def test_words_that_differ_are_marked(opened: Any) -> None:
    evaluations = make_evaluations()
    script = """article => [...article.querySelectorAll('article > dl dd')].map(answer => {
        const same = [...answer.childNodes].filter(node => node.nodeName !== 'MARK');
        return same.map(node => node.textContent).join('').split(/\\s+/).filter(Boolean);
    })"""
    list_shown(opened)
    for index, article in enumerate(opened.locator("article").all()):
        texts = [evaluations.answers[name][index]["output"] for name in ("iter2", "base")]
        assert article.locator("xpath=dl/dd").all_text_contents() == texts
        kept = article.evaluate(script)
        assert kept[0] == kept[1]
        assert len(kept[0]) == longest_common(*[tuple(text.split()) for text in texts])
    shown = opened.locator("article").first.locator("xpath=dl/dt").all_inner_texts()
    rates = [100 * (evaluations.preferences[name][0] or 0) - 100 for name in ("iter2", "base")]
    assert shown == [f"iter2, {rates[0]:.2f}%", f"base, {rates[1]:.2f}%"]


def test_everything_is_reached_by_keyboard(opened: Any) -> None:
    controls = ["model", "opponent", "outcome", "set", "order", "search", "more"]
    reached, seen = [], 0
    for _ in range(200):
        opened.keyboard.press("Tab")
        name, ring = opened.evaluate("[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]")
        seen += opened.evaluate("document.activeElement.matches('.numbers summary')")
        if name:
            reached.append(name)
            assert ring != "none", "the focus is visible"
        if name == "more":
            break
    assert reached == controls
    assert seen == opened.locator(".numbers").count()


def test_paper_has_no_controls_and_dark_screens_print_dark_text(chromium: Any, file: Path) -> None:
    with browser.open_page(chromium, file, 760, color_scheme="dark") as (page, complaints):
        page.wait_for_function(READY)
        page.emulate_media(media="print", color_scheme="dark")
        assert not page.locator("#controls").is_visible()
        assert page.locator(".verdict").is_visible()
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 27, 27)"
        assert page.evaluate("getComputedStyle(document.querySelector('.chart text')).fill") == "rgb(27, 27, 27)"
        assert complaints == []


def test_without_scripts_the_page_says_where_the_data_are(chromium: Any, file: Path) -> None:
    with browser.open_page(chromium, file, java_script_enabled=False) as (page, complaints):
        assert "reports/*.csv" in page.locator("noscript").inner_text()
        assert "iter2 is better than base" in page.locator(".verdict").inner_text()
        assert complaints == []

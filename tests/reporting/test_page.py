import copy
import json
import re
from html.parser import HTMLParser

import pytest

from stages.reporting import charts, markdown, page
from stages.runtime.documents import load_mapping
from stages.runtime.paths import ROOT
from support.plots import load_plots
from support.sample_run import HOSTILE, make_evaluations, make_page


class Elements(HTMLParser):
    """The names and attributes of all elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def text() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "bundle_vega", lambda: "'</script>'")  # takes seconds
        return make_page(make_evaluations())


def test_the_verdict_is_at_the_top(text: str) -> None:
    shown = Elements(text).text
    assert "▲ better" in shown
    assert shown.index("iter2 is better than base") < shown.index("AlpacaEval\n")
    assert re.search(r"judge\s*gold", shown)
    assert re.search(r"instructions\s*45", shown)
    assert "-S 0123456789abcdef -- dvc.lock" in shown


def test_what_was_not_judged_or_cut_is_among_the_warnings(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "bundle_vega", str)
    evaluations = copy.deepcopy(make_evaluations())
    evaluations.alpaca["iter2"]["n_failed"] = 3
    evaluations.harness["iter1"]["gsm8k"] |= {"cut": 5, "n": 1319}
    changed = Elements(make_page(evaluations)).text
    for sentence in ("no preference: 3 of iter2.", "5 of 1319 questions of gsm8k (iter1)"):
        assert sentence in changed
        assert sentence not in Elements(text).text


def test_text_is_shown_on_the_page_as_it_is() -> None:
    """Without what keeps GitHub from recognizing parts of it."""
    assert "<td>@name :smile: https://a.b</td>" in page.render_markdown(markdown.table(["x"], [["@name :smile: https://a.b"]]))


def test_every_chart_has_a_place_and_a_name(text: str) -> None:
    embedded = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    places = [attributes for _, attributes in Elements(text).elements if "data-chart" in attributes]
    assert [place["data-chart"] for place in places] == [str(index) for index in range(len(embedded["charts"]))]
    assert [place["aria-label"] for place in places] == [f"Chart: {chart['description']}" for chart in embedded["charts"]]


def test_model_output_neither_breaks_the_page_nor_runs(text: str) -> None:
    elements = Elements(text).elements
    scripts = [attributes for tag, attributes in elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}, {}]
    assert not [attributes for _, attributes in elements if "onerror" in attributes]
    embedded = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert embedded["answers"]["rows"][3]["answers"][2] == HOSTILE
    assert "{{ 1 + 1 }}" in text
    assert "'<\\/script>'" in text, "a library's string does not end the script"


def test_the_page_needs_no_network(text: str) -> None:
    links = [
        value or ""
        for _, attributes in Elements(text).elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset")
    ]
    assert links
    assert all(link.startswith("#") for link in links)


def test_text_that_utf_8_cannot_encode_is_escaped() -> None:
    value = json.dumps(["a\ud800b\u2028", "<!-- <script>"], ensure_ascii=False)
    embedded = page.embed(value)
    assert json.loads(embedded) == ["a\ud800b\u2028", "<!-- <script>"]
    assert "<" not in embedded.encode().decode()


def test_a_table_scrolls_in_a_box_of_its_own_and_headings_are_one_level_lower() -> None:
    table = markdown.table(["model", "said"], [["base", HOSTILE]], text=True)
    html = page.render_markdown(f"# Results\n\n{table}\nText\n\n## Details\n\n{table}")
    elements = [tag for tag, _ in Elements(html).elements]
    assert elements == [
        *("h2", "div", "table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "p"),
        *("h3", "div", "table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"),
    ]
    assert html.count("</table></div>\n") == 2


def test_dvc_draws_the_plots_of_the_list() -> None:
    definitions = load_mapping((ROOT / "dvc.yaml").read_bytes(), "dvc.yaml")["plots"]
    assert definitions == [{name: plot} for name, plot in load_plots().items()], "run `python -m stages.tools sync`"

import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from stages.reporting import markdown

GITHUB = {
    "mention": r"(?:^|[^a-zA-Z0-9_])@[a-z0-9]",
    "issue": r"(?:^|\W)#\d|GH-\d|[\w-]#\d",
    "commit": r"(?<!\w)(?=\d*[a-f])[0-9a-f]{7,40}(?!\w)",
    "emoji": r":[\w+-]+:",
    "URL": r"\b(?:https?|ftp)://|\bwww\.\w",
    "e-mail address": r"[\w.+-]+@[\w-]+\.\w",
    "mathematics": r"\$[^$]+\$",
}
"""What GitHub replaces or links in the text of a rendered page."""
MARKS = [
    *("@name", "@org/team", "#12", "GH-7", "x #3", ":smile:", ":+1:", "https://a.b/c", "www.a.b", "a@b.de", "$x$"),
    *("owner/repo#1", "owner#12", "0a1b2c3", "12345678F", "owner@0a1b2c3", "owner/repo@" + "0123456789abcdef" * 2 + "01234567"),
    *("$$", "1$", "```"),
]


class Texts(HTMLParser):
    """The text nodes of a page: comments and elements separate them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def render(text: str) -> list[str]:
    """Return the text nodes of a Markdown text."""
    return Texts(MarkdownIt("commonmark", {"html": True}).enable("table").render(text)).texts


@given(
    st.lists(st.sampled_from([*MARKS, *"@#:$/.w`\\ ", "GH-", "://", "0a1b2c3", "@0a1"]) | st.text(max_size=2), max_size=8).map(
        "".join
    )
)
def test_github_recognizes_nothing_in_escaped_text(text: str) -> None:
    nodes = render(markdown.table(["x"], [[text]]))
    for kind, pattern in GITHUB.items():
        found = [node for node in nodes if re.search(pattern, node, re.IGNORECASE)]
        assert not found, f"{kind}: {found}"
    assert "$" not in markdown.escape(text), "GitHub looks for mathematics before it reads entities"


@pytest.mark.parametrize("text", MARKS[:-3])
def test_github_recognizes_them_in_plain_text(text: str) -> None:
    """Otherwise the test above could not fail."""
    assert any(re.search(pattern, text, re.IGNORECASE) for pattern in GITHUB.values())


@pytest.mark.parametrize(
    "text", ["answer@iter1, answer@iter2", "12:30", "a: b", "iter1#x", "5.0e-7", "12345678", "0.12345678", "a1b2c3"]
)
def test_ordinary_text_is_not_interrupted(text: str) -> None:
    assert markdown.BREAK not in markdown.escape(text)


@given(st.text(max_size=9) | st.lists(st.sampled_from("`a |\\<@"), max_size=9).map("".join))
def test_a_code_span_shows_text_verbatim(text: str) -> None:
    shown = markdown.clean(text)
    if not shown:
        return
    html = MarkdownIt("commonmark").render(f"By {markdown.code(text)}.")
    assert html.startswith("<p>By <code>")
    assert html.endswith("</code>.</p>\n")
    assert "".join(Texts(html).texts) == f"By {shown}.\n"


@given(
    st.text(max_size=9), st.sampled_from([chr(i) for i in range(0x10000) if unicodedata.category(chr(i)) in markdown.HIDDEN])
)
def test_no_invisible_character_stays(text: str, char: str) -> None:
    shown = markdown.clean(f"a{char}b{text}{char}")
    assert char not in shown.replace(markdown.JOINERS[0], "").replace(markdown.JOINERS[1], "")
    assert shown.startswith("a b" if char.isspace() else "a\ufffdb")


@pytest.mark.parametrize("text", ["👩\u200d🔬", "👩🏽\u200d🔬", "🏳\ufe0f\u200d🌈", "می\u200cخواهم", "क्\u200dष"])
def test_what_joins_characters_stays_between_them(text: str) -> None:
    assert markdown.clean(text) == text
    for joiner in markdown.JOINERS:
        assert markdown.clean(f"{text}{joiner}") == f"{text}\ufffd"
        assert markdown.clean(f"{joiner}{text}") == f"\ufffd{text}"
        assert markdown.clean(f"@na{joiner}me") == "@na\ufffdme"


def test_our_own_hashes_stay_whole() -> None:
    md5 = "0a1b2c3d" * 4
    assert markdown.BREAK in markdown.table(["x"], [[md5]])
    assert markdown.table(["x"], [[md5, f"{md5}.dir"]], hashes=True).endswith(f"| {md5} | {md5}.dir |\n")


def test_a_code_span_of_plain_text_has_single_marks() -> None:
    assert markdown.code("gold") == "`gold`"


@given(st.text())
def test_a_cell_has_no_markup_and_no_line_break(text: str) -> None:
    cell = markdown.escape(text)
    assert len(cell.splitlines()) <= 1
    shown = cell.replace(markdown.BREAK, "").replace("&#36;", "$")
    assert "<" not in shown
    assert all(shown[index - 1] == "\\" for index, mark in enumerate(shown) if mark in "`*_[]#|~")


def test_a_table_has_as_many_cells_as_its_header() -> None:
    lines = markdown.table(["model", "a|b"], [["x", "1 | <script>"], ["y", "\n"]]).splitlines()
    assert lines[2] == "| x | 1 \\| &lt;script&gt; |"
    assert lines[3] == "| y |  |"


def test_numbers_are_aligned_right_and_text_left() -> None:
    assert markdown.table(["model", "score"], []).splitlines()[1] == "| --- | ---: |"
    assert markdown.table(["model", "answer"], [], text=True).splitlines()[1] == "| --- | --- |"


def test_a_missing_number_is_a_dash() -> None:
    assert (markdown.number(1.005, 1), markdown.number(None)) == ("1.0", "–")

from hypothesis import given
from hypothesis import strategies as st

from stages.reporting import markdown


@given(st.text())
def test_a_cell_has_no_markup_and_no_line_break(text: str) -> None:
    cell = markdown.escape(text)
    assert len(cell.splitlines()) <= 1
    assert "<" not in cell
    assert all(cell[index - 1] == "\\" for index, mark in enumerate(cell) if mark in "`*_[]#|~")


def test_a_table_has_as_many_cells_as_its_header() -> None:
    lines = markdown.table(["model", "a|b"], [["x", "1 | <script>"], ["y", "\n"]]).splitlines()
    assert lines[2] == "| x | 1 \\| &lt;script&gt; |"
    assert lines[3] == "| y |  |"


def test_numbers_are_aligned_right_and_text_left() -> None:
    assert markdown.table(["model", "score"], []).splitlines()[1] == "| --- | ---: |"
    assert markdown.table(["model", "answer"], [], text=True).splitlines()[1] == "| --- | --- |"


def test_a_missing_number_is_a_dash() -> None:
    assert (markdown.number(1.005, 1), markdown.number(None)) == ("1.0", "–")

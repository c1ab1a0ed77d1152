import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import readme, report
from stages.cli import ROOT


@given(st.text())
def test_a_cell_holds_no_markup_and_no_line_break(text: str) -> None:
    cell = report.escape(text)
    assert len(cell.splitlines()) <= 1
    assert "<" not in cell
    assert all(cell[index - 1] == "\\" for index, mark in enumerate(cell) if mark in "`*_[]#|~")


def test_a_table_has_as_many_cells_as_its_header() -> None:
    lines = report.table(["model", "a|b"], [["x", "1 | <script>"], ["y", "\n"]]).splitlines()
    assert lines[2] == "| x | 1 \\| &lt;script&gt; |"
    assert lines[3] == "| y |  |"


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=6, max_size=6))
def test_the_average_is_plain_and_its_error_that_of_independent_tasks(values: list[tuple[float, float]]) -> None:
    pairs = zip(report.TASKS, values, strict=True)
    value, error = report.harness_average({task: {"value": v, "standard_error": e} for task, (v, e) in pairs})
    assert value == pytest.approx(sum(v for v, _ in values) / 6)
    assert error == pytest.approx(math.sqrt(sum(e * e for _, e in values)) / 6)


def test_numbers_are_rounded_to_six_digits_wherever_they_stand() -> None:
    assert report.rounded({"a": {"b": 1.23456789, "c": 5}, "d": "x"}) == {"a": {"b": 1.23457, "c": 5}, "d": "x"}


def test_the_readme_shows_the_reports_tables() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text, Path(ROOT / "reports")) == text, "run `make readme`"
    assert "| iter3 |" in text

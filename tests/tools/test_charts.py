"""Charts drawn with characters, read back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.tools import charts
from stages.tools.charts import Row

VALUES = st.floats(-100, 100).map(lambda value: round(value, 3))


def read_axis(text: str) -> tuple[float, float]:
    """Return the values at the first and the last column of a chart, from its ticks."""
    ticks = text.splitlines()[-1].split()
    return float(ticks[0]), float(ticks[-1])


@given(st.lists(st.tuples(VALUES, st.floats(0.5, 50)), min_size=1, max_size=5))
def test_values_and_intervals_are_where_the_axis_says(estimates: list[tuple[float, float]]) -> None:
    text = charts.draw([Row("m", value, margin) for value, margin in estimates], "+.2f", (0,))
    *lines, _ = text.splitlines()
    start = len("m") + 2 + max(len(f"{value:+.2f}") for value, _ in estimates) + 2
    low, high = read_axis(text)
    width = (high - low) / (charts.COLUMNS - 1)
    for line, (value, margin) in zip(lines, estimates, strict=True):
        cells = line[start:]
        assert low + cells.index("●") * width == pytest.approx(value, abs=0.51 * width + 1e-9)
        if "├" in cells and "┤" in cells:
            assert low + cells.index("├") * width == pytest.approx(value - margin, abs=0.51 * width + 1e-9)
            assert low + cells.index("┤") * width == pytest.approx(value + margin, abs=0.51 * width + 1e-9)
        assert len(cells) <= charts.COLUMNS


def test_a_band_and_zero_are_drawn_below_the_interval() -> None:
    rows = [Row("base", 0.0, 0.0, band=5.0), Row("iter1", 7.5, 1.5, band=5.0), Row("iter2", -2.0, 4.0, band=10.0)]
    lines = charts.draw(rows, "+.1f", (0,)).splitlines()
    assert lines == [
        "base   +0.0             ···········●···········",
        "iter1  +7.5             ···········│··········· ├──●───┤",
        "iter2  -2.0  ·········├────────●───┼───┤··················",
        "             -10       -5          0          5         10",
    ]


@given(st.floats(1e-9, 1e9))
def test_steps_are_round_and_few(span: float) -> None:
    step = charts.find_step(span)
    assert span <= 5 * step * (1 + 1e-9)
    assert span > 1.9 * step
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_a_chart_of_equal_values_has_an_axis() -> None:
    low, high = read_axis(charts.draw([Row("base", 3.0, 0.0)], ".2f"))
    assert low <= 3 <= high
    assert low < high


def test_a_name_cannot_end_the_block_that_it_is_in() -> None:
    text = charts.draw([Row("a`\n```\n<b>" + "x" * 30, 1.0, 1.0)], ".2f")
    assert len(text.splitlines()) == 2
    assert not {"`", "<"} & set(text)
    assert text.startswith("a_______b_xxxxxx  1.00  ")

"""Charts of estimates with intervals, drawn with characters: a comment on GitHub and a terminal show them alike."""

import math
import re
from dataclasses import dataclass

COLUMNS = 45
"""Width of a chart, without the labels and numbers on its left."""
LABEL = 16
"""Longest label."""


@dataclass(frozen=True)
class Row:
    """An estimate to draw."""

    label: str
    value: float
    margin: float
    """Half of the interval's width."""
    mark: str = "●"
    band: float = 0.0
    """Values from -band to band are dotted, such as those that noise explains; 0: none."""

    @property
    def edges(self) -> tuple[float, ...]:
        """The ends of the band, if there is one."""
        return (-self.band, self.band) if self.band else ()


def draw(rows: list[Row], form: str, include: tuple[float, ...] = ()) -> str:
    """Draw a line per row: its label, its value in the given format, and its interval on a common axis below.

    include: values that the axis must cover. Zero is marked if it is on the axis. Labels are cut to LABEL characters, none of
    which can end a block of code.
    """
    bounds = [value for row in rows for value in (row.value - row.margin, row.value + row.margin, *row.edges)]
    low, high = min(*bounds, *include), max(*bounds, *include)
    step = find_step(high - low)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [step * index for index in range(first, max(last, first + 1) + 1)]
    axis = Axis(ticks[0], ticks[-1])
    labels = [re.sub(r"[^\w.-]", "_", row.label)[:LABEL] for row in rows]
    numbers = [format(row.value, form) for row in rows]
    widths = max(map(len, labels)), max(map(len, numbers))
    lines = [
        f"{label:<{widths[0]}}  {number:>{widths[1]}}  {draw_row(row, axis)}"
        for label, number, row in zip(labels, numbers, rows, strict=True)
    ]
    return "\n".join([*lines, " " * (sum(widths) + 4) + draw_ticks(ticks, axis, step)]) + "\n"


@dataclass(frozen=True)
class Axis:
    """The range of values that COLUMNS characters cover."""

    low: float
    high: float

    def place(self, value: float) -> int:
        """Return the column of a value."""
        return round((COLUMNS - 1) * (value - self.low) / (self.high - self.low))


def find_step(span: float) -> float:
    """Return a round distance between ticks (1, 2 or 5 times a power of ten) that divides a span into at most six."""
    if not span > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span))
    return next(factor * power for factor in (0.2, 0.5, 1, 2, 5) if span <= 5 * factor * power)


def draw_row(row: Row, axis: Axis) -> str:
    """Draw a row's band, zero, interval and value, each over the ones before."""
    cells = [" "] * COLUMNS
    if row.band:
        for column in range(axis.place(-row.band), axis.place(row.band) + 1):
            cells[column] = "·"
    start, end = axis.place(row.value - row.margin), axis.place(row.value + row.margin)
    cells[start : end + 1] = "─" * (end - start + 1)
    cells[start], cells[end] = "├", "┤"
    if axis.low <= 0 <= axis.high:
        zero = axis.place(0)
        cells[zero] = "┼" if start < zero < end else "│" if cells[zero] in " ·" else cells[zero]
    cells[axis.place(row.value)] = row.mark
    return "".join(cells).rstrip()


def draw_ticks(ticks: list[float], axis: Axis, step: float) -> str:
    """Write the ticks below their columns, without those that do not fit."""
    decimals = max(0, -math.floor(math.log10(step)))
    line = ""
    for tick in ticks:
        text = f"{tick:.{decimals}f}"
        start = max(0, axis.place(tick) - len(text) // 2)
        if not line or start > len(line):
            line = line.ljust(start) + text
    return line

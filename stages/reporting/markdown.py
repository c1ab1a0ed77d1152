"""Markdown tables that show text verbatim: model output must neither break a page nor be executed in it."""

import re

INTERVAL = 1.96
"""Half-width of a 95% confidence interval, in standard errors."""

WORDS = {True: "yes", False: "no", None: "–"}
"""The cells of a column that answers a question; None: unknown."""

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, including those that change the text direction, and lone surrogates."""


def table(header: list[str], rows: list[list[str]], *, text: bool = False) -> str:
    """Format a Markdown table and escape its cells (but not its header).

    The first column is left-aligned; the others are right-aligned, or left-aligned too if `text`.
    """
    return lay_out(header, [[escape(cell) for cell in row] for row in rows], text=text)


def lay_out(header: list[str], rows: list[list[str]], *, text: bool = False) -> str:
    """Format a table whose cells are Markdown; see `table`."""
    rule = ["---", *["---" if text else "---:"] * (len(header) - 1)]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def escape(text: str) -> str:
    """Escape text so that a Markdown table cell shows it verbatim: no markup, HTML or line breaks; UNPRINTABLE as U+FFFD."""
    for mark in "\\`*_[]#|~":
        text = text.replace(mark, "\\" + mark)
    text = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    return UNPRINTABLE.sub("\ufffd", text)


def number(value: float | None, digits: int = 2) -> str:
    """Format a number with this many decimals, or None as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"

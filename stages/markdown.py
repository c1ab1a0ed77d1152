"""Markdown that shows text verbatim: what models wrote must neither break a page nor run in it."""

import re

INTERVAL = 1.96
"""Half a 95 % interval in standard errors."""

UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of text among them, and halves of characters."""


def table(header: list[str], rows: list[list[str]], *, text: bool = False) -> str:
    """A Markdown table, the first column to the left, the others to the right but where they are text. Cells are escaped."""
    rule = ["---", *["---" if text else "---:"] * (len(header) - 1)]
    lines = [header, rule, *[[escape(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def escape(text: str) -> str:
    """Text as Markdown shows it verbatim within a table cell: no markup, no HTML, no line breaks; UNSEEN as U+FFFD."""
    for mark in "\\`*_[]#|~":
        text = text.replace(mark, "\\" + mark)
    text = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    return UNSEEN.sub("\ufffd", text)


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals, or a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"

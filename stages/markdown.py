"""Markdown that shows text verbatim: what models wrote must neither break a page nor run in it."""

INTERVAL = 1.96
"""Half a 95 % interval in standard errors."""


def table(header: list[str], rows: list[list[str]], *, text: bool = False) -> str:
    """A Markdown table, the first column to the left, the others to the right but where they are text. Cells are escaped."""
    rule = ["---", *["---" if text else "---:"] * (len(header) - 1)]
    lines = [header, rule, *[[escape(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def escape(text: str) -> str:
    """Text as Markdown shows it verbatim within a table cell: no markup, no HTML, no line breaks."""
    for mark in "\\`*_[]#|~":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals, or a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"

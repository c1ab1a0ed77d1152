"""Markdown tables that show text verbatim: model output must neither break a page nor be executed in it."""

import re

INTERVAL = 1.96
"""Half-width of a 95% confidence interval, in standard errors."""

WORDS = {True: "yes", False: "no", None: "–"}
"""The cells of a column that answers a question; None: unknown."""

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, including those that change the text direction, and lone surrogates."""

BREAK = "<!-- -->"
"""An empty comment. A page shows nothing for it, and text on both its sides is not recognized as one."""

RECOGNIZED = re.compile(
    r"""
      (?<![A-Za-z0-9_])@(?=[A-Za-z0-9])  # a person or team, who would be notified
    | @(?=[\w-]+\.)                      # an e-mail address
    | \#(?=[0-9]) | GH-(?=[0-9])         # an issue or pull request
    | :(?=[\w+-]+:)                      # an emoji
    | :(?=//) | www(?=\.)                # a URL
    | \$                                 # mathematics
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""Starts of text that GitHub replaces or links after it has rendered Markdown, so that no escape prevents it."""


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
    """Escape text so that a Markdown page or table cell shows it verbatim: no markup, HTML or line breaks.

    UNPRINTABLE is shown as U+FFFD. Text that GitHub itself would turn into something else (RECOGNIZED) is interrupted by BREAK.
    """
    pieces = RECOGNIZED.sub(r"\g<0>\0", clean(text)).split("\0")
    return BREAK.join(map(_escape_marks, pieces))


def _escape_marks(text: str) -> str:
    for mark in "\\`*_[]#|~":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")


def code(text: str) -> str:
    """Format text as a code span, which shows it verbatim except for line breaks and UNPRINTABLE. Not for table cells."""
    shown = clean(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def clean(text: str) -> str:
    """Join the lines of a text, and replace each of UNPRINTABLE by U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", " ".join(text.split()))


def number(value: float | None, digits: int = 2) -> str:
    """Format a number with this many decimals, or None as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"

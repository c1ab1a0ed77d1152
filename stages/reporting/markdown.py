"""Markdown tables that show text verbatim: model output must neither break a page nor be executed in it."""

import re
import unicodedata

INTERVAL = 1.96
"""Half-width of a 95% confidence interval, in standard errors."""

WORDS = {True: "yes", False: "no", None: "–"}
"""The cells of a column that answers a question; None: unknown."""

HIDDEN = ("Cc", "Cf", "Cs")
"""Categories of characters that are not shown: control and format characters, lone surrogates."""
JOINERS = "\u200c\u200d"
"""Invisible characters that emoji and the scripts of Asia need, between characters of these categories: JOINED."""
JOINED = ("Lo", "Mc", "Mn", "Sk", "So")

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

COMMIT = re.compile(r"(?<![A-Za-z0-9_])(?=[0-9]*[a-f])[0-9a-f]{7,40}(?![A-Za-z0-9_])", re.IGNORECASE)
"""The hash of a commit, which GitHub links too, if there is such a commit. Digits alone are taken for a number."""


def table(header: list[str], rows: list[list[str]], *, text: bool = False, hashes: bool = False) -> str:
    """Format a Markdown table and escape its cells (but not its header). hashes: see `escape`.

    The first column is left-aligned; the others are right-aligned, or left-aligned too if `text`.
    """
    return lay_out(header, [[escape(cell, hashes=hashes) for cell in row] for row in rows], text=text)


def lay_out(header: list[str], rows: list[list[str]], *, text: bool = False) -> str:
    """Format a table whose cells are Markdown; see `table`."""
    rule = ["---", *["---" if text else "---:"] * (len(header) - 1)]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def escape(text: str, *, hashes: bool = False) -> str:
    """Escape text so that a Markdown page or table cell shows it verbatim: no markup, HTML or line breaks.

    HIDDEN characters are shown as U+FFFD: see `clean`. Text that GitHub itself would turn into something else
    (RECOGNIZED, COMMIT) is interrupted by BREAK. hashes: leave COMMIT as it is, in text of our own.
    """
    marked = RECOGNIZED.sub(r"\g<0>\0", clean(text))
    if not hashes:
        marked = COMMIT.sub(lambda found: "\0".join(re.findall(".{1,6}", found[0])), marked)
    return BREAK.join(map(_escape_marks, marked.split("\0")))


def _escape_marks(text: str) -> str:
    for mark in "\\`*_[]#|~":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")


def code(text: str) -> str:
    """Format text as a code span, which shows it verbatim except for what `clean` replaces. Not for table cells."""
    shown = clean(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def clean(text: str) -> str:
    """Join the lines of a text, and replace each character of HIDDEN by U+FFFD, but for JOINERS where they join."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(map(_show, line, f" {line}", f"{line[1:]} "))


def _show(char: str, before: str, after: str) -> str:
    if char in JOINERS and unicodedata.category(before) in JOINED and unicodedata.category(after) in JOINED:
        return char
    return "\ufffd" if unicodedata.category(char) in HIDDEN else char


def number(value: float | None, digits: int = 2) -> str:
    """Format a number with this many decimals, or None as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"

"""The rows of the table: what was measured, and whether it is as it should be."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

PREFIX = "ROW "
"""Starts each line of a part's output that holds a row."""
PASS, FAIL, MEASURED, SKIPPED = VERDICTS = "pass", "fail", "measured", "skipped"


@dataclass(frozen=True)
class Row:
    """One row. value: as measured, with its unit. expected: the condition on it, empty if there is none (MEASURED).
    verdict: one of VERDICTS. reason: why it was skipped or, of a failure without a value, what went wrong."""

    what: str
    value: str
    expected: str
    verdict: str
    reason: str = ""


def report(*rows: Row) -> None:
    """Print rows for the process that collects them."""
    for row in rows:
        print(PREFIX + json.dumps(asdict(row)), flush=True)


def parse(line: str) -> Row | None:
    """Return the row in a line of a part's output, None if it is another line."""
    return Row(**json.loads(line.removeprefix(PREFIX))) if line.startswith(PREFIX) else None


def judge(what: str, value: str, expected: str, ok: bool) -> Row:
    """Return a row that passes if `ok`."""
    return Row(what, value, expected, PASS if ok else FAIL)


def at_most(what: str, value: float, limit: float, unit: str = "") -> Row:
    """Return a row that passes if the value is at most the limit; NaN is not."""
    return judge(what, f"{value:.3g}{unit}", f"<= {limit:g}{unit}", value <= limit)


def measure(what: str, value: str) -> Row:
    """Return a row that no condition is known for."""
    return Row(what, value, "", MEASURED)


def same_bytes(what: str, digests: Iterable[str]) -> Row:
    """Return a row that passes if all digests are the same."""
    same = len(set(digests)) == 1
    return judge(what, "same bytes" if same else "different bytes", "same bytes", same)


def skip(what: str, reason: str, value: str = "", expected: str = "") -> Row:
    """Return a row of something that was not run or, if it has a value, not judged."""
    return Row(what, value, expected, SKIPPED, reason)


def judge_on_gpu(row: Row, rehearsal: bool) -> Row:
    """Return the row; in a rehearsal, without its verdict: a CPU's speed and memory say nothing about a GPU's."""
    return skip(row.what, "rehearsal: measured on the CPU, not judged", row.value, row.expected) if rehearsal else row


def format_line(row: Row) -> str:
    """Format a row as a line for the terminal."""
    expected = f" (expected {row.expected})" if row.expected else ""
    value = f": {row.value}{expected}" if row.value else ""
    reason = f": {row.reason}" if row.reason else ""
    return f"{row.verdict:10}{row.what}{value}{reason}"


def format_table(rows: Iterable[Row]) -> str:
    """Format rows as a Markdown table."""
    lines = ["| what | value | expected | result |", "|---|---|---|---|"]
    for row in rows:
        verdict = f"{row.verdict}: {row.reason}" if row.reason else row.verdict
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in (row.what, row.value, row.expected, verdict)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

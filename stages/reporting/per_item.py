"""preferences.csv and harness.csv: the models' results for each instruction and question, small enough for Git.

Pure Python: `stages.tools diff` runs where only DVC is installed.
"""

import csv
from io import StringIO

from stages.reporting.paired import Preferences, Scores
from stages.runtime.errors import StageError, quote

PREFERENCES, HARNESS = "preferences.csv", "harness.csv"
INDEX = ["index"]
"""The columns of preferences.csv that name an instruction: its position, from 0. The others are the models'."""
QUESTION = ["task", "subtask", "question"]
"""The columns of harness.csv that name a question; `question` is the harness's doc_id, its position, from 0."""
REMEDY = "recreate it with `dvc repro`"


def shorten(value: float) -> float:
    """Round to the six significant digits of the reports.

    Preferences and scores are rounded before anything is computed from them, so that the files reproduce every difference, and
    so that no comparison of two models depends on the last bit of a floating-point number.
    """
    return float(f"{value:.6g}")


def format_preferences(preferences: dict[str, Preferences]) -> str:
    """Format preferences.csv: `index`, and a column per model, empty where the judge gave no preference."""
    rows = [[str(index), *map(format_cell, row)] for index, row in enumerate(zip(*preferences.values(), strict=True))]
    return format_csv([*INDEX, *preferences], rows)


def format_scores(scores: dict[str, Scores]) -> str:
    """Format harness.csv: `task`, `subtask`, `question`, and a column per model with the score of the task's metric."""
    first = next(iter(scores.values()))
    rows = [
        [task, subtask, str(question), *[format_cell(model[task][subtask][question]) for model in scores.values()]]
        for task, subtasks in first.items()
        for subtask, values in subtasks.items()
        for question in range(len(values))
    ]
    return format_csv([*QUESTION, *scores], rows)


def format_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def format_csv(header: list[str], rows: list[list[str]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def parse_preferences(text: str, where: str) -> dict[str, Preferences]:
    """Parse preferences.csv: model -> preferences. where: names the file in messages. Raises StageError."""
    models, rows = parse_csv(text, INDEX, where)
    preferences: dict[str, Preferences] = {model: [] for model in models}
    for index, row in enumerate(rows):
        check_position(row["index"], index, f"{where}: row {index}: 'index'")
        for model in models:
            cell = row[model]
            value = parse_number(cell, 1, 2, f"{where}: row {index}: {model!r}") if cell else None
            preferences[model].append(value)
    return preferences


def parse_scores(text: str, where: str) -> dict[str, Scores]:
    """Parse harness.csv: model -> task -> subtask -> scores. where: names the file in messages. Raises StageError."""
    models, rows = parse_csv(text, QUESTION, where)
    scores: dict[str, Scores] = {model: {} for model in models}
    for index, row in enumerate(rows):
        for model in models:
            values = scores[model].setdefault(row["task"], {}).setdefault(row["subtask"], [])
            check_position(row["question"], len(values), f"{where}: row {index}: 'question'")
            values.append(parse_number(row[model], 0, 1, f"{where}: row {index}: {model!r}"))
    counts = {f"{task}.{name}": len(values) for task, by_name in scores[models[0]].items() for name, values in by_name.items()}
    few = [name for name, count in counts.items() if count < 2]
    if few or not counts:
        raise StageError(f"{where}: expected at least two questions{f' of {few[0]}' if few else ''}: {REMEDY}")
    return scores


def parse_csv(text: str, names: list[str], where: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the models, from the header, and the rows. names: the columns before the models'. Raises StageError."""
    header, *lines = list(csv.reader(text.splitlines())) or [[]]
    models = header[len(names) :]
    if header[: len(names)] != names or not models or len(set(header)) < len(header):
        raise StageError(f"{where}: expected the columns {', '.join(names)} and one per model: {REMEDY}")
    for index, line in enumerate(lines):
        if len(line) != len(header):
            raise StageError(f"{where}: row {index}: {len(line)} cells instead of {len(header)}: {REMEDY}")
    return models, [dict(zip(header, line, strict=True)) for line in lines]


def check_position(cell: str, expected: int, where: str) -> None:
    """Raise StageError unless a cell is the expected position: a row is missing, duplicate or out of order."""
    if cell != str(expected):
        raise StageError(f"{where} is {quote(cell)}, expected {expected}: {REMEDY}")


def parse_number(cell: str, lowest: float, highest: float, where: str) -> float:
    """Parse a cell that must be a number in [lowest, highest]. Raises StageError."""
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not lowest <= value <= highest:
        raise StageError(f"{where} is {quote(cell)}, expected a number from {lowest:g} to {highest:g}: {REMEDY}")
    return value

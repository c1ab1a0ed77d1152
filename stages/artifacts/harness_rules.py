"""What the rows of the Leaderboard's six data sets must hold so that the stock tasks of lm-eval 0.4.1 can use them.

The tasks do not check their rows: an odd one ends an evaluation with a traceback, or counts as a wrong answer.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from stages.runtime.errors import quote

Fault = tuple[str, str]
"""A column, or the part of one, and what is wrong with its value."""

NUMBER = re.compile("#### [-$.,]*[0-9]")
"""How an answer of gsm8k ends: the task compares what follows `#### `."""
MMLU_CHOICES = 4
"""The task asks for A, B, C or D."""


def find_fault(task: str, row: dict[str, Any]) -> Fault | None:
    """Return the first fault of a row of the task's data set, which has all columns that the task reads; None without one.

    Texts may be empty, as second halves of contexts in hellaswag are. Columns that the task does not read may hold anything.
    """
    return next(RULES[task](row), None)


def _check_texts(row: dict[str, Any], *columns: str) -> Iterator[Fault]:
    yield from ((column, f"is {quote(row[column])}, not text") for column in columns if not isinstance(row[column], str))


def _check_list(name: str, values: Any, kind: type) -> Iterator[Fault]:
    """Yield the faults of a list that must have two or more values of one type."""
    if not isinstance(values, list) or len(values) < 2:
        yield name, f"is {quote(values)}, not a list of two or more"
    else:
        odd = (index for index, value in enumerate(values) if type(value) is not kind)
        what = "text" if kind is str else "a whole number"
        yield from ((f"{name}[{index}]", f"is {quote(values[index])}, not {what}") for index in odd)


def _check_lists(column: str, value: Any, kinds: dict[str, type]) -> Iterator[Fault]:
    """Yield the faults of a column that must hold lists of the same length under the names in `kinds`."""
    if not isinstance(value, dict) or not kinds.keys() <= value.keys():
        yield column, f"is {quote(value)}, without {' and '.join(kinds)}"
        return
    for name, kind in kinds.items():
        yield from _check_list(f"{column}.{name}", value[name], kind)
    lengths = [len(value[name]) for name in kinds]
    if len(set(lengths)) > 1:
        yield column, f"has {' and '.join(f'{length} {name}' for name, length in zip(kinds, lengths, strict=True))} values"


def _check_arc(row: dict[str, Any]) -> Iterator[Fault]:
    yield from _check_texts(row, "question", "answerKey")
    yield from _check_lists("choices", row["choices"], {"text": str, "label": str})
    if row["answerKey"] not in row["choices"]["label"]:
        yield "answerKey", f"is {quote(row['answerKey'])}, not one of choices.label, {quote(row['choices']['label'])}"


def _check_truthfulqa(row: dict[str, Any]) -> Iterator[Fault]:
    yield from _check_texts(row, "question")
    yield from _check_lists("mc2_targets", row["mc2_targets"], {"choices": str, "labels": int})
    labels = row["mc2_targets"]["labels"]
    right = labels.count(1)
    if labels != [1] * right + [0] * (len(labels) - right) or not 0 < right < len(labels):
        yield "mc2_targets.labels", f"is {quote(labels)}, not 1 for one or more true choices and then 0 for one or more others"


def _check_winogrande(row: dict[str, Any]) -> Iterator[Fault]:
    yield from _check_texts(row, "sentence", "option1", "option2", "answer")
    if "_" not in row["sentence"]:
        yield "sentence", f"is {quote(row['sentence'])}, without the blank, _"
    if row["answer"] not in ("1", "2"):
        yield "answer", f"is {quote(row['answer'])}, neither '1' nor '2'"


def _check_gsm8k(row: dict[str, Any]) -> Iterator[Fault]:
    yield from _check_texts(row, "question", "answer")
    if not NUMBER.search(row["answer"]):
        yield "answer", f"is {quote(row['answer'])}, without '#### ' and a number at its end"


def _check_hellaswag(row: dict[str, Any]) -> Iterator[Fault]:
    yield from _check_texts(row, "activity_label", "ctx_a", "ctx_b")
    yield from _check_list("endings", row["endings"], str)
    label, count = row["label"], len(row["endings"])
    if isinstance(label, bool) or str(label) not in map(str, range(count)):
        yield "label", f"is {quote(label)}, not the index of one of the {count} endings"


def _check_mmlu(row: dict[str, Any]) -> Iterator[Fault]:
    yield from _check_texts(row, "question")
    yield from _check_list("choices", row["choices"], str)
    if len(row["choices"]) != MMLU_CHOICES:
        yield "choices", f"has {len(row['choices'])} values, not {MMLU_CHOICES}"
    if type(row["answer"]) is not int or not 0 <= row["answer"] < MMLU_CHOICES:
        yield "answer", f"is {quote(row['answer'])}, not a whole number from 0 to {MMLU_CHOICES - 1}"


RULES: dict[str, Callable[[dict[str, Any]], Iterator[Fault]]] = {
    "arc_challenge": _check_arc,
    "truthfulqa_mc2": _check_truthfulqa,
    "winogrande": _check_winogrande,
    "gsm8k": _check_gsm8k,
    "hellaswag": _check_hellaswag,
    "mmlu": _check_mmlu,
}
"""Task -> the function that yields a row's faults, of which only the first is asked for: each check relies on those before."""

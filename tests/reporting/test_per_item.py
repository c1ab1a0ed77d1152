"""The CSV files of results per instruction and question."""

from io import StringIO
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.reporting import per_item
from stages.runtime.errors import StageError
from support.messages import assert_message

PREFERENCES = {"base": [1.0, None, 1.99184], "iter1": [2.0, 1.5, 1.25]}
SCORES: dict[str, Any] = {
    "base": {"gsm8k": {"gsm8k": [0, 1]}, "mmlu": {"mmlu_art": [1, 0], "mmlu_law": [0, 1, 1]}},
    "iter1": {"gsm8k": {"gsm8k": [1, 1]}, "mmlu": {"mmlu_art": [0.25, 0], "mmlu_law": [0, 0.123457, 1]}},
}
PREFERENCES_CSV = "index,base,iter1\n0,1,2\n1,,1.5\n2,1.99184,1.25\n"
HARNESS_CSV = (
    "task,subtask,question,base,iter1\n"
    "gsm8k,gsm8k,0,0,1\n"
    "gsm8k,gsm8k,1,1,1\n"
    "mmlu,mmlu_art,0,1,0.25\n"
    "mmlu,mmlu_art,1,0,0\n"
    "mmlu,mmlu_law,0,0,0\n"
    "mmlu,mmlu_law,1,1,0.123457\n"
    "mmlu,mmlu_law,2,1,1\n"
)


def test_a_row_is_an_instruction_and_an_empty_cell_a_missing_preference() -> None:
    text = per_item.format_preferences(PREFERENCES)
    assert text == PREFERENCES_CSV
    frame = pd.read_csv(StringIO(text))
    assert frame["index"].tolist() == [0, 1, 2]
    assert frame["base"].isna().tolist() == [False, True, False]
    assert per_item.parse_preferences(text, "here") == PREFERENCES


def test_a_row_is_a_question_of_the_harness() -> None:
    assert per_item.format_scores(SCORES) == HARNESS_CSV
    assert per_item.parse_scores(HARNESS_CSV, "here") == SCORES


@given(st.lists(st.tuples(st.none() | st.floats(1, 2), st.floats(1, 2)), min_size=1))
def test_what_was_shortened_is_read_as_it_was_written(rows: list[tuple[float | None, float]]) -> None:
    columns = {
        "base": [None if value is None else per_item.shorten(value) for value, _ in rows],
        "iter1": [per_item.shorten(value) for _, value in rows],
    }
    assert per_item.parse_preferences(per_item.format_preferences(columns), "here") == columns


@pytest.mark.parametrize(
    ("value", "short"), [(1.4109595659413348, 1.41096), (1.410959565941335, 1.41096), (0.1234567, 0.123457), (2.0, 2.0)]
)
def test_six_digits_are_kept(value: float, short: float) -> None:
    assert per_item.shorten(value) == short


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("index,base", "number,base", ["index", "one per model"]),
        ("index,base,iter1", "index", ["index", "one per model"]),
        ("base,iter1", "base,base", ["index", "one per model"]),
        ("1,,1.5\n", "", ["row 1", "'index'", "'2'", "expected 1"]),
        ("2,1.99184,1.25", "2,1.99184", ["row 2", "2 cells", "3"]),
        ("1.99184", "2.5", ["row 2", "'base'", "'2.5'", "from 1 to 2"]),
        ("1.99184", "nan", ["row 2", "'base'", "'nan'", "from 1 to 2"]),
        ("0,1,2", "0,1,two", ["row 0", "'iter1'", "'two'", "from 1 to 2"]),
    ],
)
def test_odd_preferences_are_refused(old: str, new: str, parts: list[str]) -> None:
    assert old in PREFERENCES_CSV
    with pytest.raises(StageError) as error:
        per_item.parse_preferences(PREFERENCES_CSV.replace(old, new, 1), "preferences.csv at main")
    assert_message(str(error.value), "preferences.csv at main", *parts, "`dvc repro`")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("task,subtask", "subtask,task", ["task, subtask, question", "one per model"]),
        ("mmlu,mmlu_law,1,1,0.123457\n", "", ["row 5", "'question'", "'2'", "expected 1"]),
        ("mmlu,mmlu_law,1,", "mmlu,mmlu_law,0,", ["row 5", "'question'", "'0'", "expected 1"]),
        ("0.25", "1.25", ["row 2", "'iter1'", "'1.25'", "from 0 to 1"]),
        ("1,0.25", "1,", ["row 2", "'iter1'", "''", "from 0 to 1"]),
        ("gsm8k,gsm8k,1,1,1\n", "", ["gsm8k.gsm8k", "two questions"]),
        (HARNESS_CSV.partition("\n")[2], "", ["two questions"]),
    ],
)
def test_odd_scores_are_refused(old: str, new: str, parts: list[str]) -> None:
    assert old in HARNESS_CSV
    with pytest.raises(StageError) as error:
        per_item.parse_scores(HARNESS_CSV.replace(old, new, 1), "harness.csv at main")
    assert_message(str(error.value), "harness.csv at main", *parts, "`dvc repro`")


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(StageError) as error:
        per_item.parse_preferences("", "preferences.csv at main")
    assert_message(str(error.value), "preferences.csv at main", "index")

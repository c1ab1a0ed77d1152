"""Rows as the real data sets have them pass; odd ones are found by column, before lm-eval fails on them."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts import harness_rules
from stages.artifacts.harness_sets import DATA_SETS
from stages.miniature.harness import make_rows

ROWS: dict[str, dict[str, Any]] = {
    "arc_challenge": {
        "question": "Which is a mineral?",
        "choices": {"text": ["wood", "quartz", "coal"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "truthfulqa_mc2": {"question": "Why?", "mc2_targets": {"choices": ["So.", "Thus.", "No."], "labels": [1, 1, 0]}},
    "winogrande": {"sentence": "Sarah met Maria, so _ smiled.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
    "gsm8k": {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "hellaswag": {"activity_label": "Cooking", "ctx_a": "He", "ctx_b": "", "endings": ["a", "b", "c", "d"], "label": "3"},
    "mmlu": {"question": "2 + 2?", "choices": ["1", "2", "3", "4"], "answer": 3},
}
QUIRKS: list[tuple[str, dict[str, Any]]] = [
    ("arc_challenge", {"choices": {"text": list("abcd"), "label": list("1234")}, "answerKey": "4"}),
    ("arc_challenge", {"choices": {"text": list("abcde"), "label": list("ABCDE")}, "answerKey": "E"}),
    ("arc_challenge", {"id": None}),
    ("truthfulqa_mc2", {"mc1_targets": {}}),
    ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]}}),
    ("winogrande", {"answer": "1"}),
    ("gsm8k", {"answer": "So $1,250.\n#### 1,250"}),
    ("gsm8k", {"answer": "#### -3"}),
    ("gsm8k", {"answer": "#### $.5"}),
    ("hellaswag", {"ctx_b": "she", "label": "0", "split_type": "zeroshot", "source_id": "wikihow~3"}),
    ("hellaswag", {"label": 2}),
    ("mmlu", {"question": "", "choices": ["", "", "nan", "None"], "answer": 0}),
]
"""What occurs in the real data sets, or works as well."""


@pytest.mark.parametrize("task", DATA_SETS)
def test_the_examples_have_the_columns_that_the_task_reads(task: str) -> None:
    assert harness_rules.RULES.keys() == DATA_SETS.keys()
    assert ROWS[task].keys() == DATA_SETS[task].columns
    assert harness_rules.find_fault(task, ROWS[task]) is None


@pytest.mark.parametrize(("task", "change"), QUIRKS)
def test_rows_of_the_real_data_sets_pass(task: str, change: dict[str, Any]) -> None:
    assert harness_rules.find_fault(task, ROWS[task] | change) is None


@pytest.mark.parametrize("task", DATA_SETS)
def test_the_miniature_s_rows_pass(task: str) -> None:
    for splits in make_rows(task, 3, 4).values():
        for row in [row for rows in splits.values() for row in rows]:
            assert harness_rules.find_fault(task, row) is None


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("arc_challenge", {"answerKey": "D"}, "answerKey"),
    ("arc_challenge", {"answerKey": ""}, "answerKey"),
    ("arc_challenge", {"answerKey": None}, "answerKey"),
    ("arc_challenge", {"choices": {"text": [], "label": []}}, "choices.text"),
    ("arc_challenge", {"choices": {"text": ["a", None], "label": ["A", "B"]}}, "choices.text[1]"),
    ("arc_challenge", {"choices": {"text": ["a", "b", "c"], "label": ["A", "B"]}}, "choices"),
    ("arc_challenge", {"choices": {"text": ["a", "b"]}}, "choices"),
    ("arc_challenge", {"choices": ["a", "b"]}, "choices"),
    ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b"], "labels": [0, 0]}}, "mc2_targets.labels"),
    ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "mc2_targets.labels"),
    ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b"], "labels": [0, 1]}}, "mc2_targets.labels"),
    ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b"], "labels": [2, 0]}}, "mc2_targets.labels"),
    ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0]}}, "mc2_targets"),
    ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b"], "labels": ["1", "0"]}}, "mc2_targets.labels[0]"),
    ("truthfulqa_mc2", {"mc2_targets": None}, "mc2_targets"),
    ("winogrande", {"answer": ""}, "answer"),
    ("winogrande", {"answer": "3"}, "answer"),
    ("winogrande", {"answer": 1}, "answer"),
    ("winogrande", {"sentence": "No blank."}, "sentence"),
    ("winogrande", {"option2": None}, "option2"),
    ("gsm8k", {"answer": "5"}, "answer"),
    ("gsm8k", {"answer": "####5"}, "answer"),
    ("gsm8k", {"answer": "#### five"}, "answer"),
    ("gsm8k", {"question": None}, "question"),
    ("hellaswag", {"label": ""}, "label"),
    ("hellaswag", {"label": "4"}, "label"),
    ("hellaswag", {"label": "-1"}, "label"),
    ("hellaswag", {"label": None}, "label"),
    ("hellaswag", {"label": True}, "label"),
    ("hellaswag", {"endings": []}, "endings"),
    ("hellaswag", {"endings": ["a", "b", None, "d"]}, "endings[2]"),
    ("hellaswag", {"ctx_b": None}, "ctx_b"),
    ("mmlu", {"answer": 4}, "answer"),
    ("mmlu", {"answer": -1}, "answer"),
    ("mmlu", {"answer": "A"}, "answer"),
    ("mmlu", {"answer": 1.0}, "answer"),
    ("mmlu", {"choices": ["1", "2", "3"]}, "choices"),
]


@pytest.mark.parametrize(("task", "change", "column"), FAULTS)
def test_an_odd_value_is_found_by_column(task: str, change: dict[str, Any], column: str) -> None:
    found = harness_rules.find_fault(task, ROWS[task] | change)
    assert found
    assert found[0] == column


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.text(max_size=2),
    lambda values: (
        st.lists(values, max_size=4) | st.dictionaries(st.sampled_from(["text", "label", "choices", "labels"]), values)
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(DATA_SETS)), st.data())
def test_any_value_passes_or_is_found_in_its_column(task: str, data: st.DataObject) -> None:
    row = copy.deepcopy(ROWS[task])
    column = data.draw(st.sampled_from(sorted(row)))
    row[column] = data.draw(ANYTHING)
    fault = harness_rules.find_fault(task, row)
    others = {"hellaswag": {"label"}, "arc_challenge": {"answerKey"}}.get(task, set())
    assert fault is None or fault[0].startswith((column, *others))

import functools
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.harness_sets import DATA_SETS
from stages.miniature import domain, harness
from stages.runtime.errors import StageError
from support.messages import assert_message

SCHEMAS: dict[str, dict[str, Any]] = {  # as in the Hub's data viewer
    "arc_challenge": {"id": str, "question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str},
    "truthfulqa_mc2": {
        "question": str,
        "mc1_targets": {"choices": [str], "labels": [int]},
        "mc2_targets": {"choices": [str], "labels": [int]},
    },
    "winogrande": {"sentence": str, "option1": str, "option2": str, "answer": str},
    "gsm8k": {"question": str, "answer": str},
    "hellaswag": {
        "ind": int,
        "activity_label": str,
        "ctx_a": str,
        "ctx_b": str,
        "ctx": str,
        "endings": [str],
        "source_id": str,
        "split": str,
        "split_type": str,
        "label": str,
    },
    "mmlu": {"question": str, "subject": str, "choices": [str], "answer": int},
}
TASKS = list(SCHEMAS)
seeds = st.integers(0, 10**6)


def infer_schema(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: infer_schema(part) for key, part in value.items()}
    if isinstance(value, list):
        assert len({type(part) for part in value}) == 1
        return [type(value[0])]
    return type(value)


def draw_rows(task: str, seed: int, count: int = 12) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return few-shot rows and test rows of the task's first configuration."""
    splits = next(iter(harness.make_rows(task, seed, count).values()))
    test = splits.pop(DATA_SETS[task].test)
    return next(iter(splits.values()), []), test


def read_question(row: dict[str, Any]) -> str:
    return str(row.get("question") or row.get("ctx") or row.get("sentence"))


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_real_schema(task: str) -> None:
    few, test = draw_rows(task, 1)
    for row in [*few, *test]:
        assert infer_schema(row) == SCHEMAS[task]
    assert DATA_SETS[task].columns <= set(SCHEMAS[task])


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_no_two_rows_share_a_question(task: str, seed: int) -> None:
    few, test = draw_rows(task, seed)
    questions = [read_question(row) for row in [*few, *test]]
    assert len(set(questions)) == len(questions)
    assert len(test) == 12
    assert len(few) >= (DATA_SETS[task].few_shot or ("", 0))[1]


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_determines_the_rows(task: str) -> None:
    assert draw_rows(task, 1) == draw_rows(task, 1)
    assert draw_rows(task, 1) != draw_rows(task, 2)


@functools.cache
def list_questions() -> dict[str, domain.Question]:
    """Nearly all questions of the toy world, by their text."""
    rng = random.Random(0)
    return {question.text: question for question in (domain.draw_question(rng) for _ in range(20000))}


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_exactly_one_choice_is_right(seed: int) -> None:
    right = list_questions()
    for row in draw_rows("hellaswag", seed)[1]:
        assert [domain.is_right(row["ctx"], ending) for ending in row["endings"]].index(True) == int(row["label"])
        assert sum(domain.is_right(row["ctx"], ending) for ending in row["endings"]) == len(set(row["endings"])) - 3 == 1
    for row in draw_rows("truthfulqa_mc2", seed)[1]:
        for targets in (row["mc1_targets"], row["mc2_targets"]):
            assert [int(domain.is_right(row["question"], choice)) for choice in targets["choices"]] == targets["labels"]
            assert targets["labels"] == sorted(targets["labels"], reverse=True), "mc2 splits at the first 0"
    arc = [
        (row["question"], row["choices"]["text"], "ABCD".index(row["answerKey"])) for row in draw_rows("arc_challenge", seed)[1]
    ]
    mmlu = [(row["question"], row["choices"], row["answer"]) for row in draw_rows("mmlu", seed)[1]]
    for question, choices, answer in arc + mmlu:
        sentences = [right[question].right.replace(right[question].right_value, choice) for choice in choices]
        assert len(set(choices)) == 4
        assert [domain.is_right(question, sentence) for sentence in sentences] == [n == answer for n in range(4)]


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_exactly_one_option_fits_the_blank(seed: int) -> None:
    forms = ["the opposite of {}", "What does a {} eat", "Where does a {} live", "What colour is a {}", "Name three {}."]
    for row in draw_rows("winogrande", seed)[1]:
        right = [
            any(domain.is_right(form.format(option), row["sentence"].replace("_", option)) for form in forms)
            for option in (row["option1"], row["option2"])
        ]
        assert right == [row["answer"] == "1", row["answer"] == "2"]


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_the_sums_are_right(seed: int) -> None:
    for row in draw_rows("gsm8k", seed)[1]:
        total = sum(int(number) for number in re.findall(r"\d+", row["question"]))
        assert row["answer"].endswith(f"\n#### {total}")
        for left, right, result in re.findall(r"<<(\d+)\+(\d+)=(\d+)>>", row["answer"]):
            assert int(left) + int(right) == int(result)


@pytest.mark.parametrize("task", TASKS)
def test_more_questions_than_there_are_raise_an_error(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MAX_REPEATS", 100)
    with pytest.raises(StageError) as error:
        harness.make_rows(task, 1, 10**5)
    assert_message(str(error.value), "params.yaml", f"assets.harness.{task}.count is {10**5}", "lower it")


def test_a_single_question_is_rejected_because_it_gives_no_standard_error() -> None:
    with pytest.raises(StageError) as error:
        harness.make_rows("gsm8k", 1, 1)
    assert_message(str(error.value), "params.yaml", "assets.harness.gsm8k.count", "standard error", "at least 2")

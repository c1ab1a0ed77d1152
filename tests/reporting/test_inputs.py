import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import files
from stages.reporting import inputs
from stages.reporting.published import TASKS
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.reports import ALPACA, COMPARISON, HARNESS, ITEMS, LOG, PREFERENCES, QUESTIONS, write_evaluations

CONTAMINATION = {"contaminated": {"iter1": 7}}
RESULTS = {"metrics.json": ALPACA, "summary.json": HARNESS, "comparison.json": COMPARISON, "contamination.json": CONTAMINATION}


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("metrics.json", ALPACA | {"win_rate": math.nan}, ["'win_rate'", "nan", "from 0 to 100:"]),
        ("metrics.json", ALPACA | {"win_rate": 100.5}, ["'win_rate'", "100.5", "from 0 to 100:"]),
        ("metrics.json", ALPACA | {"win_rate": True}, ["'win_rate'", "True", "from 0 to 100:"]),
        ("metrics.json", ALPACA | {"lc_standard_error": -1}, ["'lc_standard_error'", "-1", "from 0 to 100:"]),
        ("metrics.json", ALPACA | {"standard_error": None}, ["'standard_error'", "None", "from 0 to 100:"]),
        ("metrics.json", ALPACA | {"avg_length": math.inf}, ["'avg_length'", "inf", "from 0 to 1e+09:"]),
        ("metrics.json", ALPACA | {"n_total": "805"}, ["'n_total'", "'805'", "from 0 to 1e+09:"]),
        ("metrics.json", ALPACA | {"n_failed": -1}, ["'n_failed'", "-1", "from 0 to 1e+09:"]),
        ("metrics.json", ALPACA | {"n_failed": [1]}, ["'n_failed'", "[1]", "from 0 to 1e+09:"]),
        ("metrics.json", ALPACA | {"judge": 5}, ["'judge'", "5", "text"]),
        ("metrics.json", ALPACA | {"judge": " \n"}, ["'judge'", "text"]),
        ("metrics.json", ALPACA | {"length_controlled_absent": None}, ["'length_controlled_absent'", "None", "text"]),
        ("metrics.json", {"win_rate": 1}, ["'standard_error'", "missing"]),
        ("metrics.json", [], ["'win_rate'", "missing"]),
        ("summary.json", {**HARNESS, "gsm8k": {}}, ["'gsm8k.value'", "missing"]),
        ("summary.json", dict(list(HARNESS.items())[:5]), ["'mmlu.value'", "missing"]),
        ("summary.json", {**HARNESS, "mmlu": HARNESS["mmlu"] | {"value": 0.5e3}}, ["'mmlu.value'", "500.0", "from 0 to 100:"]),
        ("summary.json", {**HARNESS, "mmlu": HARNESS["gsm8k"]}, ["'mmlu.weighted'", "missing"]),
        ("summary.json", {**HARNESS, "gsm8k": HARNESS["gsm8k"] | {"n": 9, "cut": 10}}, ["'gsm8k.cut'", "10", "from 0 to 9:"]),
        ("summary.json", {**HARNESS, "gsm8k": HARNESS["gsm8k"] | {"n": 9, "cut": "1"}}, ["'gsm8k.cut'", "'1'", "from 0 to 9:"]),
        ("summary.json", {**HARNESS, "gsm8k": HARNESS["gsm8k"] | {"cut": 1}}, ["'gsm8k.n'", "None", "from 0 to 1e+09:"]),
        (
            "summary.json",
            {**HARNESS, "mmlu": HARNESS["mmlu"] | {"weighted_standard_error": -1}},
            ["'mmlu.weighted_standard_error'", "-1", "from 0 to 100:"],
        ),
        ("comparison.json", COMPARISON | {"models": ["base"]}, ["'models'", "['base']", "base, iter1"]),
        ("comparison.json", COMPARISON | {"more": 1}, ["models, n, standard_errors, win_rates"]),
        ("comparison.json", [], ["models, n, standard_errors, win_rates"]),
        ("comparison.json", COMPARISON | {"win_rates": [[50, 40], [60]]}, ["'win_rates'", "2 x 2"]),
        ("comparison.json", COMPARISON | {"win_rates": None}, ["'win_rates'", "2 x 2"]),
        (
            "comparison.json",
            COMPARISON | {"standard_errors": [[0, math.nan], [1, 0]]},
            ["'standard_errors'", "base", "iter1", "nan", "from 0 to 100:"],
        ),
        ("comparison.json", COMPARISON | {"n": "9"}, ["'n'", "'9'", "from 0 to 1e+09:"]),
        ("contamination.json", {"contaminated": {"iter2": 0}}, ["'contaminated.iter1'"]),
        ("contamination.json", {"contaminated": {"iter1": 1.5}}, ["'contaminated.iter1'"]),
        ("contamination.json", [], ["'contaminated.iter1'"]),
    ],
)
def test_impossible_results_are_rejected(name: str, value: Any, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    readers: dict[str, Callable[[], Any]] = {
        "metrics.json": lambda: inputs.read_alpaca(tmp_path),
        "summary.json": lambda: inputs.read_harness(tmp_path, TASKS),
        "comparison.json": lambda: inputs.read_comparison(path, ["base", "iter1"]),
        "contamination.json": lambda: inputs.read_contamination("iter1", path),
    }
    path.write_text(json.dumps(RESULTS[name]))
    assert readers[name]() == (7 if name == "contamination.json" else RESULTS[name])
    path.write_text(json.dumps(value))
    with pytest.raises(StageError) as error:
        readers[name]()
    assert_message(str(error.value), str(path), *parts, "`dvc repro`")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["CSV", "No columns to parse from file"]),
        (LOG + "3,1,2,3,4,5,6,7,8\n", ["CSV", "Error tokenizing data."]),
        (
            LOG.replace("kl", "k"),
            ["step, loss, learning_rate, gradient_norm, clipped, chosen_log_ratio, rejected_log_ratio, kl"],
        ),
        (LOG.partition("\n")[0], ["step, loss, "]),
        (LOG + "3,nan,0,41,1,0,0,0\n", ["row 2", "'loss'", "nan"]),
        (LOG + "3,1,0,inf,1,0,0,0\n", ["row 2", "'gradient_norm'", "inf"]),
        (LOG + "3,1,0,41,1,0,0,x\n", ["row 2", "'kl'", "'x'"]),
        (LOG.replace("41,1,", "41,True,"), ["row 0", "'clipped'", "True"]),
        (LOG + "4,1,0,41,1,0,0,0\n", ["row 2", "'step'", "is 4", "expected 3"]),
    ],
)
def test_an_invalid_training_log_is_rejected(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "iter1.csv"
    path.write_text(LOG)
    assert len(inputs.read_training_log(path)) == 2
    path.write_text(text)
    with pytest.raises(StageError) as error:
        inputs.read_training_log(path)
    assert_message(str(error.value), str(path), *parts, "`dvc repro`")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with the evaluations of base and iter1."""
    write_evaluations(tmp_path)
    return tmp_path


def test_evaluations_are_those_of_the_models_in_order(data: Path) -> None:
    evaluations = inputs.read_evaluations(data, ["base", "iter1"], TASKS)
    assert evaluations.alpaca == {"base": ALPACA, "iter1": ALPACA}
    assert evaluations.harness == {"base": HARNESS, "iter1": HARNESS}
    assert [rows[0]["output"] for rows in evaluations.answers.values()] == ["base says so.", "iter1 says so."]
    assert evaluations.preferences == {"base": [1.1, 1.35309], "iter1": [1.3, 1.15309]}  # to six digits
    assert evaluations.scores == ITEMS
    assert list(evaluations.scores["iter1"]) == TASKS
    assert list(evaluations.scores["iter1"]["mmlu"]) == ["mmlu_art", "mmlu_law"]


ANNOTATIONS = [{"instruction": text, "preference": value} for text, value in zip(QUESTIONS, PREFERENCES["iter1"], strict=True)]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ([], ["non-empty"]),
        (ANNOTATIONS[:1], ["1 annotations of 2 answers"]),
        (ANNOTATIONS[::-1], ["record 0", "'instruction'", "answer 0 of iter1"]),
        ([ANNOTATIONS[0], ANNOTATIONS[1] | {"instruction": "How?"}], ["record 1", "'instruction'", "answer 1 of iter1"]),
        ([ANNOTATIONS[0], {"instruction": "Who?"}], ["record 1", "'preference'", "'missing'", "from 1 to 2"]),
        ([ANNOTATIONS[0] | {"preference": 0.5}, ANNOTATIONS[1]], ["record 0", "'preference'", "0.5", "from 1 to 2"]),
        ([ANNOTATIONS[0], ANNOTATIONS[1] | {"preference": True}], ["record 1", "'preference'", "True", "from 1 to 2"]),
        ([ANNOTATIONS[0], ANNOTATIONS[1] | {"preference": math.nan}], ["record 1", "'preference'", "nan", "from 1 to 2"]),
        ([ANNOTATIONS[0], ANNOTATIONS[1] | {"preference": "2"}], ["record 1", "'preference'", "'2'", "from 1 to 2"]),
        ([ANNOTATIONS[0], ANNOTATIONS[1] | {"preference": 1.156}], ["'preference'", "22.8000", "'win_rate'", "22.6543"]),
    ],
)
def test_odd_preferences_are_rejected(data: Path, value: Any, parts: list[str]) -> None:
    path = data / "alpaca_eval" / "iter1" / "annotations.json"
    path.write_text(json.dumps(value))
    with pytest.raises(StageError) as error:
        inputs.read_evaluations(data, ["base", "iter1"], TASKS)
    assert_message(str(error.value), str(path), *parts)


def test_a_preference_of_0_is_a_draw() -> None:
    assert inputs.read_preference({"preference": 0}, "here") == 1.5


def test_too_few_preferences_for_every_model_are_rejected(data: Path) -> None:
    path = data / "alpaca_eval" / "iter1" / "annotations.json"
    path.write_text(json.dumps([ANNOTATIONS[0], ANNOTATIONS[1] | {"preference": None}]))
    with pytest.raises(StageError) as error:
        inputs.read_evaluations(data, ["base", "iter1"], TASKS)
    assert_message(str(error.value), str(data / "alpaca_eval"), "1 instructions", "at least 2", "`dvc repro`")


def test_a_missing_preference_is_none_and_not_part_of_the_win_rate(tmp_path: Path) -> None:
    answers = {"base": [{"instruction": text} for text in ("Why?", "Who?", "How?")]}
    rows = [
        {"instruction": row["instruction"], "preference": value}
        for row, value in zip(answers["base"], (1.2, None, 1.4), strict=True)
    ]
    files.write_json(rows, tmp_path / "base" / "annotations.json")
    assert inputs.read_preferences(tmp_path, answers, {"base": {"win_rate": 30}}) == {"base": [1.2, None, 1.4]}


def test_tasks_and_subjects_have_one_order(data: Path) -> None:
    """That of the published tables, and the alphabet's, so that harness.csv does not depend on the order in items.json."""
    path = data / "harness" / "base" / "items.json"
    path.write_text(json.dumps({task: dict(reversed(ITEMS["base"][task].items())) for task in reversed(TASKS)}))
    shuffled = inputs.read_items(path, TASKS)
    path.write_text(json.dumps(ITEMS["base"]))
    for scores in (shuffled, inputs.read_items(path, TASKS)):
        assert list(scores) == TASKS
        assert list(scores["mmlu"]) == ["mmlu_art", "mmlu_law"]


def change_items(**changes: Any) -> dict[str, Any]:
    """Return iter1's items with other tasks, or without those that are None."""
    return {task: subtasks for task, subtasks in (ITEMS["iter1"] | changes).items() if subtasks is not None}


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ([], ["'arc_challenge'", "missing"]),
        (change_items(gsm8k=None), ["'gsm8k'", "missing"]),
        (change_items(gsm8k={}), ["'gsm8k'", "missing"]),
        *(
            (change_items(gsm8k={name: [1, 0]}), ["'gsm8k'", "subtask", "letters, digits"])
            for name in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "", "a b", '"', "é")
        ),
        (change_items(gsm8k={"gsm8k": [1]}), ["'gsm8k.gsm8k'", "[1]", "at least two"]),
        (change_items(gsm8k={"gsm8k": [1, 0, 2]}), ["'gsm8k.gsm8k'", "question 2", "2", "from 0 to 1"]),
        (change_items(gsm8k={"gsm8k": [1, None]}), ["'gsm8k.gsm8k'", "question 1", "None", "from 0 to 1"]),
        (change_items(gsm8k={"gsm8k": [1, 0, 0.5]}), ["'gsm8k.gsm8k'", "3 questions, 2 in that of base"]),
        (change_items(mmlu={"mmlu_law": [0.3, 0.5]}), ["'mmlu.mmlu_art'", "0 questions, 3 in that of base"]),
        (change_items(gsm8k={"gsm8k": [1, 0.1]}), ["'gsm8k'", "55.0000", "'gsm8k.value'", "50.0000"]),
        (
            change_items(mmlu={"mmlu_law": [0.5, 0.5], "mmlu_art": [0.5, 0.5, 0.5]}),
            ["'mmlu'", "50.0000", "'mmlu.weighted'", "52.0000"],
        ),
    ],
)
def test_odd_scores_are_rejected(data: Path, value: Any, parts: list[str]) -> None:
    path = data / "harness" / "iter1" / "items.json"
    path.write_text(json.dumps(value))
    with pytest.raises(StageError) as error:
        inputs.read_evaluations(data, ["base", "iter1"], TASKS)
    assert_message(str(error.value), str(path), *parts, "`dvc repro`")


def test_results_of_an_unknown_model_are_named_and_ignored(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "harness" / "iter9").mkdir()
    with caplog.at_level(logging.WARNING):
        assert set(inputs.read_evaluations(data, ["base", "iter1"], TASKS).harness) == {"base", "iter1"}
    assert_message(caplog.text, str(data / "harness" / "iter9"), "params.yaml", "remove it")


def test_missing_results_are_named(data: Path) -> None:
    with pytest.raises(StageError) as error:
        inputs.read_evaluations(data / "nowhere", ["base", "iter1"], TASKS)
    assert_message(str(error.value), str(data / "nowhere" / "alpaca_eval"), "missing")

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.judges import annotations as checks
from stages.judges import scoring
from stages.runtime.errors import StageError
from support.messages import assert_message

ANNOTATIONS, OUTPUTS = Path("annotations.json"), Path("outputs.json")
Rows = list[dict[str, Any]]


def make(preferences: list[object]) -> tuple[Rows, Rows]:
    """Make annotations with these preferences, and the outputs that they are about, in another order."""
    outputs = [{"instruction": f"i{n}", "output": f"o{n}", "generator": "ours"} for n in range(len(preferences))]
    annotations = [
        {
            "instruction": row["instruction"],
            "output_1": f"r{n}",
            "output_2": row["output"],
            "generator_1": "theirs",
            "generator_2": "ours",
            "annotator": "judge",
            "preference": preference,
        }
        for n, (row, preference) in enumerate(zip(outputs, preferences, strict=True))
    ]
    return annotations, outputs[::-1]


def fail(annotations: Rows, outputs: Rows) -> str:
    with pytest.raises(StageError) as error:
        checks.check_annotations(ANNOTATIONS, annotations, OUTPUTS, outputs)
    return str(error.value)


any_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)
)


@given(any_json)
@example(10**400)
@example(1e308)
@example(-0.0)
@example(True)
@example(False)
@example(1 - 2**-53)
@example(2 + 2**-51)
def test_a_preference_is_null_or_0_or_from_1_to_2(value: object) -> None:
    annotations, outputs = make([1.5, value])
    number = type(value) in (int, float)
    if value is None or (number and (value == 0 or value == 1 or value == 2 or 1 < value < 2)):  # type: ignore[operator]
        checks.check_annotations(ANNOTATIONS, annotations, OUTPUTS, outputs)
    else:
        assert_message(fail(annotations, outputs), "annotations.json", "record 1", "'preference'", "annotate")


odd_preferences = st.none() | st.sampled_from([0, 1, 2, 0.0, 1.5]) | st.floats(1, 2)


@given(st.lists(odd_preferences, min_size=2, max_size=12))
@example([None, None])
@example([None, 1.25])
@example([0, 1, 2])
@example([1.5, 1.5, 1.5])
def test_accepted_annotations_have_the_win_rate_of_those_with_a_preference(preferences: list[object]) -> None:
    annotations, outputs = make(preferences)
    wins = [0.5 if value == 0 else value - 1 for value in preferences if value is not None]  # type: ignore[operator]
    if not wins:
        assert_message(fail(annotations, outputs), "annotations.json", "'preference'", f"all {len(preferences)} records")
        return
    checks.check_annotations(ANNOTATIONS, annotations, OUTPUTS, outputs)
    assert checks.count_failed(annotations) == len(preferences) - len(wins)
    metrics = scoring.score_annotations(annotations, outputs, None)
    mean = math.fsum(wins) / len(wins)
    assert metrics["win_rate"] == pytest.approx(100 * mean)
    assert metrics["n_total"] == len(wins)
    if len(wins) == 1:
        assert metrics["standard_error"] is None
    else:
        variance = math.fsum((win - mean) ** 2 for win in wins) / (len(wins) - 1)
        assert metrics["standard_error"] == pytest.approx(100 * math.sqrt(variance / len(wins)), abs=1e-9)


def put(rows: Rows, index: int, key: str, value: object) -> None:
    rows[index][key] = value


Edit = Callable[[Rows, Rows], object]
EDITS: dict[str, tuple[Edit, list[str]]] = {
    "another baseline": (
        lambda a, o: put(a, 2, "generator_1", "other"),
        ["annotations", "record 2", "'generator_1'", "'other'"],
    ),
    "another judge": (lambda a, o: put(a, 1, "annotator", "gpt"), ["annotations", "record 1", "'annotator'", "'gpt'", "judge"]),
    "a judge not named": (lambda a, o: a[2].pop("annotator"), ["annotations", "record 2", "'annotator'", "None"]),
    "another model": (lambda a, o: put(a, 1, "generator_2", "x"), ["annotations", "record 1", "'generator_2'", "outputs.json"]),
    "another output": (
        lambda a, o: put(a, 0, "output_2", "x"),
        ["annotations", "record 0", "'output_2'", "record 2 of outputs"],
    ),
    "no preference key": (lambda a, o: a[1].pop("preference"), ["annotations", "record 1", "'preference' is missing"]),
    "annotated twice": (lambda a, o: a.append(a[0]), ["annotations", "record 3", "'instruction'", "record 0", "remove"]),
    "not annotated": (lambda a, o: a.pop(), ["outputs.json: record 0", "'instruction'", "annotations.json", "pass"]),
    "no output": (lambda a, o: o.pop(), ["annotations.json: record 0", "'instruction'", "outputs.json", "pass"]),
}


@pytest.mark.parametrize("name", EDITS)
def test_annotations_that_do_not_belong_together_are_refused(name: str) -> None:
    annotations, outputs = make([1.0, 2.0, 1.2])
    checks.check_annotations(ANNOTATIONS, annotations, OUTPUTS, outputs)
    edit, parts = EDITS[name]
    edit(annotations, outputs)
    assert_message(fail(annotations, outputs), *parts)


def test_annotations_without_any_judges_name_are_accepted() -> None:
    annotations, outputs = make([1.0, 2.0])
    for row in annotations:
        del row["annotator"]
    checks.check_annotations(ANNOTATIONS, annotations, OUTPUTS, outputs)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(["instruction", "output_1", "output_2", "generator_1", "generator_2"]),
            st.sampled_from(["", "i1", "o2", "ours", "theirs", "\n\u2028"]),
        ),
        max_size=3,
    )
)
def test_whatever_is_edited_is_either_scored_or_refused_in_one_line(edits: list[tuple[int, str, str]]) -> None:
    original, outputs = make([1.0, 2.0, None, 1.25])
    annotations = copy.deepcopy(original)
    for index, key, value in edits:
        annotations[index][key] = value
    relevant = ("instruction", "output_2", "generator_2")
    same = all(
        [row[key] for key in relevant] == [new[key] for key in relevant] for row, new in zip(original, annotations, strict=True)
    )
    if same and len({row["generator_1"] for row in annotations}) == 1:
        checks.check_annotations(ANNOTATIONS, annotations, OUTPUTS, outputs)
        assert scoring.score_annotations(annotations, outputs, None)["win_rate"] == pytest.approx(100 * 1.25 / 3)
    else:
        text = fail(annotations, outputs)
        assert_message(text, "record", "annotations.json")
        assert len(text.splitlines()) == 1


def test_outputs_are_one_models_and_one_per_instruction() -> None:
    _, outputs = make([1, 2, 1])
    checks.check_outputs(OUTPUTS, outputs)
    for key, value, parts in (
        ("generator", "x", ["record 1", "'generator'", "'x'", "one model"]),
        ("instruction", "i2", ["record 1", "'instruction'", "record 0", "remove"]),
    ):
        changed = copy.deepcopy(outputs)
        changed[1][key] = value
        with pytest.raises(StageError) as error:
            checks.check_outputs(OUTPUTS, changed)
        assert_message(str(error.value), "outputs.json", *parts)


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("generator_1", "text_davinci_003", ["'generator_1'", "'text_davinci_003'", "'gpt4_1106_preview'"]),
        ("output_1", "", ["'output_1'", "empty"]),
    ],
)
def test_length_control_has_one_baseline_without_empty_outputs(key: str, value: str, parts: list[str]) -> None:
    annotations, _ = make([1, 2, 1])
    for row in annotations:
        row["generator_1"] = "gpt4_1106_preview"
    checks.check_references(ANNOTATIONS, annotations, "output_1", "generator_1")
    assert checks.count_empty(annotations, "output_1") == 0
    annotations[2][key] = value
    assert checks.count_empty(annotations, "output_1") == (key == "output_1")
    with pytest.raises(StageError) as error:
        checks.check_references(ANNOTATIONS, annotations, "output_1", "generator_1")
    assert_message(str(error.value), "annotations.json", "record 2", *parts, "alpaca_eval_gpt4_baseline.json")


def test_length_control_needs_lengths_that_vary() -> None:
    checks.check_lengths(ANNOTATIONS, "ours", ["ab", "abc"], ["x", "x"])
    checks.check_lengths(ANNOTATIONS, checks.BASELINE, ["ab", "abc"], ["ab", "abc"])
    with pytest.raises(StageError) as error:
        checks.check_lengths(ANNOTATIONS, "ours", ["ab", "abcd"], ["", "xy"])
    assert_message(str(error.value), "annotations.json", "'ours'", "2 characters", "check")


def test_json_gives_the_same_answer_as_python() -> None:
    """NaN and infinities are words that Python's json reads, and large integers have no limit there."""
    for text in ("NaN", "Infinity", "-Infinity", "1e400", "true", '"2"', "[2]", str(10**400)):
        annotations, outputs = make([1.5, json.loads(text)])
        assert_message(fail(annotations, outputs), "record 1", "'preference'")

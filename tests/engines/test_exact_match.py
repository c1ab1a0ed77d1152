"""The metric exact_match: the stages' own, which agrees with the one that stock lm-eval loads from the data sets' folder."""

import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts import harness_sets
from stages.engines import exact_match
from stages.runtime.errors import StageError
from support.messages import assert_message

texts = st.lists(st.tuples(st.text("aB1,.$# \n"), st.text("aB1,.$# \n")), min_size=1)
OPTIONS = ("ignore_case", "ignore_punctuation", "ignore_numbers")


def normalize(text: str, regexes: list[str], case: bool, punctuation: bool, numbers: bool) -> str:
    """Character by character, as the metric is defined."""
    for regex in regexes:
        text = "".join(re.split(regex, text))
    dropped = set(string.punctuation if punctuation else "") | set(string.digits if numbers else "")
    return "".join(character for character in (text.lower() if case else text) if character not in dropped)


@given(texts, st.lists(st.sampled_from([",", r"\$", "(?s).*#### "])), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_the_share_of_equal_texts(pairs: list[tuple[str, str]], regexes: list[str], flags: tuple[bool, bool, bool]) -> None:
    predictions, references = zip(*pairs, strict=True)
    options: dict[str, Any] = dict(zip(OPTIONS, flags, strict=True))
    equal = [normalize(a, regexes, *flags) == normalize(b, regexes, *flags) for a, b in pairs]
    found = exact_match.compute(predictions, references, regexes, **options)
    assert found == {"exact_match": sum(equal) / len(equal)}


@pytest.mark.parametrize("name", ["bleu", "../exact_match", "someone/metric"])
def test_no_other_metric_is_loaded(name: str) -> None:
    assert exact_match.load("exact_match").compute(["a"], ["a"]) == {"exact_match": 1.0}
    with pytest.raises(StageError) as raised:
        exact_match.load(name, module_type="metric")
    assert_message(str(raised.value), repr(name), "make env")


@pytest.mark.parametrize("name", ["gsm8k/gsm8k.py", "exact_match/other.py", "hellaswag/deep/down.so", "exact_match.py"])
def test_code_among_the_data_sets_is_refused(tmp_path: Path, name: str) -> None:
    harness_sets.write_exact_match(tmp_path)
    harness_sets.refuse_code(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("open('ran', 'w')")
    with pytest.raises(StageError) as raised:
        harness_sets.refuse_code(tmp_path)
    assert_message(str(raised.value), name, "remove it")

"""The rules of every table's values: a wrong value is named when it is written as when it is read."""

import copy
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts import rules, schemas, tables
from stages.engines import ranking
from stages.method import sppo
from stages.runtime.errors import StageError
from support import tables as examples
from support.messages import assert_message

NAN = math.nan
ID = schemas.prompt_id(examples.PROMPTS[0])

WRONG: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("prompts", {"prompt_id": ID, "prompt": examples.PROMPTS[0]}, "prompt_id", f"'{ID}'", "duplicate"),
    ("prompts", {"prompt": " \n"}, "prompt_id", "'{id}'", "SHA-256"),
    ("prompts", {"prompt": " \n", "prompt_id": schemas.prompt_id(" \n")}, "prompt", r"' \n'", "blank"),
    ("split", {"prompt": "Which?"}, "prompt_id", "'{id}'", "SHA-256"),
    ("responses", {"prompt": "Which?"}, "prompt_id", "'{id}'", "SHA-256"),
    ("responses", {"prompt_token_ids": []}, "prompt_token_ids", "[]", "no tokens"),
    ("responses", {"prompt_token_ids": [1, -1]}, "prompt_token_ids", "-1", "token ID"),
    ("responses", {"prompt_token_ids": [1, None]}, "prompt_token_ids", "None", "missing"),
    ("responses", {"responses": ["x"] * 2}, "responses", "['x', 'x']", "expected 3"),
    ("responses", {"responses": ["x", None, "y"]}, "responses", "None", "missing"),
    ("responses", {"token_ids": [[2], None, [2]]}, "token_ids", "None", "missing"),
    ("responses", {"token_ids": [[2], [None], [2]]}, "token_ids", "None", "missing"),
    ("responses", {"token_ids": [[2]] * 4}, "token_ids", "[[2], [2], [2], [2]]", "'responses' (expected 3)"),
    ("responses", {"token_ids": [[2], [], [2]], "token_counts": [1, 0, 1]}, "token_ids", "[]", "no tokens"),
    ("responses", {"token_ids": [[2], [7, -7, 2], [2]]}, "token_ids", "-7", "token ID"),
    ("responses", {"token_counts": [1, 3]}, "token_counts", "[1, 3]", "'responses' (expected 3)"),
    ("responses", {"token_counts": [1, 3, 4]}, "token_counts", "4", "'token_ids'"),
    ("responses", {"finish_reasons": ["stop"]}, "finish_reasons", "['stop']", "'responses' (expected 3)"),
    ("responses", {"finish_reasons": ["stop", "abort", "stop"]}, "finish_reasons", "'abort'", "'stop'"),
    ("responses", {"seeds": [5]}, "seeds", "[5]", "'responses' (expected 3)"),
    ("responses", {"seeds": [100, -1, 102]}, "seeds", "-1", "negative"),
    ("responses", {"seeds": [100, 1, 102]}, "seeds", "1", "duplicate"),
    ("rankings", {"logits": [[0.0, 1.0], [1.0, 0.0]]}, "logits", "[[0.0, 1.0], [1.0, 0.0]]", "3 x 3"),
    ("rankings", {"logits": [[0.0] * 3, [0.0] * 2, [0.0] * 4]}, "logits", "[0.0, 0.0]", "3 logits"),
    ("rankings", {"logits": [[0.0, NAN, 0.0], *[[0.0] * 3] * 2]}, "logits", "nan", "not finite"),
    ("rankings", {"logits": [*[[0.0] * 3] * 2, [0.0, 0.0, 2.0]]}, "logits", "2.0", "against itself"),
    ("rankings", {"probabilities": [0.5]}, "probabilities", "[0.5]", "fewer than two"),
    ("rankings", {"probabilities": [0.5, 0.5]}, "probabilities", "[0.5, 0.5]", "expected 3"),
    ("rankings", {"probabilities": [0.0, 0.4, 1.1]}, "probabilities", "1.1", "[0, 1]"),
    ("rankings", {"probabilities": [NAN, 0.5, 1.0]}, "probabilities", "nan", "[0, 1]"),
    ("rankings", {"probabilities": [0.5, 0.5, 0.75]}, "probabilities", "[0.5, 0.5, 0.75]", "mean is not 0.5"),
    ("rankings", {"chosen": 3}, "chosen", "3", "3 responses"),
    ("rankings", {"rejected": -1}, "rejected", "-1", "3 responses"),
    ("rankings", {"tie": True}, "tie", "True", "chosen == rejected"),
    ("rankings", {"rejected": 2}, "tie", "False", "chosen == rejected"),
    ("rankings", {"chosen": 0, "rejected": 2}, "chosen", "0", "highest logits"),
    ("rankings", {"rejected": 1}, "rejected", "1", "lowest logits"),
    ("rankings", {"responses_truncated": 4}, "responses_truncated", "4", "0 and 3"),
    ("rankings", {"responses_truncated": -1}, "responses_truncated", "-1", "0 and 3"),
    ("pairs", {"prompt_id": ID}, "prompt_id", f"'{ID}'", "duplicate"),
    ("pairs", {"prompt_token_ids": []}, "prompt_token_ids", "[]", "no tokens"),
    ("pairs", {"chosen_token_ids": []}, "chosen_token_ids", "[]", "no tokens"),
    ("pairs", {"rejected_token_ids": [-100]}, "rejected_token_ids", "-100", "token ID"),
    ("pairs", {"chosen_probability": 1.5}, "chosen_probability", "1.5", "[0, 1]"),
    ("pairs", {"rejected_probability": NAN}, "rejected_probability", "nan", "[0, 1]"),
    ("pairs", {"chosen_reference_logps": 0.5}, "chosen_reference_logps", "0.5", "log-probability"),
    ("pairs", {"chosen_reference_logps": NAN}, "chosen_reference_logps", "nan", "log-probability"),
    ("pairs", {"rejected_reference_logps": -math.inf}, "rejected_reference_logps", "-inf", "log-probability"),
    ("pairs", {"prompt_tokens_cut": -1}, "prompt_tokens_cut", "-1", "negative"),
    ("pairs", {"chosen_tokens_cut": -1}, "chosen_tokens_cut", "-1", "negative"),
    ("pairs", {"rejected_tokens_cut": -2}, "rejected_tokens_cut", "-2", "negative"),
]
"""A table, a change to its second row, and the column, the value and the problem that are then named."""


@pytest.mark.parametrize("name", examples.VALID)
def test_a_valid_table_is_written_and_read(name: str, tmp_path: Path) -> None:
    schema, rows = examples.VALID[name]
    tables.write(rows, schema, tmp_path / "x.parquet")
    assert tables.read(tmp_path / "x.parquet", schema).to_pylist() == [{key: row[key] for key in schema.names} for row in rows]


@pytest.mark.parametrize(
    ("name", "change", "column", "value", "problem"), WRONG, ids=[f"{name}-{next(iter(change))}" for name, change, *_ in WRONG]
)
def test_a_wrong_value_is_named_on_write_and_on_read(
    name: str, change: dict[str, Any], column: str, value: str, problem: str, tmp_path: Path
) -> None:
    schema, rows = copy.deepcopy(examples.VALID[name])
    value = value.replace("{id}", rows[1]["prompt_id"])
    named = (f" {value}: ", problem)
    rows[1] |= change
    path = tmp_path / "x.parquet"
    with pytest.raises(StageError) as error:
        tables.write(rows, schema, path)
    assert_message(str(error.value), f"{path}: not written: row 1: {column!r} ", *named, "`make verify`")
    assert not path.exists()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    with pytest.raises(StageError) as error:
        tables.read(path, schema)
    assert_message(str(error.value), f"{path}: row 1: {column!r} ", *named, "recreate the file")


@pytest.mark.parametrize("name", examples.VALID)
def test_every_cell_must_have_a_value(name: str) -> None:
    schema, rows = examples.VALID[name]
    for column in set(schema.names) - {"iteration"}:
        table = pa.Table.from_pylist([rows[0], rows[1] | {column: None}], schema=schema)
        assert_message(rules.find_fault(table, schema) or "", "row 1", repr(column), "None", "missing")


def test_the_row_is_right_across_chunks_and_in_slices() -> None:
    rows = examples.responses()
    third = rows[1] | {"prompt": "Why?", "prompt_id": schemas.prompt_id("Why?"), "seeds": [7, 8, 9], "token_counts": [1, 3, 5]}
    table = pa.concat_tables(pa.Table.from_pylist([row], schema=schemas.RESPONSES) for row in [*rows, third])
    assert table["token_ids"].num_chunks == 3
    for row, part in ((2, table), (1, table.slice(1)), (1, table.combine_chunks().slice(1))):
        assert_message(rules.find_fault(part, schemas.RESPONSES) or "", f"row {row}: 'token_counts'", "5", "'token_ids'")
    assert rules.find_fault(table.slice(0, 2), schemas.RESPONSES) is None


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_every_prompt_has_the_same_positive_number_of_responses(samples: int) -> None:
    rows = examples.responses(samples)
    assert rules.find_fault(pa.Table.from_pylist(rows, schema=schemas.RESPONSES), schemas.RESPONSES) is None
    assert rules.find_fault(pa.Table.from_pylist(rows[:1], schema=schemas.RESPONSES), schemas.RESPONSES) is None
    empty: dict[str, list[Any]] = {name: [] for name in ("responses", "token_ids", "token_counts", "finish_reasons", "seeds")}
    none = pa.Table.from_pylist([row | empty for row in rows], schema=schemas.RESPONSES)
    assert_message(rules.find_fault(none, schemas.RESPONSES) or "", "row 0: 'responses'", "[]", "no responses")


def rank(logits: torch.Tensor, texts: list[str], probability: str) -> dict[str, Any]:
    row = ranking.rank_row("an id", logits, texts, probability, 0.5)
    return row | {"prompt_truncated": False, "responses_truncated": 0}


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_ranking_by_the_method_is_valid(data: st.DataObject) -> None:
    """Whatever the logits, by either definition of P^, with identical responses among them."""
    count = data.draw(st.sampled_from([2, 3, 5, 8]))
    values = st.sampled_from([0.0, 1.0, -1.0, 30.0, -30.0, 1e-6]) | st.floats(-100, 100, width=32)
    flat = data.draw(st.lists(values, min_size=count**2, max_size=count**2))
    logits = torch.tensor(flat).view(count, count).fill_diagonal_(0)
    texts = data.draw(st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=count, max_size=count))
    first = [texts.index(text) for text in texts]  # in rank, identical texts have the same logits, and 0 between them
    row = rank(logits[first][:, first], texts, data.draw(st.sampled_from(["pairwise", "aggregate"])))
    assert rules.find_fault(pa.Table.from_pylist([row], schema=schemas.RANKINGS), schemas.RANKINGS) is None


def test_the_chosen_response_may_have_a_lower_probability_than_the_rejected_one() -> None:
    """So the rules compare the mean scores, which selected them, and not P^."""
    scores = torch.tensor([[0, 40, -2, -2], [-40, 0, 10, 10], [2, -10, 0, 0], [2, -10, 0, 0]], dtype=torch.float64)
    logits = (scores / 2).triu()
    row = rank(logits - logits.T, ["a", "b", "c", "d"], "pairwise")
    assert (row["chosen"], row["rejected"]) == (0, 1)
    assert row["probabilities"][0] < row["probabilities"][1]
    assert rules.find_fault(pa.Table.from_pylist([row], schema=schemas.RANKINGS), schemas.RANKINGS) is None
    assert sppo.choose_pair(scores) == (torch.tensor(0), torch.tensor(1))

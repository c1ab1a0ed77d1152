"""What every table must hold, beside its columns and types: a wrong value is named, on write as on read."""

import copy
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tables
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import files, rank, schemas, sppo
from stages.cli import StageError

NAN = math.nan
ID = schemas.prompt_id(tables.PROMPTS[0])
CYCLE = {"logits": [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], "probabilities": [0.5] * 3}
"""Three responses of the same mean score."""

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("prompts", {"prompt_id": ID, "prompt": tables.PROMPTS[0]}, f"'prompt_id' is '{ID}', which is there before"),
    ("prompts", {"prompt": " \n"}, "'prompt_id' is '{id}', which is not the SHA-256 of the prompt"),
    ("prompts", {"prompt": " \n", "prompt_id": schemas.prompt_id(" \n")}, r"'prompt' is ' \n', which is blank"),
    ("part", {"prompt": "Which?"}, "'prompt_id' is '{id}', which is not the SHA-256 of the prompt"),
    ("responses", {"prompt": "Which?"}, "'prompt_id' is '{id}', which is not the SHA-256 of the prompt"),
    ("responses", {"prompt_token_ids": []}, "'prompt_token_ids' is [], which is without a token"),
    ("responses", {"prompt_token_ids": [1, -1]}, "'prompt_token_ids' has -1, which is no token"),
    ("responses", {"prompt_token_ids": [1, None]}, "'prompt_token_ids' has None, which is no value"),
    ("responses", {"responses": ["x"] * 2}, "'responses' is ['x', 'x'], which is not of as many as row 0, 3"),
    ("responses", {"responses": ["x", None, "y"]}, "'responses' has None, which is no value"),
    ("responses", {"token_ids": [[2], None, [2]]}, "'token_ids' has None, which is no value"),
    ("responses", {"token_ids": [[2], [None], [2]]}, "'token_ids' has None, which is no value"),
    ("responses", {"token_ids": [[2]] * 4}, "'token_ids' is [[2], [2], [2], [2]], which is not of as many as the responses"),
    ("responses", {"token_ids": [[2], [], [2]], "token_counts": [1, 0, 1]}, "'token_ids' has [], which is without a token"),
    ("responses", {"token_ids": [[2], [7, -7, 2], [2]]}, "'token_ids' has -7, which is no token"),
    ("responses", {"token_counts": [1, 3]}, "'token_counts' is [1, 3], which is not of as many as the responses"),
    ("responses", {"token_counts": [1, 3, 4]}, "'token_counts' has 4, which is not the number of its token_ids"),
    ("responses", {"finish_reasons": ["stop"]}, "'finish_reasons' is ['stop'], which is not of as many as the responses"),
    ("responses", {"finish_reasons": ["stop", "abort", "stop"]}, "'finish_reasons' has 'abort', which is neither 'stop' nor"),
    ("responses", {"seeds": [5]}, "'seeds' is [5], which is not of as many as the responses"),
    ("responses", {"seeds": [100, -1, 102]}, "'seeds' has -1, which is negative"),
    ("responses", {"seeds": [100, 1, 102]}, "'seeds' has 1, which is there before"),
    ("rankings", {"logits": [[0.0, 1.0], [1.0, 0.0]]}, "'logits' is [[0.0, 1.0], [1.0, 0.0]], which is not 3 x 3"),
    ("rankings", {"logits": [[0.0] * 3, [0.0] * 2, [0.0] * 4]}, "'logits' has [0.0, 0.0], which is not of 3 logits"),
    ("rankings", {"logits": [[0.0, NAN, 0.0], *[[0.0] * 3] * 2]}, "'logits' has nan, which is not finite"),
    ("rankings", {"logits": [*[[0.0] * 3] * 2, [0.0, 0.0, 2.0]]}, "'logits' has 2.0, which is of a response against itself"),
    ("rankings", {"probabilities": [0.5]}, "'probabilities' is [0.5], which is fewer than two"),
    ("rankings", {"probabilities": [0.5, 0.5]}, "'probabilities' is [0.5, 0.5], which is not of as many as row 0, 3"),
    ("rankings", {"probabilities": [0.0, 0.4, 1.1]}, "'probabilities' has 1.1, which is not in [0, 1]"),
    ("rankings", {"probabilities": [NAN, 0.5, 1.0]}, "'probabilities' has nan, which is not in [0, 1]"),
    ("rankings", {"probabilities": [0.5, 0.5, 0.75]}, "'probabilities' is [0.5, 0.5, 0.75], which is not a half in the mean"),
    ("rankings", {"winner": 3}, "'winner' is 3, which is none of the 3 responses"),
    ("rankings", {"loser": -1}, "'loser' is -1, which is none of the 3 responses"),
    ("rankings", {"tie": True}, "'tie' is True, which is not whether winner and loser are one"),
    ("rankings", {"loser": 2}, "'tie' is False, which is not whether winner and loser are one"),
    ("rankings", {"winner": 0, "loser": 2}, "'winner' is 0, which is not the highest by the logits"),
    ("rankings", {"loser": 1}, "'loser' is 1, which is not the lowest by the logits"),
    ("rankings", {"responses_cut": 4}, "'responses_cut' is 4, which is not in 0 to 3"),
    ("rankings", {"responses_cut": -1}, "'responses_cut' is -1, which is not in 0 to 3"),
    ("pairs", {"prompt_id": ID}, f"'prompt_id' is '{ID}', which is there before"),
    ("pairs", {"prompt_token_ids": []}, "'prompt_token_ids' is [], which is without a token"),
    ("pairs", {"chosen_token_ids": []}, "'chosen_token_ids' is [], which is without a token"),
    ("pairs", {"rejected_token_ids": [-100]}, "'rejected_token_ids' has -100, which is no token"),
    ("pairs", {"chosen_probability": 1.5}, "'chosen_probability' is 1.5, which is not in [0, 1]"),
    ("pairs", {"rejected_probability": NAN}, "'rejected_probability' is nan, which is not in [0, 1]"),
    ("pairs", {"chosen_reference_logps": 0.5}, "'chosen_reference_logps' is 0.5, which is no log-probability"),
    ("pairs", {"chosen_reference_logps": NAN}, "'chosen_reference_logps' is nan, which is no log-probability"),
    ("pairs", {"rejected_reference_logps": -math.inf}, "'rejected_reference_logps' is -inf, which is no log-probability"),
    ("pairs", {"prompt_cut": -1}, "'prompt_cut' is -1, which is negative"),
    ("pairs", {"chosen_cut": -1}, "'chosen_cut' is -1, which is negative"),
    ("pairs", {"rejected_cut": -2}, "'rejected_cut' is -2, which is negative"),
]
"""A table, what is changed in its second row, and what is then said of it."""


@pytest.mark.parametrize("name", tables.VALID)
def test_a_right_table_is_written_and_read(name: str, tmp_path: Path) -> None:
    schema, rows = tables.VALID[name]
    files.write_table(rows, schema, tmp_path / "x.parquet")
    assert files.read_table(tmp_path / "x.parquet", schema).to_pylist() == [
        {key: row[key] for key in schema.names} for row in rows
    ]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[f"{name}-{next(iter(row))}" for name, row, _ in WRONG])
def test_a_wrong_value_is_named_on_write_and_on_read(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    schema, rows = copy.deepcopy(tables.VALID[name])
    wanted = message.replace("{id}", rows[1]["prompt_id"])
    rows[1] |= change
    path = tmp_path / "x.parquet"
    with pytest.raises(StageError) as error:
        files.write_table(rows, schema, path)
    assert str(error.value).startswith(f"{path}: not written: row 1: {wanted}")
    assert not path.exists()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    with pytest.raises(StageError) as error:
        files.read_table(path, schema)
    assert str(error.value).startswith(f"{path}: row 1: {wanted}")
    assert str(error.value).endswith(": check the path, or make the file again")


@pytest.mark.parametrize("name", tables.VALID)
def test_every_column_is_needed_in_every_row(name: str) -> None:
    schema, rows = tables.VALID[name]
    for column in set(schema.names) - {"part"}:
        table = pa.Table.from_pylist([rows[0], rows[1] | {column: None}], schema=schema)
        assert schemas.fault(table, schema) == f"row 1: {column!r} is None, which is no value"


def test_a_row_is_found_among_the_parts_of_a_table_and_in_a_slice() -> None:
    rows = tables.responses()
    third = rows[1] | {"prompt": "Why?", "prompt_id": schemas.prompt_id("Why?"), "seeds": [7, 8, 9], "token_counts": [1, 3, 5]}
    table = pa.concat_tables(pa.Table.from_pylist([row], schema=schemas.RESPONSES) for row in [*rows, third])
    wanted = "'token_counts' has 5, which is not the number of its token_ids"
    assert table["token_ids"].num_chunks == 3
    assert schemas.fault(table, schemas.RESPONSES) == f"row 2: {wanted}"
    assert schemas.fault(table.slice(1), schemas.RESPONSES) == f"row 1: {wanted}"
    assert schemas.fault(table.combine_chunks().slice(1), schemas.RESPONSES) == f"row 1: {wanted}"
    assert schemas.fault(table.slice(0, 2), schemas.RESPONSES) is None


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_any_number_of_responses_will_do_but_the_same_to_each_prompt(samples: int) -> None:
    rows = tables.responses(samples)
    assert schemas.fault(pa.Table.from_pylist(rows, schema=schemas.RESPONSES), schemas.RESPONSES) is None
    assert schemas.fault(pa.Table.from_pylist(rows[:1], schema=schemas.RESPONSES), schemas.RESPONSES) is None
    empty: dict[str, list[Any]] = {name: [] for name in ("responses", "token_ids", "token_counts", "finish_reasons", "seeds")}
    none = pa.Table.from_pylist([row | empty for row in rows], schema=schemas.RESPONSES)
    assert schemas.fault(none, schemas.RESPONSES) == "row 0: 'responses' is [], which is no response"


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_ranking_by_the_method_is_right(data: st.DataObject) -> None:
    """Whatever the logits, by either rule, with identical responses among them."""
    count = data.draw(st.sampled_from([2, 3, 5, 8]))
    values = st.sampled_from([0.0, 1.0, -1.0, 30.0, -30.0, 1e-6]) | st.floats(-100, 100, width=32)
    logits = (
        torch.tensor(data.draw(st.lists(values, min_size=count**2, max_size=count**2))).view(count, count).fill_diagonal_(0)
    )
    texts = data.draw(st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=count, max_size=count))
    where = [texts.index(text) for text in texts]  # as rank does: identical texts have the same logits, and 0 between them
    rule = data.draw(st.sampled_from(["pairwise", "aggregate"]))
    row = rank.ranking("an id", logits[where][:, where], texts, rule) | {"prompt_cut": False, "responses_cut": 0}
    assert schemas.fault(pa.Table.from_pylist([row], schema=schemas.RANKINGS), schemas.RANKINGS) is None


def test_by_its_probability_a_winner_may_be_below_its_loser() -> None:
    """So nothing can be asked of their order but by the mean scores that chose them."""
    scores = torch.tensor([[0, 40, -2, -2], [-40, 0, 10, 10], [2, -10, 0, 0], [2, -10, 0, 0]], dtype=torch.float64)
    logits = (scores / 2).triu()
    row = rank.ranking("an id", logits - logits.T, ["a", "b", "c", "d"], "pairwise")
    assert (row["winner"], row["loser"]) == (0, 1)
    assert row["probabilities"][0] < row["probabilities"][1]
    table = pa.Table.from_pylist([row | {"prompt_cut": False, "responses_cut": 0}], schema=schemas.RANKINGS)
    assert schemas.fault(table, schemas.RANKINGS) is None
    assert sppo.choose_pair(scores) == (torch.tensor(0), torch.tensor(1))

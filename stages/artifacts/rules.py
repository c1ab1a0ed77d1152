"""Rules that the values of each schema obey, checked whenever a table is written or read.

Checks work on whole columns: 60,000 prompts with 5 responses each take about a second.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.artifacts import schemas
from stages.runtime.errors import quote


class Check(NamedTuple):
    """One rule applied to one column."""

    column: str
    depth: int
    """How many levels of lists to unwrap to reach the values that the rule applies to."""
    wrong: Any
    """Mask of the values, in order, that break the rule."""
    problem: str
    """What is wrong with such a value."""


def find_fault(table: pa.Table, schema: pa.Schema) -> str | None:
    """Return the first fault (row, column, value, problem) in a table with the schema's columns and types, or None.

    Every schema requires at least one row, a value in every non-nullable cell, and unique prompt_ids.
    """
    if not table.num_rows:
        return "no rows"
    for checks in (_check_missing(table, schema), _check_duplicate_ids(table), RULES[schema](table)):
        for check in checks:
            wrong = check.wrong if isinstance(check.wrong, pa.ChunkedArray) else pa.array(check.wrong, pa.bool_())
            index = pc.index(wrong, True).as_py()
            if index >= 0:
                return _describe(table, check, index)
    return None


def _describe(table: pa.Table, check: Check, index: int) -> str:
    """Describe the value at `index` among the values of the check's column and depth."""
    levels = [table[check.column]]
    for _ in range(check.depth):
        levels.append(pc.list_flatten(levels[-1]))
    value = quote(levels[-1][index].as_py())
    for level in levels[-2::-1]:
        index = int(np.searchsorted(np.cumsum(pc.list_value_length(level)), index, side="right"))
    return f"row {index}: {check.column!r} {'contains' if check.depth else 'is'} {value}: {check.problem}"


def _check_missing(table: pa.Table, schema: pa.Schema) -> Iterator[Check]:
    for field in schema:
        values, depth = table[field.name], 0
        while values is not None:
            if values.null_count and (depth or not field.nullable):
                yield Check(field.name, depth, pc.is_null(values), "missing value")
            values, depth = pc.list_flatten(values) if pa.types.is_list(values.type) else None, depth + 1


def _check_duplicate_ids(table: pa.Table) -> Iterator[Check]:
    yield Check("prompt_id", 0, _find_repeated(table["prompt_id"].combine_chunks().dictionary_encode().indices), "duplicate")


def _find_repeated(values: Any) -> npt.NDArray[np.bool_]:
    """Return a mask of the values that occur earlier among the values."""
    repeated = np.ones(len(values), bool)
    repeated[np.unique(values, return_index=True)[1]] = False
    return repeated


def _check_ids(table: pa.Table) -> Iterator[Check]:
    pairs = zip(table["prompt_id"].to_pylist(), table["prompt"].to_pylist(), strict=True)
    wrong = [prompt_id != schemas.prompt_id(prompt) for prompt_id, prompt in pairs]
    yield Check("prompt_id", 0, wrong, "not the SHA-256 of the prompt")


def _check_prompts(table: pa.Table) -> Iterator[Check]:
    yield from _check_ids(table)
    yield Check("prompt", 0, [not prompt.strip() for prompt in table["prompt"].to_pylist()], "blank")


def _check_tokens(table: pa.Table, column: str, depth: int = 0) -> Iterator[Check]:
    """Check lists of token IDs at `depth`: none is empty, and no ID is negative."""
    lists = table[column]
    for _ in range(depth):
        lists = pc.list_flatten(lists)
    yield Check(column, depth, pc.equal(pc.list_value_length(lists), 0), "no tokens")
    tokens = pc.list_flatten(lists)
    zero = pa.scalar(0, tokens.type)  # a Python 0 would convert every token to int64
    yield Check(column, depth + 1, pc.less(tokens, zero), "not a valid token ID")


def _check_responses(table: pa.Table) -> Iterator[Check]:
    yield from _check_ids(table)
    yield from _check_tokens(table, "prompt_token_ids")
    samples = pc.list_value_length(table["responses"])
    yield Check("responses", 0, pc.equal(samples, 0), "no responses")
    yield Check("responses", 0, pc.not_equal(samples, samples[0]), f"length differs from row 0 (expected {samples[0]})")
    for column in ("token_ids", "token_counts", "finish_reasons", "seeds"):
        different = pc.not_equal(pc.list_value_length(table[column]), samples)
        yield Check(column, 0, different, f"length does not match 'responses' (expected {samples[0]})")
    yield from _check_tokens(table, "token_ids", 1)
    lengths = pc.list_value_length(pc.list_flatten(table["token_ids"]))
    different = pc.not_equal(pc.list_flatten(table["token_counts"]), lengths)
    yield Check("token_counts", 1, different, "not the length of its 'token_ids'")
    known = pc.is_in(pc.list_flatten(table["finish_reasons"]), pa.array(["stop", "length"]))
    yield Check("finish_reasons", 1, pc.invert(known), "neither 'stop' nor 'length'")
    seeds = pc.list_flatten(table["seeds"])
    yield Check("seeds", 1, pc.less(seeds, 0), "negative")
    yield Check("seeds", 1, _find_repeated(seeds), "duplicate")


def _check_rankings(table: pa.Table) -> Iterator[Check]:
    """Check constraints that hold for any logits; P^ is not recomputed, because only method/sppo.py implements it."""
    samples = pc.list_value_length(table["probabilities"])
    count = samples[0].as_py()
    yield Check("probabilities", 0, pc.less(samples, 2), "fewer than two")
    yield Check("probabilities", 0, pc.not_equal(samples, count), f"length differs from row 0 (expected {count})")
    yield from _check_logits(table, count)
    yield from _check_win_probabilities(table, count)
    yield from _check_choices(table, count)
    truncated = table["responses_truncated"].to_numpy()
    yield Check("responses_truncated", 0, (truncated < 0) | (truncated > count), f"not between 0 and {count}")


def _check_logits(table: pa.Table, count: int) -> Iterator[Check]:
    """Check that each row's logits are count x count, finite, and 0 on the diagonal."""
    wrong = pc.not_equal(pc.list_value_length(table["logits"]), count)
    yield Check("logits", 0, wrong, f"not a {count} x {count} matrix")
    rows = pc.list_flatten(table["logits"])
    yield Check("logits", 1, pc.not_equal(pc.list_value_length(rows), count), f"not a row of {count} logits")
    logits = _stack_logits(table, count)
    yield Check("logits", 2, ~np.isfinite(logits).ravel(), "not finite")
    diagonal = np.eye(count, dtype=bool)
    yield Check("logits", 2, ((logits != 0) & diagonal).ravel(), "a response's logit against itself must be 0")


def _stack_logits(table: pa.Table, count: int) -> npt.NDArray[np.float64]:
    """Convert the column `logits`, whose rows are all count x count, to an array of shape (rows, count, count)."""
    flat = pc.list_flatten(pc.list_flatten(table["logits"])).to_numpy().astype(float)
    stacked: npt.NDArray[np.float64] = flat.reshape(-1, count, count)
    return stacked


def _check_win_probabilities(table: pa.Table, count: int) -> Iterator[Check]:
    probabilities = pc.list_flatten(table["probabilities"]).to_numpy()
    yield Check("probabilities", 1, ~_in_unit_interval(probabilities), "not in [0, 1]")
    sums = probabilities.reshape(-1, count).sum(1)  # P(i > j) + P(j > i) = 1, and k = i counts 1/2
    yield Check("probabilities", 0, np.abs(sums - count / 2) > 1e-6, "mean is not 0.5 (P(i > j) + P(j > i) must be 1)")


def _in_unit_interval(values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return a mask of the values in [0, 1]; False for NaN."""
    inside: npt.NDArray[np.bool_] = (values >= 0) & (values <= 1)
    return inside


def _check_choices(table: pa.Table, count: int) -> Iterator[Check]:
    """Check that chosen and rejected are the responses with the highest and the lowest mean score, and equal if tie."""
    chosen, rejected = table["chosen"].to_numpy(), table["rejected"].to_numpy()
    for column, index in (("chosen", chosen), ("rejected", rejected)):
        yield Check(column, 0, (index < 0) | (index >= count), f"not the index of one of {count} responses")
    tie = table["tie"].to_numpy()
    yield Check("tie", 0, tie != (chosen == rejected), "does not match chosen == rejected")
    # When the ranker's preferences are cyclic (intransitive), P^ of the chosen response may be below that of the rejected one.
    # The mean scores, by which they were selected, are always in order.
    logits = _stack_logits(table, count)
    margin, rows = logits.sum(2) - logits.sum(1), np.arange(len(logits))
    rounding = 1e-9 * (1 + np.abs(logits).sum((1, 2)))
    too_low = ~tie & (margin[rows, chosen] < margin.max(1) - rounding)
    yield Check("chosen", 0, too_low, "not the response with the highest logits")
    too_high = ~tie & (margin[rows, rejected] > margin.min(1) + rounding)
    yield Check("rejected", 0, too_high, "not the response with the lowest logits")


def _check_logps(table: pa.Table) -> Iterator[Check]:
    for column in schemas.REFERENCE_LOGPS:
        logps = table[column].to_numpy()  # 0 is valid: in float32, a probability very close to 1 is 1
        yield Check(column, 0, ~((logps <= 0) & np.isfinite(logps)), "not a valid log-probability")


def _check_pairs(table: pa.Table) -> Iterator[Check]:
    yield from _check_logps(table)
    yield from _check_unscored_pairs(table)


def _check_unscored_pairs(table: pa.Table) -> Iterator[Check]:
    for column in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"):
        yield from _check_tokens(table, column)
    for column in ("chosen_probability", "rejected_probability"):
        yield Check(column, 0, ~_in_unit_interval(table[column].to_numpy()), "not in [0, 1]")
    for column in ("prompt_tokens_cut", "chosen_tokens_cut", "rejected_tokens_cut"):
        yield Check(column, 0, pc.less(table[column], 0), "negative")


RULES: dict[pa.Schema, Callable[[pa.Table], Iterator[Check]]] = {
    schemas.PROMPTS: _check_prompts,
    schemas.SPLIT: _check_prompts,
    schemas.RESPONSES: _check_responses,
    schemas.RANKINGS: _check_rankings,
    schemas.PAIRS: _check_pairs,
    schemas.UNSCORED_PAIRS: _check_unscored_pairs,
    schemas.LOGPS: _check_logps,
}
"""The rules of each schema, in addition to those that apply to every schema."""

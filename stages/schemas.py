"""What is in the files between the stages: columns, types and meaning, and for Parquet the rules of the values."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages import files
from stages.cli import shown

_text, _ids = pa.string(), pa.list_(pa.int32())


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name == "part") for name, kind in columns.items()])


PROMPTS = _schema(prompt_id=_text, prompt=_text, part=_text)
"""assets -> split. prompt_id: SHA-256 of the prompt, each once; part: the iteration a source gives it to, or null."""

PART = _schema(prompt_id=_text, prompt=_text)
"""split -> generate: the prompts of one iteration, or the hold-out."""

RESPONSES = _schema(
    prompt_id=_text,
    prompt=_text,
    templated_prompt=_text,
    prompt_token_ids=_ids,
    responses=pa.list_(_text),
    token_ids=pa.list_(_ids),
    token_counts=_ids,
    finish_reasons=pa.list_(_text),
    seeds=pa.list_(pa.int64()),
)
"""generate -> rank, reference. One row per prompt, lists of K; templated_prompt: the text that prompt_token_ids are of;
token_ids are the sampled ones, the end token included where finish_reason is `stop`, absent where it is `length`. A text may
be empty, its tokens are not: vLLM samples the end token at least."""

RANKINGS = _schema(
    prompt_id=_text,
    logits=pa.list_(pa.list_(pa.float32())),
    probabilities=pa.list_(pa.float64()),
    winner=pa.int32(),
    loser=pa.int32(),
    tie=pa.bool_(),
    prompt_cut=pa.bool_(),
    responses_cut=pa.int32(),
)
"""rank -> reference. One row per prompt in the order of the responses; logits: K x K, left response by row; probabilities:
P^ of each response; winner and loser: indices into the K responses, equal where tie; what was too long for the ranker, which
read its beginning only: prompt_cut, and how many responses_cut."""

PAIRS = _schema(
    prompt_id=_text,
    prompt_token_ids=_ids,
    chosen_token_ids=_ids,
    rejected_token_ids=_ids,
    chosen_probability=pa.float64(),
    rejected_probability=pa.float64(),
    chosen_reference_logps=pa.float32(),
    rejected_reference_logps=pa.float32(),
    prompt_cut=pa.int32(),
    chosen_cut=pa.int32(),
    rejected_cut=pa.int32(),
)
"""reference -> train: the tokens that are trained on, P^ and the summed log-probability under the reference pi_t; how many
tokens of prompt and responses were cut to fit."""

_logps_names = ["chosen_reference_logps", "rejected_reference_logps"]
CHOSEN = pa.schema([field for field in PAIRS if field.name not in _logps_names])
LOGPS = pa.schema([PAIRS.field(name) for name in ("prompt_id", *_logps_names)])
"""In reference's scratch: PAIRS before the reference has scored them, and a finished part of its scores."""

LOG_COLUMNS = [
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "clipped",
    "chosen_log_ratio",
    "rejected_log_ratio",
    "kl",
]
"""train -> report, the CSV of data/logs, a row a step: means over the step's global batch, log-ratios r = log pi_theta/pi_t in
nats; gradient norm before clipping, clipped: 1 where it was above train.max_grad_norm; kl: the mean of r^2 / 2 over winners
and losers, which estimates KL(pi_t || pi_theta) to second order, though of K samples from pi_t only the best and the worst
enter."""

ARTIFACTS = {
    "data/prompts.parquet": PROMPTS,
    "data/split/*.parquet": PART,
    "data/responses/*.parquet, data/hold_out/*.parquet": RESPONSES,
    "data/rankings/*.parquet": RANKINGS,
    "data/pairs/*.parquet": PAIRS,
}
"""Files by their names in the folder of dvc.yaml, and their schemas."""

DISJOINT = "data/split/*.parquet"
"""Of these files no two hold the same prompt."""

Rule = tuple[str, int, Any, str]
"""A column, how many lists deep its values are meant, a mask of those that are wrong, and what they then are."""


def prompt_id(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def fault(table: pa.Table, schema: pa.Schema) -> str | None:
    """The first wrong value in a table of a schema's columns and types: row, column, value and what is wrong, or None.

    The checks are of whole columns: 60,000 prompts of 5 responses take about a second.
    """
    if not table.num_rows:
        return "no rows"
    for rules in (_missing, _repeated_ids, RULES[schema]):
        for name, depth, wrong, what in rules(table):
            index = pc.index(wrong if isinstance(wrong, pa.ChunkedArray) else pa.array(wrong, pa.bool_()), True).as_py()
            if index >= 0:
                levels = [table[name]]
                for _ in range(depth):
                    levels.append(pc.list_flatten(levels[-1]))
                value = shown(levels[-1][index].as_py())
                for level in levels[-2::-1]:
                    index = int(np.searchsorted(np.cumsum(pc.list_value_length(level)), index, side="right"))
                return f"row {index}: {name!r} {'has' if depth else 'is'} {value}, which is {what}"
    return None


def _missing(table: pa.Table) -> Iterator[Rule]:
    for field in table.schema:
        values, depth = table[field.name], 0
        while values is not None:
            if values.null_count and (depth or field.name != "part"):
                yield field.name, depth, pc.is_null(values), "no value"
            values, depth = pc.list_flatten(values) if pa.types.is_list(values.type) else None, depth + 1


def _repeated_ids(table: pa.Table) -> Iterator[Rule]:
    yield "prompt_id", 0, _repeated(table["prompt_id"].combine_chunks().dictionary_encode().indices), "there before"


def _repeated(values: Any) -> Any:
    """Mask of the values that are there before."""
    wrong = np.ones(len(values), bool)
    wrong[np.unique(values, return_index=True)[1]] = False
    return wrong


def _hashes(table: pa.Table) -> Iterator[Rule]:
    pairs = zip(table["prompt_id"].to_pylist(), table["prompt"].to_pylist(), strict=True)
    yield "prompt_id", 0, [one != prompt_id(prompt) for one, prompt in pairs], "not the SHA-256 of the prompt"


def _prompts(table: pa.Table) -> Iterator[Rule]:
    yield from _hashes(table)
    yield "prompt", 0, [not prompt.strip() for prompt in table["prompt"].to_pylist()], "blank"


def _tokens(table: pa.Table, name: str, depth: int = 0) -> Iterator[Rule]:
    """Of lists of token ids, so many lists deep: none is empty, and no id negative."""
    values = table[name]
    for _ in range(depth):
        values = pc.list_flatten(values)
    yield name, depth, pc.equal(pc.list_value_length(values), 0), "without a token"
    tokens = pc.list_flatten(values)
    yield name, depth + 1, pc.less(tokens, pa.scalar(0, tokens.type)), "no token"  # a plain 0 makes an int64 of every token


def _responses(table: pa.Table) -> Iterator[Rule]:
    yield from _hashes(table)
    yield from _tokens(table, "prompt_token_ids")
    samples = pc.list_value_length(table["responses"])
    yield "responses", 0, pc.equal(samples, 0), "no response"
    yield "responses", 0, pc.not_equal(samples, samples[0]), f"not of as many as row 0, {samples[0]}"
    for name in ("token_ids", "token_counts", "finish_reasons", "seeds"):
        yield name, 0, pc.not_equal(pc.list_value_length(table[name]), samples), "not of as many as the responses"
    yield from _tokens(table, "token_ids", 1)
    counts = pc.list_value_length(pc.list_flatten(table["token_ids"]))
    yield "token_counts", 1, pc.not_equal(pc.list_flatten(table["token_counts"]), counts), "not the number of its token_ids"
    reasons = pc.is_in(pc.list_flatten(table["finish_reasons"]), pa.array(["stop", "length"]))
    yield "finish_reasons", 1, pc.invert(reasons), "neither 'stop' nor 'length'"
    seeds = pc.list_flatten(table["seeds"])
    yield "seeds", 1, pc.less(seeds, 0), "negative"
    yield "seeds", 1, _repeated(seeds), "there before"


def _rankings(table: pa.Table) -> Iterator[Rule]:
    """P^ follows from the logits by stages/sppo.py alone; what every such rule has in common is checked."""
    samples = pc.list_value_length(table["probabilities"])
    count = samples[0].as_py()
    yield "probabilities", 0, pc.less(samples, 2), "fewer than two"
    yield "probabilities", 0, pc.not_equal(samples, count), f"not of as many as row 0, {count}"
    yield "logits", 0, pc.not_equal(pc.list_value_length(table["logits"]), count), f"not {count} x {count}"
    left = pc.list_flatten(table["logits"])
    yield "logits", 1, pc.not_equal(pc.list_value_length(left), count), f"not of {count} logits"
    flat = pc.list_flatten(left).to_numpy().astype(float)
    yield "logits", 2, ~np.isfinite(flat), "not finite"
    logits = flat.reshape(-1, count, count)
    yield "logits", 2, ((logits != 0) & np.eye(count, dtype=bool)).ravel(), "of a response against itself, and not 0"
    probabilities = pc.list_flatten(table["probabilities"]).to_numpy()
    yield "probabilities", 1, ~((probabilities >= 0) & (probabilities <= 1)), "not in [0, 1]"
    sums = probabilities.reshape(-1, count).sum(1)  # P(i > j) + P(j > i) = 1, and k = i counts 1/2
    yield "probabilities", 0, np.abs(sums - count / 2) > 1e-6, "not a half in the mean, as P(i > j) + P(j > i) = 1 has it"
    winner, loser = table["winner"].to_numpy(), table["loser"].to_numpy()
    for name, index in (("winner", winner), ("loser", loser)):
        yield name, 0, (index < 0) | (index >= count), f"none of the {count} responses"
    tie = table["tie"].to_numpy()
    yield "tie", 0, tie != (winner == loser), "not whether winner and loser are one"
    # By P^ a winner may be below its loser, where the ranker runs in circles; by the mean score, which chose them, never.
    margin, rows = logits.sum(2) - logits.sum(1), np.arange(len(logits))
    rounding = 1e-9 * (1 + np.abs(logits).sum((1, 2)))
    yield "winner", 0, ~tie & (margin[rows, winner] < margin.max(1) - rounding), "not the highest by the logits"
    yield "loser", 0, ~tie & (margin[rows, loser] > margin.min(1) + rounding), "not the lowest by the logits"
    cut = table["responses_cut"].to_numpy()
    yield "responses_cut", 0, (cut < 0) | (cut > count), f"not in 0 to {count}"


def _logps(table: pa.Table) -> Iterator[Rule]:
    for name in _logps_names:
        logps = table[name].to_numpy()  # 0 where float32 has no probability between this one and 1
        yield name, 0, ~((logps <= 0) & np.isfinite(logps)), "no log-probability"


def _pairs(table: pa.Table) -> Iterator[Rule]:
    yield from _logps(table)
    yield from _chosen(table)


def _chosen(table: pa.Table) -> Iterator[Rule]:
    for name in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"):
        yield from _tokens(table, name)
    for side in ("chosen", "rejected"):
        probability = table[f"{side}_probability"].to_numpy()
        yield f"{side}_probability", 0, ~((probability >= 0) & (probability <= 1)), "not in [0, 1]"
    for name in ("prompt_cut", "chosen_cut", "rejected_cut"):
        yield name, 0, pc.less(table[name], 0), "negative"


RULES: dict[pa.Schema, Callable[[pa.Table], Iterator[Rule]]] = {
    PROMPTS: _prompts,
    PART: _prompts,
    RESPONSES: _responses,
    RANKINGS: _rankings,
    PAIRS: _pairs,
    CHOSEN: _chosen,
    LOGPS: _logps,
}
"""What holds for a schema's values, beside that none is missing and every prompt_id is there once."""

files.faults |= {schema: partial(fault, schema=schema) for schema in RULES}

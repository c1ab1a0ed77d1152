"""Columns, types and meaning of the tables and training logs that stages exchange. The rules of their values: rules.py."""

import hashlib
from collections.abc import Iterable

import pyarrow as pa

from stages.runtime.params import BASE

_text, _ids = pa.string(), pa.list_(pa.int32())


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name == "iteration") for name, kind in columns.items()])


PROMPTS = _schema(prompt_id=_text, prompt=_text, iteration=_text)
"""assets-prompts -> split. prompt_id: SHA-256 of the prompt, unique; iteration: the iteration that the source assigns the
prompt to, or null."""

SPLIT = _schema(prompt_id=_text, prompt=_text)
"""split -> generate, answer: the prompts of one iteration, or the hold-out."""

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
"""generate -> rank, reference; answer -> compare. One row per prompt, with lists of K samples. templated_prompt: the prompt in
the chat template, whose tokens are prompt_token_ids. token_ids: the sampled tokens, including the end token if finish_reason is
`stop` but not if it is `length`. A response's text may be empty but its tokens may not: vLLM samples at least the end token."""

RANKINGS = _schema(
    prompt_id=_text,
    logits=pa.list_(pa.list_(pa.float32())),
    probabilities=pa.list_(pa.float64()),
    chosen=pa.int32(),
    rejected=pa.int32(),
    tie=pa.bool_(),
    prompt_truncated=pa.bool_(),
    responses_truncated=pa.int32(),
)
"""rank -> reference. One row per prompt, in the order of the responses. logits: K x K, row i compares response i with each
of the others; probabilities: P^ of each response; chosen, rejected: indices into the K responses, equal if tie.
prompt_truncated, responses_truncated: whether the prompt, and how many of the responses, exceeded the ranker's length
limit, so that it read only their beginning."""

PAIRS = _schema(
    prompt_id=_text,
    prompt_token_ids=_ids,
    chosen_token_ids=_ids,
    rejected_token_ids=_ids,
    chosen_probability=pa.float64(),
    rejected_probability=pa.float64(),
    chosen_reference_logps=pa.float32(),
    rejected_reference_logps=pa.float32(),
    prompt_tokens_cut=pa.int32(),
    chosen_tokens_cut=pa.int32(),
    rejected_tokens_cut=pa.int32(),
)
"""reference -> train. The tokens to train on, P^, and the summed log-probabilities, in nats, under the reference pi_t;
*_tokens_cut: how many tokens were removed to fit the maximum lengths."""

REFERENCE_LOGPS = ["chosen_reference_logps", "rejected_reference_logps"]
UNSCORED_PAIRS = pa.schema([field for field in PAIRS if field.name not in REFERENCE_LOGPS])
"""In reference's scratch folder: PAIRS before the reference has scored them."""
LOGPS = pa.schema([PAIRS.field(name) for name in ("prompt_id", *REFERENCE_LOGPS)])
"""In reference's scratch folder: the scores of one shard of UNSCORED_PAIRS."""

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
"""train -> report: the columns of the CSV in data/logs, one row per step. Means over the step's global batch; log-ratios
r = log(pi_theta / pi_t) in nats; gradient_norm before clipping; clipped: 1 if it exceeded train.max_grad_norm, else 0; kl: the
mean of r^2 / 2 over chosen and rejected responses, which estimates KL(pi_t || pi_theta) to second order, although it
includes only the best and the worst of K samples from pi_t."""

UPDATE_KEYS = ["steps", "effective_steps", "weights", "changed", "survived"]
"""train -> report: the keys of the JSON object in data/logs, which describes a training run as a whole. steps: number of
optimizer steps; effective_steps: number of steps with a learning rate above 0; weights: number of weights in the checkpoint;
changed: the share of weights that differ from the starting policy's after both are rounded to the checkpoint's precision;
survived: the share of the update, by projection onto it, that survives this rounding; see stages/engines/updates.py."""

ARTIFACTS = {
    "data/prompts.parquet": PROMPTS,
    "data/split/*.parquet": SPLIT,
    "data/responses/*.parquet, data/hold_out/*.parquet": RESPONSES,
    "data/rankings/*.parquet": RANKINGS,
    "data/pairs/*.parquet": PAIRS,
}
"""Files -> their schema. Files: glob patterns relative to the folder of dvc.yaml, separated by commas."""

DISJOINT = "data/split/*.parquet"
"""No two of these files contain the same prompt."""


def prompt_id(prompt: str) -> str:
    """Return the SHA-256 of a prompt's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def model_names(iterations: Iterable[str]) -> list[str]:
    """Return the names of all models: the base policy's, then one per iteration (the keys of `iterations` in params.yaml)."""
    return [BASE, *iterations]

"""What is in the Parquet files between the stages: columns, types and meaning, a schema per artifact."""

import pyarrow as pa

_text, _ids = pa.string(), pa.list_(pa.int32())


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name == "part") for name, kind in columns.items()])


PROMPTS = _schema(prompt_id=_text, prompt=_text, part=_text)
"""assets -> split. prompt_id: SHA-256 of the prompt; part: the iteration a source assigns it to, or null."""

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
token_ids are the sampled ones, the end token included where finish_reason is `stop`, absent where it is `length`."""

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

ARTIFACTS = {
    "data/prompts.parquet": PROMPTS,
    "data/split/*.parquet": PART,
    "data/responses/*.parquet, data/hold_out/*.parquet": RESPONSES,
    "data/rankings/*.parquet": RANKINGS,
    "data/pairs/*.parquet": PAIRS,
}
"""Files by their names in the folder of dvc.yaml, and their schemas."""

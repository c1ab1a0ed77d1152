"""Compute log-probabilities of chosen and rejected responses under the reference pi_t, the policy before training (eq. 4.7).

The pairs get their final form here: ties are dropped, tokens cut to the maximum lengths. They do not depend on eta,
so a sweep over eta reuses them.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from stages.artifacts import models, schemas, shards, tables
from stages.engines import distributed, training
from stages.method import chat, packing, seeding
from stages.runtime import params, scratch
from stages.runtime.devices import is_main_process
from stages.runtime.errors import StageError
from stages.runtime.logs import log

SHARD_STEPS = 16
"""Batches per process in a shard: a killed stage repeats at most one shard."""

Integers = npt.NDArray[np.integer[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="the policy pi_t that the responses were sampled from")
    parser.add_argument("--responses", type=Path, required=True, help="Parquet of responses")
    parser.add_argument("--rankings", type=Path, required=True, help="Parquet of their rankings")
    parser.add_argument("--out", type=Path, required=True, help="Parquet to write: pairs with reference log-probabilities")


def main(args: argparse.Namespace) -> None:
    settings = params.load("lengths", "train.devices", "train.nodes", "train.device_batch", "train.dtype", "train.attention")
    inputs = {"model": args.model, "responses": args.responses, "rankings": args.rankings}
    distributed.launch(settings.devices, inputs, partial(run, args, settings), settings.nodes)


def run(args: argparse.Namespace, settings: Any, group: distributed.Group) -> None:
    """Build and score the pairs in one process of the group; the main one writes them."""
    folder = scratch.folder("reference", {**group.digests, **settings.model_dump(exclude={"nodes"})})
    training.quiet_libraries()
    if is_main_process():
        models.check_policy(args.model)
    distributed.start_group(group)
    seeding.make_deterministic(0)
    arguments = training.training_arguments(folder, settings.device_batch, settings.dtype, seed=0)
    path = folder / "unscored.parquet"
    with arguments.main_process_first(local=False):  # only one process holds all responses in memory
        if not shards.is_kept(path):
            responses = tables.read(args.responses, schemas.RESPONSES)
            pairs = build_pairs(responses, tables.read(args.rankings, schemas.RANKINGS), settings.lengths)
            tables.write(pairs, schemas.UNSCORED_PAIRS, path)
            del responses
    unscored = tables.read(path, schemas.UNSCORED_PAIRS)
    paths = score_pairs(unscored, args.model, settings, arguments, folder)
    if is_main_process():
        scores = pa.concat_tables([tables.read(path, schemas.LOGPS) for path in paths])
        sources = {name: unscored if name in schemas.UNSCORED_PAIRS.names else scores for name in schemas.PAIRS.names}
        columns = {name: table[name] for name, table in sources.items()}
        tables.write(pa.table(columns).combine_chunks(), schemas.PAIRS, args.out)


def build_pairs(responses: pa.Table, rankings: pa.Table, lengths: params.Lengths) -> pa.Table:
    """Build the pair of each prompt that is not a tie; drop or truncate those that do not fit, as lengths.too_long says.

    responses, rankings: tables of schemas.RESPONSES and RANKINGS, with the same prompts in the same order. Returns a table of
    schemas.UNSCORED_PAIRS. Raises StageError if the prompts differ, or if no pairs are left.
    """
    if responses.column("prompt_id") != rankings.column("prompt_id"):
        raise StageError(
            "responses and rankings do not have the same 'prompt_id's in the same order: re-run rank on these responses"
        )
    batches, start = [], 0
    for batch in responses.select(["prompt_id", "prompt_token_ids", "token_ids"]).to_batches(tables.BATCH):
        if batch.num_rows:  # a table may have empty chunks
            batches.append(_build_batch(batch, rankings.slice(start, batch.num_rows), lengths))
        start += batch.num_rows
    pairs = pa.concat_tables(batches).combine_chunks()
    ties = pc.sum(rankings["tie"]).as_py()
    too_long = len(rankings) - ties - len(pairs)
    log.info("%d pairs; dropped %d ties and %d pairs that are too long", len(pairs), ties, too_long)
    if not len(pairs):
        remedy = (
            "raise lengths.total, or set lengths.too_long to truncate"
            if too_long
            else "raise generate.temperature or generate.samples"
        )
        raise StageError(f"no pairs are left from {len(responses)} prompts ({ties} ties, {too_long} too long): {remedy}")
    return pairs


def _build_batch(responses: pa.RecordBatch, rankings: pa.Table, lengths: params.Lengths) -> pa.Table:
    """Build the pairs of N prompts, from three columns of schemas.RESPONSES and the rankings of the same prompts."""
    prompt_starts, prompt_lengths = list_spans(responses["prompt_token_ids"])
    first_responses, _ = list_spans(responses["token_ids"])
    tokens = responses["token_ids"].values  # one list per response, the responses of all prompts one after another
    starts, counts = list_spans(tokens)
    pair = np.stack([rankings["chosen"].to_numpy(), rankings["rejected"].to_numpy()])  # (2, N), indices into K responses
    starts, counts = starts[first_responses + pair], counts[first_responses + pair]
    kept_prompts, kept, dropped = cut_lengths(prompt_lengths, counts, lengths)
    rows = np.flatnonzero(~dropped & ~rankings["tie"].to_numpy())
    samples = len(rankings["probabilities"][0])
    probabilities = pc.list_flatten(rankings["probabilities"]).to_numpy().reshape(-1, samples)
    prompt_ends = (prompt_starts + prompt_lengths)[rows]
    columns = {
        "prompt_id": responses["prompt_id"].take(pa.array(rows)),
        "prompt_token_ids": slice_lists(
            responses["prompt_token_ids"].values, prompt_ends - kept_prompts[rows], kept_prompts[rows]
        ),
        "chosen_token_ids": slice_lists(tokens.values, starts[0, rows], kept[0, rows]),
        "rejected_token_ids": slice_lists(tokens.values, starts[1, rows], kept[1, rows]),
        "chosen_probability": probabilities[rows, pair[0, rows]],
        "rejected_probability": probabilities[rows, pair[1, rows]],
        "prompt_tokens_cut": (prompt_lengths - kept_prompts)[rows],
        "chosen_tokens_cut": (counts - kept)[0, rows],
        "rejected_tokens_cut": (counts - kept)[1, rows],
    }
    return pa.table(columns).cast(schemas.UNSCORED_PAIRS)


def cut_lengths(
    prompts: Integers, responses: Integers, lengths: params.Lengths
) -> tuple[Integers, Integers, npt.NDArray[np.bool_]]:
    """Apply `lengths` to the token counts of N prompts (N,) and of their chosen and rejected responses (2, N).

    Returns the counts that are kept, in the same shapes, and a mask (N,) of the pairs to drop.
    """
    if lengths.too_long == "drop":
        return prompts, responses, ~chat.fit_lengths(prompts, responses, lengths.total)
    limits = {"max_prompt": lengths.prompt, "max_total": lengths.total}
    kept_prompts, kept = chat.truncate_lengths(prompts, responses, lengths.too_long, **limits)
    return kept_prompts, kept, np.zeros(len(prompts), bool)


def list_spans(lists: pa.ListArray) -> tuple[Integers, Integers]:
    """Return where each list starts in the array's `values`, and its length: (N,) each."""
    offsets = lists.offsets.to_numpy()
    return offsets[:-1], np.diff(offsets)


def slice_lists(values: pa.Array, starts: Integers, lengths: Integers) -> pa.ListArray:
    """Return N lists, list i being the lengths[i] values from starts[i] on. starts, lengths: (N,)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(offsets.astype(np.int32), values.take(pa.array(index)))


def longest_pair(pairs: pa.Table) -> dict[str, Any]:
    """Return the pair with the longest sequence of prompt and response."""
    prompt, *responses = (pc.list_value_length(pairs[f"{text}_token_ids"]) for text in packing.TEXTS)
    lengths = pc.add(prompt, pc.max_element_wise(*responses))
    row: dict[str, Any] = pairs.slice(pc.index(lengths, pc.max(lengths)).as_py(), 1).to_pylist()[0]
    return row


def score_pairs(pairs: pa.Table, model_path: Path, settings: Any, arguments: Any, folder: Path) -> list[Path]:
    """Score pairs under the model, in shards: every process takes part in each, the main one writes it.

    pairs: a table of schemas.UNSCORED_PAIRS. settings: with the dtype and the attention of `train`. arguments: from
    `training_arguments`. folder: holds the shards; finished ones are reused. Returns the paths, in order, of Parquet files of
    schemas.LOGPS: one row per pair, in nats.
    Raises StageError if packing or the fused attention does not support the model.
    """
    size = SHARD_STEPS * arguments.world_size * arguments.per_device_eval_batch_size
    paths, pending = shards.list_shards(folder, -(-len(pairs) // size))
    if not pending:
        return paths
    from stages.engines.trainer import LogpsScorer

    model = training.load_scored_policy(model_path, settings.dtype, settings.attention)
    scorer = LogpsScorer(model, arguments, longest_pair(pairs), settings.dtype)
    for index in tqdm(pending, desc="reference", unit="shard", disable=not is_main_process()):
        shard = pairs.slice(index * size, size)
        logps = scorer.predict(shard.to_pylist()).predictions
        if is_main_process():
            scores = pa.Table.from_arrays([shard["prompt_id"], *logps.T], schema=schemas.LOGPS)
            tables.write(scores, schemas.LOGPS, paths[index])
    return paths

"""Log-probabilities of winners and losers under the reference pi_t, the start of the iteration (eq. 4.7).

Pairs are fixed here, as they are trained: ties dropped, tokens cut to what training holds. eta does not enter, so a sweep
over eta reuses them.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from stages import chat, cli, files, params, policy, schemas, scratch, shards
from stages.cli import StageError

SHARD_STEPS = 16
"""Batches of each process in a shard, the most that a killed stage repeats."""


def pairs(responses: pa.Table, rankings: pa.Table, lengths: params.Lengths) -> pa.Table:
    """Winner and loser of every prompt that is no tie and, unless lengths.too_long is `truncate`, fits.

    Returns a table of schemas.CHOSEN. Raises StageError where the two tables are not of the same prompts in the same order,
    or where no pair is left.
    """
    if responses.column("prompt_id") != rankings.column("prompt_id"):
        raise StageError("responses and rankings are not of the same prompts in the same order: rank the responses again")
    parts, start, samples = [], 0, len(rankings["probabilities"][0])
    for batch in responses.select(["prompt_id", "prompt_token_ids", "token_ids"]).to_batches(files.BATCH):
        ranked = rankings.slice(start, batch.num_rows)
        start += batch.num_rows
        prompt_starts, prompts = spans(batch["prompt_token_ids"])
        firsts, _ = spans(batch["token_ids"])
        drawn = batch["token_ids"].values  # the responses of all prompts, one after the other
        starts, counts = spans(drawn)
        which = np.stack([ranked["winner"].to_numpy(), ranked["loser"].to_numpy()])
        starts, counts = starts[firsts + which], counts[firsts + which]
        kept_prompts, kept = chat.fit(prompts, counts, longest_prompt=lengths.prompt, longest=lengths.total)
        fits = (kept_prompts == prompts) & (kept == counts).all(0) | (lengths.too_long == "truncate")
        row = np.flatnonzero(fits & ~ranked["tie"].to_numpy())
        probabilities = pc.list_flatten(ranked["probabilities"]).to_numpy().reshape(-1, samples)
        columns = {
            "prompt_id": batch["prompt_id"].take(pa.array(row)),
            "prompt_token_ids": runs(
                batch["prompt_token_ids"].values, (prompt_starts + prompts - kept_prompts)[row], kept_prompts[row]
            ),
            "chosen_token_ids": runs(drawn.values, starts[0, row], kept[0, row]),
            "rejected_token_ids": runs(drawn.values, starts[1, row], kept[1, row]),
            "chosen_probability": probabilities[row, which[0, row]],
            "rejected_probability": probabilities[row, which[1, row]],
            "prompt_cut": (prompts - kept_prompts)[row],
            "chosen_cut": (counts - kept)[0, row],
            "rejected_cut": (counts - kept)[1, row],
        }
        parts.append(pa.table(columns).cast(schemas.CHOSEN))
    chosen = pa.concat_tables(parts).combine_chunks()
    ties = pc.sum(rankings["tie"]).as_py()
    too_long = len(rankings) - ties - len(chosen)
    cli.log.info("%d pairs; %d ties and %d too long pairs dropped", len(chosen), ties, too_long)
    if not len(chosen):
        raise StageError(
            f"no pair is left of {len(responses)} prompts ({ties} ties, {too_long} too long): "
            + ("raise lengths.total or lengths.prompt" if too_long else "raise generate.temperature or generate.samples")
        )
    return chosen


def spans(lists: pa.ListArray) -> tuple[Any, Any]:
    """Where each list starts in the array's `values`, and its length: (N,) integers both."""
    offsets = lists.offsets.to_numpy()
    return offsets[:-1], np.diff(offsets)


def runs(values: pa.Array, starts: Any, lengths: Any) -> pa.ListArray:
    """For each start, (N,), the list of so many values from there on, lengths (N,)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(offsets.astype(np.int32), values.take(pa.array(index)))


def longest(chosen: pa.Table) -> dict[str, Any]:
    """The pair of the longest text."""
    prompt, *responses = (pc.list_value_length(chosen[f"{part}_token_ids"]) for part in ("prompt", "chosen", "rejected"))
    lengths = pc.add(prompt, pc.max_element_wise(*responses))
    found: dict[str, Any] = chosen.slice(pc.index(lengths, pc.max(lengths)).as_py(), 1).to_pylist()[0]
    return found


def score(table: pa.Table, model_path: Path, dtype: params.Precision, arguments: Any, folder: Path) -> list[Path]:
    """Parquet files of schemas.LOGPS in the folder, a row a pair in order: summed log-probabilities, in nats, under the model.

    table: of schemas.CHOSEN; arguments: of policy.trainer_arguments. Every process takes part in every shard, the main one
    writes it. Shards that are there already are not made again.
    """
    import torch
    from transformers import ProgressCallback, Trainer

    size = SHARD_STEPS * arguments.world_size * arguments.per_device_eval_batch_size
    paths, pending = shards.places(folder, -(-len(table) // size))
    if not pending:
        return paths
    model = policy.scoring(policy.load(model_path, dtype))

    class Scorer(Trainer):  # type: ignore[misc]
        checked = False

        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs  # on their device already; Trainer would cast float tensors to bfloat16 under DeepSpeed

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            with torch.no_grad():
                if not self.checked:
                    policy.check_packing(model, longest(table), dtype)
                    self.checked = True
                logps = policy.batch_logps(model, inputs)
            return None, torch.stack(logps.chunk(2), 1), None

    scorer = Scorer(model=model, args=arguments, data_collator=policy.collate)
    scorer.remove_callback(ProgressCallback)  # of a single shard
    for index in tqdm(pending, desc="reference", unit="shard", disable=not cli.is_main()):
        shard = table.slice(index * size, size)
        logps = scorer.predict(shard.to_pylist()).predictions
        if cli.is_main():
            found = pa.Table.from_arrays([shard["prompt_id"], *logps.T], schema=schemas.LOGPS)
            files.write_table(found, schemas.LOGPS, paths[index])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the policy pi_t that drew the responses")
    parser.add_argument("responses", type=Path)
    parser.add_argument("rankings", type=Path)
    parser.add_argument("out", type=Path, help="Parquet of pairs with their reference log-probabilities")
    args = parser.parse_args()
    wanted = params.load("lengths", "train.devices", "train.device_batch", "train.dtype")

    def run(digests: dict[str, str]) -> None:
        folder = scratch.folder("reference", digests | wanted.model_dump())
        arguments = policy.trainer_arguments(folder, wanted.devices, wanted.device_batch, wanted.dtype, seed=0)
        path = folder / "chosen.parquet"
        with arguments.main_process_first(local=False):  # one process holds all responses, the others wait for its choice
            if not path.exists():
                responses = files.read_table(args.responses, schemas.RESPONSES)
                chosen = pairs(responses, files.read_table(args.rankings, schemas.RANKINGS), wanted.lengths)
                files.write_table(chosen, schemas.CHOSEN, path)
                del responses
        chosen = files.read_table(path, schemas.CHOSEN)
        paths = score(chosen, args.model, wanted.dtype, arguments, folder)
        if cli.is_main():
            scored = pa.concat_tables([files.read_table(path, schemas.LOGPS) for path in paths])
            columns = {name: (chosen if name in schemas.CHOSEN.names else scored)[name] for name in schemas.PAIRS.names}
            files.write_table(pa.table(columns).combine_chunks(), schemas.PAIRS, args.out)

    policy.launch(wanted.devices, {name: getattr(args, name) for name in ("model", "responses", "rankings")}, run)


if __name__ == "__main__":
    cli.run(main)

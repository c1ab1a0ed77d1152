"""Log-probabilities of winners and losers under the reference pi_t, the start of the iteration (eq. 4.7).

Pairs are fixed here, as they are trained: ties dropped, tokens cut to what training holds. eta does not enter, so a sweep
over eta reuses them.
"""

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from stages import chat, cli, files, params, policy, schemas, scratch, shards
from stages.cli import StageError

SHARD_STEPS = 16
"""Batches of each process in a shard, the most that a killed stage repeats."""


def pairs(responses: pa.Table, rankings: pa.Table, lengths: params.Lengths) -> list[dict[str, Any]]:
    """Winner and loser of every prompt that is no tie and, unless lengths.too_long is `truncate`, fits.

    Returns rows of schemas.PAIRS without the reference's columns. Raises StageError where the two tables are not of the same
    prompts in the same order, or where no pair is left.
    """
    if responses.column("prompt_id") != rankings.column("prompt_id"):
        raise StageError("responses and rankings are not of the same prompts in the same order: rank the responses again")
    rows: list[dict[str, Any]] = []
    ties = too_long = 0
    for response, ranking in zip(responses.to_pylist(), rankings.to_pylist(), strict=True):
        if ranking["tie"]:
            ties += 1
            continue
        winner, loser = ranking["winner"], ranking["loser"]
        fitted = chat.fit(
            response["prompt_token_ids"],
            [response["token_ids"][winner], response["token_ids"][loser]],
            longest_prompt=lengths.prompt,
            longest=lengths.total,
            truncate=lengths.too_long == "truncate",
        )
        if fitted is None:
            too_long += 1
            continue
        prompt, (chosen, rejected) = fitted
        rows.append(
            {
                "prompt_id": response["prompt_id"],
                "prompt_token_ids": prompt,
                "chosen_token_ids": chosen,
                "rejected_token_ids": rejected,
                "chosen_probability": ranking["probabilities"][winner],
                "rejected_probability": ranking["probabilities"][loser],
                "prompt_cut": len(response["prompt_token_ids"]) - len(prompt),
                "chosen_cut": len(response["token_ids"][winner]) - len(chosen),
                "rejected_cut": len(response["token_ids"][loser]) - len(rejected),
            }
        )
    cli.log.info("%d pairs; %d ties and %d too long pairs dropped", len(rows), ties, too_long)
    if not rows:
        raise StageError(
            f"no pair is left of {len(responses)} prompts ({ties} ties, {too_long} too long): "
            + ("raise lengths.total or lengths.prompt" if too_long else "raise generate.temperature or generate.samples")
        )
    return rows


def length(row: dict[str, Any]) -> int:
    """Of a pair's longer text, in tokens."""
    return len(row["prompt_token_ids"]) + max(len(row["chosen_token_ids"]), len(row["rejected_token_ids"]))


def score(
    rows: list[dict[str, Any]], model_path: Path, devices: int, device_batch: int, dtype: params.Precision, folder: Path
) -> list[Path]:
    """Parquet files of schemas.LOGPS in the folder, a row a pair in order: summed log-probabilities, in nats, under the model.

    Every process takes part in every shard, the main one writes it. Shards that are there already are not made again.
    """
    import torch
    from transformers import ProgressCallback, Trainer

    size = SHARD_STEPS * devices * device_batch
    paths, pending = shards.places(folder, -(-len(rows) // size))
    if not pending:
        return paths
    arguments = policy.trainer_arguments(folder, devices, device_batch, dtype, seed=0)
    model, _ = policy.load(model_path, dtype)

    class Scorer(Trainer):  # type: ignore[misc]
        checked = False

        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs  # on their device already; Trainer would cast float tensors to bfloat16 under DeepSpeed

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            with torch.no_grad():
                if not self.checked:
                    policy.check_packing(model, max(rows, key=length), dtype)
                    self.checked = True
                chosen, rejected = policy.batch_logps(model, inputs).chunk(2)
            return None, torch.stack([chosen, rejected], 1), None

    scorer = Scorer(model=policy.scoring(model), args=arguments, data_collator=policy.collate)
    scorer.remove_callback(ProgressCallback)  # of a single shard
    for index in tqdm(pending, desc="reference", unit="shard", disable=not cli.is_main()):
        shard = rows[index * size : (index + 1) * size]
        logps = scorer.predict(shard).predictions
        if cli.is_main():
            table = pa.Table.from_arrays([[row["prompt_id"] for row in shard], *logps.T], schema=schemas.LOGPS)
            files.write_table(table, schemas.LOGPS, paths[index])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the policy pi_t that drew the responses")
    parser.add_argument("responses", type=Path)
    parser.add_argument("rankings", type=Path)
    parser.add_argument("out", type=Path, help="Parquet of pairs with their reference log-probabilities")
    args = parser.parse_args()
    wanted = params.load("lengths", "train.devices", "train.device_batch", "train.dtype")
    responses = files.read_table(args.responses, schemas.RESPONSES)
    rows = pairs(responses, files.read_table(args.rankings, schemas.RANKINGS), wanted.lengths)

    def run() -> None:
        inputs = {name: files.digest(getattr(args, name)) for name in ("model", "responses", "rankings")}
        folder = scratch.folder("reference", inputs | wanted.model_dump())
        paths = score(rows, args.model, wanted.devices, wanted.device_batch, wanted.dtype, folder)
        if cli.is_main():
            logps = [row for path in paths for row in files.read_table(path, schemas.LOGPS).to_pylist()]
            files.write_table([row | found for row, found in zip(rows, logps, strict=True)], schemas.PAIRS, args.out)

    policy.launch(wanted.devices, run)


if __name__ == "__main__":
    cli.run(main)

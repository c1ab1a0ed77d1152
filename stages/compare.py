"""Compute the ranker's win rate of every model against every other on the hold-out (Fig. 3), a proxy for progress."""

import argparse
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from stages.artifacts import files, schemas, shards, tables
from stages.engines import pairrm, ranking
from stages.method import sppo
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.logs import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranker", type=Path, required=True, help="folder with PairRM and base, from assets-ranker")
    parser.add_argument("--hold-out", type=Path, required=True, help="folder of MODEL.parquet, each model's hold-out responses")
    parser.add_argument("--out", type=Path, required=True, help="JSON with models, win_rates, standard_errors and n")


def main(args: argparse.Namespace) -> None:
    settings = params.load("iterations", "rank")
    models = schemas.model_names(settings.iterations)
    paths = [args.hold_out / f"{name}.parquet" for name in models]
    responses = join_responses([(path, tables.read(path, schemas.RESPONSES)) for path in paths])
    pairrm.check_ranker(args.ranker)  # before starting workers, each of which would report the same error
    key = {
        "ranker": files.digest(args.ranker),
        "answers": [files.digest(path) for path in paths],
        "rank": settings.rank.model_dump(),
    }
    arguments = (args.ranker, settings.rank)
    rankings = shards.map_shards(
        "compare", responses, settings.rank.shard_size, ranking.load_ranker, arguments, schemas.RANKINGS, key, cores=True
    )
    rates, errors = compute_win_rates(rankings.to_pylist(), settings.rank.scale)
    files.write_json({"models": models, "win_rates": rates, "standard_errors": errors, "n": rankings.num_rows}, args.out)
    for name, row in zip(models, rates, strict=True):
        log.info("%s against %s: %s", name, ", ".join(models), ", ".join(f"{rate:.1f}" for rate in row))


def join_responses(answers: list[tuple[Path, pa.Table]]) -> pa.Table:
    """Join the models' single responses to each prompt into one table of schemas.RESPONSES with K = number of models.

    answers: each model's file and its content. Raises StageError unless all models answered the same prompts in the same
    order.
    """
    first_path, first = answers[0]
    for path, table in answers:
        if table["prompt_id"] != first["prompt_id"]:
            raise StageError(f"{path}: column 'prompt_id' differs from that of {first_path}: re-run the stage answer for both")
    lists = ["responses", "token_ids", "token_counts", "finish_reasons", "seeds"]
    rows = [
        same_prompt[0] | {name: [value for row in same_prompt for value in row[name]] for name in lists}
        for same_prompt in zip(*(table.to_pylist() for _, table in answers), strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=schemas.RESPONSES)


def compute_win_rates(rankings: list[dict[str, Any]], scale: float) -> tuple[list[list[float]], list[list[float]]]:
    """Compute win rates of the row's model against the column's, in percent, and their standard errors, (K, K) each.

    A win rate is the mean over prompts of P(y_i > y_j) by position-debiased scores. rankings: rows of schemas.RANKINGS.
    scale: rank.scale.
    """
    logits = torch.tensor([row["logits"] for row in rankings], dtype=torch.float64)
    wins = 100 * torch.sigmoid(sppo.pairwise_scores(logits, scale))
    errors = wins.std(0) / math.sqrt(len(wins))
    return wins.mean(0).tolist(), errors.tolist()

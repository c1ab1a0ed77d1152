"""The ranker's win rate of every model against every other on the hold-out: the paper's Fig. 3, a proxy of progress."""

import argparse
import math
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import cli, files, params, rank, schemas, shards
from stages.cli import StageError


def side_by_side(answers: list[tuple[Path, pa.Table]]) -> pa.Table:
    """One table of schemas.RESPONSES with the models' single responses as each prompt's K responses.

    Raises StageError where the models did not answer the same prompts in the same order, once each.
    """
    path, first = answers[0]
    for other, table in answers:
        if table.column("prompt_id") != first.column("prompt_id"):
            raise StageError(f"{other}: not the prompts of {path} in their order: answer them again")
    lists = ["responses", "token_ids", "token_counts", "finish_reasons", "seeds"]
    rows = [
        drawn[0] | {name: [value for one in drawn for value in one[name]] for name in lists}
        for drawn in zip(*(table.to_pylist() for _, table in answers), strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=schemas.RESPONSES)


def win_rates(rankings: list[dict[str, Any]]) -> tuple[list[list[float]], list[list[float]]]:
    """Mean over prompts of P(y_i > y_j) by position-debiased scores, in percent, row against column, and its standard error."""
    import torch

    from stages import sppo

    logits = torch.tensor([row["logits"] for row in rankings], dtype=torch.float64)
    wins = 100 * torch.sigmoid(sppo.pairwise_scores(logits))
    errors = wins.std(0) / math.sqrt(len(wins))
    return wins.mean(0).tolist(), errors.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranker", type=Path, help="folder with PairRM and base")
    parser.add_argument("answers", type=Path, help="folder of <model>.parquet, each model's responses to the hold-out")
    parser.add_argument("out", type=Path, help="JSON: models, win_rates, standard_errors, n")
    args = parser.parse_args()
    wanted = params.load("iterations", "rank")
    models = params.models(wanted.iterations)
    paths = [args.answers / f"{name}.parquet" for name in models]
    table = side_by_side([(path, files.read_table(path, schemas.RESPONSES)) for path in paths])
    rank.parts(args.ranker)  # before the workers, each of which would say it
    key = {
        "ranker": files.digest(args.ranker),
        "answers": [files.digest(path) for path in paths],
        "rank": wanted.rank.model_dump(),
    }
    arguments = (args.ranker, wanted.rank)
    rankings = shards.map_shards(
        "compare", table, wanted.rank.shard_size, rank.load, arguments, schemas.RANKINGS, key, cores=True
    )
    rates, errors = win_rates(rankings.to_pylist())
    files.write_json({"models": models, "win_rates": rates, "standard_errors": errors, "n": rankings.num_rows}, args.out)
    for name, row in zip(models, rates, strict=True):
        cli.log.info("%s against %s: %s", name, ", ".join(models), ", ".join(f"{rate:.1f}" for rate in row))


if __name__ == "__main__":
    cli.run(main, environment="rank")

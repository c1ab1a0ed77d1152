"""Compute the ranker's win rate of every model against every other on the hold-out (Fig. 3), a proxy for progress."""

import argparse
from pathlib import Path

import pyarrow as pa

from stages.artifacts import files, schemas, tables
from stages.engines import comparing
from stages.runtime import params
from stages.runtime.errors import StageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranker", type=Path, required=True, help="folder with PairRM and base, from assets-ranker")
    parser.add_argument("--hold-out", type=Path, required=True, help="folder of MODEL.parquet, each model's hold-out responses")
    parser.add_argument("--out", type=Path, required=True, help="JSON with models, win_rates, standard_errors and n")


def main(args: argparse.Namespace) -> None:
    settings = params.load("iterations", "rank")
    models = schemas.model_names(settings.iterations)
    paths = [args.hold_out / f"{name}.parquet" for name in models]
    responses = join_responses([(path, tables.read(path, schemas.RESPONSES)) for path in paths])
    comparison = comparing.compare_responses("compare", models, responses, paths, args.ranker, settings.rank)
    files.write_json(comparison, args.out)


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

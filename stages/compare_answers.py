"""Compute the ranker's win rate of every existing model against every other on AlpacaEval's instructions."""

import argparse
from pathlib import Path

import pyarrow as pa

from stages.artifacts import answers, files, schemas
from stages.engines import comparing
from stages.runtime import params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranker", type=Path, required=True, help="folder with PairRM and base, from assets-pairrm")
    parser.add_argument("--answers", type=Path, required=True, help="folder of MODEL.json, each model's answers")
    parser.add_argument("--out", type=Path, required=True, help="JSON with models, win_rates, standard_errors and n")


def main(args: argparse.Namespace) -> None:
    settings = params.load("models", "answers", "rank")
    models = [*settings.models, *settings.answers]
    responses = join_answers(answers.read_answers(args.answers, models))
    # Answers have no templated prompt, and P^ plays no part in the win rates.
    rank = params.Rank(probability="pairwise", input="instruction", **settings.rank.model_dump())
    paths = [args.answers / f"{name}.json" for name in models]
    comparison = comparing.compare_responses("compare-answers", models, responses, paths, args.ranker, rank)
    files.write_json(comparison, args.out)


def join_answers(outputs: dict[str, answers.Records]) -> pa.Table:
    """Join the models' answers to each instruction into one row: `prompt_id`, `prompt`, and `responses`, one per model.

    outputs: model -> its answers, all to the same instructions in the same order.
    """
    rows = [
        {
            "prompt_id": schemas.prompt_id(same[0]["instruction"]),
            "prompt": same[0]["instruction"],
            "responses": [row["output"] for row in same],
        }
        for same in zip(*outputs.values(), strict=True)
    ]
    return pa.Table.from_pylist(rows)

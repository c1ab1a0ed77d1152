"""Rank the K responses of each prompt with PairRM: all ordered pairs, P^, chosen and rejected (Alg. 1, section 5.1)."""

import argparse
from pathlib import Path

import pyarrow.compute as pc

from stages.artifacts import files, schemas, tables
from stages.engines import ranking
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.logs import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranker", type=Path, required=True, help="folder with PairRM and base, from assets-ranker")
    parser.add_argument("--responses", type=Path, required=True, help="Parquet of responses, from generate")
    parser.add_argument("--out", type=Path, required=True, help="Parquet of the rankings")


def main(args: argparse.Namespace) -> None:
    settings = params.load("rank").rank
    responses = tables.read(args.responses, schemas.RESPONSES)
    samples = len(responses["responses"][0])
    if samples < 2:
        raise StageError(f"{args.responses}: only one response per prompt: set generate.samples to at least 2")
    digests = {"responses": files.digest(args.responses)}
    rankings = ranking.rank_responses("rank", responses, args.ranker, settings, digests)
    columns = ("tie", "prompt_truncated", "responses_truncated")
    ties, prompts_truncated, responses_truncated = (pc.sum(rankings[name]).as_py() for name in columns)
    log.info("ranked %d prompts with %d responses each, %d ties", rankings.num_rows, samples, ties)
    log.info("truncated for the ranker: %d prompts, %d responses", prompts_truncated, responses_truncated)
    tables.write(rankings, schemas.RANKINGS, args.out)

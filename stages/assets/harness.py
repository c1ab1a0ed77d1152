"""Provide the six data sets of the Open LLM Leaderboard: the miniature's, or from local directories or the Hub."""

import argparse
from pathlib import Path

from stages.artifacts import files
from stages.artifacts.harness_sets import DATA_SETS, read_rows, write_data_set, write_exact_match
from stages.miniature.harness import make_rows
from stages.runtime import params
from stages.runtime.logs import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write, the working directory of lm-eval")


def main(args: argparse.Namespace) -> None:
    settings = params.load("seed", "assets.harness")
    with files.replacing(args.out) as partial:
        for task, data_set in DATA_SETS.items():
            asset: params.EvaluationAsset = getattr(settings.harness, task)
            configs = make_rows(task, settings.seed, asset.count) if asset.count else read_rows(task, asset)
            write_data_set(data_set, configs, partial)
            count = sum(len(splits[data_set.test]) for splits in configs.values())
            log.info("%s: %s: %d questions from %s", args.out, task, count, asset.repo)
        write_exact_match(partial)

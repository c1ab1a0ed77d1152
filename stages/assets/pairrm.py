"""Provide a ranker that exists already, so that it can compare answers: PairRM or one like it, from the Hub or a directory."""

import argparse
from pathlib import Path

from stages.artifacts import files, hub
from stages.runtime import params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="name of the ranker in `rankers` of params.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, with PairRM and base")


def main(args: argparse.Namespace) -> None:
    rankers: dict[str, params.ExistingRanker] = params.load("rankers").rankers
    asset = params.find_named("rankers", rankers, args.name)
    with files.replacing(args.out) as partial:
        hub.fetch_ranker(asset, asset.base, partial)

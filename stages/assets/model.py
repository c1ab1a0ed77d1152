"""Provide a model that exists already, so that it can be evaluated: from a directory, or from the Hub at a pinned revision."""

import argparse
from pathlib import Path

from stages.artifacts import golden
from stages.runtime import params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="name of the model in `models` of params.yaml")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write: a checkpoint, or a pointer to one in the Hub cache"
    )


def main(args: argparse.Namespace) -> None:
    models: dict[str, params.ModelAsset] = params.load("models").models
    golden.fetch_checked(params.find_named("models", models, args.name), args.out, f"models.{args.name}")

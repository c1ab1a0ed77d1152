"""Provide the base policy: the miniature's, a local model, or one from the Hub at a pinned revision."""

import argparse
from pathlib import Path

from stages.artifacts import golden
from stages.miniature.policy import make_policy
from stages.runtime import params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write: a checkpoint, or a pointer to one in the Hub cache"
    )


def main(args: argparse.Namespace) -> None:
    settings = params.load("seed", "assets.policy")
    asset: params.PolicyAsset = settings.policy
    if asset.miniature:
        make_policy(asset.miniature, settings.seed, args.out)
        return
    golden.fetch_checked(asset, args.out, "assets.policy")

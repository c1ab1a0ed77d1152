"""Provide the ranker: PairRM from the Hub or a local directory, or the miniature's, trained here on noisy gold preferences.

The folder holds `PairRM` (weights and llm-blender's configuration) and `base` (the DeBERTa model and tokenizer it is based on).
"""

import argparse
from pathlib import Path

from stages.artifacts import files, hub
from stages.miniature.ranker import make_ranker
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.logs import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write")


def main(args: argparse.Namespace) -> None:
    settings = params.load("seed", "assets.ranker")
    asset: params.RankerAsset = settings.ranker
    with files.replacing(args.out) as partial:
        if asset.miniature:
            make_ranker(asset.miniature, settings.seed, partial)
        else:
            hub.fetch_ranker(asset, require_base(asset), partial)
    log.info("wrote %s", args.out)


def require_base(asset: params.RankerAsset) -> params.Asset:
    """Return the base model of a ranker that is not made here. Raises StageError if it is missing."""
    if asset.base is None:
        raise StageError(
            "params.yaml: assets.ranker.base is missing: set it to the DeBERTa model that the ranker is based on "
            "(PairRM: microsoft/deberta-v3-large)"
        )
    return asset.base

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
            fetch_ranker(asset, partial)
    log.info("wrote %s", args.out)


def fetch_ranker(asset: params.RankerAsset, out: Path) -> None:
    """Fetch PairRM and the configuration and tokenizer of its base model. Raises StageError if either is missing."""
    if asset.base is None:
        raise StageError(
            "params.yaml: assets.ranker.base is missing: set it to the DeBERTa model that the ranker is based on "
            "(PairRM: microsoft/deberta-v3-large)"
        )
    hub.fetch_model(params.Asset(repo=asset.repo, revision=asset.revision), out / "PairRM")
    hub.fetch_model(asset.base, out / "base", weights=False)

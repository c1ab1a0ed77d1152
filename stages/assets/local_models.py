"""Link the models, rankers and evaluation sets that are local directories, so that stages depend on their contents."""

import argparse
from pathlib import Path

from stages.artifacts import links
from stages.runtime import params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this stage."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write: a link or a file for each asset")


def main(args: argparse.Namespace) -> None:
    """Write the links."""
    settings = params.load("models", "rankers", "assets")
    assets: links.Assets = {f"models.{name}": asset for name, asset in settings.models.items()}
    for name, ranker in settings.rankers.items():
        assets |= {f"rankers.{name}": ranker, f"rankers.{name}.base": ranker.base}
    links.write_links(assets | links.list_sets(settings.assets), args.out)

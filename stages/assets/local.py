"""Link the assets that are local directories, so that the stages that read them depend on their contents."""

import argparse
from pathlib import Path

from stages.artifacts import links
from stages.runtime import params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this stage."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write: a link or a file for each asset")


def main(args: argparse.Namespace) -> None:
    """Write the links."""
    links.write_links(links.list_training_assets(params.load("assets").assets), args.out)

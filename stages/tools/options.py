"""Options that several tools share."""

import argparse
from pathlib import Path


def add_recipe_option(parser: argparse.ArgumentParser, help: str = "folder of params.yaml and dvc.yaml") -> None:
    """Add `--recipe DIR`, by default the current folder: the miniature's, in the root of the repository."""
    parser.add_argument("--recipe", type=Path, default=Path(), metavar="DIR", help=f"{help} (default: this folder)")

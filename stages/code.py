"""Fingerprint the code of every stage, so that only a change that can alter its results makes a stage stale.

DVC hashes whole files. Each stage of dvc.yaml depends on the fingerprint written here instead of on its modules, so a
changed comment or docstring re-runs this stage alone, in a second.
"""

import argparse
from pathlib import Path

from stages.artifacts import files
from stages.runtime.catalog import stage_modules
from stages.runtime.fingerprint import fingerprint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write: NAME.json for each stage, path -> SHA-256")


def main(args: argparse.Namespace) -> None:
    for stage in stage_modules().keys() - {"code"}:
        files.write_json(fingerprint(stage), args.out / f"{stage}.json")

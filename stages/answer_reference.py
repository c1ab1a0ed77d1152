"""Provide the reference outputs that AlpacaEval compares with: those of the set, or else a second draw of the base policy.

The canonical set comes with reference outputs. The miniature's set has none; with the base policy's own answers, drawn with
different seeds than in the stage answer, the base policy wins about half.
"""

import argparse
import shutil
from pathlib import Path

from stages.artifacts import files
from stages.engines.answering import draw_answers, format_outputs
from stages.runtime import params

NAME = "reference"
"""The generator's name for the second draw, part of every sample's seed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="folder of the base policy; not read if the set has outputs")
    parser.add_argument("--alpaca-eval-set", type=Path, required=True, help="folder of the set, from assets-alpaca-eval")
    parser.add_argument("--out", type=Path, required=True, help="JSON of the reference outputs (reference_outputs.json)")


def main(args: argparse.Namespace) -> None:
    published = args.alpaca_eval_set / "reference_outputs.json"
    if published.exists():
        copy_outputs(published, args.out)
    else:
        sample_outputs(args.model, args.alpaca_eval_set / "instructions.json", args.out)


def copy_outputs(source: Path, out: Path) -> None:
    """Copy alpaca-eval's reference outputs byte by byte. Raises StageError if a record lacks a key."""
    files.read_records(source, ["dataset", "instruction", "output", "generator"])
    with files.replacing(out) as partial:
        shutil.copyfile(source, partial)


def sample_outputs(model: Path, path: Path, out: Path) -> None:
    """Sample an answer to each instruction of a JSON file and write them as alpaca-eval's reference outputs."""
    settings = params.load("seed", "engine", "answer")
    instructions = files.read_records(path, ["dataset", "instruction"])
    texts = [row["instruction"] for row in instructions]
    responses = draw_answers("answer-reference", model, NAME, texts, settings.seed, settings.engine, settings.answer)
    files.write_json(format_outputs(NAME, instructions, responses), out)

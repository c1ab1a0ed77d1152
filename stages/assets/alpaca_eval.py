"""Provide AlpacaEval's evaluation set: the canonical 805 instructions from the Hub or a local directory, or the miniature's.

The canonical set comes with the reference outputs and with the files that the length-controlled win rate needs. The
miniature's has instructions only; the stage answer-reference samples reference outputs for them.
"""

import argparse
import shutil
from pathlib import Path

from stages.artifacts import files, hub
from stages.miniature import domain
from stages.runtime import params
from stages.runtime.errors import StageError

REFERENCE_OUTPUTS = "alpaca_eval_gpt4_baseline.json"
"""Name of the reference outputs in the data set."""
LENGTH_CONTROL = ["df_gamed.csv", "instruction_difficulty.csv"]
"""Files that the length-controlled win rate is fitted on; they exist for the canonical instructions only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help=f"folder to write: instructions.json; canonical set: also reference_outputs.json, {', '.join(LENGTH_CONTROL)}",
    )


def main(args: argparse.Namespace) -> None:
    settings = params.load("seed", "assets.alpaca_eval")
    asset: params.EvaluationAsset = settings.alpaca_eval
    with files.replacing(args.out) as partial:
        if asset.count:
            files.write_json(make_instructions(settings.seed, asset.count), partial / "instructions.json")
        else:
            fetch_set(asset, partial)


def make_instructions(seed: int, count: int) -> list[dict[str, str]]:
    """Make the miniature's instructions. Raises StageError if the toy world has fewer."""
    try:
        prompts = domain.distinct_prompts(f"{seed}/evaluation", "evaluation", count)
    except ValueError as error:
        raise StageError(f"params.yaml: assets.alpaca_eval.count: {error}: lower it") from error
    return [{"dataset": "miniature", "instruction": prompt} for prompt in prompts]


def fetch_set(asset: params.EvaluationAsset, out: Path) -> None:
    """Write the canonical set to the folder `out`. Raises StageError if a file or a record's key is missing."""
    reference = hub.fetch_file(asset, REFERENCE_OUTPUTS)
    outputs = files.read_records(reference, ["dataset", "instruction", "output", "generator"])
    files.write_json([{key: row[key] for key in ("dataset", "instruction")} for row in outputs], out / "instructions.json")
    shutil.copyfile(reference, out / "reference_outputs.json")
    for name in LENGTH_CONTROL:
        shutil.copyfile(hub.fetch_file(asset, name), out / name)

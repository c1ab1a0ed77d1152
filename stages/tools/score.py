"""Print the AlpacaEval 2.0 metrics of existing annotations as JSON.

The annotations may come from any judge. Length control is defined for AlpacaEval's 805 instructions only.
"""

import argparse
import json
from pathlib import Path

from stages.artifacts import files
from stages.judges import scoring
from stages.runtime.errors import StageError, quote

METRICS = [
    "length_controlled_winrate",
    "lc_standard_error",
    "win_rate",
    "standard_error",
    "n_wins",
    "n_draws",
    "n_total",
    "avg_length",
]
"""The printed metrics, in this order."""


def read_annotations(path: Path) -> scoring.Records:
    """Read alpaca-eval's annotations.json. Raises StageError if it is not valid."""
    annotations = files.read_records(path, ["instruction", "output_1", "output_2", "generator_1", "generator_2"])
    for index, row in enumerate(annotations):
        preference = row.get("preference")
        if not isinstance(preference, int | float | None):
            raise StageError(
                f"{path}: record {index}: 'preference' is {quote(preference)}, not a number or null: pass alpaca-eval's "
                "annotations.json"
            )
    return annotations


def read_outputs(path: Path, annotations: scoring.Records, annotations_path: Path) -> scoring.Records:
    """Read the model_outputs.json of one model. Raises StageError unless the annotations are about exactly these outputs."""
    outputs = files.read_records(path, ["instruction", "output", "generator"])
    annotated = sorted((row["instruction"], row["output_2"], row["generator_2"]) for row in annotations)
    if annotated != sorted((row["instruction"], row["output"], row["generator"]) for row in outputs):
        raise StageError(f"{path}: not the outputs that {annotations_path} judges: pass the file that was annotated")
    if len({row["generator"] for row in outputs}) > 1:
        raise StageError(f"{path}: outputs of several models ('generator'): score one model at a time")
    return outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", type=Path, required=True, help="alpaca-eval's annotations.json of one model")
    parser.add_argument("--outputs", type=Path, required=True, help="the model_outputs.json that was annotated")
    parser.add_argument(
        "--alpaca-eval-set",
        type=Path,
        default=Path("data/alpaca_eval_set"),
        help="folder of df_gamed.csv (default: %(default)s)",
    )
    parser.add_argument("--no-length-control", action="store_true", help="compute win rates without length control")


def main(args: argparse.Namespace) -> None:
    annotations = read_annotations(args.annotations)
    outputs = read_outputs(args.outputs, annotations, args.annotations)
    if not args.no_length_control and not scoring.is_canonical([row["instruction"] for row in annotations]):
        raise StageError(
            f"{args.annotations}: not AlpacaEval's 805 instructions in their order, and length control is defined for these "
            "only: pass --no-length-control for the other metrics"
        )
    metrics = scoring.score_annotations(annotations, outputs, None if args.no_length_control else args.alpaca_eval_set)
    print(json.dumps({name: metrics[name] for name in METRICS if name in metrics}, indent=1))

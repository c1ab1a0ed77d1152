"""Print the AlpacaEval 2.0 metrics of existing annotations as JSON.

The annotations may come from any judge. Length control is defined for AlpacaEval's 805 instructions and reference outputs only.
stages/judges/annotations.py says which odd annotations are refused and which are counted: the printed `n_failed` is the number
of annotations without a preference, which the win rate leaves out, and `n_empty_references` is the number of empty reference
outputs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.assets.alpaca_eval import REFERENCE_OUTPUTS
from stages.judges import annotations as checks
from stages.judges import scoring
from stages.runtime.errors import StageError

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
"""alpaca-eval's metrics that are printed, in this order."""


def score(annotations_path: Path, outputs_path: Path, length_control: Path | None) -> dict[str, Any]:
    """Compute the metrics of a model's outputs from alpaca-eval's annotations of them.

    length_control: folder of df_gamed.csv and, if there, the reference outputs; None computes win rates without length control.
    Returns METRICS (percent; lengths in characters), n_failed, n_empty_references, and the names of the judge (`annotator`,
    None if not stated) and of the `baseline`. Raises StageError.
    """
    annotations = files.read_records(annotations_path, ["instruction", "output_1", "output_2", "generator_1", "generator_2"])
    outputs = files.read_records(outputs_path, ["instruction", "output", "generator"])
    checks.check_outputs(outputs_path, outputs)
    checks.check_annotations(annotations_path, annotations, outputs_path, outputs)
    if length_control:
        check_length_control(annotations_path, annotations, length_control)
    metrics = scoring.score_annotations(annotations, outputs, length_control)
    return {name: metrics[name] for name in METRICS if name in metrics} | {
        "n_failed": checks.count_failed(annotations),
        "n_empty_references": checks.count_empty(annotations, "output_1"),
        "annotator": annotations[0].get("annotator"),
        "baseline": annotations[0]["generator_1"],
    }


def check_length_control(path: Path, annotations: scoring.Records, folder: Path) -> None:
    """Raise StageError unless the annotations are of AlpacaEval's instructions and reference outputs.

    The outputs are compared with those in the folder, if it has them.
    """
    if not scoring.is_canonical([row["instruction"] for row in annotations]):
        raise StageError(
            f"{path}: not AlpacaEval's 805 instructions in their order, and length control is defined for these only: pass "
            "--no-length-control for the other metrics"
        )
    checks.check_references(path, annotations, "output_1", "generator_1")
    texts = [[row[key] for row in annotations] for key in ("output_2", "output_1")]
    checks.check_lengths(path, annotations[0]["generator_2"], *texts)
    for file in (folder / "reference_outputs.json", folder / REFERENCE_OUTPUTS):
        if not file.exists():
            continue
        for index, (row, reference) in enumerate(zip(annotations, files.read_records(file, ["output"]), strict=False)):
            if row["output_1"] != reference["output"]:
                raise StageError(
                    f"{path}: record {index}: 'output_1' is not 'output' in record {index} of {file}: annotate against these "
                    "reference outputs"
                )


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
    length_control = None if args.no_length_control else args.alpaca_eval_set
    print(json.dumps(score(args.annotations, args.outputs, length_control), indent=1))

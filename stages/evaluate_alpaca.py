"""Evaluate a model on AlpacaEval 2.0: a judge compares its answers with the reference outputs.

The judge is the miniature's gold rule, called in process, or a model at an OpenAI-compatible endpoint, which gets AlpacaEval
2.0's own prompt. Win rates are alpaca-eval's. stages/judges/annotations.py says which odd outputs and annotations are refused
and which are counted. `python -m stages.tools score` scores existing annotations.
"""

import argparse
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.judges import annotations as checks
from stages.judges import gold, scoring
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.logs import log

CONFIGS = Path(__file__).parent / "judges" / "configs"
"""alpaca-eval's configuration of each kind of judge."""


def configure_judge(section: params.EvaluateAlpaca) -> dict[str, Any]:
    """Return the arguments of alpaca_eval.evaluate that choose the judge. Raises StageError if its API key is missing."""
    if section.judge == "gold":
        return {
            "annotators_config": str(CONFIGS / "gold"),
            "fn_completions": gold.complete,
            "fn_completion_parser": gold.parse_completion,
        }
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

    from stages.judges import endpoint

    return {
        "annotators_config": str(CONFIGS / "weighted"),
        "prompt_template": str(EVALUATORS_CONFIG_DIR / endpoint.PROMPT),
        "fn_completions": endpoint.EndpointJudge(section).complete,
        "fn_completion_parser": endpoint.parse_choice,
    }


def evaluate(
    outputs: scoring.Records, references: scoring.Records, section: params.EvaluateAlpaca, length_control: Path | None
) -> tuple[dict[str, Any], scoring.Records]:
    """Have the judge compare outputs with references, in the same order of instructions.

    length_control: folder of df_gamed.csv; None computes win rates without length control.
    Returns the metrics of `scoring.run_alpaca_eval` with `judge` and `n_failed`, the number of pairs without a preference; and
    the annotations. Raises StageError.
    """
    metrics, annotations = scoring.run_alpaca_eval(
        outputs, references, length_control, caching_path=None, **configure_judge(section)
    )
    annotations = scoring.clean_annotations(annotations)
    metrics["judge"] = section.judge
    metrics["n_failed"] = checks.count_failed(annotations)
    return metrics, annotations


def check_instructions(answers: Path, instructions: list[str], references: Path, expected: list[str]) -> None:
    """Raise StageError unless the answers' instructions are those of the references, in the same order."""
    if instructions == expected:
        return
    same = [first == second for first, second in zip(instructions, expected, strict=False)]
    index = same.index(False) if False in same else len(same)
    raise StageError(
        f"{answers}: record {index}: 'instruction' does not match record {index} of {references}: answer the same instructions "
        "again, in the same order"
    )


def read_inputs(
    answers: Path, reference_outputs: Path, alpaca_eval_set: Path
) -> tuple[scoring.Records, scoring.Records, Path | None]:
    """Read and check the answers and the reference outputs.

    Returns both, in the same order of instructions, and the folder for length control: None if the instructions are not
    canonical. Raises StageError.
    """
    keys = ["dataset", "instruction", "output", "generator"]
    outputs, references = files.read_records(answers, keys), files.read_records(reference_outputs, keys)
    instructions = [row["instruction"] for row in references]
    check_instructions(answers, [row["instruction"] for row in outputs], reference_outputs, instructions)
    checks.check_outputs(answers, outputs)
    checks.check_outputs(reference_outputs, references)
    if not scoring.is_canonical(instructions):
        if empty := checks.count_empty(references, "output"):
            log.warning("%s: %d of %d reference outputs are empty", reference_outputs, empty, len(references))
        return outputs, references, None
    checks.check_references(reference_outputs, references)
    texts = [[row["output"] for row in rows] for rows in (outputs, references)]
    checks.check_lengths(answers, outputs[0]["generator"], *texts)
    return outputs, references, alpaca_eval_set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--answers", type=Path, required=True, help="the model's answers, in the format of alpaca-eval's model_outputs.json"
    )
    parser.add_argument("--reference-outputs", type=Path, required=True, help="the outputs to compare with, in the same format")
    parser.add_argument(
        "--alpaca-eval-set", type=Path, required=True, help="folder of df_gamed.csv, read for the canonical instructions only"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for annotations.json and metrics.json")


def main(args: argparse.Namespace) -> None:
    section = params.load("evaluate_alpaca").evaluate_alpaca
    outputs, references, length_control = read_inputs(args.answers, args.reference_outputs, args.alpaca_eval_set)
    if section.judge == "gold":
        gold.check_instructions(args.reference_outputs, [row["instruction"] for row in references])
    metrics, annotations = evaluate(outputs, references, section, length_control)
    checks.check_annotations(f"the annotations by {section.judge}", annotations, args.answers, outputs)
    if not length_control:
        metrics["length_controlled_absent"] = scoring.NOT_CANONICAL
    with files.replacing(args.out) as partial:
        files.write_json(annotations, partial / "annotations.json")
        files.write_json(metrics, partial / "metrics.json")
    log.info("win rate %.2f, standard error %.2f, judge %s", metrics["win_rate"], metrics["standard_error"], section.judge)

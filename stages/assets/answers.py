"""Provide a model's answers to AlpacaEval's instructions that exist already, after checking that none is missing."""

import argparse
from pathlib import Path

from stages.artifacts import files
from stages.judges.annotations import check_outputs
from stages.judges.scoring import Records
from stages.runtime.errors import StageError, quote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instructions", type=Path, required=True, help="instructions.json of the AlpacaEval set")
    parser.add_argument("--answers", type=Path, required=True, help="the answers, as in alpaca-eval's model_outputs.json")
    parser.add_argument("--out", type=Path, required=True, help="JSON of the answers, in the order of the instructions")


def main(args: argparse.Namespace) -> None:
    instructions = files.read_records(args.instructions, ["dataset", "instruction"])
    outputs = files.read_records(args.answers, ["instruction", "output", "generator"])
    check_outputs(args.answers, outputs)
    files.write_json(sort_outputs(args.answers, outputs, args.instructions, instructions), args.out)


def sort_outputs(path: Path, outputs: Records, instructions_path: Path, instructions: Records) -> Records:
    """Return one output per instruction, in the order of the instructions: dataset, instruction, output, generator.

    outputs: of one model, with distinct instructions. Raises StageError if an instruction has no output, or the other way
    round. The paths are those of the files, for the message.
    """
    known = {row["instruction"] for row in instructions}
    for index, row in enumerate(outputs):
        if row["instruction"] not in known:
            raise StageError(
                f"{path}: record {index}: 'instruction' does not occur in {instructions_path}: remove the record, or use the "
                "outputs of this set of instructions"
            )
    answers = {row["instruction"]: row for row in outputs}
    for index, row in enumerate(instructions):
        if row["instruction"] not in answers:
            raise StageError(
                f"{path}: no answer to record {index} of {instructions_path}, {quote(row['instruction'])}: add it, or use the "
                "outputs of this set of instructions"
            )
    ordered = [(row["dataset"], answers[row["instruction"]]) for row in instructions]
    return [{"dataset": name} | {key: row[key] for key in ("instruction", "output", "generator")} for name, row in ordered]

"""Answer the AlpacaEval instructions with a policy, as alpaca-eval's model_outputs.json, and the hold-out, as Parquet.

Without --hold-out and --out-hold-out, it answers the instructions only. Prompts of the hold-out that do not leave room for an
answer are left out, as in generate; every instruction must be answered.
"""

import argparse
from pathlib import Path

from stages.artifacts import files, schemas, tables
from stages.engines.answering import draw_answers, format_outputs, select_fitting
from stages.runtime import params
from stages.runtime.errors import StageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="name of the model, the generator in --out; part of every sample's seed")
    parser.add_argument("--model", type=Path, required=True, help="folder of the policy")
    parser.add_argument("--instructions", type=Path, required=True, help="instructions.json of the AlpacaEval set")
    parser.add_argument("--hold-out", type=Path, help="Parquet of the hold-out's prompts, from split")
    parser.add_argument("--out", type=Path, required=True, help="JSON of the answers to the instructions (model_outputs.json)")
    parser.add_argument("--out-hold-out", type=Path, help="Parquet of the responses to the hold-out")


def main(args: argparse.Namespace) -> None:
    if (args.hold_out is None) != (args.out_hold_out is None):
        raise StageError("--hold-out and --out-hold-out belong together: pass both or neither")
    settings = params.load("seed", "engine", "answer")
    instructions = files.read_records(args.instructions, ["dataset", "instruction"])
    texts = [row["instruction"] for row in instructions]
    if args.hold_out:  # both at once, so that vLLM starts only once
        hold_out = tables.read(args.hold_out, schemas.SPLIT)
        texts += select_fitting(args.model, hold_out, settings.engine.max_model_length, settings.answer)["prompt"].to_pylist()
    responses = draw_answers("answer", args.model, args.name, texts, settings.seed, settings.engine, settings.answer)
    files.write_json(format_outputs(args.name, instructions, responses.slice(0, len(instructions))), args.out)
    if args.out_hold_out:
        tables.write(responses.slice(len(instructions)), schemas.RESPONSES, args.out_hold_out)

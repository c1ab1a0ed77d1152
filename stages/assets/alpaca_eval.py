"""AlpacaEval's instructions and reference outputs: the canonical 805 from the Hub, or the miniature's own.

The miniature's reference outputs are a second draw of the base policy, so that the base itself wins about half.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from stages import answer, cli, domain, files, params
from stages.assets import hub

LENGTH_CONTROL = ["df_gamed.csv", "instruction_difficulty.csv"]
"""What the length-controlled win rate is fitted with, defined for the canonical instructions only."""


def asked(outputs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The instructions alone, a file of their own for split: they stay as they are where the base policy changes."""
    return [{"instruction": row["instruction"]} for row in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the base policy, which answers the miniature's reference")
    parser.add_argument(
        "out",
        type=Path,
        help="folder with reference_outputs.json, instructions.json and, for the canonical set, the files of LC",
    )
    args = parser.parse_args()
    wanted = params.load("seed", "engine", "answer", "assets.alpaca_eval")
    if wanted.alpaca_eval.made_here:
        try:
            prompts = domain.distinct_prompts(f"{wanted.seed}/evaluation", "evaluation", wanted.alpaca_eval.count)
        except ValueError as error:
            raise cli.StageError(f"assets.alpaca_eval.count: {error}") from error
        instructions = [{"dataset": "miniature", "instruction": prompt} for prompt in prompts]
        responses = answer.draw(args.model, "reference", prompts, wanted.seed, wanted.engine, wanted.answer)
        outputs = answer.outputs("reference", instructions, responses)
        with files.replacing(args.out) as partial:
            files.write_json(outputs, partial / "reference_outputs.json")
            files.write_json(asked(outputs), partial / "instructions.json")
        return
    reference = hub.fetch_file(wanted.alpaca_eval, "alpaca_eval_gpt4_baseline.json")
    outputs = files.read_records(reference, ["dataset", "instruction", "output", "generator"])
    with files.replacing(args.out) as partial:
        partial.mkdir()
        shutil.copyfile(reference, partial / "reference_outputs.json")
        files.write_json(asked(outputs), partial / "instructions.json")
        for name in LENGTH_CONTROL:
            shutil.copyfile(hub.fetch_file(wanted.alpaca_eval, name), partial / name)


if __name__ == "__main__":
    cli.run(main, online=True)

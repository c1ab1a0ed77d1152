"""Answer the AlpacaEval instructions with a policy: alpaca-eval's model_outputs.json."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import cli, files, params, sampling


def answers(
    model: Path, name: str, instructions: list[dict[str, str]], seed: int, engine: params.Engine, answer: params.Answer
) -> list[dict[str, Any]]:
    """One answer to each instruction, in alpaca-eval's form: dataset, instruction, output, generator.

    instructions: rows with the keys `dataset` and `instruction`. name: the generator's, and part of every sample's seed.
    """
    texts = [row["instruction"] for row in instructions]
    ids = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    part = pa.table({"prompt_id": ids, "prompt": texts}, schema=files.PART)
    draw = sampling.Sampling(
        samples=1,
        temperature=answer.temperature,
        top_p=answer.top_p,
        max_new_tokens=answer.max_new_tokens,
        seed=seed,
        name=f"answer/{name}",
    )
    table = sampling.respond("answer", part, model, engine, draw, answer.shard_size, leave_out=False)
    return [
        {"dataset": row["dataset"], "instruction": row["instruction"], "output": responses[0], "generator": name}
        for row, responses in zip(instructions, table.column("responses").to_pylist(), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="name of the model: the generator in model_outputs.json, part of every sample's seed")
    parser.add_argument("model", type=Path)
    parser.add_argument("alpaca_eval", type=Path, help="folder of the evaluation set, from assets")
    parser.add_argument("out", type=Path, help="model_outputs.json")
    args = parser.parse_args()
    wanted = params.load("seed", "engine", "answer")
    instructions = files.read_records(args.alpaca_eval / "reference_outputs.json", ["dataset", "instruction"])
    files.write_json(answers(args.model, args.name, instructions, wanted.seed, wanted.engine, wanted.answer), args.out)


if __name__ == "__main__":
    cli.run(main)

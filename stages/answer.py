"""Answer the AlpacaEval instructions and the hold-out with a policy: alpaca-eval's model_outputs.json, and Parquet."""

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import cli, files, params, sampling, schemas


def draw(model: Path, name: str, texts: list[str], seed: int, engine: params.Engine, answer: params.Answer) -> pa.Table:
    """One response to each of the texts, in their order. name: the generator's, and part of every sample's seed.

    Returns columns of schemas.RESPONSES; a text that is there twice is asked once.
    """
    distinct = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    ids = [schemas.prompt_id(text) for text in distinct]
    part = pa.table({"prompt_id": ids, "prompt": list(distinct)}, schema=schemas.PART)
    wanted = sampling.Sampling(
        samples=1,
        temperature=answer.temperature,
        top_p=answer.top_p,
        max_new_tokens=answer.max_new_tokens,
        seed=seed,
        name=f"answer/{name}",
    )
    responses = sampling.respond("answer", part, model, engine, wanted, answer.shard_size, leave_out=False)
    return responses.take([distinct[text] for text in texts])


def outputs(name: str, instructions: list[dict[str, str]], responses: pa.Table) -> list[dict[str, Any]]:
    """Answers in alpaca-eval's form: dataset, instruction, output, generator.

    instructions: rows with the keys `dataset` and `instruction`; responses: to them, in their order.
    """
    return [
        {"dataset": row["dataset"], "instruction": row["instruction"], "output": drawn[0], "generator": name}
        for row, drawn in zip(instructions, responses.column("responses").to_pylist(), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="name of the model: the generator in model_outputs.json, part of every sample's seed")
    parser.add_argument("model", type=Path)
    parser.add_argument("alpaca_eval", type=Path, help="folder of the evaluation set, from assets")
    parser.add_argument("hold_out", type=Path, help="Parquet of the hold-out's prompts, from split")
    parser.add_argument("out", type=Path, help="model_outputs.json")
    parser.add_argument("hold_out_out", type=Path, help="Parquet of the responses to the hold-out")
    args = parser.parse_args()
    wanted = params.load("seed", "engine", "answer")
    instructions = files.read_records(args.alpaca_eval / "reference_outputs.json", ["dataset", "instruction"])
    texts = [row["instruction"] for row in instructions] + files.read_table(args.hold_out, schemas.PART)["prompt"].to_pylist()
    responses = draw(args.model, args.name, texts, wanted.seed, wanted.engine, wanted.answer)  # together: one start of vLLM
    files.write_json(outputs(args.name, instructions, responses.slice(0, len(instructions))), args.out)
    files.write_table(responses.slice(len(instructions)), schemas.RESPONSES, args.hold_out_out)


if __name__ == "__main__":
    cli.run(main)

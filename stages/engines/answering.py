"""Answers of a policy: one response per text, and alpaca-eval's format of outputs."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import schemas
from stages.engines import sampling
from stages.runtime import params


def draw_answers(
    stage: str, model: Path, name: str, texts: list[str], seed: int, engine: params.Engine, answer: params.Answer
) -> pa.Table:
    """Sample one response to each of the texts and return a table of schemas.RESPONSES, in the same order.

    stage: the command whose scratch folder holds finished shards. name: the generator's name, part of every sample's seed.
    A text that occurs more than once is answered once. Raises StageError as `sampling.sample_responses` does.
    """
    distinct = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    ids = [schemas.prompt_id(text) for text in distinct]
    prompts = pa.table({"prompt_id": ids, "prompt": list(distinct)}, schema=schemas.SPLIT)
    single = sampling.Sampling(
        samples=1,
        temperature=answer.temperature,
        top_p=answer.top_p,
        max_new_tokens=answer.max_new_tokens,
        seed=seed,
        name=f"answer/{name}",
    )
    responses = sampling.sample_responses(stage, prompts, model, engine, single, answer.shard_size, skip_too_long=False)
    return responses.take([distinct[text] for text in texts])


def format_outputs(name: str, instructions: list[dict[str, str]], responses: pa.Table) -> list[dict[str, Any]]:
    """Format answers as rows of alpaca-eval's model_outputs.json: dataset, instruction, output, generator.

    name: the generator. instructions: rows with the keys `dataset` and `instruction`. responses: their answers, in the same
    order, as `draw_answers` returns them.
    """
    return [
        {"dataset": row["dataset"], "instruction": row["instruction"], "output": texts[0], "generator": name}
        for row, texts in zip(instructions, responses["responses"].to_pylist(), strict=True)
    ]

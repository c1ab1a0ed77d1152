"""Answers of a policy: one response per text, and alpaca-eval's format of outputs."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import pointers, schemas
from stages.engines import sampling
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.logs import log


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


def select_fitting(model: Path, prompts: pa.Table, max_model_length: int, answer: params.Answer) -> pa.Table:
    """Return the prompts of a hold-out that leave room for an answer within max_model_length tokens, as generate's do.

    prompts, and the result: tables of schemas.SPLIT. The prompts that are left out are counted in the log.
    Raises StageError if fewer than two are left, or if the model's tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pointers.check_model(model), trust_remote_code=False)
    tokenized = sampling.tokenize_prompts(tokenizer, prompts)
    fitting = sampling.select_fitting(tokenized, max_model_length, answer.max_new_tokens, skip_too_long=True)
    if fitting.num_rows < 2:
        raise StageError(
            f"only {fitting.num_rows} of the hold-out's {prompts.num_rows} prompts leaves room for {answer.max_new_tokens} "
            f"tokens within engine.max_model_length {max_model_length}: raise it or lower answer.max_new_tokens in params.yaml"
        )
    if left_out := prompts.num_rows - fitting.num_rows:
        log.warning("%d of %d prompts of the hold-out left out as too long for the engine", left_out, prompts.num_rows)
    return fitting.select(schemas.SPLIT.names)


def format_outputs(name: str, instructions: list[dict[str, str]], responses: pa.Table) -> list[dict[str, Any]]:
    """Format answers as rows of alpaca-eval's model_outputs.json: dataset, instruction, output, generator.

    name: the generator. instructions: rows with the keys `dataset` and `instruction`. responses: their answers, in the same
    order, as `draw_answers` returns them.
    """
    return [
        {"dataset": row["dataset"], "instruction": row["instruction"], "output": texts[0], "generator": name}
        for row, texts in zip(instructions, responses["responses"].to_pylist(), strict=True)
    ]

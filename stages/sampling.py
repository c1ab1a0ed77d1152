"""Sampling from a policy with vLLM, for generate and answer alike: one request per prompt, a seed per sample."""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages import chat, cli, files, params, pointers, schemas, shards
from stages.cli import StageError

MEMORY = "lower engine.kv_cache_gib (null leaves nine tenths of the GPU to it) or engine.max_model_length"


@dataclass(frozen=True)
class Sampling:
    """What is drawn: `samples` responses a prompt, seeded by (seed, name, prompt_id, sample)."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    name: str
    """Whose draw it is, an iteration's for example: the same prompt gets other seeds under another name."""


def sample_seed(seed: int, name: str, prompt_id: str) -> int:
    """The seed of a prompt's first sample; sample k has the k-th after it (that is how vLLM seeds the samples of a request).

    56 bits of a hash: two prompts' runs of seeds do not meet, and neither device nor order enters.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{prompt_id}".encode()).digest()[:7], "big")


def respond(
    stage: str, part: pa.Table, model: Path, engine: params.Engine, sampling: Sampling, shard_size: int, *, leave_out: bool
) -> pa.Table:
    """Draw responses to every prompt of a table of schemas.PART and return a table of schemas.RESPONSES, in the same order.

    stage: whose scratch folder holds finished shards. leave_out: whether prompts that leave no room for max_new_tokens
    within engine.max_model_length are left out and counted in the log. Otherwise their responses may be shorter.
    Raises StageError for a prompt that leaves no room at all.
    """
    from transformers import AutoTokenizer

    local = pointers.model(model)
    tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=False)
    beyond = [token for token in engine.stop_token_ids if token >= len(tokenizer)]
    if beyond:
        raise StageError(
            f"engine.stop_token_ids: {beyond[0]} is no token of {model}, which has {len(tokenizer)}: correct it in params.yaml"
        )
    prompts = part.column("prompt").to_pylist()
    texts = [chat.prompt_text(tokenizer, prompt) for prompt in prompts]
    prompt_ids = [chat.text_ids(tokenizer, text) for text in texts]
    room = sampling.max_new_tokens if leave_out else 1
    fits = [len(ids) + room <= engine.max_model_length for ids in prompt_ids]
    if not leave_out and not all(fits):
        row = fits.index(False)
        raise StageError(
            f"prompt {part.column('prompt_id')[row]} has {len(prompt_ids[row])} tokens: "
            f"engine.max_model_length {engine.max_model_length} leaves no room to answer; raise it"
        )
    if not any(fits):
        raise StageError(
            f"no prompt leaves room for {room} tokens in engine.max_model_length {engine.max_model_length}: raise it"
        )
    cli.log.info("%d prompts, %d left out as too long for the engine", sum(fits), len(fits) - sum(fits))
    if marked := chat.marked(tokenizer, prompt_ids):
        cli.log.info("%d prompts hold special tokens as text, which count as such, as in the released code", marked)
    tokenized = part.append_column("templated_prompt", pa.array(texts))
    tokenized = tokenized.append_column("prompt_token_ids", pa.array(prompt_ids, pa.list_(pa.int32()))).filter(pa.array(fits))
    key = {
        "model": files.digest(model),
        "prompts": hashlib.sha256("".join(tokenized.column("prompt_id").to_pylist()).encode()).hexdigest(),
        "engine": engine.model_dump(),
        "sampling": vars(sampling),
    }
    table = shards.map_shards(stage, tokenized, shard_size, load, (local, engine, sampling), schemas.RESPONSES, key)
    counts, reasons = (pc.list_flatten(table[name]) for name in ("token_counts", "finish_reasons"))
    cut = pc.sum(pc.equal(reasons, "length")).as_py()
    cli.log.info("%d responses, %d tokens, %d cut at the limit", len(counts), pc.sum(counts).as_py(), cut)
    return table


def not_started(error: Exception, engine: params.Engine) -> str:
    """Why vLLM did not start, by its own message, and the parameter that mends it."""
    text = str(error)
    if "KV cache" in text or "cache blocks" in text:
        return (
            f"too little memory for keys and values: raise engine.kv_cache_gib (now {engine.kv_cache_gib}), or lower "
            f"engine.max_model_length (now {engine.max_model_length})"
        )
    if "max_model_len" in text:
        return f"engine.max_model_length {engine.max_model_length} is more than the model has positions: lower it"
    return f"vLLM does not start ({cli.reason(error)}): see engine in params.yaml, and the model"


def load(model: Path, engine: params.Engine, sampling: Sampling) -> Callable[[pa.Table], pa.Table]:
    """Start vLLM on this process's device. Returns the function that answers one shard of tokenized prompts."""
    return answering(start(model, engine, sampling.seed), engine, sampling)


def start(model: Path, engine: params.Engine, seed: int) -> Any:
    """vLLM's LLM on this process's device. Raises StageError where it does not start."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: nothing reorders its requests
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for name, value in (("VLLM_HOST_IP", "127.0.0.1"), ("GLOO_SOCKET_IFNAME", "lo")):  # nothing listens to other machines
        os.environ.setdefault(name, value)
    import torch

    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # that there is no Triton without a GPU is known
    from vllm import LLM

    settings: dict[str, Any] = {"use_tqdm_on_load": False}
    if engine.kv_cache_gib is not None:
        settings["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    if not torch.cuda.is_available():
        # Per-request seeds fail on the processor with chunked prefill; eager saves a compilation that does not pay here; the
        # K samples share their prompt's whole blocks of keys and values only, and 128, the default, holds most prompts.
        settings |= {
            "block_size": 32,
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": engine.max_model_length * 8,
        }
    try:
        with cli.within_memory(MEMORY):
            return LLM(
                model=str(model),
                dtype=engine.dtype,
                max_model_len=engine.max_model_length,
                seed=seed,
                load_format="safetensors",
                trust_remote_code=False,
                **settings,
            )
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise StageError(f"{model}: {not_started(error, engine)}") from error


def answering(llm: Any, engine: params.Engine, sampling: Sampling) -> Callable[[pa.Table], pa.Table]:
    """The function of one shard of tokenized prompts, by a started LLM."""
    from vllm import SamplingParams

    def answer(shard: pa.Table) -> pa.Table:
        rows = shard.to_pylist()
        seeds = [sample_seed(sampling.seed, sampling.name, row["prompt_id"]) for row in rows]
        requests = [
            SamplingParams(
                n=sampling.samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=engine.stop_token_ids,
                seed=seed,
            )
            for seed in seeds
        ]
        with cli.within_memory(MEMORY):
            outputs = llm.generate([{"prompt_token_ids": row["prompt_token_ids"]} for row in rows], requests, use_tqdm=False)
        for row, seed, output in zip(rows, seeds, outputs, strict=True):
            drawn = sorted(output.outputs, key=lambda sample: sample.index)
            row["responses"] = [sample.text for sample in drawn]
            row["token_ids"] = [list(sample.token_ids) for sample in drawn]
            row["token_counts"] = [len(sample.token_ids) for sample in drawn]
            row["finish_reasons"] = [sample.finish_reason for sample in drawn]
            row["seeds"] = [seed + sample.index for sample in drawn]
        return pa.Table.from_pylist(rows, schema=schemas.RESPONSES)

    return answer

"""Sample from a policy with vLLM, for both generate and answer: one request per prompt, one seed per sample."""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.artifacts import files, models, schemas, shards
from stages.engines import numerics
from stages.method import chat
from stages.runtime import cluster, params
from stages.runtime.devices import explain_out_of_memory
from stages.runtime.errors import StageError, describe, one_line
from stages.runtime.logs import log

LOWEST_TEMPERATURE = 0.01
"""vLLM replaces a lower temperature by it, unless it is 0: greedy decoding."""
LESS_MEMORY = "lower engine.kv_cache_gib (null: what is left of engine.gpu_memory_utilization) or engine.max_model_length"
CAPABILITY = 8
"""The lowest compute capability, major, for which vLLM has batch-invariant kernels."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: `samples` responses per prompt, seeded by (seed, name, prompt_id, sample)."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    """The longest response, in tokens."""
    seed: int
    name: str
    """What the samples are for, such as an iteration's name: with another name, the same prompt gets different seeds."""


def sample_seed(seed: int, name: str, prompt_id: str) -> int:
    """Return the seed of a prompt's first sample; sample k uses this seed + k, as vLLM seeds the samples of one request.

    The seed is 56 bits of a hash: the seeds of two prompts do not overlap, and depend on neither device nor order.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{prompt_id}".encode()).digest()[:7], "big")


def sample_responses(
    stage: str,
    prompts: pa.Table,
    model: Path,
    engine: params.Engine,
    sampling: Sampling,
    shard_size: int,
    *,
    skip_too_long: bool,
) -> pa.Table:
    """Sample responses to a table of schemas.SPLIT and return a table of schemas.RESPONSES, in the same order.

    stage: the command whose scratch folder holds finished shards. skip_too_long: whether to leave out (and count in the log)
    the prompts that do not leave room for max_new_tokens within engine.max_model_length; if not, their responses may be
    shorter. Raises StageError if vLLM cannot load the model or keep to the temperature, as `models.check_policy` does, if a
    prompt leaves no room at all, or if every prompt is left out.
    """
    from transformers import AutoTokenizer

    check_temperature(sampling)
    local = models.check_policy(model)
    tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=False)
    check_stop_tokens(engine, len(tokenizer), model)
    tokenized = tokenize_prompts(tokenizer, prompts)
    kept = select_fitting(tokenized, engine.max_model_length, sampling.max_new_tokens, skip_too_long=skip_too_long)
    log.info("%d prompts, %d left out as too long for the engine", kept.num_rows, tokenized.num_rows - kept.num_rows)
    if count := chat.count_special_tokens(tokenizer, tokenized["prompt_token_ids"].to_pylist()):
        log.info("%d prompts contain special tokens as text, which are tokenized as such, as in the released code", count)
    key = {
        "model": files.digest(model),
        "prompts": hash_prompts(kept),
        "engine": engine.model_dump(exclude={"gpu_memory_utilization"}),
        "sampling": vars(sampling),
    }
    arguments = (local, engine, sampling)
    responses = shards.map_shards(
        stage, kept, shard_size, load_sampler, arguments, schemas.RESPONSES, key, gpus=engine.tensor_parallel
    )
    log_lengths(responses)
    return responses


def check_temperature(sampling: Sampling) -> None:
    """Raise StageError if vLLM would sample at another temperature, or decode greedily and give the same response K times."""
    if sampling.temperature == 0 and sampling.samples > 1:
        raise StageError(
            f"a temperature of 0 gives the same response {sampling.samples} times: raise generate.temperature in params.yaml"
        )
    if 0 < sampling.temperature < LOWEST_TEMPERATURE:
        raise StageError(
            f"the temperature is {sampling.temperature}, which vLLM would raise to {LOWEST_TEMPERATURE}: set it to at least "
            "that in params.yaml (answer.temperature may also be 0: greedy decoding)"
        )


def hash_prompts(tokenized: pa.Table) -> str:
    """Hash what the model reads. tokenized: a table of `tokenize_prompts`."""
    total = hashlib.sha256()
    for row in tokenized.select(["prompt_id", "templated_prompt", "prompt_token_ids"]).to_pylist():
        total.update(json.dumps(row, sort_keys=True).encode())
    return total.hexdigest()


def check_stop_tokens(engine: params.Engine, vocabulary: int, model: Path) -> None:
    """Raise StageError if one of engine.stop_token_ids is not below the number of tokens in the model's vocabulary."""
    invalid = [token for token in engine.stop_token_ids if token >= vocabulary]
    if invalid:
        raise StageError(
            f"engine.stop_token_ids: {invalid[0]} is not a token of {model} (vocabulary size {vocabulary}): correct it in "
            "params.yaml"
        )


def tokenize_prompts(tokenizer: Any, prompts: pa.Table) -> pa.Table:
    """Append `templated_prompt` and `prompt_token_ids` to a table with the column `prompt`. Raises StageError as chat does."""
    texts = chat.prompt_texts(tokenizer, prompts["prompt"].to_pylist())
    token_ids = [chat.text_ids(tokenizer, text) for text in texts]
    templated = prompts.append_column("templated_prompt", pa.array(texts, pa.string()))
    return templated.append_column("prompt_token_ids", pa.array(token_ids, pa.list_(pa.int32())))


def select_fitting(prompts: pa.Table, max_model_length: int, max_new_tokens: int, *, skip_too_long: bool) -> pa.Table:
    """Select the rows that leave room for max_new_tokens within max_model_length; see `sample_responses`.

    prompts: a table with the columns `prompt_id` and `prompt_token_ids`. Raises StageError if no row fits and, without
    skip_too_long, if any row does not leave room for a single token.
    """
    remedy = (
        f"engine.max_model_length {max_model_length}: raise it in params.yaml or, at the model's own limit, use another model"
    )
    room = max_new_tokens if skip_too_long else 1
    lengths = pc.list_value_length(prompts["prompt_token_ids"])
    fits = [length + room <= max_model_length for length in lengths.to_pylist()]
    if not skip_too_long and not all(fits):
        row = fits.index(False)
        raise StageError(
            f"prompt {prompts['prompt_id'][row]} has {lengths[row]} tokens, which leaves no room to answer within {remedy}"
        )
    if not any(fits):
        raise StageError(f"no prompt leaves room for {room} tokens within {remedy}")
    return prompts.filter(pa.array(fits))


def log_lengths(responses: pa.Table) -> None:
    """Log the number of responses, of tokens, and of responses truncated at the limit."""
    counts, reasons = (pc.list_flatten(responses[name]) for name in ("token_counts", "finish_reasons"))
    truncated = pc.sum(pc.equal(reasons, "length")).as_py()
    log.info("%d responses, %d tokens, %d truncated at the limit", len(counts), pc.sum(counts).as_py(), truncated)


def load_sampler(model: Path, engine: params.Engine, sampling: Sampling) -> Callable[[pa.Table], pa.Table]:
    """Start vLLM on this process's device. Returns a function that samples responses to one shard; see `sample_shard`."""
    return functools.partial(sample_shard, start_engine(model, engine, sampling.seed), engine, sampling)


def start_engine(model: Path, engine: params.Engine, seed: int) -> Any:
    """Start a vLLM `LLM` on this process's devices. Raises StageError if it does not start."""
    set_variables(engine)
    import torch

    on_gpu = torch.cuda.is_available()
    if engine.batch_invariant and not (on_gpu and torch.cuda.get_device_capability()[0] >= CAPABILITY):
        raise StageError(
            f"engine.batch_invariant is true, which needs an NVIDIA GPU of compute capability {CAPABILITY}.0 or higher, and "
            f"this is {torch.cuda.get_device_name() if on_gpu else 'a CPU'}: set it to false"
        )
    numerics.restrict_vllm()
    cluster.hide_ray()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # hide its warning that a CPU has no Triton
    from vllm import LLM

    gc.freeze()  # vLLM collects garbage several times while it starts, and would scan every object of the imports each time
    settings: dict[str, Any] = {"use_tqdm_on_load": False}
    if engine.kv_cache_gib is not None:
        settings["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    if not on_gpu:
        # On a CPU, per-request seeds fail with chunked prefill, and compilation costs more than it saves. The K samples of
        # a prompt share only its full blocks of the KV cache, and most prompts are shorter than one default block of 128.
        settings |= {"block_size": 32, "enforce_eager": True, "enable_chunked_prefill": False}
    try:
        with explain_out_of_memory(LESS_MEMORY):
            return LLM(
                model=str(model),
                dtype=engine.dtype,
                max_model_len=engine.max_model_length,
                max_num_seqs=engine.max_num_seqs,
                max_num_batched_tokens=engine.max_num_batched_tokens,
                gpu_memory_utilization=engine.gpu_memory_utilization,
                tensor_parallel_size=engine.tensor_parallel,
                seed=seed,
                load_format="safetensors",
                trust_remote_code=False,
                **settings,
            )
    except StageError:
        raise
    except Exception as error:  # a process of vLLM's for another GPU fails with no narrower class
        raise StageError(f"{model}: {explain_failed_start(error, engine)}") from error


def set_variables(engine: params.Engine) -> None:
    """Set the environment variables that vLLM reads when it is imported, or later."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # run the engine in this process, where nothing reorders requests
    os.environ["VLLM_RAISE_ON_LOGIT_NANS"] = "1"  # otherwise it samples token 0 from NaN, and calls that a response
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(engine.batch_invariant))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    loopback = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}  # not open to other machines
    if engine.tensor_parallel > 1:
        loopback["NCCL_SOCKET_IFNAME"] = "lo"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # CUDA does not survive a fork
        # vLLM starts a process for each GPU, which Python refuses in a worker that is a daemon. They end when this one does.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    for name, value in loopback.items():
        os.environ.setdefault(name, value)


def explain_failed_start(error: Exception, engine: params.Engine) -> str:
    """Explain why vLLM did not start, from its error message, and name the parameter to change."""
    text = str(error)
    utilization = f"engine.gpu_memory_utilization (now {engine.gpu_memory_utilization})"
    length = f"engine.max_model_length (now {engine.max_model_length})"
    if re.match("(Free|Available) memory on ", text):  # before anything is loaded
        return (
            f"other programs use so much memory that {utilization} of it is not free ({one_line(text.partition('. ')[0])}): "
            "lower it, end them, or choose other GPUs with CUDA_VISIBLE_DEVICES"
        )
    if "KV cache" in text or "cache blocks" in text:
        cache = f"engine.kv_cache_gib (now {engine.kv_cache_gib})"
        raised = utilization if engine.kv_cache_gib is None else cache
        return f"too little memory for the KV cache: raise {raised}, or lower {length}"
    if ("max_num_seqs" in text and "memory" in text) or "out of memory" in text:  # while the first batch is tried
        return f"out of GPU memory: lower engine.max_num_seqs (now {engine.max_num_seqs}) or {utilization}"
    if "max_num_batched_tokens" in text:
        return (
            f"engine.max_num_batched_tokens {engine.max_num_batched_tokens} is too small, on a CPU below {length}: raise the "
            "first or lower the second"
        )
    if "max_model_len" in text:
        return f"engine.max_model_length {engine.max_model_length} exceeds the model's maximum length: lower it"
    return f"vLLM failed to start ({describe(error)}): check the model and the section engine of params.yaml"


@contextlib.contextmanager
def explain_failure(llm: Any) -> Iterator[None]:
    """Raise StageError where, within the block, vLLM notices logits that are NaN, or a process of its own runs out of memory.
    llm: from `start_engine`."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise StageError(f"out of GPU memory: {LESS_MEMORY}") from error
        if "NaNs detected in logits" not in str(error):
            raise
        raise StageError(
            f"{llm.model_config.model}: logits are NaN: check the numbers in its config.json, and its weights (`make verify`), "
            "or use another model"
        ) from error


def sample_shard(llm: Any, engine: params.Engine, sampling: Sampling, shard: pa.Table) -> pa.Table:
    """Sample responses to one shard of tokenized prompts and return a table of schemas.RESPONSES.

    llm: from `start_engine`. shard: the columns of schemas.SPLIT, `templated_prompt` and `prompt_token_ids`. Raises
    StageError if the GPU runs out of memory, or if a logit is NaN.
    """
    from vllm import SamplingParams

    # Otherwise the results would depend, in the last digits, on the shards sampled before.
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not empty its prefix cache before a shard: requests of another shard are not finished")
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
    with explain_out_of_memory(LESS_MEMORY), explain_failure(llm):
        outputs = llm.generate([{"prompt_token_ids": row["prompt_token_ids"]} for row in rows], requests, use_tqdm=False)
    for row, seed, output in zip(rows, seeds, outputs, strict=True):
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        row["responses"] = [sample.text for sample in samples]
        row["token_ids"] = [list(sample.token_ids) for sample in samples]
        row["token_counts"] = [len(sample.token_ids) for sample in samples]
        row["finish_reasons"] = [sample.finish_reason for sample in samples]
        row["seeds"] = [seed + sample.index for sample in samples]
    return pa.Table.from_pylist(rows, schema=schemas.RESPONSES)

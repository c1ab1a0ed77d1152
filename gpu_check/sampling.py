"""vLLM: a shard's bytes do not depend on what was sampled before, and tokens per second."""

import hashlib
import importlib.util
import json
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import train as benchmark
from gpu_check import rows
from gpu_check import sizes as check
from stages.engines import sampling
from stages.runtime import params


def make_shard(name: str, size: check.Sampling) -> pa.Table:
    """Make a shard of prompts of random tokens, all with the same beginning, which the engine's prefix cache could keep."""
    rng = random.Random(name)
    start = random.Random("beginning")
    shared = [start.randrange(3, size.model.vocabulary) for _ in range(size.prompt_tokens // 2)]
    prompts = [
        {
            "prompt_id": f"{name} {index}",
            "prompt": "",
            "templated_prompt": "",
            "prompt_token_ids": shared + [rng.randrange(3, size.model.vocabulary) for _ in range(size.prompt_tokens // 2)],
        }
        for index in range(size.prompts)
    ]
    return pa.Table.from_pylist(prompts)


def make_draw(size: check.Sampling) -> sampling.Sampling:
    """Return the stage's settings of sampling."""
    return sampling.Sampling(
        samples=size.samples, temperature=1.0, top_p=1.0, max_new_tokens=size.new_tokens, seed=0, name="check"
    )


def digest(table: pa.Table) -> str:
    """Hash the rows of a table."""
    return hashlib.sha256(json.dumps(table.to_pylist()).encode()).hexdigest()


def sample_timed(llm: Any, engine: params.Engine, draw: sampling.Sampling, shard: pa.Table) -> tuple[pa.Table, float]:
    """Sample responses to a shard. Returns them, and their tokens per second."""
    start = time.perf_counter()
    responses = sampling.sample_shard(llm, engine, draw, shard)
    return responses, sum(map(sum, responses["token_counts"].to_pylist())) / (time.perf_counter() - start)


def run(sizes: check.Sizes, folder: Path, limits: dict[str, float], rehearsal: bool) -> None:
    """Run this part. limits: not used."""
    what = "generate: the same shard first, and after another"
    if importlib.util.find_spec("vllm") is None:
        rows.report(rows.skip(what, "vllm is not installed"))
        return
    size = sizes.sampling
    benchmark.make_model(size.model.vocabulary, size.model.shape(), "bfloat16", folder / "model")
    engine, draw = size.engine(), make_draw(size)
    llm = sampling.start_engine(folder / "model", engine, draw.seed)
    shards = [make_shard(name, size) for name in ("one", "other", "one")]
    (first, _), _, (again, speed) = (sample_timed(llm, engine, draw, shard) for shard in shards)
    tokens = sum(map(sum, again["token_counts"].to_pylist()))
    rows.report(
        rows.same_bytes(f"{what} ({size.prompts} prompts, {tokens} tokens)", map(digest, (first, again))),
        rows.judge_on_gpu(
            rows.measure(f"generate, {size.model.parameters() / 1e9:.2g}B parameters: speed", f"{speed:.0f} tokens/s"),
            rehearsal,
        ),
    )

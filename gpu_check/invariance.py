"""vLLM with engine.batch_invariant: a shard's bytes do not depend on what is sampled in the same batch.

A part of its own, because vLLM takes this setting once in a process.
"""

import importlib.util
from pathlib import Path

import pyarrow as pa

from benchmarks import train as benchmark
from gpu_check import rows
from gpu_check import sampling as shards
from gpu_check.sizes import Sizes
from stages.engines import sampling

WHAT = "generate, engine.batch_invariant: the same shard alone, within a larger one, and alone again"


def find_obstacle() -> str:
    """Return why vLLM's batch-invariant kernels cannot run here, empty if they can."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    import torch

    needed = f"needs an NVIDIA GPU of compute capability {sampling.CAPABILITY}.0 or higher"
    if not torch.cuda.is_available():
        return needed
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= sampling.CAPABILITY else f"{needed}, and this one has {major}.{minor}"


def run(sizes: Sizes, folder: Path, limits: dict[str, float], rehearsal: bool) -> None:
    """Run this part. limits: not used."""
    if obstacle := find_obstacle():
        rows.report(rows.skip(WHAT, obstacle))
        return
    size = sizes.sampling
    benchmark.make_model(size.model.vocabulary, size.model.shape(), "bfloat16", folder / "model")
    engine, draw = size.engine(batch_invariant=True), shards.make_draw(size)
    llm = sampling.start_engine(folder / "model", engine, draw.seed)
    shard, other = (shards.make_shard(name, size) for name in ("one", "other"))
    alone = sampling.sample_shard(llm, engine, draw, shard)
    larger = sampling.sample_shard(llm, engine, draw, pa.concat_tables([other, shard]))
    within = larger.slice(other.num_rows)
    again, speed = shards.sample_timed(llm, engine, draw, shard)
    rows.report(
        rows.same_bytes(f"{WHAT} ({shard.num_rows} of {larger.num_rows} prompts)", map(shards.digest, (alone, within, again))),
        rows.judge_on_gpu(
            rows.measure("generate, engine.batch_invariant: speed, to compare with generate's", f"{speed:.0f} tokens/s"),
            rehearsal,
        ),
    )

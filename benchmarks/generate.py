"""generate against vLLM called in two other ways, in responses per second: (a) the released code's K passes and (b) an upper
bound, the bare engine.

One engine, started as the stage starts it, serves all sides in turn; its prefix cache is emptied before each. Ours takes a
shard of prompts and writes a Parquet file with K responses per prompt, as shards.map_shards does. The released code makes K
passes over the prompts, with one response per prompt and one seed per pass. The bare engine gets the same requests as ours and
returns vLLM's own objects, which are discarded. The model is a random Llama (hidden size 128, 4 layers), prompts are about as
long as most of UltraFeedback's, and all responses have the maximum length, because a random model does not stop.
"""

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import texts
from benchmarks.measure import Comparison, compare_rates, report, time_in_turn
from stages.artifacts import schemas, tables
from stages.engines import sampling
from stages.method import seeding
from stages.miniature import policy
from stages.runtime import params
from stages.runtime.paths import ROOT

WORDS = 90
"""Average words of a prompt."""
PROMPTS = 24, 48
"""Sizes of a shard."""


def make_model(out: Path, examples: list[tuple[str, str]]) -> Any:
    """Write a Llama with random weights and a tokenizer for these prompts and responses. Returns the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = policy.make_tokenizer(examples, 2000)
    seeding.make_deterministic(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=policy.CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return tokenizer


def make_shard(tokenizer: Any, count: int) -> pa.Table:
    """Make a shard of `count` prompts as the stage does."""
    rng = random.Random(count)
    prompts = [texts.make_text(rng, texts.draw_length(rng, WORDS)) for _ in range(count)]
    ids = [schemas.prompt_id(prompt) for prompt in prompts]
    return sampling.tokenize_prompts(tokenizer, pa.table({"prompt_id": ids, "prompt": prompts}, schema=schemas.SPLIT))


def run_stage(llm: Any, shard: pa.Table, engine: params.Engine, draw: sampling.Sampling, out: Path) -> None:
    """Run our side: sample and write one shard."""
    llm.reset_prefix_cache()
    tables.write(sampling.sample_shard(llm, engine, draw, shard), schemas.RESPONSES, out)


def run_requests(llm: Any, prompts: list[dict[str, Any]], passes: list[Any]) -> None:
    """Run a baseline: one pass over the prompts for each request, or list of requests, in `passes`."""
    llm.reset_prefix_cache()
    for requests in passes:
        llm.generate(prompts, requests, use_tqdm=False)


def make_sides(
    llm: Any, shard: pa.Table, engine: params.Engine, draw: sampling.Sampling, out: Path
) -> dict[str, Callable[[], None]]:
    """Return the three sides: ours, passes (the released code's) and bare (the engine alone)."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in shard["prompt_token_ids"].to_pylist()]
    common = {"temperature": draw.temperature, "top_p": draw.top_p, "max_tokens": draw.max_new_tokens}
    seeds = [sampling.sample_seed(draw.seed, draw.name, prompt_id) for prompt_id in shard["prompt_id"].to_pylist()]
    passes = [SamplingParams(seed=50 * sample, **common) for sample in range(draw.samples)]
    bare = [SamplingParams(n=draw.samples, seed=seed, **common) for seed in seeds]
    return {
        "ours": functools.partial(run_stage, llm, shard, engine, draw, out),
        "passes": functools.partial(run_requests, llm, prompts, passes),
        "bare": functools.partial(run_requests, llm, prompts, [bare]),
    }


def compare(llm: Any, shard: pa.Table, engine: params.Engine, draw: sampling.Sampling, out: Path) -> list[Comparison]:
    """Compare ours with both baselines. out: the Parquet file that ours writes."""
    seconds = time_in_turn(make_sides(llm, shard, engine, draw, out))
    size = f"{shard.num_rows} prompts, {draw.samples} responses of {draw.max_new_tokens} tokens"
    count = shard.num_rows * draw.samples
    return [
        compare_rates(f"responses per second, against {label}", size, count, seconds["ours"], seconds[name], target)
        for name, label, target in (
            ("passes", "one pass per response, as in the released code", ">= 1.3"),
            ("bare", "the bare engine", ">= 0.95"),
        )
    ]


def main() -> None:
    settings = params.load("engine", "generate", path=ROOT / "params.yaml")
    draw = sampling.Sampling(
        samples=settings.generate.samples,
        temperature=settings.generate.temperature,
        top_p=settings.generate.top_p,
        max_new_tokens=settings.generate.max_new_tokens,
        seed=0,
        name="benchmark",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = random.Random(0)
        examples = [(texts.make_text(rng, 60), texts.make_text(rng, 60)) for _ in range(500)]
        tokenizer = make_model(folder / "model", examples)
        llm = sampling.start_engine(folder / "model", settings.engine, draw.seed)
        for count in PROMPTS:
            report(compare(llm, make_shard(tokenizer, count), settings.engine, draw, folder / "responses.parquet"))


if __name__ == "__main__":
    main()

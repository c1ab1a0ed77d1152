"""generate against vLLM without it, in responses a second: as the released code calls it, and as nobody could call it sooner.

One engine, started as the stage starts it, serves all sides in turn; its prefix cache is emptied before each. Here a shard
of prompts goes in and a Parquet file of K responses to each comes out, as shards.map_shards has it done. The released code
makes K passes over the prompts, one response and one seed a pass. The bare engine gets the requests of this repository and
gives vLLM's own objects, which nothing reads. The model is a random Llama (hidden size 128, 4 layers), prompts are as long as
UltraFeedback's mostly are, and the responses all as long as they may be: a random model does not stop.
"""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import texts
from benchmarks.measure import Figure, figure, in_turn, report
from stages import chat, cli, files, params, sampling, schemas
from stages.assets import policy

WORDS = 90
"""Of a prompt, about."""


def make(out: Path) -> Any:
    """Write a Llama with random weights and its tokenizer, which is returned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    draw = random.Random(0)
    tokenizer = policy.make_tokenizer([(texts.text(draw, 60), texts.text(draw, 60)) for _ in range(500)], 2000)
    cli.deterministic(0)
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


def tokenized(tokenizer: Any, count: int) -> pa.Table:
    """A shard as sampling.respond makes it."""
    draw = random.Random(count)
    prompts = [texts.text(draw, texts.around(draw, WORDS)) for _ in range(count)]
    templated = [chat.prompt_text(tokenizer, prompt) for prompt in prompts]
    return pa.table(
        {
            "prompt_id": [schemas.prompt_id(prompt) for prompt in prompts],
            "prompt": prompts,
            "templated_prompt": templated,
            "prompt_token_ids": pa.array([chat.text_ids(tokenizer, text) for text in templated], pa.list_(pa.int32())),
        }
    )


def sides(
    llm: Any, shard: pa.Table, engine: params.Engine, wanted: sampling.Sampling, out: Path
) -> dict[str, Callable[[], Any]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in shard.column("prompt_token_ids").to_pylist()]
    common = {"temperature": wanted.temperature, "top_p": wanted.top_p, "max_tokens": wanted.max_new_tokens}
    seeds = [sampling.sample_seed(wanted.seed, wanted.name, prompt_id) for prompt_id in shard.column("prompt_id").to_pylist()]
    answer = sampling.answering(llm, engine, wanted)

    def generate(asked: Any) -> Any:
        return llm.generate(prompts, asked, use_tqdm=False)

    def ours() -> None:
        llm.reset_prefix_cache()
        files.write_table(answer(shard), schemas.RESPONSES, out)

    def passes() -> None:
        llm.reset_prefix_cache()
        for sample in range(wanted.samples):
            generate(SamplingParams(seed=50 * sample, **common))

    def bare() -> None:
        llm.reset_prefix_cache()
        generate([SamplingParams(n=wanted.samples, seed=seed, **common) for seed in seeds])

    return {"ours": ours, "passes": passes, "bare": bare}


def compared(llm: Any, shard: pa.Table, engine: params.Engine, wanted: sampling.Sampling, out: Path) -> list[Figure]:
    seconds = in_turn(sides(llm, shard, engine, wanted, out))
    size = f"{shard.num_rows} prompts, {wanted.samples} responses of {wanted.max_new_tokens} tokens"
    count = shard.num_rows * wanted.samples
    return [
        figure(f"responses a second, against {against}", size, count, seconds["ours"], seconds[name], aim)
        for name, against, aim in (
            ("passes", "a pass a response, as in the released code", ">= 1.3"),
            ("bare", "the bare engine", ">= 0.95"),
        )
    ]


def main() -> None:
    read = params.load("engine", "generate", path=cli.ROOT / "params.yaml")
    engine, generate = read.engine, read.generate
    wanted = sampling.Sampling(
        samples=generate.samples,
        temperature=generate.temperature,
        top_p=generate.top_p,
        max_new_tokens=generate.max_new_tokens,
        seed=0,
        name="benchmark",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make(folder / "model")
        llm = sampling.start(folder / "model", engine, wanted.seed)
        figures = [
            one
            for count in (24, 48)
            for one in compared(llm, tokenized(tokenizer, count), engine, wanted, folder / "responses.parquet")
        ]
    report(figures)


if __name__ == "__main__":
    main()

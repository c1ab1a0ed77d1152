"""What a GPU reaches of its limit: train at the shapes of 1B and 8B models, vLLM, and PairRM. Skipped without a GPU.

Weights are random, in bfloat16, with gradient checkpointing in training. The limit is what a product of two matrices of
8192 x 8192 reaches here in bfloat16; the ratio is the share of it that the model's own operations are, without those that
gradient checkpointing does again (model FLOPs utilisation). PairRM's choices in half precision are held against float32's.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks import train as training
from stages import cli

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
"""Llama 3's, both with 32 heads and 8 of keys and values."""
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 128256
DEBERTA = 1024, 24
"""Width and layers of DeBERTa-v3-large."""
BATCH = 8
LENGTH = 1024
PROMPTS = 128


def limit(side: int = 8192) -> float:
    """FLOP/s of a product of two square matrices in bfloat16, the median of the rounds."""
    import torch

    one, other = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    seconds = []
    for _ in range(measure.ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            one @ other
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 50)
    return 2 * side**3 / statistics.median(seconds[1:])


def of_limit(subject: str, size: str, rates: list[float], peak: float) -> measure.Figure:
    """The figure of each round's FLOP/s."""
    ratios = [rate / peak for rate in rates]
    return measure.of_rounds(f"{subject}, TFLOP/s of the limit", size, [rate / 1e12 for rate in rates], [peak / 1e12], ratios)


def forward_flops(pairs: list[dict[str, Any]], shape: dict[str, int], vocabulary: int) -> float:
    """Of a forward pass over packed pairs: each text once, its causal attention, and logits of response tokens only."""
    width, head = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    attention = width * (2 * width + 2 * head * shape["num_key_value_heads"])
    layer = attention + 3 * width * shape["intermediate_size"]
    total = 0.0
    for pair in pairs:
        prompt, *responses = (len(pair[f"{part}_token_ids"]) for part in ("prompt", "chosen", "rejected"))
        tokens = prompt + sum(responses)
        seen = prompt**2 / 2 + sum(prompt * response + response**2 / 2 for response in responses)
        total += shape["num_hidden_layers"] * (2 * tokens * layer + 4 * width * seen) + 2 * sum(responses) * width * vocabulary
    return total


def train(name: str, shape: dict[str, int], vocabulary: int, peak: float) -> list[measure.Figure]:
    """TFLOP/s of reference and train, of the limit."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wanted = training.settings(BATCH, "bfloat16", gradient_checkpointing=True)
        pairs = training.prepare(folder, shape, vocabulary, LENGTH, wanted)
        flops = forward_flops(pairs, shape, vocabulary) / len(pairs) * BATCH
        tokens = sum(len(ids) for pair in pairs for key, ids in pair.items() if key != "prompt_id") / len(pairs) * BATCH
        figures = []
        for stage, passes in (("reference", 1), ("train", 3)):
            process = training.start(stage, folder)
            took = [training.turn(process) for _ in range(measure.ROUNDS + 1)][1:]
            if stage == "reference":
                process.communicate("\n")  # it may write
            process.kill()
            seconds = [one["seconds"] for one in took]
            size = f"{name}, {tokens / statistics.median(seconds):.0f} tokens/s"
            figures.append(of_limit(stage, size, [flops * passes / one for one in seconds], peak))
    return figures


def generate(name: str, shape: dict[str, int], vocabulary: int, peak: float) -> list[measure.Figure]:
    """Responses a second as benchmarks/generate.py compares them, and TFLOP/s of the limit that their tokens are."""
    from transformers import AutoTokenizer

    from benchmarks import generate as sampled
    from stages import params, sampling

    engine = params.Engine(dtype="bfloat16", max_model_length=2048, stop_token_ids=[], kv_cache_gib=None)
    wanted = sampling.Sampling(samples=5, temperature=1.0, top_p=1.0, max_new_tokens=256, seed=0, name="benchmark")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        training.make_model(folder / "model", vocabulary, shape, "bfloat16")
        llm = sampling.start(folder / "model", engine, wanted.seed)
        shard = sampled.tokenized(AutoTokenizer.from_pretrained(folder / "model"), PROMPTS)
        compared = sampled.compared(llm, shard, engine, wanted, folder / "responses.parquet")
        figures = [dataclasses.replace(one, size=f"{name}, {one.size}") for one in compared]
    tokens = figures[0].ours * wanted.max_new_tokens
    pair = {"prompt_token_ids": range(1), "chosen_token_ids": range(wanted.max_new_tokens), "rejected_token_ids": range(1)}
    reached = forward_flops([pair], shape, vocabulary) * figures[0].ours
    return [*figures, of_limit("generate", f"{name}, {tokens:.0f} tokens/s", [reached], peak)]


def rank(peak: float, flops_per_token: float, flops_per_pass: float, width: int, layers: int) -> list[measure.Figure]:
    """Of a PairRM of DeBERTa-v3-large's shape in half precision: winners and losers as in float32, TFLOP/s of the limit."""
    from benchmarks import rank as ranked
    from stages import params
    from stages import rank as stage

    size = params.MiniatureRanker(hidden_size=width, layers=layers, prompts=1, candidates=2, noise=0.0, learning_rate=1.0)
    settings = params.Rank(probability="pairwise", input="instruction", shard_size=256, tokens_per_batch=65536)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ranked.make(folder, size)
        figures = []
        for kind, words in (("short", ranked.SHORT), ("long", ranked.LONG)):
            table = ranked.responses(PROMPTS, 5, words)
            run = stage.load(folder, settings)
            blender = stage.load_blender(folder)
            chosen = run(table).select(["winner", "loser"]).to_pylist()
            blender.ranker.float()
            rows = table.to_pylist()
            encoded = [stage.encode(blender, row["prompt"], row["responses"]) for row in rows]
            logits = stage.pair_logits(stage.comparing(blender), encoded, settings.tokens_per_batch)
            exact = [
                stage.ranking(row["prompt_id"], found, row["responses"], "pairwise")
                for row, found in zip(rows, logits, strict=True)
            ]
            alike = sum(a["winner"] == b["winner"] and a["loser"] == b["loser"] for a, b in zip(chosen, exact, strict=True))
            subject = "rank, pairs chosen as in float32"
            figures.append(measure.of_rounds(subject, f"{kind} texts", [alike], [PROMPTS], [alike / PROMPTS], ">= 0.95"))
            passes = PROMPTS * 20
            tokens = sum(20 * len(one.source) + 8 * sum(len(one.candidates[where]) for where in one.where) for one in encoded)
            seconds = measure.in_turn({"ours": functools.partial(run, table)})["ours"]
            rates = [(tokens * flops_per_token + passes * flops_per_pass) / one for one in seconds]
            label = f"{kind} texts, {passes / statistics.median(seconds):.0f} pairs/s"
            figures.append(of_limit("rank, PairRM", label, rates, peak))
    return figures


def part(name: str, size: str) -> None:
    """One part, in a process of its own, whose end frees the GPU's memory."""
    peak = limit()
    if name == "rank":
        per_token, per_pass = map(float, size.split("/"))
        measure.report(rank(peak, per_token, per_pass, *DEBERTA))
    else:
        measure.report({"train": train, "generate": generate}[name](size, SHAPES[size] | HEADS, VOCABULARY, peak))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help="used within: train or generate and a shape, or rank and its FLOPs")
    wanted = parser.parse_args().part
    if wanted:
        part(*wanted)
        return
    if not torch.cuda.is_available():
        return
    from stages import plan

    flops = f"{plan.RANKER_FLOPS_PER_TOKEN}/{plan.RANKER_FLOPS_PER_PASS}"
    for name, size in [*itertools.product(("train", "generate"), SHAPES), ("rank", flops)]:
        python = cli.ROOT / ".venv" / ("rank" if name == "rank" else "main") / "bin" / "python"
        subprocess.run([str(python), "-m", "benchmarks.gpu", name, size], check=True)


if __name__ == "__main__":
    main()

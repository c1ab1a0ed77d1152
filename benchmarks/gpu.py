"""How close the stages come to a GPU's limit: training and vLLM at the shapes of 1B and 8B models, and PairRM.

Weights are random, in bfloat16, with gradient checkpointing in training. The limit is the rate of a product of two matrices of
8192 x 8192 in bfloat16, measured on this GPU. The ratio is the share of it that goes into the model's own operations, not
counting those that gradient checkpointing repeats (model FLOPs utilization). PairRM's choices in half precision are compared
with those in float32.
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
from stages.runtime.paths import ROOT

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
"""Llama 3's, both with HEADS."""
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 128256
DEBERTA = 1024, 24
"""Width and layers of DeBERTa-v3-large."""
BATCH = 8
LENGTH = 1024
PROMPTS = 128
SAMPLES = 5


def measure_limit(side: int = 8192) -> float:
    """Return the FLOP/s of a product of two square matrices in bfloat16, the median of the rounds."""
    import torch

    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    seconds = []
    for _ in range(measure.ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            left @ right
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 50)
    return 2 * side**3 / statistics.median(seconds[1:])


def compare_with_limit(subject: str, size: str, rates: list[float], limit: float) -> measure.Comparison:
    """Compare each round's FLOP/s with the limit."""
    ratios = [rate / limit for rate in rates]
    ours, baseline = [rate / 1e12 for rate in rates], [limit / 1e12]
    return measure.summarize(f"{subject}, TFLOP/s, against the limit", size, ours, baseline, ratios)


def count_flops(pairs: list[dict[str, Any]], shape: dict[str, int], vocabulary: int) -> float:
    """Count the FLOPs of a forward pass over packed pairs: each text once, causal attention, logits for responses only."""
    width, head = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    attention = width * (2 * width + 2 * head * shape["num_key_value_heads"])
    layer = attention + 3 * width * shape["intermediate_size"]
    total = 0.0
    for pair in pairs:
        prompt, *responses = (len(pair[f"{text}_token_ids"]) for text in ("prompt", "chosen", "rejected"))
        tokens = prompt + sum(responses)
        attended = prompt**2 / 2 + sum(prompt * response + response**2 / 2 for response in responses)
        total += shape["num_hidden_layers"] * (2 * tokens * layer + 4 * width * attended)
        total += 2 * sum(responses) * width * vocabulary
    return total


def measure_train(name: str, shape: dict[str, int], vocabulary: int, limit: float) -> list[measure.Comparison]:
    """Compare reference and train with the limit. name: of the shape."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = training.make_settings(BATCH, "bfloat16", gradient_checkpointing=True)
        pairs = training.prepare(folder, shape, vocabulary, LENGTH, settings)
        flops = count_flops(pairs, shape, vocabulary) / len(pairs) * BATCH
        tokens = sum(len(ids) for pair in pairs for key, ids in pair.items() if key != "prompt_id") / len(pairs) * BATCH
        comparisons = []
        for stage, passes in (("reference", 1), ("train", 3)):
            process = training.start_side(stage, folder)
            seconds = [training.take_turn(process)["seconds"] for _ in range(measure.ROUNDS + 1)][1:]
            if stage == "reference":
                process.communicate("\n")  # let it write its results, which train reads
            process.kill()
            size = f"{name}, {tokens / statistics.median(seconds):.0f} tokens/s"
            comparisons.append(compare_with_limit(stage, size, [flops * passes / each for each in seconds], limit))
    return comparisons


def measure_generate(name: str, shape: dict[str, int], vocabulary: int, limit: float) -> list[measure.Comparison]:
    """Compare generate with what benchmarks/generate.py compares it with, and its FLOP/s with the limit."""
    from transformers import AutoTokenizer

    from benchmarks import generate
    from stages.engines import sampling
    from stages.runtime import params

    engine = params.Engine(
        dtype="bfloat16",
        max_model_length=2048,
        stop_token_ids=[],
        kv_cache_gib=None,
        max_num_seqs=512,
        max_num_batched_tokens=16384,
        gpu_memory_utilization=0.9,
        tensor_parallel=1,
        batch_invariant=False,
    )
    draw = sampling.Sampling(samples=SAMPLES, temperature=1.0, top_p=1.0, max_new_tokens=256, seed=0, name="benchmark")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        training.make_model(vocabulary, shape, "bfloat16", folder / "model")
        llm = sampling.start_engine(folder / "model", engine, draw.seed)
        shard = generate.make_shard(AutoTokenizer.from_pretrained(folder / "model"), PROMPTS)
        compared = generate.compare(llm, shard, engine, draw, folder / "responses.parquet")
        comparisons = [dataclasses.replace(each, size=f"{name}, {each.size}") for each in compared]
    tokens = comparisons[0].ours * draw.max_new_tokens
    pair = {"prompt_token_ids": range(1), "chosen_token_ids": range(draw.max_new_tokens), "rejected_token_ids": range(1)}
    rate = count_flops([pair], shape, vocabulary) * comparisons[0].ours
    return [*comparisons, compare_with_limit("generate", f"{name}, {tokens:.0f} tokens/s", [rate], limit)]


def measure_rank(limit: float, flops_per_token: float, flops_per_pass: float) -> list[measure.Comparison]:
    """Compare a PairRM of DeBERTa-v3-large's shape in half precision with float32, and its FLOP/s with the limit."""
    from benchmarks import rank
    from stages.engines import pairrm, ranking
    from stages.runtime import params

    width, layers = DEBERTA
    size = params.MiniatureRanker(hidden_size=width, layers=layers, prompts=1, candidates=2, noise=0.0, learning_rate=1.0)
    settings = params.Rank(probability="pairwise", scale=0.5, input="instruction", shard_size=256, tokens_per_batch=32768)
    comparisons = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rank.make_ranker(size, folder)
        for kind, words in (("short", rank.SHORT), ("long", rank.LONG)):
            table = rank.make_responses(PROMPTS, SAMPLES, words)
            run = ranking.load_ranker(folder, settings)
            blender = pairrm.load_blender(folder)
            comparisons.append(compare_choices(kind, run(table).to_pylist(), blender, table.to_pylist(), settings))
            passes = PROMPTS * SAMPLES * (SAMPLES - 1)
            tokens = count_pair_tokens(blender, table.to_pylist())
            seconds = measure.time_in_turn({"ours": functools.partial(run, table)})["ours"]
            rates = [(tokens * flops_per_token + passes * flops_per_pass) / each for each in seconds]
            label = f"{kind} texts, {passes / statistics.median(seconds):.0f} pairs/s"
            comparisons.append(compare_with_limit("rank, PairRM", label, rates, limit))
    return comparisons


def compare_choices(
    kind: str, rankings: list[dict[str, Any]], blender: Any, rows: list[dict[str, Any]], settings: Any
) -> measure.Comparison:
    """Count the pairs that half precision and float32 choose alike. Leaves the blender in float32."""
    from stages.engines import pairrm, ranking

    blender.ranker.float()
    encoded = [pairrm.encode(blender, row["prompt"], row["responses"]) for row in rows]
    logits = pairrm.pair_logits(pairrm.select_forward(blender), encoded, settings.tokens_per_batch)
    exact = [
        ranking.rank_row(row["prompt_id"], matrix, row["responses"], settings.probability, settings.scale)
        for row, matrix in zip(rows, logits, strict=True)
    ]
    alike = sum(
        (half["chosen"], half["rejected"]) == (full["chosen"], full["rejected"])
        for half, full in zip(rankings, exact, strict=True)
    )
    subject, size = "rank, pairs chosen as in float32", f"{kind} texts"
    return measure.summarize(subject, size, [alike], [len(rows)], [alike / len(rows)], ">= 0.95")


def count_pair_tokens(blender: Any, rows: list[dict[str, Any]]) -> int:
    """Count the tokens of all ordered pairs: each reads the prompt and two responses."""
    from stages.engines import pairrm

    tokens = 0
    for row in rows:
        texts = pairrm.encode(blender, row["prompt"], row["responses"])
        responses = sum(len(texts.candidates[index]) for index in texts.indices)
        tokens += SAMPLES * (SAMPLES - 1) * len(texts.source) + 2 * (SAMPLES - 1) * responses
    return tokens


def run_part(name: str, size: str) -> None:
    """Run one part in this process, whose end frees the GPU's memory. size: of SHAPES, or PairRM's FLOPs as `token/pass`."""
    limit = measure_limit()
    if name == "rank":
        per_token, per_pass = map(float, size.split("/"))
        measure.report(measure_rank(limit, per_token, per_pass))
    else:
        run = {"train": measure_train, "generate": measure_generate}[name]
        measure.report(run(size, SHAPES[size] | HEADS, VOCABULARY, limit))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help="internal: train or generate and a shape, or rank and its FLOPs")
    part = parser.parse_args().part
    if part:
        run_part(*part)
        return
    if not torch.cuda.is_available():
        return
    from stages.tools.planning import work

    flops = f"{work.RANKER_FLOPS_PER_TOKEN}/{work.RANKER_FLOPS_PER_PASS}"
    for name, size in [*itertools.product(("train", "generate"), SHAPES), ("rank", flops)]:
        python = ROOT / ".venv" / ("rank" if name == "rank" else "main") / "bin" / "python"
        subprocess.run([str(python), "-m", "benchmarks.gpu", name, size], check=True)


if __name__ == "__main__":
    main()

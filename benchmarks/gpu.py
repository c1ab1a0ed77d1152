"""What a GPU reaches of its limit: train at the shapes of 1B and 8B models, vLLM, and PairRM. Skipped without a GPU.

Weights are random, in bfloat16, with gradient checkpointing in training. The limit is what a product of two matrices of
8192 x 8192 reaches here in bfloat16; the ratio is the share of it that the model's own operations are, without those that
gradient checkpointing does again (model FLOPs utilisation).
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks import train as training

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
"""Llama 3's, both with 32 heads and 8 of keys and values."""
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 128256
BATCH = 8
LENGTH = 1024


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
    return 2 * side**3 / sorted(seconds[1:])[measure.ROUNDS // 2]


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


def train(name: str, shape: dict[str, int], vocabulary: int, length: int, peak: float) -> list[measure.Figure]:
    """TFLOP/s of reference and train, of the limit."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wanted = training.settings(BATCH, "bfloat16", gradient_checkpointing=True)
        pairs = training.prepare(folder, shape, vocabulary, length, wanted)
        flops = forward_flops(pairs, shape, vocabulary) / len(pairs) * BATCH
        tokens = sum(len(ids) for pair in pairs for key, ids in pair.items() if key != "prompt_id") / len(pairs) * BATCH
        figures = []
        for stage, passes in (("reference", 1), ("train", 3)):
            process = training.start(stage, folder)
            took = [training.turn(process) for _ in range(measure.ROUNDS + 1)][1:]
            if stage == "reference":
                process.communicate("\n")  # it may write
            process.kill()
            rates = sorted(flops * passes / one["seconds"] for one in took)
            middle = rates[len(rates) // 2]
            size = f"{name}, {tokens * middle / flops / passes:.0f} tokens/s"
            low, ratio, high = (rate / peak for rate in (rates[0], middle, rates[-1]))
            figures.append(measure.Figure(f"{stage}, TFLOP/s of the limit", size, middle / 1e12, peak / 1e12, ratio, low, high))
    return figures


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        return
    peak = limit()
    for name, shape in SHAPES.items():
        measure.report(train(name, shape | HEADS, VOCABULARY, LENGTH, peak))


if __name__ == "__main__":
    main()

"""train's pairs dealt out by length against pairs in the given order: positions computed per token needed, simulated.

The GPUs wait for each other after every batch, so each round costs the positions of its largest batch on all of them. Lengths
are drawn as for `plan`, those of recipes/llama-3-8b; the figures are the same on every machine. Each ratio is one of 20 global
batches.
"""

import numpy as np

from benchmarks.measure import Comparison, report, summarize
from stages.method import dealing
from stages.tools.planning import lengths, sizes

PROMPT, TOTAL = 512, 1024
"""Tokens of the longest prompt, and of the longest prompt with a response."""
GLOBAL_BATCH = 64
BATCHES = 20
SIZES = (8, 8), (8, 1), (32, 8), (32, 1)
"""Numbers of GPUs, and of pairs in a batch of one GPU."""


def compare(devices: int, device_batch: int) -> Comparison:
    """Compare both orders; a global batch has a batch of every GPU at least."""
    global_batch, random = max(GLOBAL_BATCH, devices * device_batch), np.random.default_rng(0)
    ours: list[float] = []
    baseline: list[float] = []
    for _ in range(BATCHES):
        drawn = lengths.draw_pairs(random, global_batch, sizes.PROMPT_TOKENS, sizes.RESPONSE_TOKENS, PROMPT, TOTAL)
        tokens = drawn.tolist()
        given = np.arange(global_batch).reshape(-1, device_batch).tolist()
        for batches, results in ((dealing.deal_out(tokens, devices, device_batch), ours), (given, baseline)):
            results.append(devices * dealing.measure_rounds(batches, tokens, devices)[0] / sum(tokens))
    ratios = [theirs / mine for mine, theirs in zip(ours, baseline, strict=True)]
    size = f"{devices} GPUs, batches of {device_batch}, {global_batch} pairs a step"
    return summarize("positions per token, against the given order", size, ours, baseline, ratios)


def main() -> None:
    report([compare(devices, device_batch) for devices, device_batch in SIZES])


if __name__ == "__main__":
    main()

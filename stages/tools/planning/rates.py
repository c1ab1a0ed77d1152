"""Rates that `plan` computes with, each with its source. docs/performance.md shows them; `make sync` copies them there.

A rate without a measurement or a document behind it is marked as a guess. No rate of a GPU has been measured with this project.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple


class Rate(NamedTuple):
    """A value in SI units, what it is in words, and its source; `guess: ` begins the source of a guess."""

    value: float
    meaning: str
    source: str


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    memory: Rate
    bandwidth: Rate
    peak: Rate
    forward: Rate
    train: Rate
    sequence: Rate


def describe_gpu(
    memory: float,
    bandwidth: float,
    peak: float,
    sheet: str,
    forward: tuple[float, str],
    train: tuple[float, str],
    sequence: tuple[float, str],
) -> Gpu:
    """Return a GPU from its values, in bytes, bytes per second, FLOP/s, fractions of the peak, and seconds.

    sheet: the source of the first three; each other value comes with its own source.
    """
    return Gpu(
        memory=Rate(memory, "memory, bytes", sheet),
        bandwidth=Rate(bandwidth, "memory bandwidth, bytes/s", sheet),
        peak=Rate(peak, "peak of dense bf16, FLOP/s", sheet),
        forward=Rate(forward[0], "share of the peak in forward passes of the policy", forward[1]),
        train=Rate(train[0], "share of the peak in training, padding counted as work", train[1]),
        sequence=Rate(sequence[0], "vLLM: seconds per sequence and step, beside reading memory", sequence[1]),
    )


GPUS = {
    "H100": describe_gpu(
        80e9,
        3.35e12,
        989e12,
        "NVIDIA's data sheet of the H100, SXM",
        (0.40, "guess: between training below and the 0.57 that llm-foundry's benchmarks report for MPT-7B, 1024 tokens"),
        (0.30, "18.4 pairs/s on 8 GPUs, padded to 1024 tokens: the DPO baseline of a repository for prefix sharing"),
        (27e-6, "from 12,500 tokens/s of an 8B model in third-party benchmarks of vLLM, taken as 256 sequences of our lengths"),
    ),
    "A100": describe_gpu(
        80e9,
        2.039e12,
        312e12,
        "NVIDIA's data sheet of the A100, SXM, 80 GB",
        (0.45, "guess: an A100 reaches more of its peak than an H100 (llm-foundry's benchmarks: 0.77 and 0.57)"),
        (0.45, "11.5 pairs/s on 8 GPUs, zephyr-7b-dpo-full: 0.33 without padding; guess: 0.45 with it"),
        (20e-6, "from 7,516 tokens/s of a 7B model in vLLM's pull request 5046, taken likewise"),
    ),
    "RTX 4090": describe_gpu(
        24e9,
        1.008e12,
        165e12,
        "NVIDIA's data sheet of the GeForce RTX 4090 and its Ada GPU architecture paper",
        (0.35, "guess"),
        (0.30, "guess: as the H100"),
        (45e-6, "guess: a slower host"),
    ),
}

DECODING = Rate(
    0.75,
    "share of the bandwidth at which vLLM reads weights and KV cache",
    "75 tokens/s of one request to Llama-3.1-8B on an A100 with 40 GB are 0.77 of it, in a sweep by J. Musgrave",
)
SUMMED_LAYER = Rate(
    30e-6, "vLLM: seconds per layer and step to sum over the GPUs that share a model", "guess: two sums of 15 microseconds"
)
RANKER_BYTES = Rate(22e6, "PairRM: bytes moved per token at 1000 tokens", "counted on torch's meta device, DeBERTa-v3-large")
RANKING = Rate(0.7, "share of the bandwidth that PairRM reaches", "guess: long element-wise kernels")
FUSED_RANKING = Rate(0.4, "share of the peak that PairRM reaches with fused attention", "guess: as the policy's forward pass")
BLOCKS = Rate(4 / 3, "training with a block mask against a dense one", "guess: 5.2 times fewer scores, and a faster kernel")
ENGINE_START = Rate(90, "seconds to start vLLM, beside loading weights", "guess: imports 25, compilation and CUDA graphs 65")
TRAINING_START = Rate(30, "seconds to start a training or reference, beside loading weights", "guess: imports, NCCL")
HARNESS_START = Rate(20, "seconds to start the harness or PairRM, beside loading weights", "guess: imports")
LOADING = Rate(1e9, "bytes/s to load weights onto a GPU", "guess: safetensors from a network disk or the page cache")
WRITING = Rate(2e9, "bytes/s to write weights and checkpoints", "guess: a local NVMe disk")
HASHING = Rate(0.63e9, "bytes/s hashed", "measured on a CPU: 16 GB in 25 s")
DECODED_LAYER = Rate(
    0.8e-3, "harness: seconds per layer and generated token", "guess: 26 ms a token with 32 layers, limited by Python"
)
JUDGING = Rate(1.2, "seconds per request to AlpacaEval's judge", "guess; evaluate_alpaca.workers of them at a time")
HOST_BANDWIDTH = Rate(
    100e9, "bytes/s of the host's memory, for offloaded optimizer steps", "guess: half of eight channels of DDR4"
)

COMMON = (
    DECODING,
    SUMMED_LAYER,
    RANKER_BYTES,
    RANKING,
    FUSED_RANKING,
    BLOCKS,
    ENGINE_START,
    TRAINING_START,
    HARNESS_START,
    LOADING,
    WRITING,
    HASHING,
    DECODED_LAYER,
    JUDGING,
    HOST_BANDWIDTH,
)
"""The rates that are the same on every GPU."""


def list_rates() -> list[list[str]]:
    """Return the rows of the table of rates: GPU, meaning, value, source."""
    rows = [
        [name, rate.meaning, f"{rate.value:.4g}", rate.source]
        for name, gpu in GPUS.items()
        for rate in (getattr(gpu, field.name) for field in fields(gpu))
    ]
    return rows + [["all", rate.meaning, f"{rate.value:.4g}", rate.source] for rate in COMMON]

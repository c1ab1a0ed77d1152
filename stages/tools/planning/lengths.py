"""Lengths of prompts and responses, and what they cost beside the mean: waiting for long responses, padding, uneven GPUs.

All by simulation with a fixed seed, so that a plan of the same recipe is the same.
"""

import functools
import heapq
import math
import statistics
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stages.method import dealing

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SPREAD = 0.76
"""Standard deviation of the logarithm of responses' lengths: with a mean of 375 tokens, 95% have at most 980. Assumed."""
PROMPT_SPREAD = 0.8
"""The same of prompts' lengths. Assumed."""
SHARDS = 6
"""Shards that are simulated and averaged."""
BATCHES = 60
"""Global batches that are simulated and averaged."""


def draw_lengths(random: np.random.Generator, count: int, mean: float, spread: float, limit: int) -> Integers:
    """Return lognormal lengths (count,) with a mean of `mean` before they are cut at `limit`, of at least 1 token.

    They are the quantiles of the distribution in random order, so that two draws differ in their order only.
    """
    drawn = np.exp(math.log(mean) - spread**2 / 2 + spread * list_quantiles(count))
    return random.permutation(np.clip(np.ceil(drawn), 1, limit).astype(np.int64))


@functools.cache
def list_quantiles(count: int) -> Floats:
    """Return `count` quantiles of the standard normal distribution, evenly spread."""
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((index + 0.5) / count) for index in range(count)])


@functools.cache
def simulate_queue(requests: int, slots: int, mean: float, limit: int, seed: int) -> tuple[Floats, Floats]:
    """Simulate a queue of requests of which at most `slots` are sampled at a time, one token of each per step.

    mean, limit: tokens of a response. Returns, for each step (T,), the number of sequences, and the tokens sampled so far in
    those sequences together.
    """
    lengths = draw_lengths(np.random.default_rng(seed), requests, mean, SPREAD, limit)
    free, starts = [0] * min(slots, requests), np.zeros(requests, np.int64)
    for index, length in enumerate(lengths.tolist()):
        starts[index] = heapq.heappop(free)
        heapq.heappush(free, int(starts[index]) + length)
    ends = starts + lengths
    steps = int(ends.max())
    active, started = np.zeros(steps + 1), np.zeros(steps + 1)
    for change, times in ((1, starts), (-1, ends)):
        np.add.at(active, times, change)
        np.add.at(started, times, change * starts)
    running = active.cumsum()[:steps]
    return running, running * np.arange(steps) - started.cumsum()[:steps]


class Pairs(NamedTuple):
    """What pairs of simulated lengths cost: see `simulate_pairs`."""

    tokens: float
    """Mean tokens of a pair."""
    in_order: float
    dealt: float
    in_order_unpadded: float
    dealt_unpadded: float


@functools.cache
def simulate_pairs(
    prompt: float, response: float, longest_prompt: int, longest: int, global_batch: int, device_batch: int, devices: int
) -> Pairs:
    """Simulate global batches of pairs whose prompts and responses have these mean lengths, cut as `lengths` says.

    Returns the mean tokens of a pair, and how many times their share of all tokens the GPUs are busy, because each round lasts
    as long as its largest batch: if the pairs are batched in their order, and if `dealing.deal_out` deals them out; both packed
    in rows with padding, and in one row without.
    """
    random = np.random.default_rng(0)
    given = np.arange(global_batch).reshape(-1, device_batch).tolist()
    tokens, busy = 0, [0, 0, 0, 0]
    for _ in range(BATCHES):
        sizes = draw_pairs(random, global_batch, prompt, response, longest_prompt, longest).tolist()
        tokens += sum(sizes)
        ways = [
            (batches, count)
            for count in (dealing.count_positions, sum)
            for batches in (given, dealing.deal_out(sizes, devices, device_batch, count))
        ]
        for way, (batches, count) in enumerate(ways):
            busy[way] += dealing.measure_rounds(batches, sizes, devices, count)[0] * devices
    return Pairs(tokens / (BATCHES * global_batch), *(each / tokens for each in busy))


def draw_pairs(
    random: np.random.Generator, count: int, prompt: float, response: float, longest_prompt: int, longest: int
) -> Integers:
    """Return the tokens (count,) of pairs of a prompt and two responses with these mean lengths, cut as `lengths` says."""
    prompts = draw_lengths(random, count, prompt, PROMPT_SPREAD, longest_prompt)
    responses = draw_lengths(random, 2 * count, response, SPREAD, longest).reshape(2, -1)
    tokens: Integers = prompts + np.minimum(responses, longest - prompts).sum(0)
    return tokens


def deal_pairs(settings: Any, prompt: float, response: float) -> Pairs:
    """Return what `simulate_pairs` does for the parameters of a recipe that trains."""
    train, lengths = settings.train, settings.lengths
    rounded = round(prompt, 1), round(response, 1)
    return simulate_pairs(*rounded, lengths.prompt, lengths.total, train.global_batch, train.device_batch, train.devices)

"""Simulate how long generate takes with shards of several sizes: `python -m benchmarks.tail`.

A GPU works on one shard at a time, and the last responses of each are sampled with most of the batch empty. Large shards have
fewer such ends, but a number of shards that is no multiple of the GPUs leaves GPUs idle. The lengths are lognormal; a step of
the engine takes the time to read the weights, and the keys and values of all that is being sampled, which is what limits
decoding on a GPU. This is not a measurement on one.
"""

import heapq
import math

import numpy as np
import numpy.typing as npt

MEAN, P95, LONGEST = 375, 980, 2048
"""Tokens of the responses."""
PROMPT = 200
"""Tokens of each prompt."""
WEIGHTS = 16e9 / 2.5e12
"""Seconds to read 8 billion parameters in bfloat16 at three quarters of an H100's bandwidth."""
KEYS = 131_072 / 2.5e12
"""Seconds to read a token's keys and values (Llama-3-8B)."""
SAMPLES = 5
PROMPTS = 20_000


def draw_lengths(count: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw response lengths, in tokens."""
    ratio = math.log(P95 / MEAN)
    sigma = 1.645 - math.sqrt(1.645**2 - 2 * ratio)
    values = np.random.default_rng(seed).lognormal(math.log(MEAN) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(values), 1, LONGEST).astype(np.int64)


def time_shard(lengths: npt.NDArray[np.int64], slots: int) -> float:
    """Return the seconds that one GPU takes for responses of these lengths, at most `slots` at a time, in order."""
    left, done = lengths[:slots].copy(), np.zeros(min(slots, len(lengths)), dtype=np.int64)
    waiting, seconds = lengths[slots:], 0.0
    while len(left):
        steps = int(left.min())
        context = steps * float((PROMPT + done).sum()) + len(left) * steps * (steps - 1) / 2
        seconds += steps * WEIGHTS + context * KEYS
        left, done = left - steps, done + steps
        done, left = done[left > 0], left[left > 0]
        free = slots - len(left)
        left = np.concatenate([left, waiting[:free]])
        done = np.concatenate([done, np.zeros(len(left) - len(done), dtype=np.int64)])
        waiting = waiting[free:]
    return seconds


def time_stage(lengths: npt.NDArray[np.int64], size: int, gpus: int, slots: int) -> tuple[float, float]:
    """Return the seconds of a stage whose GPUs take the next shard when they are free, and those of its longest shard."""
    shards = [time_shard(lengths[start : start + size], slots) for start in range(0, len(lengths), size)]
    ends = [0.0] * gpus
    for seconds in shards:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends), max(shards)


def main() -> None:
    for prompts, gpus, slots in ((PROMPTS, 8, 512), (PROMPTS, 4, 512), (5000, 1, 256)):
        lengths = draw_lengths(prompts * SAMPLES, 0)
        best = time_shard(lengths[: len(lengths) // gpus], slots)
        print(f"{prompts} prompts, {gpus} GPUs, {slots} responses at a time: {best:.0f} s in one queue per GPU")
        for size in (256, 512, 625, 1000, 1024, 1250, 2500):
            total, longest = time_stage(lengths, size * SAMPLES, gpus, slots)
            print(f"  {size} prompts a shard: {total / best - 1:+.0%}, a shard takes up to {longest:.0f} s")


if __name__ == "__main__":
    main()

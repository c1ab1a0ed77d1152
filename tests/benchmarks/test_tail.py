"""The estimates for generate's shards, against another simulation, and the numbers on the page."""

import re

import numpy as np
import pytest

from benchmarks import tail
from stages.runtime.paths import ROOT


@pytest.fixture(scope="module")
def found() -> dict[int, tuple[float, float]]:
    return tail.compare_shards(20_000, 8)


def sample_shard(prompts: int) -> float:
    """Seconds of an H100 for five responses of Llama-3-8B to each prompt, 512 at a time, from one end to the next.

    Each step reads 16 GB of weights and 131 kB for each token in the cache, at three quarters of 3.35 TB/s, or computes 16
    GFLOP for each sequence at 0.4 of 989 TFLOP/s; and it takes 27 microseconds for each sequence.
    """
    drawn = np.random.default_rng(prompts).lognormal(np.log(375) - 0.76**2 / 2, 0.76, 5 * prompts)
    waiting = np.clip(np.ceil(drawn), 1, 2048)
    left, done, seconds = waiting[:512].copy(), np.zeros(min(512, len(waiting))), 0.0
    waiting = waiting[512:]
    while len(left):
        steps, count = left.min(), len(left)
        cache = 131_072 * (190 * count + done.sum() + count * (steps - 1) / 2)
        step = max((16.06e9 + cache) / (0.75 * 3.35e12), count * 16.06e9 / (0.4 * 989e12)) + count * 27e-6
        seconds += steps * step
        left, done = left - steps, done + steps
        left, done = left[left > 0], done[left > 0]
        free = 512 - len(left)
        left, waiting = np.concatenate([left, waiting[:free]]), waiting[free:]
        done = np.concatenate([done, np.zeros(len(left) - len(done))])
    return float(seconds)


@pytest.mark.parametrize(("prompts", "times"), [(256, 10), (512, 5), (1024, 3), (1250, 2), (2500, 1)])
def test_shards_take_as_long_as_by_another_simulation(prompts: int, times: int, found: dict[int, tuple[float, float]]) -> None:
    """times: shards of the busiest of 8 GPUs."""
    longer, seconds = found[prompts]
    assert seconds == pytest.approx(sample_shard(prompts), rel=0.06)
    assert 1 + longer == pytest.approx(times * seconds / found[2500][1])


def test_the_page_has_the_estimates(found: dict[int, tuple[float, float]]) -> None:
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"shards of 256 prompts take (\d+)% longer, of 512 (\d+)%, of 1024 (\d+)% .*? of 1250 (\d+)%", text)
    assert [int(cell) for cell in listed] == [round(100 * found[size][0]) for size in (256, 512, 1024, 1250)]
    assert found[1250][1] == pytest.approx(180, abs=15), "about three minutes"

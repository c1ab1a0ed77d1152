"""The simulation of generate's shards, against numbers that can be worked out by hand."""

import numpy as np
import pytest

from benchmarks import tail


@pytest.fixture(autouse=True)
def _steps_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "WEIGHTS", 1.0)
    monkeypatch.setattr(tail, "KEYS", 0.0)


@pytest.mark.parametrize(
    ("lengths", "slots", "seconds"),
    [([5], 4, 5), ([5, 3], 4, 5), ([5, 3], 1, 8), ([2, 3, 4], 2, 6), ([1, 1, 1, 1, 9], 4, 10), ([2, 2, 2, 9], 2, 11)],
)
def test_a_response_starts_when_there_is_room(lengths: list[int], slots: int, seconds: float) -> None:
    assert tail.time_shard(np.array(lengths), slots) == seconds


def test_keys_and_values_are_read_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "KEYS", 0.5)
    monkeypatch.setattr(tail, "PROMPT", 10)
    # Steps with 10 + 10, 11 + 11 and 12 tokens in the cache, the last one alone.
    assert tail.time_shard(np.array([2, 3]), 4) == 3 + 0.5 * (20 + 22 + 12)


def test_shards_go_to_the_gpu_that_is_free() -> None:
    assert tail.time_stage(np.array([5, 1, 1, 1]), 1, 2, 1) == (5, 5)
    assert tail.time_stage(np.array([3, 3, 3]), 1, 2, 1) == (6, 3), "three shards on two GPUs"


def test_lengths_have_the_mean_and_the_percentile_that_are_stated() -> None:
    lengths = tail.draw_lengths(200_000, 1)
    assert lengths.mean() == pytest.approx(tail.MEAN, rel=0.02)
    assert np.percentile(lengths, 95) == pytest.approx(tail.P95, rel=0.02)
    assert lengths.max() == tail.LONGEST

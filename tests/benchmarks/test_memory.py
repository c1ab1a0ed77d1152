"""The count of living bytes, against tensors that are counted by hand."""

import pytest
import torch

from benchmarks import memory
from benchmarks.live_bytes import LiveBytes


def test_the_peak_counts_what_is_alive_at_a_time_and_views_once() -> None:
    with LiveBytes() as counted:
        a = torch.zeros(100, dtype=torch.float32, device="meta")
        b = a.view(10, 10) + 1
        del a
        c = b[0].half()
        del b
        assert counted.now == 2 * 10
        del c
    assert counted.peak == 4 * 100 + 4 * 100
    assert counted.now == 0


def test_an_estimate_is_compared_with_the_count_in_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def num_parameters(self) -> int:
            return 1_000_000_000

    monkeypatch.setattr(memory, "count_batch", lambda model, count, length: count * length * 1000)
    monkeypatch.setattr(memory.memory, "RANKER_WEIGHTS", 1e9)
    monkeypatch.setattr(memory.memory, "ranker_bytes_per_token", lambda length: length)
    row = memory.compare(Model(), 1024)
    assert row.size == "16 pairs of 1024 tokens"
    assert row.baseline == pytest.approx(2 + 16_384 * 1000 / 1e9)
    assert row.ours == pytest.approx(1 + 16_384 * 1024 / 1e9)
    assert row.ratio == pytest.approx(row.baseline / row.ours)

"""Dealing out by length against the given order."""

from benchmarks import dealing


def test_dealing_helps_and_is_measured_in_positions_per_token() -> None:
    row = dealing.compare(8, 1)
    assert row.baseline > row.ours >= 1
    assert row.low >= 1
    assert row.size == "8 GPUs, batches of 1, 64 pairs a step"

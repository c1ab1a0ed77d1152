"""The rates and their sources."""

from dataclasses import fields

import pytest

from stages.tools.planning import rates


@pytest.mark.parametrize(
    ("name", "memory", "bandwidth", "peak"),
    [("H100", 80, 3350, 989.4), ("A100", 80, 2039, 312), ("RTX 4090", 24, 1008, 165.2)],
)
def test_the_gpus_are_as_in_their_data_sheets(name: str, memory: float, bandwidth: float, peak: float) -> None:
    """GB, GB/s, and dense bf16 TFLOP/s with accumulation in float32."""
    gpu = rates.GPUS[name]
    found = gpu.memory.value / 1e9, gpu.bandwidth.value / 1e9, gpu.peak.value / 1e12
    assert found == pytest.approx((memory, bandwidth, peak), rel=0.002)
    assert not gpu.peak.source.startswith("guess")


def test_every_rate_is_listed_with_a_source() -> None:
    rows = rates.list_rates()
    declared = [value for value in vars(rates).values() if isinstance(value, rates.Rate)]
    assert len(rows) == len(rates.GPUS) * len(fields(rates.Gpu)) + len(declared)
    assert {rate.meaning for rate in declared} <= {row[1] for row in rows}
    assert all(len(source) > 4 for *_, source in rows)
    assert [row[2] for row in rows if row[:2] == ["A100", "memory, bytes"]] == ["8e+10"]

import importlib.util
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import measure

HELPERS = {"__init__", "__main__", "live_bytes", "measure", "scaling", "tail", "texts", "train_sides", "train_trl"}
"""Modules that are not benchmarks."""


def test_the_page_has_a_table_per_benchmark() -> None:
    comparison = measure.Comparison("s", "z", ours=2.0, baseline=1.0, ratio=2.0, low=1.5, high=2.5, target=">= 2")
    text = bench.format_results({"rank": [asdict(comparison)]}, "a machine")
    assert "\nMachine: a machine.\n" in text
    assert "| what | size | ours | baseline | ratio | range | target |\n" in text
    assert "| s | z | 2 | 1 | 2.00 | 1.50 to 2.50 | >= 2 |\n" in text
    assert "## rank\n\nrank against what the released code calls" in text


@pytest.mark.parametrize("name", bench.ENVIRONMENTS)
def test_every_benchmark_is_a_module(name: str) -> None:
    assert importlib.util.find_spec(f"benchmarks.{name}")


def test_every_module_is_a_benchmark_or_a_helper() -> None:
    assert {path.stem for path in Path(bench.__file__).parent.glob("*.py")} == HELPERS | set(bench.ENVIRONMENTS)

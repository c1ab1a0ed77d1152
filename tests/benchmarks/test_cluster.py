"""What the workers send back is checked."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from benchmarks import cluster

TABLE = pa.table({"prompt": ["Why?"] * 3})


def compute(tasks: list[Any], describe: Callable[[int], str]) -> Iterator[tuple[int, Any]]:
    work = cluster.load()
    return ((index, work(task)) for index, task in enumerate(tasks))


def test_a_worker_returns_the_shard_that_it_got() -> None:
    cluster.deal_shards(compute, TABLE, 0.0)
    with pytest.raises(AssertionError):
        cluster.deal_shards(lambda tasks, describe: compute(tasks[1:], describe), TABLE, 0.0)
    with pytest.raises(AssertionError):
        cluster.deal_shards(
            lambda tasks, describe: ((index, TABLE.slice(1)) for index, _ in compute(tasks, describe)), TABLE, 0.0
        )


def test_the_result_is_in_milliseconds_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "time_in_turn", lambda sides: {"ours": [3.0, 3.0, 6.0], "baseline": [2.0, 2.0, 2.0]})
    row = cluster.compare(compute, compute, 7, 0.25)
    assert row.ours == 3000 / cluster.SHARDS
    assert row.baseline == 2000 / cluster.SHARDS
    assert row.ratio == pytest.approx(2 / 3)
    assert "of 7 prompts, 250 ms" in row.size

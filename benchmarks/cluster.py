"""The same shards dealt to two workers of a Ray cluster of one node, against two local processes: milliseconds per shard.

Each shard is a table of prompts with 5 responses of 380 tokens on average, which a worker sends back as it is: of 128 prompts,
2 MB each way. `empty`: it computes nothing, so that the time is what dealing costs. Otherwise a shard takes at least the time
stated, in which a worker sleeps. The workers have started before anything is timed.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import data
from benchmarks.measure import Comparison, compare_times, report, time_in_turn
from stages.runtime import cluster, workers
from stages.runtime.workers import Deal

CASES = (1, 0.0), (128, 0.0), (128, 0.25)
"""Prompts of a shard, and the seconds that it takes to compute."""
SHARDS = 40
WORKERS = 2
MEMORY = 200_000_000
"""Bytes of the node's object store."""
NICENESS = "RAY_worker_niceness"

Task = tuple[pa.Table, float]


def load() -> Callable[[Task], pa.Table]:
    """Return the function that computes a task: a table, and for how many seconds to sleep."""

    def compute(task: Task) -> pa.Table:
        table, seconds = task
        time.sleep(seconds)
        return table

    return compute


@contextlib.contextmanager
def start_cluster() -> Iterator[None]:
    """Start a Ray cluster of one node on the loopback interface, and let RAY_ADDRESS name it within the block."""
    from ray.cluster_utils import Cluster

    os.environ[NICENESS] = "0"  # Ray's default is 15, so that all else on this machine would come first
    ray: Any = Cluster()
    try:
        ray.add_node(num_cpus=1, node_ip_address="127.0.0.2", object_store_memory=MEMORY, include_dashboard=False)
        os.environ[cluster.ADDRESS] = ray.address
        yield
    finally:
        os.environ.pop(cluster.ADDRESS, None)
        ray.shutdown()


def deal_shards(deal: Deal, table: pa.Table, seconds: float) -> None:
    """Deal SHARDS shards, and check that each comes back."""
    results = dict(deal([(table, seconds)] * SHARDS, lambda index: f"shard {index}"))
    assert sorted(results) == list(range(SHARDS))
    assert all(result.equals(table) for result in results.values())


def compare(ours: Deal, baseline: Deal, prompts: int, seconds: float) -> Comparison:
    """Compare a cluster with local processes."""
    random = np.random.default_rng(0)
    table = data.make_responses(data.make_texts(np.full(prompts, 190), random), random)
    sides = {name: partial(deal_shards, deal, table, seconds) for name, deal in (("ours", ours), ("baseline", baseline))}
    milliseconds = {name: [1000 * each / SHARDS for each in times] for name, times in time_in_turn(sides).items()}
    work = f"{1000 * seconds:.0f} ms" if seconds else "empty"
    subject = "ms per shard, on a Ray cluster against local processes"
    return compare_times(
        subject,
        f"{SHARDS} shards of {prompts} prompts, {work}, {WORKERS} workers",
        milliseconds["ours"],
        milliseconds["baseline"],
    )


def main() -> None:
    arguments: tuple[Any, ...] = (load, (), [""] * WORKERS)
    with workers.start(*arguments, fork=True) as baseline, start_cluster(), workers.start(*arguments) as ours:
        report([compare(ours, baseline, *case) for case in CASES])


if __name__ == "__main__":
    main()

"""Both sides sample the same shards; one of them waits after each round."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from benchmarks import barrier, generate
from benchmarks.barrier import Task

TASKS: list[Task] = [([[number]], [number + 1]) for number in range(5)]


@pytest.mark.parametrize(("size", "rounds"), [(5, [5]), (2, [2, 2, 1])])
def test_all_shards_are_sampled_in_rounds_of_the_given_size(size: int, rounds: list[int]) -> None:
    dealt: list[int] = []

    def deal(tasks: list[Task], describe: Callable[[int], str]) -> Iterator[tuple[int, Any]]:
        dealt.append(len(tasks))
        for index in reversed(range(len(tasks))):
            (ids,), (count,) = tasks[index]
            yield index, [ids * count]

    assert barrier.run(deal, TASKS, size) == [[[number] * (number + 1)] for number in range(5)]
    assert dealt == rounds


def test_lengths_vary_within_the_limit_and_every_response_has_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[number] for number in range(24)]
    monkeypatch.setattr(generate, "make_shard", lambda _, count: pa.table({"prompt_token_ids": prompts[:count]}))
    tasks = barrier.make_tasks(None, 12, 2, 3)
    assert [ids for shard, _ in tasks for ids in shard] == [ids for ids in prompts for _ in range(3)]
    counts = [count for _, shard in tasks for count in shard]
    assert len(tasks) == 12
    assert len(set(counts)) > 20
    assert 1 <= min(counts) <= max(counts) <= barrier.LONGEST

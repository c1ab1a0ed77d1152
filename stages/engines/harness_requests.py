"""The requests of the lm-evaluation-harness, ordered and cut into chunks, so that several processes can compute them.

lm-eval 0.4.1's HFLM sorts the requests that it gets, the longest first, and computes them in batches. Sorted in the same way,
and cut at whole batches, they are computed together as if one HFLM got all of them, whatever the number of processes.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

Encoded = tuple[list[int], list[int]]
"""The token IDs of a request's context and of the continuation whose log-likelihood it asks for."""
Value = TypeVar("Value")

BATCHES = 4
"""Batches in a chunk of a long task."""
CHUNKS = 16
"""Chunks of a short one, so that several workers end at about the same time."""


def cut(values: Sequence[Value], size: int) -> list[Sequence[Value]]:
    """Cut a sequence into pieces of `size`; the last may be shorter."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def choose_size(count: int, batch_size: int) -> int:
    """Return how many of `count` rows make a chunk: BATCHES batches, or fewer where there would be less than CHUNKS chunks."""
    batches = math.ceil(count / batch_size)
    return batch_size * max(1, min(BATCHES, batches // CHUNKS))


def share_rows(requests: Sequence[Encoded]) -> list[list[int]]:
    """Sort requests as HFLM._loglikelihood_tokens does, and join those that one row of a batch answers.

    Returns the indices of each row's requests. Requests with the same context and a continuation of one token share a row,
    whose last logits score them all: MMLU's four choices, for example. The harness would compute a row for each. They are
    neighbours, because only their last tokens differ.
    """

    def sort_key(index: int) -> tuple[int, list[int]]:
        context, continuation = requests[index]
        return -len(context) - len(continuation), context + continuation

    rows: list[list[int]] = []
    for index in sorted(range(len(requests)), key=sort_key):
        context, continuation = requests[index]
        if rows and len(continuation) == len(requests[rows[-1][0]][1]) == 1 and context == requests[rows[-1][0]][0]:
            rows[-1].append(index)
        else:
            rows.append([index])
    return rows


def group_generations(requests: Sequence[tuple[str, dict[str, Any]]], lengths: Sequence[int]) -> list[list[int]]:
    """Sort requests to generate texts as HFLM.generate_until does, apart for each kind of options.

    requests: context and options. lengths: tokens of each context. Returns the indices of each group's requests.
    """
    groups: dict[str, list[int]] = {}
    for index, (_, options) in enumerate(requests):
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(index)
    return [sorted(group, key=lambda index: (-lengths[index], requests[index][0])) for group in groups.values()]

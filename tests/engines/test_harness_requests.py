"""Requests are ordered and cut as one HFLM would order and batch them, and requests that share logits share a row."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.engines import harness_requests

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=4)
REQUESTS = st.lists(st.tuples(TOKENS, TOKENS), max_size=30)


def order_as_lm_eval(requests: list[tuple[list[int], list[int]]]) -> list[int]:
    """The order of lm-eval 0.4.1's Collator in HFLM._loglikelihood_tokens."""
    return [i for i, _ in sorted(enumerate(requests), key=lambda x: (-len(x[1][0] + x[1][1]), tuple(x[1][0] + x[1][1])))]


@given(REQUESTS)
def test_rows_are_in_the_harnesss_order_and_cover_every_request(requests: list[tuple[list[int], list[int]]]) -> None:
    rows = harness_requests.share_rows(requests)
    assert [index for row in rows for index in row] == order_as_lm_eval(requests)


@given(REQUESTS)
def test_a_row_is_shared_by_all_choices_of_one_token_after_the_same_context(
    requests: list[tuple[list[int], list[int]]],
) -> None:
    rows = harness_requests.share_rows(requests)
    for row in rows:
        contexts = {tuple(requests[index][0]) for index in row}
        assert len(contexts) == 1
        assert len(row) == 1 or all(len(requests[index][1]) == 1 for index in row)
    contexts = {tuple(context) for context, continuation in requests if len(continuation) == 1}
    apart = [row for row in rows if len(requests[row[0]][1]) > 1]
    assert len(rows) - len(apart) >= len(contexts)
    if not apart:
        assert len(rows) == len(contexts)


def test_four_choices_are_one_row() -> None:
    requests = [([5, question], [choice]) for question in range(3) for choice in (40, 10, 30, 20)]
    random.Random(0).shuffle(requests)
    rows = harness_requests.share_rows(requests)
    assert [[requests[index][1] for index in row] for row in rows] == [[[10], [20], [30], [40]]] * 3
    assert [requests[row[0]][0] for row in rows] == [[5, 0], [5, 1], [5, 2]]


def test_texts_are_generated_the_longest_first_apart_for_each_kind_of_options() -> None:
    long, short = {"until": ["a"]}, {"until": ["b"]}
    requests = [("x", long), ("y", short), ("b", dict(long)), ("a", long), ("z", short)]
    assert harness_requests.group_generations(requests, [1, 2, 3, 3, 9]) == [[3, 2, 0], [4, 1]]


@pytest.mark.parametrize(
    ("count", "batch_size", "size"),
    [(0, 4, 4), (1, 4, 4), (31 * 4, 4, 4), (31 * 4 + 1, 4, 8), (64 * 4, 4, 16), (10_000, 4, 16), (640, 32, 32), (10_000, 1, 4)],
)
def test_chunks_are_whole_batches_a_few_of_them_only_where_there_are_many(count: int, batch_size: int, size: int) -> None:
    assert harness_requests.choose_size(count, batch_size) == size


def test_pieces_are_of_one_size_except_for_the_last() -> None:
    assert harness_requests.cut("abcdefg", 3) == ["abc", "def", "g"]
    assert harness_requests.cut([], 3) == []

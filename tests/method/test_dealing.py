"""Pairs dealt out to batches and rows: whole, in order, and near the best."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.method import dealing


def test_pairs_are_assigned_to_the_first_row_with_room_longest_first() -> None:
    assert dealing.assign_rows([3, 10, 4, 7, 6]) == [[1], [3, 0], [4, 2]]
    assert dealing.assign_rows([5]) == [[0]]
    assert dealing.assign_rows([2, 2]) == [[0], [1]]


@pytest.mark.parametrize(
    ("sizes", "positions"),
    [([5], 5), ([5, 5], 10), ([5, 3, 2], 10), ([6, 3, 3], 12), ([6, 4, 3, 3, 2], 18), ([9, 1, 1, 1], 18)],
)
def test_a_batch_computes_rows_of_its_longest_pair(sizes: list[int], positions: int) -> None:
    assert dealing.count_positions(sizes) == positions


def test_a_round_lasts_as_long_as_its_largest_batch() -> None:
    """Each batch has two rows, of 5, 4, 4 and 8 positions: no row has room for both of its pairs."""
    sizes, batches = [5, 4, 4, 2, 4, 3, 8, 1], [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert dealing.measure_rounds(batches, sizes, 2) == (10 + 16, 10 + 8 + 8 + 16)
    assert dealing.measure_rounds(batches, sizes, 1) == (10 + 8 + 8 + 16, 10 + 8 + 8 + 16)
    assert dealing.measure_rounds(batches, sizes, 2, sum) == (9 + 9, 9 + 6 + 7 + 9)


def wait_for_rounds(batches: list[list[int]], sizes: list[int], devices: int) -> tuple[int, int]:
    """Return the positions computed in the rounds, each as long as its largest batch, and in all batches."""
    positions = [
        len(dealing.assign_rows([sizes[pair] for pair in batch])) * max(sizes[pair] for pair in batch) for batch in batches
    ]
    rounds = [positions[start : start + devices] for start in range(0, len(positions), devices)]
    return sum(map(max, rounds)), sum(positions)


@st.composite
def global_batches(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Draw the sizes of a global batch's pairs, devices, and pairs per batch."""
    devices, device_batch, accumulation = (draw(st.integers(1, most)) for most in (4, 4, 3))
    count = devices * device_batch * accumulation
    return draw(st.lists(st.integers(1, 60), min_size=count, max_size=count)), devices, device_batch


@settings(deadline=None)
@given(global_batches())
def test_a_global_batch_is_dealt_out_whole_and_no_slower_than_in_its_order(given_batch: tuple[list[int], int, int]) -> None:
    sizes, devices, device_batch = given_batch
    batches = dealing.deal_out(sizes, devices, device_batch)
    assert batches == dealing.deal_out(sizes, devices, device_batch)
    assert {len(batch) for batch in batches} == {device_batch}
    assert sorted(pair for batch in batches for pair in batch) == list(range(len(sizes)))
    assert all(batch == sorted(batch) for batch in batches)
    in_order = [list(range(start, start + device_batch)) for start in range(0, len(sizes), device_batch)]
    assert wait_for_rounds(batches, sizes, devices) <= wait_for_rounds(in_order, sizes, devices)
    if device_batch == 1:  # no padding: each round takes the longest pairs that are left
        longest = sorted(sizes, reverse=True)[::devices]
        assert wait_for_rounds(batches, sizes, devices) == (sum(longest), sum(sizes))


@pytest.mark.parametrize(("devices", "device_batch"), [(8, 8), (4, 4), (1, 8)])
def test_without_padding_pairs_are_dealt_out_by_the_sum_of_their_tokens(devices: int, device_batch: int) -> None:
    draw = random.Random(2)
    for _ in range(5):
        sizes = [200 + sum(min(824, round(draw.lognormvariate(5.63, 0.775))) for _ in range(2)) for _ in range(64)]
        batches = dealing.deal_out(sizes, devices, device_batch, sum)
        assert sorted(pair for batch in batches for pair in batch) == list(range(64))
        tokens = [sum(sizes[pair] for pair in batch) for batch in batches]
        rounds = [max(tokens[start : start + devices]) for start in range(0, len(tokens), devices)]
        assert devices * sum(rounds) < 1.03 * sum(sizes)
        padded = dealing.deal_out(sizes, devices, device_batch)
        assert devices == 1 or dealing.measure_rounds(padded, sizes, devices, sum) > dealing.measure_rounds(
            batches, sizes, devices, sum
        )


def test_a_single_batch_has_its_pairs_in_their_order() -> None:
    assert dealing.deal_out([3, 9, 1, 7], devices=1, device_batch=4) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("devices", "device_batch", "waited", "before"),
    [(8, 8, 1.25, 1.45), (8, 2, 1.25, 1.65), (1, 8, 1.12, 1.2), (8, 1, 1.12, 1.5)],
)
def test_the_slowest_device_is_near_the_mean(devices: int, device_batch: int, waited: float, before: float) -> None:
    """Positions in the rounds over tokens of the pairs, for 64 pairs with lengths like UltraFeedback's."""
    draw, ours, in_order, tokens = random.Random(0), 0, 0, 0
    for _ in range(20):
        sizes = [200 + sum(min(824, round(draw.lognormvariate(5.63, 0.775))) for _ in range(2)) for _ in range(64)]
        batches = dealing.deal_out(sizes, devices, device_batch)
        plain = [list(range(start, start + device_batch)) for start in range(0, 64, device_batch)]
        ours += wait_for_rounds(batches, sizes, devices)[0] * devices
        in_order += wait_for_rounds(plain, sizes, devices)[0] * devices
        tokens += sum(sizes)
    assert ours / tokens < waited
    assert in_order / tokens > before or devices == 1

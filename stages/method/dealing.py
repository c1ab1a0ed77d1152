"""How pairs are dealt out to batches and rows, by their lengths alone."""

from collections.abc import Callable, Sequence

Count = Callable[[list[int]], int]
"""Returns the positions that a batch computes, from the tokens of each of its pairs: `count_positions` or, if all pairs share
one row without padding, `sum`."""


def assign_rows(sizes: list[int]) -> list[list[int]]:
    """Assign pairs to rows by first-fit-decreasing: longest first, each to the first row that has room for it.

    sizes: tokens of each pair; a row holds as many tokens as the longest pair has. Returns the pairs' indices by row.
    """
    length = max(sizes)
    assigned: list[list[int]] = []
    for pair in sorted(range(len(sizes)), key=lambda pair: -sizes[pair]):
        fitting = (row for row in assigned if sum(sizes[other] for other in row) + sizes[pair] <= length)
        if (row := next(fitting, None)) is None:
            assigned.append(row := [])
        row.append(pair)
    return assigned


def count_positions(sizes: list[int]) -> int:
    """Return the positions that a packed batch computes, padding included. sizes: tokens of each pair."""
    return len(assign_rows(sizes)) * max(sizes)


def deal_out(sizes: list[int], devices: int, device_batch: int, count: Count = count_positions) -> list[list[int]]:
    """Deal the pairs of a global batch out to batches of device_batch pairs, so that the devices wait little for each other.

    The devices compute one batch each at a time: every round lasts as long as its largest batch. Of several ways to deal, the
    one with the shortest rounds is taken, and of these the one with the least padding.
    sizes: (global_batch,), tokens of each pair. count: the measure of a batch. Returns the pairs' indices by batch, ascending
    in each: `devices` batches of the first round, those of the second, and so on. A single batch has the pairs in their order.
    """
    batches, in_round = len(sizes) // device_batch, devices * device_batch
    if batches == 1:
        return [list(range(len(sizes)))]
    order = sorted(range(len(sizes)), key=lambda pair: -sizes[pair])
    balanced_rounds = [
        batch
        for start in range(0, len(sizes), in_round)
        for batch in _fill_batches(order[start : start + in_round], sizes, devices, device_batch, count)
    ]
    balanced = _fill_batches(order, sizes, batches, device_batch, count)
    similar, given = (
        [pairs[start : start + device_batch] for start in range(0, len(sizes), device_batch)]
        for pairs in (order, list(range(len(sizes))))
    )
    ways = [balanced_rounds, balanced, similar, given]
    return [sorted(batch) for batch in min(ways, key=lambda way: measure_rounds(way, sizes, devices, count))]


def _fill_batches(pairs: list[int], sizes: list[int], number: int, device_batch: int, count: Count) -> list[list[int]]:
    """Add each pair to that of `number` batches, of those with room, which is then the smallest. Returns the largest first."""

    def measure(batch: list[int]) -> tuple[int, int]:
        tokens = [sizes[pair] for pair in batch]
        return count(tokens), sum(tokens)

    batches: list[list[int]] = [[] for _ in range(number)]
    for pair in pairs:
        with_room = [batch for batch in batches if len(batch) < device_batch]
        min(with_room, key=lambda batch: measure([*batch, pair])).append(pair)
    return sorted(batches, key=measure, reverse=True)


def measure_rounds(
    batches: list[list[int]], sizes: Sequence[int], devices: int, count: Count = count_positions
) -> tuple[int, int]:
    """Return the positions of each round's largest batch, summed over the rounds, and those of all batches.

    batches, sizes, devices: as in `deal_out`.
    """
    positions = [count([sizes[pair] for pair in batch]) for batch in batches]
    return sum(max(positions[start : start + devices]) for start in range(0, len(positions), devices)), sum(positions)

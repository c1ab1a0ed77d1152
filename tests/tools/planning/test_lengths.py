"""Waiting, padding and uneven GPUs against simulations written in another way, and against cases computed by hand."""

import math
import random

import numpy as np
import pytest

from stages.tools.planning import lengths


def test_the_assumed_spread_has_95_percent_below_980_tokens() -> None:
    drawn = lengths.draw_lengths(np.random.default_rng(1), 200_000, 375, lengths.SPREAD, 10**9)
    assert drawn.mean() == pytest.approx(375, rel=0.01)
    assert np.quantile(drawn, 0.95) == pytest.approx(980, rel=0.02)
    assert lengths.draw_lengths(np.random.default_rng(1), 1000, 375, lengths.SPREAD, 300).max() == 300
    assert lengths.draw_lengths(np.random.default_rng(1), 1000, 1, lengths.SPREAD, 300).min() == 1


def step_by_step(requests: list[int], slots: int) -> tuple[list[int], list[int]]:
    """Simulate a queue one token at a time: the number of sequences, and their tokens so far, in each step."""
    waiting, batch, running, sampled = list(requests), [], [], []  # type: list[int], list[list[int]], list[int], list[int]
    while waiting or batch:
        while waiting and len(batch) < slots:
            batch.append([0, waiting.pop(0)])
        running.append(len(batch))
        sampled.append(sum(done for done, _ in batch))
        for sequence in batch:
            sequence[0] += 1
        batch = [sequence for sequence in batch if sequence[0] < sequence[1]]
    return running, sampled


@pytest.mark.parametrize(("requests", "slots"), [(1, 4), (4, 4), (50, 8), (30, 1)])
def test_a_queue_is_the_same_as_step_by_step(requests: int, slots: int) -> None:
    drawn = lengths.draw_lengths(np.random.default_rng(3), requests, 20, lengths.SPREAD, 100).tolist()
    running, sampled = lengths.simulate_queue(requests, slots, 20, 100, 3)
    assert (running.tolist(), sampled.tolist()) == step_by_step(drawn, slots)


def test_the_slowest_gpu_computes_half_as_much_again_unless_pairs_are_dealt_by_length() -> None:
    """Against another simulation, of 400 batches: pure Python, pairs as lists, one GPU after the other."""
    draw = random.Random(5)

    def text(mean: float, spread: float, limit: int) -> int:
        return min(limit, max(1, math.ceil(mean * math.exp(draw.gauss(-(spread**2) / 2, spread)))))

    needed = packed = padded = in_order_unpadded = dealt_unpadded = 0
    for _ in range(400):
        pairs = []
        for _ in range(64):
            prompt = text(190, lengths.PROMPT_SPREAD, 512)
            pairs.append(prompt + sum(min(1024 - prompt, text(375, lengths.SPREAD, 1024)) for _ in range(2)))
        needed += sum(pairs)
        gpus = []
        for gpu in range(8):
            room: list[int] = []
            mine = sorted(pairs[8 * gpu : 8 * gpu + 8])[::-1]
            for size in mine:
                fits = [index for index, left in enumerate(room) if left >= size]
                if fits:
                    room[fits[0]] -= size
                else:
                    room.append(mine[0] - size)
            gpus.append(mine[0] * len(room))
        packed += 8 * max(gpus)
        padded += sum(gpus)
        in_order_unpadded += 8 * max(sum(pairs[8 * gpu : 8 * gpu + 8]) for gpu in range(8))
        totals = [[0, 0] for _ in range(8)]
        for size in sorted(pairs)[::-1]:
            smallest = min((total for total in totals if total[1] < 8), key=lambda total: total[0])
            smallest[0] += size
            smallest[1] += 1
        dealt_unpadded += 8 * max(total for total, _ in totals)
    mean, in_order, dealt, unpadded, balanced = lengths.simulate_pairs(190, 375, 512, 1024, 64, 8, 8)
    assert mean == pytest.approx(needed / 400 / 64, rel=0.03)
    assert in_order == pytest.approx(packed / needed, rel=0.03)
    assert unpadded == pytest.approx(in_order_unpadded / needed, rel=0.03)
    assert balanced == pytest.approx(dealt_unpadded / needed, rel=0.005)
    assert 1 - needed / padded == pytest.approx(0.19, abs=0.02), "padding, as docs/performance.md says"
    assert packed / padded == pytest.approx(1.25, abs=0.05)
    assert in_order == pytest.approx(1.5, abs=0.05)
    assert dealt == pytest.approx(1.21, abs=0.03)
    assert unpadded == pytest.approx(1.2, abs=0.03)
    assert balanced == pytest.approx(1.01, abs=0.005)
    waits = [lengths.simulate_pairs(190, 375, 512, 1024, 64, batch, 8).dealt_unpadded for batch in (2, 1)]
    assert waits == pytest.approx([1.03, 1.1], abs=0.005)


def test_pairs_of_one_length_wait_for_nothing() -> None:
    found = lengths.simulate_pairs(10**6, 10**6, 100, 300, 64, 8, 8)
    assert found == pytest.approx((500, 1, 1, 1, 1), rel=0.001)


def test_a_pair_has_a_prompt_and_two_responses_that_are_cut() -> None:
    tokens = lengths.draw_pairs(np.random.default_rng(0), 50_000, 190, 375, 10**9, 10**9)
    assert tokens.mean() == pytest.approx(190 + 2 * 375, rel=0.02)
    cut = lengths.draw_pairs(np.random.default_rng(0), 50_000, 190, 375, 512, 1024)
    assert 512 + 1024 < cut.max() <= 2 * 1024 - 1, "a prompt counts once"
    assert cut.min() >= 3

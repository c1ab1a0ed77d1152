"""The equations compared with naive loops over Python floats, and the invariants that the paper implies."""

import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.method import sppo

Matrix = list[list[float]]
logit = st.floats(-30, 30, allow_nan=False, width=32)
eta = st.floats(0.1, 2000)


@st.composite
def matrices(draw: st.DrawFn, values: st.SearchStrategy[float] = logit) -> Matrix:
    size = draw(st.integers(2, 6))
    return draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=size, max_size=size))


@st.composite
def responses(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
    """Draw log-probabilities under policy and reference, and P^, of up to 8 responses."""
    size = draw(st.integers(1, 8))
    logps = st.lists(st.floats(-500, 0), min_size=size, max_size=size)
    return draw(logps), draw(logps), draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def as_tensor(logits: Matrix) -> Tensor:
    return torch.tensor(logits, dtype=torch.float64)


def scores_of(logits: Matrix) -> Tensor:
    return sppo.pairwise_scores(as_tensor(logits), 0.5)


@settings(deadline=None)
@given(matrices(), st.floats(0.01, 3))
def test_scores_are_the_scaled_difference_of_both_orders(logits: Matrix, scale: float) -> None:
    scores = sppo.pairwise_scores(as_tensor(logits), scale).tolist()
    for i in range(len(logits)):
        for j in range(len(logits)):
            assert scores[i][j] == pytest.approx((logits[i][j] - logits[j][i]) * scale)


@settings(deadline=None)
@given(matrices())
def test_a_scale_of_one_half_is_exactly_the_mean_of_both_orders(logits: Matrix) -> None:
    difference = as_tensor(logits) - as_tensor(logits).T
    assert torch.equal(scores_of(logits), difference / 2)
    assert torch.equal(sppo.pairwise_scores(as_tensor(logits), 1), difference)  # llm-blender's compare


@settings(deadline=None)
@given(matrices(st.integers(-40, 40).map(float)), st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_the_scale_sharpens_probabilities_but_chooses_the_same_pair(logits: Matrix, scale: float) -> None:
    scores = sppo.pairwise_scores(as_tensor(logits), scale)
    for one, other in zip(sppo.choose_pair(scores), sppo.choose_pair(scores_of(logits)), strict=True):
        assert one == other
    size = len(logits)
    for i, probability in enumerate(sppo.win_probabilities(scores).tolist()):
        wins = [sigmoid(scale * (logits[i][k] - logits[k][i])) for k in range(size) if k != i]
        assert probability == pytest.approx((sum(wins) + 0.5) / size)


@settings(deadline=None)
@given(matrices())
def test_win_probability_is_the_mean_of_pairwise_probabilities(logits: Matrix) -> None:
    size = len(logits)
    probabilities = sppo.win_probabilities(scores_of(logits)).tolist()
    for i in range(size):
        wins = [0.5 if i == k else sigmoid((logits[i][k] - logits[k][i]) / 2) for k in range(size)]
        assert probabilities[i] == pytest.approx(sum(wins) / size)


@settings(deadline=None)
@given(matrices())
def test_pairwise_probabilities_sum_to_one(logits: Matrix) -> None:
    scores = scores_of(logits)
    assert torch.equal(scores, -scores.T)
    pairwise = torch.sigmoid(scores)
    torch.testing.assert_close(pairwise + pairwise.T, torch.ones_like(pairwise))


@settings(deadline=None)
@given(matrices())
def test_probabilities_are_bounded_and_half_on_average(logits: Matrix) -> None:
    size = len(logits)
    probabilities = sppo.win_probabilities(scores_of(logits))
    assert probabilities.min() >= 1 / (2 * size) - 1e-12
    assert probabilities.max() <= 1 - 1 / (2 * size) + 1e-12
    assert probabilities.mean().item() == pytest.approx(0.5)


def test_bounds_are_attained_by_a_response_that_always_wins_and_one_that_always_loses() -> None:
    probabilities = sppo.win_probabilities(scores_of([[0, 90, 90], [-90, 0, 90], [-90, -90, 0]]))
    torch.testing.assert_close(probabilities, torch.tensor([5 / 6, 1 / 2, 1 / 6], dtype=torch.float64))


@settings(deadline=None)
@given(matrices(), st.floats(-20, 20))
def test_a_position_bias_cancels(logits: Matrix, bias: float) -> None:
    biased = [[value + bias for value in row] for row in logits]
    torch.testing.assert_close(scores_of(biased), scores_of(logits))


@settings(deadline=None)
@given(matrices())
def test_chosen_and_rejected_have_the_highest_and_lowest_mean_score(logits: Matrix) -> None:
    size = len(logits)
    means = [sum((logits[i][k] - logits[k][i]) / 2 for k in range(size)) / size for i in range(size)]
    chosen, rejected = sppo.choose_pair(scores_of(logits))
    assert means[chosen] == pytest.approx(max(means))
    assert means[rejected] == pytest.approx(min(means))


def test_the_pair_is_chosen_by_mean_score_not_by_win_probability() -> None:
    # The first wins once by a wide margin and loses once narrowly, the second beats both narrowly: P^ would choose the second.
    logits = [[0, -1, 9], [1, 0, 1], [-9, -1, 0]]
    scores = scores_of([[float(value) for value in row] for row in logits])
    assert sppo.win_probabilities(scores).argmax() == 1
    assert [int(index) for index in sppo.choose_pair(scores)] == [0, 2]


@settings(deadline=None)
@given(matrices())
def test_aggregate_scores_give_the_released_codes_probabilities(logits: Matrix) -> None:
    size = len(logits)
    totals = [sum(logits[i][k] - logits[k][i] for k in range(size)) / size for i in range(size)]
    aggregated = sppo.aggregate_scores(as_tensor(logits))
    probabilities = sppo.win_probabilities(aggregated).tolist()
    for i in range(size):
        assert probabilities[i] == pytest.approx(sum(sigmoid(totals[i] - totals[k]) for k in range(size)) / size)
    pairwise = torch.sigmoid(aggregated)
    torch.testing.assert_close(pairwise + pairwise.T, torch.ones_like(pairwise))


def test_aggregate_scores_of_two_responses_are_the_difference_of_both_orders() -> None:
    logits = [[0.0, 1.0], [-0.5, 0.0]]
    torch.testing.assert_close(sppo.aggregate_scores(as_tensor(logits)), sppo.pairwise_scores(as_tensor(logits), 1))


def test_equal_responses_are_a_tie() -> None:
    chosen, rejected = sppo.choose_pair(scores_of([[0.0, 2.0, 2.0], [2.0, 0.0, 2.0], [2.0, 2.0, 0.0]]))
    assert chosen == rejected


@settings(deadline=None)
@given(matrices(st.integers(-40, 40).map(float)), st.randoms())
def test_the_order_of_responses_does_not_matter(logits: Matrix, shuffler: random.Random) -> None:
    order = list(range(len(logits)))
    shuffler.shuffle(order)
    scores, moved = scores_of(logits), scores_of([[logits[i][j] for j in order] for i in order])
    torch.testing.assert_close(sppo.win_probabilities(moved), sppo.win_probabilities(scores)[order])
    for one, other in zip(sppo.choose_pair(moved), sppo.choose_pair(scores), strict=True):
        # Among equally good responses the first is chosen, so only the mean scores must agree.
        assert moved.mean(-1)[one].item() == pytest.approx(scores.mean(-1)[other].item())


@settings(deadline=None)
@given(matrices(), matrices())
def test_prompts_in_a_batch_do_not_affect_each_other(first: Matrix, second: Matrix) -> None:
    size = min(len(first), len(second))
    both = [scores_of([row[:size] for row in logits[:size]]) for logits in (first, second)]
    batch = torch.stack(both)
    for function in (sppo.win_probabilities, lambda scores: torch.stack(sppo.choose_pair(scores), -1)):
        torch.testing.assert_close(function(batch), torch.stack([function(scores) for scores in both]))


@settings(deadline=None)
@given(responses(), eta)
def test_loss_is_eq_4_7(values: tuple[list[float], list[float], list[float]], eta: float) -> None:
    policy, reference, probabilities = values
    squares = [(a - b - eta * (p - 0.5)) ** 2 for a, b, p in zip(policy, reference, probabilities, strict=True)]
    tensors = [torch.tensor(value, dtype=torch.float64) for value in values]
    assert sppo.sppo_loss(*tensors, eta).item() == pytest.approx(sum(squares) / len(squares))


@settings(deadline=None)
@given(responses(), eta)
def test_the_initial_loss_is_eta_squared_times_the_mean_squared_margin(
    values: tuple[list[float], list[float], list[float]], eta: float
) -> None:
    logps, probabilities = (torch.tensor(values[index], dtype=torch.float64) for index in (0, 2))
    expected = eta**2 * sum((p - 0.5) ** 2 for p in values[2]) / len(values[2])
    assert sppo.sppo_loss(logps, logps, probabilities, eta).item() == pytest.approx(expected)


@st.composite
def paired(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
    """Draw log-probabilities of N chosen responses, then of the N rejected ones, under policy and reference, and P^."""
    size = 2 * draw(st.integers(1, 4))
    logps = st.lists(st.floats(-200, 0), min_size=size, max_size=size)
    return draw(logps), draw(logps), draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))


@settings(deadline=None)
@given(paired(), eta, st.floats(0.001, 2))
def test_each_loss_matches_its_papers_equation_and_initial_value(
    values: tuple[list[float], list[float], list[float]], eta: float, beta: float
) -> None:
    policy, reference, probabilities = values
    ratios = [a - b for a, b in zip(policy, reference, strict=True)]
    half = len(ratios) // 2
    margins = [chosen - rejected for chosen, rejected in zip(ratios[:half], ratios[half:], strict=True)]
    naive = {
        "sppo": sum((r - eta * (p - 0.5)) ** 2 for r, p in zip(ratios, probabilities, strict=True)) / len(ratios),
        "sppo_hard": sum((r - eta * w) ** 2 for r, w in zip(ratios, [0.5] * half + [-0.5] * half, strict=True)) / len(ratios),
        "dpo": sum(max(-beta * m, 0) + math.log1p(math.exp(-abs(beta * m))) for m in margins) / half,
        "ipo": sum((m - 1 / (2 * beta)) ** 2 for m in margins) / half,
    }
    tensors = [torch.tensor(value, dtype=torch.float64) for value in values]
    for name, expected in naive.items():
        assert sppo.loss(name, *tensors, eta, beta).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    starts = {"sppo_hard": eta**2 / 4, "dpo": math.log(2), "ipo": 1 / (4 * beta**2)}
    for name, expected in starts.items():
        assert sppo.loss(name, tensors[1], *tensors[1:], eta, beta).item() == pytest.approx(expected)


def test_the_loss_is_zero_if_every_log_ratio_is_eta_times_the_margin() -> None:
    reference, probabilities = torch.tensor([-50.0, -20.0]).double(), torch.tensor([0.9, 0.1]).double()
    assert sppo.sppo_loss(reference + 10 * (probabilities - 0.5), reference, probabilities, 10).item() == pytest.approx(0)


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    logps, logits = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(4, 4, dtype=torch.float64)
    reference, probabilities = torch.randn(6).double(), torch.rand(6).double()
    for name in ("sppo", "sppo_hard", "dpo", "ipo"):
        loss = partial(sppo.loss, name, reference_logps=reference, probabilities=probabilities, eta=7.0, beta=0.3)
        assert torch.autograd.gradcheck(loss, (logps,))
    assert torch.autograd.gradcheck(lambda x: sppo.win_probabilities(sppo.pairwise_scores(x, 0.5)), (logits.requires_grad_(),))

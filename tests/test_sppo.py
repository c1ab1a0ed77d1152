"""The method against naive loops over Python floats, and the invariants that the paper's equations imply."""

import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages import sppo

Matrix = list[list[float]]
logit = st.floats(-30, 30, allow_nan=False, width=32)
eta = st.floats(0.1, 2000)


@st.composite
def matrices(draw: st.DrawFn, values: st.SearchStrategy[float] = logit) -> Matrix:
    size = draw(st.integers(2, 6))
    return draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=size, max_size=size))


@st.composite
def responses(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
    """Log-probabilities under policy and reference, and P^, of up to 8 responses."""
    size = draw(st.integers(1, 8))
    logps = st.lists(st.floats(-500, 0), min_size=size, max_size=size)
    return draw(logps), draw(logps), draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def scores_of(logits: Matrix) -> Tensor:
    return sppo.pairwise_scores(torch.tensor(logits, dtype=torch.float64))


@settings(deadline=None)
@given(matrices())
def test_scores_are_half_the_difference_of_the_two_orders(logits: Matrix) -> None:
    scores = scores_of(logits).tolist()
    for i in range(len(logits)):
        for j in range(len(logits)):
            assert scores[i][j] == pytest.approx((logits[i][j] - logits[j][i]) / 2)


@settings(deadline=None)
@given(matrices())
def test_probabilities_are_the_mean_of_pairwise_ones(logits: Matrix) -> None:
    size = len(logits)
    found = sppo.win_probabilities(scores_of(logits)).tolist()
    for i in range(size):
        wins = [0.5 if i == k else sigmoid((logits[i][k] - logits[k][i]) / 2) for k in range(size)]
        assert found[i] == pytest.approx(sum(wins) / size)


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
    found = sppo.win_probabilities(scores_of(logits))
    assert found.min() >= 1 / (2 * size) - 1e-12
    assert found.max() <= 1 - 1 / (2 * size) + 1e-12
    assert found.mean().item() == pytest.approx(0.5)


def test_the_bounds_are_reached_by_one_that_wins_and_one_that_loses_always() -> None:
    found = sppo.win_probabilities(scores_of([[0, 90, 90], [-90, 0, 90], [-90, -90, 0]]))
    torch.testing.assert_close(found, torch.tensor([5 / 6, 1 / 2, 1 / 6], dtype=torch.float64))


@settings(deadline=None)
@given(matrices(), st.floats(-20, 20))
def test_a_preference_for_one_side_changes_nothing(logits: Matrix, bias: float) -> None:
    biased = [[value + bias for value in row] for row in logits]
    torch.testing.assert_close(scores_of(biased), scores_of(logits))


@settings(deadline=None)
@given(matrices())
def test_winner_and_loser_have_the_highest_and_lowest_mean_score(logits: Matrix) -> None:
    size = len(logits)
    means = [sum((logits[i][k] - logits[k][i]) / 2 for k in range(size)) / size for i in range(size)]
    winner, loser = sppo.choose_pair(scores_of(logits))
    assert means[winner] == pytest.approx(max(means))
    assert means[loser] == pytest.approx(min(means))


def test_the_pair_is_chosen_by_mean_score_not_by_win_probability() -> None:
    # The first wins once by far and loses once by little, the second beats both by little: P^ would choose the second.
    logits = [[0, -1, 9], [1, 0, 1], [-9, -1, 0]]
    scores = scores_of([[float(value) for value in row] for row in logits])
    assert sppo.win_probabilities(scores).argmax() == 1
    assert [int(index) for index in sppo.choose_pair(scores)] == [0, 2]


@settings(deadline=None)
@given(matrices())
def test_the_released_codes_probabilities_are_of_aggregate_scores(logits: Matrix) -> None:
    size = len(logits)
    totals = [sum(logits[i][k] - logits[k][i] for k in range(size)) / size for i in range(size)]
    aggregated = sppo.aggregate_scores(scores_of(logits))
    found = sppo.win_probabilities(aggregated).tolist()
    for i in range(size):
        assert found[i] == pytest.approx(sum(sigmoid(totals[i] - totals[k]) for k in range(size)) / size)
    pairwise = torch.sigmoid(aggregated)
    torch.testing.assert_close(pairwise + pairwise.T, torch.ones_like(pairwise))


def test_two_responses_have_twice_the_logit_in_aggregate() -> None:
    scores = scores_of([[0.0, 1.0], [-0.5, 0.0]])
    torch.testing.assert_close(sppo.aggregate_scores(scores), 2 * scores)


def test_equal_responses_are_a_tie() -> None:
    winner, loser = sppo.choose_pair(scores_of([[0.0, 2.0, 2.0], [2.0, 0.0, 2.0], [2.0, 2.0, 0.0]]))
    assert winner == loser


@settings(deadline=None)
@given(matrices(st.integers(-40, 40).map(float)), st.randoms())
def test_the_order_of_responses_does_not_matter(logits: Matrix, shuffler: random.Random) -> None:
    order = list(range(len(logits)))
    shuffler.shuffle(order)
    scores, moved = scores_of(logits), scores_of([[logits[i][j] for j in order] for i in order])
    torch.testing.assert_close(sppo.win_probabilities(moved), sppo.win_probabilities(scores)[order])
    for one, other in zip(sppo.choose_pair(moved), sppo.choose_pair(scores), strict=True):
        # Of several that are equally good the first is taken: the mean score is what must agree.
        assert moved.mean(-1)[one].item() == pytest.approx(scores.mean(-1)[other].item())


@settings(deadline=None)
@given(matrices(), matrices())
def test_prompts_of_a_batch_do_not_mix(first: Matrix, second: Matrix) -> None:
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
def test_the_initial_loss_is_eta_squared_times_the_variance_about_a_half(
    values: tuple[list[float], list[float], list[float]], eta: float
) -> None:
    logps, probabilities = torch.tensor(values[0]).double(), torch.tensor(values[2]).double()
    expected = eta**2 * sum((p - 0.5) ** 2 for p in values[2]) / len(values[2])
    assert sppo.sppo_loss(logps, logps, probabilities, eta).item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@st.composite
def paired(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
    """Log-probabilities of N winners and then of their losers under policy and reference, and P^."""
    size = 2 * draw(st.integers(1, 4))
    logps = st.lists(st.floats(-200, 0), min_size=size, max_size=size)
    return draw(logps), draw(logps), draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))


@settings(deadline=None)
@given(paired(), eta, st.floats(0.001, 2))
def test_the_baselines_losses_are_those_of_their_papers(
    values: tuple[list[float], list[float], list[float]], eta: float, beta: float
) -> None:
    policy, reference, probabilities = values
    ratios = [a - b for a, b in zip(policy, reference, strict=True)]
    half = len(ratios) // 2
    margins = [won - lost for won, lost in zip(ratios[:half], ratios[half:], strict=True)]
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


def test_the_loss_is_zero_where_the_log_ratio_is_eta_times_the_margin() -> None:
    reference, probabilities = torch.tensor([-50.0, -20.0]).double(), torch.tensor([0.9, 0.1]).double()
    assert sppo.sppo_loss(reference + 10 * (probabilities - 0.5), reference, probabilities, 10).item() == pytest.approx(0)


def test_the_loss_and_what_leads_to_it_have_right_gradients() -> None:
    torch.manual_seed(0)
    logps, logits = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(4, 4, dtype=torch.float64)
    reference, probabilities = torch.randn(6).double(), torch.rand(6).double()
    for name in ("sppo", "sppo_hard", "dpo", "ipo"):
        loss = partial(sppo.loss, name, reference_logps=reference, probabilities=probabilities, eta=7.0, beta=0.3)
        assert torch.autograd.gradcheck(loss, (logps,))
    assert torch.autograd.gradcheck(lambda x: sppo.win_probabilities(sppo.pairwise_scores(x)), (logits.requires_grad_(),))


@st.composite
def heads(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]:
    """Hidden states (T, H), weights (V, H), targets (T,), a bias (V,) or none, and a soft cap or none."""
    tokens, width, vocabulary = (draw(st.integers(1, most)) for most in (9, 4, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    hidden, weight = (2 * torch.randn(rows, width, generator=generator) for rows in (tokens, vocabulary))
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    bias = torch.randn(vocabulary, generator=generator) if draw(st.booleans()) else None
    return hidden, weight, targets, bias, draw(st.sampled_from([None, 3.0]))


@settings(deadline=None)
@given(heads(), st.integers(1, 4))
def test_token_logps_are_log_softmax_whatever_is_made_at_once(
    head: tuple[Tensor, Tensor, Tensor, Tensor | None, float | None], at_once: int
) -> None:
    hidden, weight, targets, bias, softcap = head
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sppo, "TOKENS_AT_ONCE", at_once)
        found = sppo.token_logps(hidden, weight, targets, bias=bias, softcap=softcap)
    assert found.dtype == torch.float32
    for value, state, target in zip(found.tolist(), hidden.tolist(), targets.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(state, row, strict=True)) for row in weight.tolist()]
        scores = [score + extra for score, extra in zip(scores, bias.tolist(), strict=True)] if bias is not None else scores
        scores = [softcap * math.tanh(score / softcap) for score in scores] if softcap else scores
        assert value == pytest.approx(scores[target] - math.log(sum(map(math.exp, scores))), rel=1e-5, abs=1e-4)


def test_token_logps_of_bf16_are_taken_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(300, 16).bfloat16(), torch.randn(50, 16).bfloat16(), torch.randint(0, 50, (300,))
    logits = torch.nn.functional.linear(hidden, weight)
    expected = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(sppo.token_logps(hidden, weight, targets), expected, rtol=1e-6, atol=1e-5)


def test_token_logps_have_the_gradient_of_log_softmax() -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (7, 5))
    targets, bias = torch.randint(0, 5, (7,)), torch.randn(5, dtype=torch.float64, requires_grad=True)

    def gradients(logps: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logps * torch.arange(7)).sum(), (hidden, weight, bias))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sppo, "TOKENS_AT_ONCE", 3)
        found = gradients(sppo.token_logps(hidden, weight, targets, bias=bias, softcap=2.0))
    logits = 2 * torch.tanh(torch.nn.functional.linear(hidden, weight, bias) / 2)
    expected = gradients(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

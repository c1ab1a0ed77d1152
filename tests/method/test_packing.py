"""Packed log-probabilities compared with the model's own, one response at a time."""

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Gemma2Config, GraniteConfig, LlamaConfig, MistralConfig, PreTrainedConfig

from stages.engines import training
from stages.method import attention, packing
from stages.runtime import params
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.packed import GEMMA, VOCABULARY, Lengths, Row, compute_logps, make_model, make_rows, make_sharp


def draw_lengths(most: int) -> st.SearchStrategy[Lengths]:
    length = st.integers(1, most)
    return st.lists(st.tuples(length, length, length), min_size=1, max_size=12)


@settings(deadline=None, max_examples=20)
@given(draw_lengths(9), st.sampled_from([(LlamaConfig, {}), (Gemma2Config, GEMMA)]))
def test_packed_log_probabilities_and_gradients_match_those_of_each_response_alone(
    lengths: Lengths, architecture: tuple[type[PreTrainedConfig], dict[str, Any]]
) -> None:
    """The other response, other pairs, padding, the shared prompt and the chunks have no effect."""
    config, changes = architecture
    rows, model = make_rows(lengths), make_model(config, **changes)
    expected = compute_logps(model, rows)
    weights = torch.linspace(-1, 1, len(expected))
    (expected * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "TOKENS_AT_ONCE", 4)
        logps = packing.batch_logps(packing.enable_scoring(model), packing.collate(rows))
        (logps * weights).sum().backward()
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)


@given(draw_lengths(30), st.booleans())
def test_a_packed_batch_contains_every_text_once(lengths: Lengths, one_row: bool) -> None:
    rows = make_rows(lengths)
    batch = packing.collate(rows, one_row=one_row)
    ids, positions, segments = (batch[name] for name in ("input_ids", "position_ids", "segments"))
    for pair, row in enumerate(rows):
        prompt = len(row["prompt_token_ids"])
        for text, name in enumerate(("prompt", "chosen", "rejected")):
            where = segments == 3 * pair + text
            assert ids[where].tolist() == row[f"{name}_token_ids"]
            assert positions[where].tolist() == [prompt * bool(text) + k for k in range(len(row[f"{name}_token_ids"]))]
    sizes = [sum(triple) for triple in lengths]
    assert (segments >= 0).sum() == sum(sizes)
    if one_row:
        assert len(ids) == 1
        assert ids.shape[1] % 128 == 0
        assert 0 <= ids.shape[1] - sum(sizes) < 128
    else:
        assert ids.shape[1] == max(sizes)
        assert len(ids) <= max(1, 2 * sum(sizes) / max(sizes))  # no two rows are half empty
    assert batch["targets"].tolist() == [
        token for side in ("chosen", "rejected") for row in rows for token in row[f"{side}_token_ids"]
    ]
    assert batch["lengths"].tolist() == [triple[text] for text in (1, 2) for triple in lengths]


def test_a_batch_has_the_columns_that_its_rows_have() -> None:
    rows = make_rows([(2, 3, 4), (1, 1, 1)])
    assert not {"probabilities", "reference_logps"} & packing.collate(rows).keys()
    for index, row in enumerate(rows):
        row |= {"chosen_probability": 0.75 + index / 8, "rejected_probability": 0.25}
        row |= {"chosen_reference_logps": -1.5 - index, "rejected_reference_logps": -2.5}
    batch = packing.collate(rows)
    torch.testing.assert_close(batch["probabilities"], torch.tensor([0.75, 0.875, 0.25, 0.25]), rtol=0, atol=0)
    torch.testing.assert_close(batch["reference_logps"], torch.tensor([-1.5, -2.5, -2.5, -2.5]), rtol=0, atol=0)


def test_a_model_with_adapters_and_gradient_checkpointing_has_the_same_log_probabilities() -> None:
    rows = make_rows([(3, 4, 5), (6, 2, 1)])
    model = make_model(LlamaConfig)
    expected = compute_logps(model, rows).detach()
    model = training.add_adapters(packing.enable_scoring(model), params.Lora(rank=2, alpha=4))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logps = packing.batch_logps(model.train(), packing.collate(rows))
    torch.testing.assert_close(logps.detach(), expected, rtol=1e-4, atol=1e-4)
    logps.sum().backward()
    assert any(weights.grad is not None and weights.grad.abs().sum() > 0 for weights in model.parameters())


def test_scoring_keeps_the_parameters_and_the_original_forward() -> None:
    model, ids = make_model(LlamaConfig), torch.arange(9)[None]
    names, logits = [name for name, _ in model.named_parameters()], model(ids).logits
    packing.enable_scoring(model)
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(ids, original_forward=True).logits, logits, rtol=0, atol=0)


def test_a_text_longer_than_the_attention_window_is_refused() -> None:
    mistral = packing.enable_scoring(make_model(MistralConfig, sliding_window=6))
    with torch.no_grad():
        packing.check_packing(mistral, make_rows([(2, 3, 4)])[0], "float32")
        with pytest.raises(StageError) as raised:
            packing.check_packing(mistral, make_rows([(2, 9, 4)])[0], "float32")
    assert_message(str(raised.value), "prompt 0", "11 tokens", "mistral", "lengths.total", "at most 6")


def test_an_architecture_that_packing_does_not_support_is_refused() -> None:
    """Granite scales its logits."""
    granite = packing.enable_scoring(make_model(GraniteConfig, logits_scaling=4.0))
    with torch.no_grad(), pytest.raises(StageError) as raised:
        packing.check_packing(granite, make_rows([(2, 3, 4)])[0], "float32")
    assert_message(str(raised.value), "prompt 0", "packed", "granite", "use another model")


def sample_rows(model: Any, count: int, prompt: int = 5, response: int = 9) -> list[Row]:
    """Make pairs of random prompts and of responses sampled from the model."""
    torch.manual_seed(0)
    prompts = torch.randint(VOCABULARY, (count, prompt))
    sides = []
    for _ in range(2):
        ids = prompts
        for _ in range(response):
            logits = model(input_ids=ids, original_forward=True).logits[:, -1].float()
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
        sides.append(ids[:, prompt:].tolist())
    names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    tokens = zip(prompts.tolist(), *sides, strict=True)
    return [{"prompt_id": str(index)} | dict(zip(names, texts, strict=True)) for index, texts in enumerate(tokens)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slowest)])
def test_a_confident_model_is_accepted_whatever_the_pair(dtype: str, count: int) -> None:
    """Its sums are close to 0, so that a relative tolerance would refuse some of them in bfloat16."""
    with torch.no_grad():
        model = make_sharp(getattr(torch, dtype))
        rows = sample_rows(model, count)
        for row in rows:
            packing.check_packing(model, row, dtype)
        packed = packing.batch_logps(model, packing.collate(rows[:20]))
        expected = compute_logps(partial(model, original_forward=True), rows[:20])
    relative = ((packed - expected) / expected).abs()
    assert expected.mean() > -9, "one nat per token"
    assert dtype == "float32" or (relative > 0.01).any(), "otherwise this test shows nothing"


def see_everything_before(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """A causal mask without segments."""
    square = torch.ones(*segments.shape, segments.shape[1]).tril()
    return torch.zeros_like(square).masked_fill(square == 0, -math.inf).to(dtype)[:, None]


def see_the_next_token(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """The right mask, shifted by one."""
    mask = original_mask(segments, dtype)
    return torch.cat([mask[..., 1:, :], mask[..., -1:, :]], -2)


def count_positions(pairs: list[list[list[int]]], one_row: bool) -> Any:
    """Lay pairs out with positions that do not start again at the second response."""
    batch, starts = original_layout(pairs, one_row)
    positions = batch["position_ids"]
    return batch | {"position_ids": torch.arange(positions.shape[1]).expand_as(positions)}, starts


def predict_from_the_token_before(start: int, texts: list[list[int]], text: int) -> Tensor:
    """Predict the rejected response's first token from the chosen one's last."""
    first = start + sum(map(len, texts[:text]))
    return torch.arange(first - 1, first - 1 + len(texts[text]))


original_mask, original_layout = attention.dense_mask, packing._lay_out
WRONG: list[tuple[ModuleType, str, Callable[..., Any]]] = [
    (attention, "dense_mask", see_everything_before),
    (attention, "dense_mask", see_the_next_token),
    (packing, "_lay_out", count_positions),
    (packing, "_predicting_positions", predict_from_the_token_before),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("module", "name", "wrong"), WRONG)
@pytest.mark.parametrize("sharpness", [1, 4])
def test_wrong_packing_is_refused(
    monkeypatch: pytest.MonkeyPatch, dtype: str, module: ModuleType, name: str, wrong: Callable[..., Any], sharpness: float
) -> None:
    """By every pair in float32; in bfloat16, rounding may hide a change of a single token, of one nat in thirty."""
    rows, refused = make_rows([(5, 12, 11)] * 6), 0
    with torch.no_grad():
        model = make_sharp(getattr(torch, dtype), sharpness)
        for row in rows:
            packing.check_packing(model, row, dtype)
        monkeypatch.setattr(module, name, wrong)
        for row in rows:
            try:
                packing.check_packing(model, row, dtype)
            except StageError:
                refused += 1
    assert refused >= (6 if dtype == "float32" else 4)


@pytest.mark.parametrize(
    ("errors", "allowed"),
    [
        ([0.0] * 4, True),
        ([0.4, -0.4, 0.4, -0.4], True),
        ([0.0, 2.4, -2.4, 0.0], True),
        ([0.0, 2.6, -2.6, 0.0], False),  # a token: 4 x 20 / 32 = 2.5
        ([0.3, 0.3, 0.3, 0.3], True),
        ([0.35, 0.35, 0.35, 0.35], False),  # the sum: 4 / 100 + 20 / 32 x sqrt(4) = 1.29
        ([-0.35, -0.35, -0.35, -0.35], False),
        ([math.nan, 0.0, 0.0, 0.0], False),
    ],
)
def test_rounding_in_bfloat16_is_relative_to_the_logits(errors: list[float], allowed: bool) -> None:
    expected = torch.full((4,), -1.0)
    assert packing.agree(expected + torch.tensor(errors), expected, torch.full((4,), 20.0), "bfloat16") is allowed


def test_the_tolerance_of_a_mean_grows_with_the_sums_and_with_the_root_of_their_tokens() -> None:
    logps, lengths = torch.tensor([-100.0, -300.0]), torch.tensor([16, 64])
    assert packing.mean_tolerance(logps, lengths, "bfloat16") == pytest.approx(2 + 0.1 * 6)
    assert packing.mean_tolerance(logps, lengths, "float32") == pytest.approx(0.2 + 1e-4 * 6)


@st.composite
def heads(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]:
    """Draw hidden states (T, H), weights (V, H), targets (T,), a bias (V,) or None, and a soft cap or None."""
    tokens, width, vocabulary = (draw(st.integers(1, most)) for most in (9, 4, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    hidden, weight = (2 * torch.randn(rows, width, generator=generator) for rows in (tokens, vocabulary))
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    bias = torch.randn(vocabulary, generator=generator) if draw(st.booleans()) else None
    return hidden, weight, targets, bias, draw(st.sampled_from([None, 3.0]))


@settings(deadline=None)
@given(heads(), st.integers(1, 4))
def test_token_logps_are_log_softmax_for_any_chunk_size(
    head: tuple[Tensor, Tensor, Tensor, Tensor | None, float | None], tokens_at_once: int
) -> None:
    hidden, weight, targets, bias, softcap = head
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "TOKENS_AT_ONCE", tokens_at_once)
        logps = packing.token_logps(hidden, weight, targets, bias=bias, softcap=softcap)
    assert logps.dtype == torch.float32
    for value, state, target in zip(logps.tolist(), hidden.tolist(), targets.tolist(), strict=True):
        logits = [sum(a * b for a, b in zip(state, row, strict=True)) for row in weight.tolist()]
        logits = [logit + extra for logit, extra in zip(logits, bias.tolist(), strict=True)] if bias is not None else logits
        logits = [softcap * math.tanh(logit / softcap) for logit in logits] if softcap else logits
        assert value == pytest.approx(logits[target] - math.log(sum(map(math.exp, logits))), rel=1e-5, abs=1e-4)


def test_token_logps_of_bfloat16_logits_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(300, 16).bfloat16(), torch.randn(50, 16).bfloat16(), torch.randint(0, 50, (300,))
    logits = torch.nn.functional.linear(hidden, weight)
    expected = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(packing.token_logps(hidden, weight, targets), expected, rtol=1e-6, atol=1e-5)


def test_token_logps_have_the_gradient_of_log_softmax() -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (7, 5))
    targets, bias = torch.randint(0, 5, (7,)), torch.randn(5, dtype=torch.float64, requires_grad=True)

    def gradients(logps: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logps * torch.arange(7)).sum(), (hidden, weight, bias))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "TOKENS_AT_ONCE", 3)
        actual = gradients(packing.token_logps(hidden, weight, targets, bias=bias, softcap=2.0))
    logits = 2 * torch.tanh(torch.nn.functional.linear(hidden, weight, bias) / 2)
    expected = gradients(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

"""Packed batches of pairs and the log-probabilities of their responses.

Packing avoids nearly all padding, processes a prompt once for both of its responses, and computes logits only for response
tokens.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from stages.method import attention, dealing
from stages.runtime.errors import StageError

Row = dict[str, Any]
"""A row of schemas.PAIRS. The reference log-probabilities may be missing."""

TOKENS_AT_ONCE = 1024
"""Number of tokens whose logits exist at a time: one to two gigabytes for a vocabulary of 128,000."""

TOLERANCE = {"float32": 0.001, "bfloat16": 0.01}
"""By dtype, the maximum relative difference, due to rounding, between log-probabilities of the same tokens in two batches."""

ROUNDING = {"float32": 1e-5, "bfloat16": 2**-5}
"""By dtype, what rounding may change a token's log-probability by, relative to its largest logit: four ulps in bfloat16. The
output layer rounds a logit by half an ulp at most, the layers before it by more: the tests' models reach ten, in one token of
ten thousand. The errors of tokens are nearly independent, so that of a sum grows with the square root of its tokens."""

OUTLIER = 4
"""A single token may differ by so many times as much."""

MEAN_ROUNDING = {"float32": 1e-4, "bfloat16": 0.1}
"""By dtype, in nats per square root of a response's tokens, what rounding may change the log-probability of a response by, as
a mean over a batch, where the logits are not at hand: that of logits around 16, whose ulp in bfloat16 is 0.125."""

TEXTS = ("prompt", "chosen", "rejected")
"""The texts of a pair in the order in which they are packed."""


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Compute the log-probability of each token, holding the logits of TOKENS_AT_ONCE tokens at most.

    The logits are computed a second time in the backward pass. The log-softmax is taken in float32.
    hidden: (T, H), the model's last hidden states at the positions that predict the tokens. weight: (V, H) and bias: (V,), of
    the output layer, with hidden's dtype. targets: (T,) int64. softcap: Gemma 2's limit on
    logits, softcap tanh(logits / softcap).
    Returns (T,) float32, in nats.
    """
    compute = partial(_chunk_logps, weight=weight, bias=bias, softcap=softcap)
    chunks = zip(torch.split(hidden, TOKENS_AT_ONCE), torch.split(targets, TOKENS_AT_ONCE), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([compute(*chunk) for chunk in chunks])
    return torch.cat([torch.utils.checkpoint.checkpoint(compute, *chunk, use_reentrant=False) for chunk in chunks])


def _chunk_logps(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def enable_scoring(model: Any, *, fused: bool = False) -> Any:
    """Make a causal language model return log-probabilities of tokens when called as `batch_logps` calls it.

    Replaces `forward` of the model and of its output layer; parameters and their names stay. Both are still called as modules,
    because ZeRO-3 gathers weights in the hooks of module calls and PEFT wraps modules. With original_forward=True the model
    computes what it did before, by its own attention.
    model: a transformers model with an output layer. fused: attend by the fused kernel of stages/method/attention.py. Returns
    the model. Raises StageError if the kernel does not support it.
    """
    head, own_attention = model.get_output_embeddings(), model.config._attn_implementation
    if fused:
        attention.fuse(model)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    head.forward = partial(_head_forward, head, softcap)
    model.forward = partial(_model_forward, model, model.base_model, head, own_attention)
    return model


def _head_forward(head: Any, softcap: float | None, hidden: Tensor, targets: Tensor | None = None) -> Any:
    if targets is None:
        return type(head).forward(head, hidden)
    return token_logps(hidden, head.weight, targets, bias=head.bias, softcap=softcap)


def _model_forward(
    model: Any,
    decoder: Any,
    head: Any,
    own_attention: str,
    input_ids: Tensor,
    predicting: Tensor | None = None,
    targets: Tensor | None = None,
    original_forward: bool = False,
    **inputs: Any,
) -> Any:
    if original_forward:
        with attention.use_implementation(model, own_attention):
            return type(model).forward(model, input_ids, use_cache=False)
    hidden = decoder(input_ids, use_cache=False, **inputs).last_hidden_state
    return head(hidden.flatten(0, 1)[predicting], targets)


def collate(rows: list[Row], *, one_row: bool = False) -> dict[str, Tensor]:
    """Collate B rows of schemas.PAIRS into one packed batch in which each prompt occurs once, before its two responses.

    one_row: put all pairs into a single row, whose length is the next multiple of attention.BLOCK, for the fused attention.
    input_ids, position_ids, segments: (R, L) int64, with the longest pair's length as L and R from `dealing.assign_rows`,
    unless there is one row. The prompt of pair i is segment 3i, its responses are segments 3i + 1 and 3i + 2, padding is
    segment -1. The positions of both responses continue the prompt's.
    targets: (T,) int64, the tokens of all chosen responses, then of all rejected ones. predicting: (T,) int64, for each target
    the index, among the R * L positions, of the position that predicts it. lengths: (2B,) int64, tokens of each response.
    probabilities: (2B,) float32, P^; reference_logps: (2B,) float32, in nats; each only if the rows have its columns.
    """
    pairs = [[row[f"{text}_token_ids"] for text in TEXTS] for row in rows]
    batch, starts = _lay_out(pairs, one_row)
    responses = [(pair, text) for text in (1, 2) for pair in range(len(rows))]
    batch |= {
        "predicting": torch.cat([_predicting_positions(starts[pair], pairs[pair], text) for pair, text in responses]),
        "targets": torch.cat([torch.tensor(pairs[pair][text]) for pair, text in responses]),
        "lengths": torch.tensor([len(pairs[pair][text]) for pair, text in responses]),
    }
    for name, column in (("probabilities", "probability"), ("reference_logps", "reference_logps")):
        if f"chosen_{column}" in rows[0]:
            values = [row[f"{side}_{column}"] for side in ("chosen", "rejected") for row in rows]
            batch[name] = torch.tensor(values, dtype=torch.float32)
    return batch


def _lay_out(pairs: list[list[list[int]]], one_row: bool) -> tuple[dict[str, Tensor], dict[int, int]]:
    """Lay the texts of all pairs out in rows, or in a single one.

    Returns input_ids, position_ids and segments as in `collate`, and where each pair starts among the R * L positions.
    """
    sizes = [sum(map(len, texts)) for texts in pairs]
    if one_row:
        assigned, length = [list(range(len(pairs)))], -(-sum(sizes) // attention.BLOCK) * attention.BLOCK
    else:
        assigned, length = dealing.assign_rows(sizes), max(sizes)
    input_ids = torch.zeros(len(assigned), length, dtype=torch.long)
    position_ids, segments = torch.zeros_like(input_ids), torch.full_like(input_ids, -1)
    starts = {}
    for index, row in enumerate(assigned):
        end = 0
        for pair in row:
            starts[pair] = index * length + end
            for text, ids in enumerate(pairs[pair]):
                start, end = end, end + len(ids)
                position = len(pairs[pair][0]) if text else 0
                input_ids[index, start:end] = torch.tensor(ids)
                position_ids[index, start:end] = torch.arange(position, position + len(ids))
                segments[index, start:end] = 3 * pair + text
    return {"input_ids": input_ids, "position_ids": position_ids, "segments": segments}, starts


def _predicting_positions(start: int, texts: list[list[int]], text: int) -> Tensor:
    """Return the positions that predict the tokens of a response, texts[text], of a pair that starts at `start`."""
    prompt_end = start + len(texts[0])
    first = start + sum(map(len, texts[:text]))
    positions = torch.arange(first - 1, first - 1 + len(texts[text]))
    positions[:1] = prompt_end - 1  # the prompt's last token predicts the first token of either response
    return positions


def batch_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Compute the summed log-probability of each response of a collated batch.

    model: after `enable_scoring`. Returns (2B,) float32, in nats: all chosen responses, then all rejected ones.
    """
    return torch.stack([response.sum() for response in response_logps(model, batch)])


def response_logps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Compute the log-probability of each token of each response of a collated batch.

    model: after `enable_scoring`. Returns 2B tensors (tokens,) float32, in nats: of all chosen responses, then of all rejected
    ones.
    """
    fused, dtype = attention.is_fused(model), next(model.parameters()).dtype
    logps: Tensor = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=attention.block_mask(batch["segments"]) if fused else attention.dense_mask(batch["segments"], dtype),
        predicting=batch["predicting"],
        targets=batch["targets"],
    )
    return torch.split(logps, batch["lengths"].tolist())


def check_packing(model: Any, row: Row, dtype: str) -> None:
    """Check that a pair's log-probabilities match those of the model's original forward, up to rounding (`agree`).

    Some architectures attend, or scale their logits, in ways that packing does not support. The original forward attends by the
    model's own attention, so that this is also a check of the fused one.
    model: after `enable_scoring`, possibly wrapped by DeepSpeed. row: the pair to check, the longest one. dtype: the model's, a
    key of TOLERANCE. Raises StageError.
    """
    config, prompt = getattr(model, "module", model).config, row["prompt_token_ids"]
    sequences = [prompt + row[f"{side}_token_ids"] for side in ("chosen", "rejected")]
    longest, window = max(map(len, sequences)), getattr(config.get_text_config(), "sliding_window", None)
    if window and longest > window:
        raise StageError(
            f"prompt {row['prompt_id']} and a response have {longest} tokens, more than the sliding attention window of "
            f"{config.model_type}: set lengths.total to at most {window}"
        )
    device, batch = next(model.parameters()).device, collate([row], one_row=attention.is_fused(model))
    packed = response_logps(model, {name: tensor.to(device) for name, tensor in batch.items()})
    for logps, sequence in zip(packed, sequences, strict=True):
        expected, largest = _original_logps(model, torch.tensor([sequence], device=device), len(prompt))
        if not agree(logps, expected, largest, dtype):
            remedy = f"use another model, or {attention.REMEDY}" if attention.is_fused(model) else "use another model"
            raise StageError(
                f"prompt {row['prompt_id']}: the log-probability of a response is {logps.sum().item():.5g} when packed but "
                f"{expected.sum().item():.5g} unpacked, and that of a token differs by "
                f"{(logps - expected).abs().max().item():.3g}: packing is not supported for {config.model_type} (custom "
                f"attention or logit scaling); {remedy}"
            )


def mean_tolerance(logps: Tensor, lengths: Tensor, dtype: str) -> float:
    """Return how much, in nats, rounding may change the log-probabilities of responses, as a mean of the magnitudes.

    logps, lengths: (N,), of each response, in nats and tokens. dtype: a key of MEAN_ROUNDING.
    """
    return TOLERANCE[dtype] * logps.abs().mean().item() + MEAN_ROUNDING[dtype] * lengths.double().sqrt().mean().item()


def agree(logps: Tensor, expected: Tensor, largest: Tensor, dtype: str) -> bool:
    """Return whether the log-probabilities of a response's tokens agree, each and in their sum, up to rounding.

    A wrong mask may change many tokens a little, and a wrong start of a response changes one token: hence both checks. The sum
    of a confident model is close to 0, so a tolerance relative to it alone would refuse what only rounding changed.
    logps, expected: (T,), in nats. largest: (T,), the largest magnitude of a logit for each token. dtype: a key of ROUNDING.
    """
    difference, rounding = (logps - expected).double(), ROUNDING[dtype] * largest.double()
    total = TOLERANCE[dtype] * expected.double().sum().abs() + rounding.norm()
    return bool(difference.sum().abs() <= total and (difference.abs() <= OUTLIER * rounding).all())


def _original_logps(model: Any, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Compute, by the original forward, the log-probabilities of the tokens that follow the first `prompt` ones of ids, (1, L).

    Returns them, (T,) float32 for T tokens, and the largest magnitude of a logit for each of them, (T,).
    """
    logits = model(input_ids=ids, original_forward=True).logits[0, prompt - 1 : -1].float()
    logps = logits.gather(-1, ids[0, prompt:, None])[:, 0] - logits.logsumexp(-1)
    return logps, torch.maximum(logits.amax(-1), -logits.amin(-1))

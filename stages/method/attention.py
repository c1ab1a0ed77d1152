"""Attention over packed pairs: which tokens a token attends to, and two ways to compute it.

Plain: the model's own attention in transformers, with a dense mask (R, 1, L, L). It computes all scores: FlashAttention takes
no such mask, and the kernels that do skip nothing. Fused: one kernel (torch's FlexAttention, compiled), which skips blocks of
scores that are masked and stores no matrix of them. The kernel has not run on a GPU yet, only its uncompiled form on a CPU.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stages.method import parity
from stages.runtime.errors import StageError, one_line

FUSED = "packed_pairs"
"""The name of `attend` among transformers' implementations of attention."""
BLOCK = 128
"""The kernel's blocks have BLOCK queries and BLOCK keys; rows whose length is a multiple of it have no incomplete block."""

CHECKED = [150, 130, 110, 40, 60, 100, 50]
"""Tokens of two pairs and of padding with which the kernel is checked: some blocks are masked, some visible, some both."""
REMEDY = "set train.attention to plain"


def is_visible(query: Tensor, key: Tensor) -> Tensor:
    """Return whether tokens of a segment attend to earlier ones of a segment: to their own, and to their prompt's.

    query, key: numbers of segments, as in `packing.collate`, in shapes that broadcast.
    """
    return (query == key) | ((query // 3 == key // 3) & (key % 3 == 0))


def dense_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Build the causal mask: a token attends to its own segment and its prompt's segment, padding only to padding.

    segments: (R, L), as in `packing.collate`. Returns (R, 1, L, L) of the dtype, to add to attention scores: 0 or -inf.
    """
    visible = is_visible(segments[:, :, None], segments[:, None, :]).tril()
    mask = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))
    return mask[:, None]


def block_mask(segments: Tensor) -> Any:
    """Build the same mask as a BlockMask for FlexAttention, one row of blocks after the other: no matrix (L, L) exists.

    segments: (R, L), as in `packing.collate`, with L a multiple of BLOCK.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & is_visible(segments[row, query], segments[row, key])

    rows, length = segments.shape
    row, tokens = torch.arange(rows, device=segments.device)[:, None, None], torch.arange(length, device=segments.device)
    counts = torch.stack(
        [
            visible(row, row, queries[:, None], tokens).view(rows, BLOCK, -1, BLOCK).sum((1, 3))
            for queries in torch.split(tokens, BLOCK)
        ],
        1,
    )
    full = counts == BLOCK**2
    return BlockMask.from_kv_blocks(*_list_blocks((counts > 0) & ~full), *_list_blocks(full), BLOCK, visible)


def _list_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each row of blocks (R, N, N), how many are chosen and their columns, before the others: with a head each."""
    columns = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None]


def fuse(model: Any) -> None:
    """Make a transformers model attend by `attend`. Raises StageError if its attention cannot be replaced."""
    from transformers import AttentionInterface

    if not (model._supports_flex_attn and model._can_set_attn_implementation()):
        raise StageError(f"train.attention: fused does not support {model.config.model_type}: {REMEDY}")
    AttentionInterface.register(FUSED, attend)
    model.set_attn_implementation(FUSED)


def is_fused(model: Any) -> bool:
    """Return whether a model, possibly wrapped by DeepSpeed, attends by `attend`."""
    return bool(getattr(model, "module", model).config._attn_implementation == FUSED)


@contextlib.contextmanager
def use_implementation(model: Any, name: str) -> Iterator[None]:
    """Make a transformers model attend by another of transformers' implementations within the block."""
    before = model.config._attn_implementation
    if name == before:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention as a layer of transformers calls it. A sliding window is left out: `packing.check_packing` refuses
    texts that exceed it.

    query: (R, heads, L, d). key, value: (R, heads or fewer, L, d), each for as many consecutive heads. mask: from `block_mask`.
    scaling: factor of the scores. softcap: Gemma 2's limit on them, softcap tanh(score / softcap). Returns (R, L, heads, d).
    Raises StageError for what changes the scores in other ways.
    """
    if s_aux is not None or position_bias is not None:
        raise StageError(f"train.attention: fused does not support attention sinks or biases: {REMEDY}")
    context = select_kernel(query.device.type)(query, key, value, mask, scaling, softcap)
    return context.transpose(1, 2).contiguous(), None


@functools.cache
def select_kernel(device: str) -> Callable[..., Tensor]:
    """Return `attend_in_blocks`, compiled on a GPU: for the first length, then once for all others."""
    return torch.compile(attend_in_blocks, fullgraph=True) if device == "cuda" else attend_in_blocks


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, softcap: float | None) -> Tensor:
    """Compute attention (R, heads, L, d) with FlexAttention; see `attend`."""
    from torch.nn.attention.flex_attention import flex_attention

    def cap(score: Tensor, row: Tensor, head: Tensor, asking: Tensor, asked: Tensor) -> Tensor:
        assert softcap
        return softcap * torch.tanh(score / softcap)

    context: Tensor = flex_attention(
        query, key, value, cap if softcap else None, mask, scaling, enable_gqa=True, kernel_options={"BACKEND": "TRITON"}
    )
    return context


def attend_densely(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Compute the same with all scores. mask: from `dense_mask`."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores + mask).softmax(-1) @ value.repeat_interleave(groups, 1)


def check_kernel(model: Any, device: torch.device) -> None:
    """Check the kernel's output and gradients against `attend_densely` in float32, with heads like the model's.

    The first batches are compared with the model's own attention anyway, but not their gradients. Precisions below float32
    round, so the error is compared with that of `attend_densely` in the model's precision (`parity.is_rounding`). Raises
    StageError if it is larger or not a number, or if the kernel fails, except for lack of memory.
    model: after `fuse`, in the precision in which it attends.
    """
    config, dtype = model.config.get_text_config(), next(model.parameters()).dtype
    heads, softcap = config.num_attention_heads, getattr(config, "attn_logit_softcapping", None)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    segments = torch.repeat_interleave(torch.tensor([0, 1, 2, 3, 4, 5, -1]), torch.tensor(CHECKED))[None].to(device)
    generator = torch.Generator().manual_seed(0)
    inputs, upstream = (
        [torch.randn(1, count, sum(CHECKED), size, generator=generator).to(device, dtype) for count in counts]
        for counts in ((heads, key_heads, key_heads), (heads,))
    )

    def compute(attention: Callable[..., Tensor], mask: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        context = attention(*leaves, mask, size**-0.5, softcap)
        gradients = torch.autograd.grad(context, leaves, upstream[0].to(dtype))
        return [tensor.detach().double().cpu() for tensor in (context, *gradients)]

    try:
        found = compute(select_kernel(device.type), block_mask(segments), dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compilers raise
        raise StageError(f"the fused attention cannot be computed ({one_line(error)}): {REMEDY}") from error
    exact, usual = (compute(attend_densely, dense_mask(segments, precision), precision) for precision in (torch.float32, dtype))
    for name, one, other, reference in zip(("output", "query", "key", "value"), found, usual, exact, strict=True):
        wrong, rounding = ((each - reference).square().mean().sqrt().item() for each in (one, other))
        if not parity.is_rounding(wrong, rounding):
            what = "outputs" if name == "output" else f"gradients of the {name}"
            raise StageError(
                f"the fused attention gives other {what} than the dense one: they differ by {wrong:.2g} from those in float32, "
                f"and the dense one's by {rounding:.2g}: {REMEDY}"
            )

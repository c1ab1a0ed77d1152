"""DeBERTa: the same numbers as transformers', with fewer passes over main memory and without unused work.

The score of query i for key j is q_i k_j + q_i K[i - j] + k_j Q[i - j], divided by sqrt(3 d), where K and Q are projections
of the embeddings of bucketed distances. transformers computes each term, sum and quotient for all (B, heads, L, L) at once,
which exceeds every cache for texts as long as PairRM's limits, and computes K and Q again for every batch. Here K and Q are
computed once, and the last layer only for the positions that are read. On a CPU, scores are computed in blocks that stay in the
cache from the first product to the last. Fused, as a GPU can compute them, one kernel computes scores, their softmax and its
product with the values (torch's FlexAttention), and reads the two terms of distance from tables (B, heads, L, buckets): no
(L, L) matrix is stored. The kernel has not run on a GPU yet, only its uncompiled form on a CPU.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**18
"""Scores computed at a time: 1 MB in float32, the size of a core's second-level cache."""

TABLE = 2**28
"""Entries of a table of the fused kernel: 0.5 GB in float16, and so few that 32-bit indices reach them."""
SMALLEST_HEAD = 16
"""The smallest dimension of a head that Triton's matrix product takes."""

Distances = list[tuple[Tensor, Tensor]]
"""K and Q of each layer, (heads, buckets, d) each."""


def is_supported(model: Any) -> bool:
    """Return whether this module computes what the model does: a DeBERTa v2 or v3 with the published models' positions."""
    config = model.config
    return bool(
        config.model_type == "deberta-v2"
        and config.relative_attention
        and config.share_att_key
        and config.position_buckets > 0
        and set(config.pos_att_type) == {"c2p", "p2c"}
        and model.encoder.conv is None
    )


def is_fusable(model: Any) -> bool:
    """Return whether the fused kernel computes what the model does: one that is supported, with heads of a sufficient size."""
    return is_supported(model) and model.encoder.layer[0].attention.self.attention_head_size >= SMALLEST_HEAD


@torch.inference_mode()
def project_distances(model: Any) -> Distances:
    """Project the distance embeddings of a DebertaV2Model, once for all batches that `hidden_states` is called with."""
    projections = []
    for layer in model.encoder.layer:
        module, embeddings = layer.attention.self, model.encoder.get_rel_embedding()
        keys = split_heads(module, module.key_proj(embeddings))
        queries = split_heads(module, module.query_proj(embeddings))
        projections.append((keys, queries * attention_scale(module)))
    return projections


@torch.inference_mode()
def hidden_states(
    model: Any, distances: Distances, ids: Tensor, mask: Tensor, positions: Tensor, *, fused: bool = False
) -> Tensor:
    """Compute the last hidden states (B, P, width), without dropout, at some positions.

    distances: from `project_distances`. ids, mask: token ids and attention mask, padded on the right, (B, L) each. positions:
    (B, P). All three may be on the CPU. fused: use the fused kernel, on the model's device.
    """
    padding = None if mask.all() else ~mask.bool().to(model.device)
    lengths = mask.sum(1, dtype=torch.int32).to(model.device)
    ids, mask, positions = (tensor.to(model.device) for tensor in (ids, mask, positions))
    module, length = model.encoder.layer[0].attention.self, ids.shape[1]
    line = bucket_distances(module, torch.arange(length - 1, -length, -1, device=ids.device))
    # Row i of the windows holds the buckets of the i-th query from the end: queries are processed in reverse.
    windows = line.unfold(0, length, 1)
    position_buckets = bucket_distances(module, positions[..., None] - torch.arange(length, device=ids.device))
    hidden: Tensor = model.embeddings(input_ids=ids, mask=mask)
    for layer, (keys, queries) in zip(model.encoder.layer, distances, strict=True):
        attention, last = layer.attention.self, layer is model.encoder.layer[-1]
        if last:
            asking = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
            context = attend(attention, keys, queries, hidden, asking, position_buckets, padding)
        elif fused:
            asking, context = hidden, attend_fused(attention, keys, queries, hidden, line, lengths)
        else:
            asking = hidden.flip(1)
            context = attend(attention, keys, queries, hidden, asking, windows.expand(len(ids), -1, -1), padding)
        attended = layer.attention.output(context, asking)
        hidden = layer.output(layer.intermediate(attended), attended)
        hidden = hidden if last or fused else hidden.flip(1)
    return hidden


def split_heads(module: Any, projected: Tensor) -> Tensor:
    """Reshape (..., L, heads * d) to (..., heads, L, d)."""
    return projected.view(*projected.shape[:-1], module.num_attention_heads, -1).transpose(-2, -3)


def attention_scale(module: Any) -> float:
    """Return 1 / sqrt(3 d), the factor of the scores."""
    return float((3 * module.attention_head_size) ** -0.5)


def bucket_distances(module: Any, distances: Tensor) -> Tensor:
    """Return the bucket (int64) of each distance from key to query, in the shape of `distances`."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    size = module.pos_ebd_size
    signed = make_log_bucket_position(distances, module.position_buckets, module.max_relative_positions).long()
    buckets: Tensor = (signed + size).clamp(0, 2 * size - 1)
    return buckets


def attend(
    module: Any, pos_keys: Tensor, pos_queries: Tensor, hidden: Tensor, asking: Tensor, index: Tensor, padding: Tensor | None
) -> Tensor:
    """Compute DisentangledSelfAttention of the states `asking` (B, P, width) to the states `hidden` (B, L, width).

    pos_keys, pos_queries: one layer of Distances. index: buckets (B, P, L). padding: True where a key is padding (B, L), or
    None if there is no padding. Returns (B, P, width).
    """
    size, count = asking.shape[:2]
    length, heads = hidden.shape[1], module.num_attention_heads
    query = split_heads(module, module.query_proj(asking)) * attention_scale(module)
    key, value = split_heads(module, module.key_proj(hidden)), split_heads(module, module.value_proj(hidden))
    by_query, by_key = query @ pos_keys.mT, pos_queries @ key.mT
    context = torch.empty_like(query)
    rows_per_block = min(count, max(1, BLOCK // length))
    texts_per_block = max(1, BLOCK // (rows_per_block * length * heads))
    heads_per_block = min(heads, max(1, BLOCK // (rows_per_block * length)))
    for text in range(0, size, texts_per_block):
        for head in range(0, heads, heads_per_block):
            at = (slice(text, text + texts_per_block), slice(head, head + heads_per_block))
            for row in range(0, count, rows_per_block):
                rows = slice(row, row + rows_per_block)
                buckets = index[at[0], None, rows].expand(-1, len(query[0, at[1]]), -1, -1)
                scores = by_query[(*at, rows)].gather(-1, buckets)
                scores += by_key[at].gather(-2, buckets)
                scores += query[(*at, rows)] @ key[at].mT
                if padding is not None:
                    scores.masked_fill_(padding[at[0], None, None], torch.finfo(scores.dtype).min)
                context[(*at, rows)] = scores.softmax(-1) @ value[at]
    return context.transpose(1, 2).flatten(2)


def attend_fused(module: Any, pos_keys: Tensor, pos_queries: Tensor, hidden: Tensor, line: Tensor, lengths: Tensor) -> Tensor:
    """Compute DisentangledSelfAttention of the states `hidden` (B, L, width) to themselves, as `attend` does.

    line: buckets of the distances L - 1 to 1 - L. lengths: of the texts without their padding (B,), int32. Returns
    (B, L, width).
    """
    query = split_heads(module, module.query_proj(hidden)) * attention_scale(module)
    key, value = split_heads(module, module.key_proj(hidden)), split_heads(module, module.value_proj(hidden))
    middle, line = torch.tensor(hidden.shape[1] - 1, device=line.device), line.int()
    context = torch.empty_like(query)
    texts = max(1, TABLE // (pos_keys.shape[-2] * math.prod(query.shape[1:3])))
    for text in range(0, len(hidden), texts):
        at = slice(text, text + texts)
        tables = [query[at] @ pos_keys.mT, key[at] @ pos_queries.mT]
        context[at] = select_kernel(hidden.device.type)(query[at], key[at], value[at], *tables, line, middle, lengths[at])
        tables.clear()  # before the next group's are computed
    return context.transpose(1, 2).flatten(2)


@functools.cache
def select_kernel(device: str) -> Callable[..., Tensor]:
    """Return `attend_with_tables`, compiled on a GPU: once, except for single pairs and short ones, for all batches."""
    return torch.compile(attend_with_tables, dynamic=True, fullgraph=True) if device == "cuda" else attend_with_tables


def attend_with_tables(
    query: Tensor, key: Tensor, value: Tensor, by_query: Tensor, by_key: Tensor, line: Tensor, middle: Tensor, lengths: Tensor
) -> Tensor:
    """Compute attention with scores that depend on the distance, (B, heads, L, d).

    query, key, value: (B, heads, L, d), the query scaled. by_query, by_key: the terms of each bucket (B, heads, L, buckets).
    line, lengths: see `attend_fused`. middle: index of distance 0 in the line. It is a tensor, because the kernel would be
    compiled for each value of a number.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def add_terms(score: Tensor, text: Tensor, head: Tensor, asking: Tensor, asked: Tensor) -> Tensor:
        bucket = line[middle + asked - asking]
        terms = score + by_query[text, head, asking, bucket] + by_key[text, head, asked, bucket]
        return torch.where(asked < lengths[text], terms, -math.inf)

    # Not the kernel for few queries, which would be another one for short pairs.
    context: Tensor = flex_attention(query, key, value, add_terms, scale=1.0, kernel_options={"BACKEND": "TRITON"})
    return context

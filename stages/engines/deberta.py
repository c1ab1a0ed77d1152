"""DeBERTa on a CPU: the same numbers as transformers', with fewer passes over main memory and without unused work.

The score of query i for key j is q_i k_j + q_i K[i - j] + k_j Q[i - j], divided by sqrt(3 d), where K and Q are projections
of the embeddings of bucketed distances. transformers computes each term, sum and quotient for all (B, heads, L, L) at once,
which exceeds every cache for texts as long as PairRM's limits, and computes K and Q again for every batch. Here K and Q are
computed once, scores in blocks that stay in the cache from the first product to the last, and the last layer only for the
positions that are read.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 2**18
"""Scores computed at a time: 1 MB in float32, the size of a core's second-level cache."""

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
def hidden_states(model: Any, distances: Distances, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Compute the last hidden states (B, P, width), without dropout, at some positions.

    distances: from `project_distances`. ids, mask: token ids and attention mask, (B, L) each. positions: (B, P).
    """
    module, length = model.encoder.layer[0].attention.self, ids.shape[1]
    line = bucket_distances(module, torch.arange(length - 1, -length, -1))
    # Row i of the windows holds the buckets of the i-th query from the end: queries are processed in reverse.
    windows = line.unfold(0, length, 1)
    position_buckets = bucket_distances(module, positions[..., None] - torch.arange(length))
    padding = None if mask.all() else ~mask.bool()
    hidden: Tensor = model.embeddings(input_ids=ids, mask=mask)
    for layer, (keys, queries) in zip(model.encoder.layer, distances, strict=True):
        last = layer is model.encoder.layer[-1]
        asking = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])) if last else hidden.flip(1)
        index = position_buckets if last else windows.expand(len(ids), -1, -1)
        context = attend(layer.attention.self, keys, queries, hidden, asking, index, padding)
        attended = layer.attention.output(context, asking)
        hidden = layer.output(layer.intermediate(attended), attended)
        hidden = hidden if last else hidden.flip(1)
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

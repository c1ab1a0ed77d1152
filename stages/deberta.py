"""DeBERTa on a processor: transformers' numbers, without its dozen passes over main memory and without what nobody reads.

A score of query i for key j is q_i k_j + q_i K[i - j] + k_j Q[i - j], over sqrt(3 d), K and Q being projections of the
embeddings of distances in buckets. transformers makes each term, sum and quotient for all (B, heads, L, L) at once, which no
cache holds where texts are as long as PairRM's limits, and K and Q again for every batch. Here K and Q are made once, scores
in blocks that go from the first product to the last before the next is begun, and the last layer for some positions only.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 2**18
"""Scores made at a time, 1 MB of them: a core's second cache."""

Distances = list[tuple[Tensor, Tensor]]
"""K and Q of each layer, (heads, buckets, d)."""


def understood(model: Any) -> bool:
    """Whether this module computes what the model does: a DeBERTa v2 or v3 with positions as its published models have."""
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
def distances(model: Any) -> Distances:
    """What `states` needs of a DebertaV2Model, once for all batches."""
    found = []
    for layer in model.encoder.layer:
        module, embeddings = layer.attention.self, model.encoder.get_rel_embedding()
        keys, queries = heads(module, module.key_proj(embeddings)), heads(module, module.query_proj(embeddings))
        found.append((keys, queries * scale(module)))
    return found


@torch.inference_mode()
def states(model: Any, found: Distances, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """The last hidden states (B, P, width), without dropout, at the positions (B, P) of token ids and mask (B, L)."""
    module, length = model.encoder.layer[0].attention.self, ids.shape[1]
    line = buckets(module, torch.arange(length - 1, -length, -1))
    windows = line.unfold(0, length, 1)  # of the last query first: each row is the line from one bucket later
    some = buckets(module, positions[..., None] - torch.arange(length))
    padding = None if mask.all() else ~mask.bool()
    hidden: Tensor = model.embeddings(input_ids=ids, mask=mask)
    for layer, (keys, queries) in zip(model.encoder.layer, found, strict=True):
        last = layer is model.encoder.layer[-1]
        asking = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])) if last else hidden.flip(1)
        index = some if last else windows.expand(len(ids), -1, -1)
        context = attend(layer.attention.self, keys, queries, hidden, asking, index, padding)
        attended = layer.attention.output(context, asking)
        hidden = layer.output(layer.intermediate(attended), attended)
        hidden = hidden if last else hidden.flip(1)
    return hidden


def heads(module: Any, projected: Tensor) -> Tensor:
    """(..., L, heads * d) as (..., heads, L, d)."""
    return projected.view(*projected.shape[:-1], module.num_attention_heads, -1).transpose(-2, -3)


def scale(module: Any) -> float:
    return float((3 * module.attention_head_size) ** -0.5)


def buckets(module: Any, apart: Tensor) -> Tensor:
    """The bucket of each distance from key to query."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    near = module.pos_ebd_size
    signed = make_log_bucket_position(apart, module.position_buckets, module.max_relative_positions).long()
    found: Tensor = (signed + near).clamp(0, 2 * near - 1)
    return found


def attend(
    module: Any, pos_keys: Tensor, pos_queries: Tensor, hidden: Tensor, asking: Tensor, index: Tensor, padding: Tensor | None
) -> Tensor:
    """DisentangledSelfAttention of the states `asking` (B, P, width) to the states `hidden` (B, L, width): (B, P, width).

    index: buckets (B, P, L). padding: which of L are not to be seen (B, L), None where all are.
    """
    size, count = asking.shape[:2]
    length, many = hidden.shape[1], module.num_attention_heads
    query = heads(module, module.query_proj(asking)) * scale(module)
    key, value = heads(module, module.key_proj(hidden)), heads(module, module.value_proj(hidden))
    by_query, by_key = query @ pos_keys.mT, pos_queries @ key.mT
    context = torch.empty_like(query)
    rows = min(count, max(1, BLOCK // length))
    texts = max(1, BLOCK // (rows * length * many))
    step = min(many, max(1, BLOCK // (rows * length)))
    for text in range(0, size, texts):
        for head in range(0, many, step):
            at = (slice(text, text + texts), slice(head, head + step))
            for row in range(0, count, rows):
                part = slice(row, row + rows)
                chosen = index[at[0], None, part].expand(-1, len(query[0, at[1]]), -1, -1)
                scores = by_query[(*at, part)].gather(-1, chosen)
                scores += by_key[at].gather(-2, chosen)
                scores += query[(*at, part)] @ key[at].mT
                if padding is not None:
                    scores.masked_fill_(padding[at[0], None, None], torch.finfo(scores.dtype).min)
                context[(*at, part)] = scores.softmax(-1) @ value[at]
    return context.transpose(1, 2).flatten(2)

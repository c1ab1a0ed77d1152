"""DeBERTa's disentangled attention on a processor: transformers' numbers, without its dozen passes over main memory.

A score of query i for key j is q_i k_j + q_i K[i - j] + k_j Q[i - j], over sqrt(3 d), K and Q being projections of the
embeddings of distances in buckets. transformers makes each term, sum and quotient of all scores (B, heads, L, L), which no
cache holds for texts of PairRM's limits, and K and Q again for every batch. Here K and Q are made once, and scores in blocks
that go from the first product to the last before the next is begun.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**18
"""Scores made at a time, 1 MB of them: a core's second cache."""


def quicken(model: Any) -> None:
    """Give a DebertaV2Model, in float32 on a processor, this attention; another model is left as it is."""
    config = model.config
    if config.model_type != "deberta-v2" or not (config.relative_attention and config.share_att_key):
        return
    if config.position_buckets < 1 or set(config.pos_att_type) != {"c2p", "p2c"}:
        return
    with torch.no_grad():
        embeddings = model.encoder.get_rel_embedding()
        for layer in model.encoder.layer:
            module = layer.attention.self
            keys, queries = heads(module, module.key_proj(embeddings)), heads(module, module.query_proj(embeddings))
            module.forward = partial(attend, module, keys, queries * scale(module))
    model.encoder.get_rel_pos = lambda *_: None  # of all scores, again for every batch
    model.encoder.get_attention_mask = lambda mask: mask  # likewise


def heads(module: Any, projected: Tensor) -> Tensor:
    """(..., L, heads * d) as (..., heads, L, d)."""
    return projected.unflatten(-1, (module.num_attention_heads, -1)).transpose(-2, -3)


def scale(module: Any) -> float:
    return float((3 * module.attention_head_size) ** -0.5)


def windows(module: Any, length: int) -> Tensor:
    """The bucket (L, L) of each key's distance from each query, from the last query to the first.

    In this order every row is a window of one line, which takes 16 L bytes instead of 8 L^2.
    """
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances = torch.arange(length - 1, -length, -1)
    buckets = make_log_bucket_position(distances, module.position_buckets, module.max_relative_positions).long()
    return (buckets + module.pos_ebd_size).clamp(0, 2 * module.pos_ebd_size - 1).unfold(0, length, 1)


def attend(
    module: Any, pos_keys: Tensor, pos_queries: Tensor, hidden_states: Tensor, attention_mask: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """DisentangledSelfAttention.forward, of hidden states (B, L, heads * d) and a mask (B, L), without dropout.

    pos_keys, pos_queries: (heads, buckets, d), the latter times the scale.
    """
    size, length, _width = hidden_states.shape
    query, key, value = (
        heads(module, project(hidden_states)) for project in (module.query_proj, module.key_proj, module.value_proj)
    )
    query = query.flip(-2) * scale(module)  # last query first: see windows
    by_query = query @ pos_keys.transpose(-1, -2)
    by_key = pos_queries @ key.transpose(-1, -2)
    query, key, value, by_query, by_key = (one.flatten(0, 1) for one in (query, key, value, by_query, by_key))
    index, padding = windows(module, length), None
    if not attention_mask.all():
        padding = ~attention_mask.bool()[:, None].expand(size, module.num_attention_heads, length).flatten(0, 1)[:, None]
    context = torch.empty_like(query)
    rows = min(length, max(1, BLOCK // length))
    together = max(1, BLOCK // (rows * length))
    for start in range(0, len(query), together):
        some = slice(start, start + together)
        count = len(query[some])
        for first in range(0, length, rows):
            part = slice(first, first + rows)
            buckets = index[part].expand(count, -1, -1)
            scores = by_query[some, part].gather(-1, buckets)
            scores += by_key[some].gather(-2, buckets)
            scores.baddbmm_(query[some, part], key[some].transpose(-1, -2))
            if padding is not None:
                scores.masked_fill_(padding[some], torch.finfo(scores.dtype).min)
            torch.bmm(scores.softmax(-1), value[some], out=context[some, part])
    return context.unflatten(0, (size, -1)).flip(-2).transpose(1, 2).flatten(2), None

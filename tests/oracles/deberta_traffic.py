"""Count what a forward pass of DeBERTa-v3-large moves, by running transformers' model on torch's meta device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DebertaV2Config, DebertaV2Model

LAYERS = 24


class Traffic(TorchDispatchMode):
    """Counts bytes read and written by operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs), result))
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        new = [tensor for tensor in written if tensor.untyped_storage()._cdata not in storages]
        if new or operation._schema.is_mutable:
            # An expanded tensor is as large in memory as what it was expanded from.
            self.moved += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in read + written)
        return result


def count_traffic(length: int, texts: int) -> float:
    """Return the bytes that a float16 forward pass over `texts` texts of `length` tokens moves per token. Counted for one and
    two layers, from which 24 follow."""
    one, two = (_count(layers, length, texts) for layers in (1, 2))
    return (two + (LAYERS - 2) * (two - one)) / (length * texts)


def _count(layers: int, length: int, texts: int) -> int:
    config = DebertaV2Config(
        vocab_size=128100,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
        position_biased_input=False,
    )
    with torch.device("meta"), torch.no_grad():
        model = DebertaV2Model(config).half().eval()
        tokens = torch.ones(texts, length, dtype=torch.long)
        with Traffic() as traffic:
            model(input_ids=tokens, attention_mask=tokens)
    return traffic.moved

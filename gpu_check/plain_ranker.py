"""PairRM with random weights on transformers' DeBERTa alone, in place of llm-blender's objects where it is not installed.

It has the attributes that stages/engines/pairrm.py reads, and PairRM's own forward pass, written from its definition: the
texts one after another, the hidden states at the three markers, and for each response the head's output on those of the prompt
and of the response.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gpu_check.sizes import Ranking

VOCABULARY = 1000
TOKENIZER = SimpleNamespace(
    pad_token_id=0,
    cls_token_id=1,
    sep_token_id=2,
    unk_token_id=3,
    source_prefix_id=4,
    cand1_prefix_id=5,
    cand2_prefix_id=6,
    cand_prefix_id=7,
    vocab_size=VOCABULARY,
)
"""The special tokens of PairRM's tokenizer, by its names; any other number is a word."""


class Ranker(torch.nn.Module):
    """The pair ranker."""

    def __init__(self, size: Ranking) -> None:
        super().__init__()
        from transformers import DebertaV2Config, DebertaV2Model

        config = DebertaV2Config(
            vocab_size=VOCABULARY,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=512,
            relative_attention=True,
            position_buckets=size.buckets,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type="p2c|c2p",
            layer_norm_eps=1e-7,
            max_relative_positions=-1,
            position_biased_input=False,
            type_vocab_size=0,
            pad_token_id=TOKENIZER.pad_token_id,
            initializer_range=0.05,
        )
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = torch.nn.Sequential(
            torch.nn.Dropout(0.0),
            torch.nn.Linear(2 * size.width, size.width),
            torch.nn.Tanh(),
            torch.nn.Dropout(0.0),
            torch.nn.Linear(size.width, 1),
        )

    def _forward(self, source: Tensor, source_mask: Tensor, *candidates: Tensor) -> dict[str, Tensor]:
        """Compute logits (N,) of N triples. source, source_mask, then left, left_mask, right, right_mask: (N, L) each."""
        left, left_mask, right, right_mask = candidates
        left, right = (
            torch.where(ids == TOKENIZER.cand_prefix_id, marker, ids)
            for ids, marker in ((left, TOKENIZER.cand1_prefix_id), (right, TOKENIZER.cand2_prefix_id))
        )
        states = []
        masks = [mask.bool() for mask in (source_mask, left_mask, right_mask)]
        for texts in zip(source, left, right, *masks, strict=True):
            states.append(torch.cat([ids[mask] for ids, mask in zip(texts[:3], texts[3:], strict=True)]))
        ids = torch.nn.utils.rnn.pad_sequence(states, batch_first=True, padding_value=TOKENIZER.pad_token_id)
        ends = torch.tensor([len(state) for state in states], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < ends[:, None]  # a text may contain the token of padding
        hidden = self.pretrained_model(ids, attention_mask=mask.long()).last_hidden_state
        prompt, first, second = (
            hidden[ids == marker]
            for marker in (TOKENIZER.source_prefix_id, TOKENIZER.cand1_prefix_id, TOKENIZER.cand2_prefix_id)
        )
        scores = [self.head_layer(torch.cat([prompt, response], -1)).mean(-1) for response in (first, second)]
        return {"logits": scores[0] - scores[1]}


def make_blender(size: Ranking, device: str) -> Any:
    """Make a ranker with random weights on a device: in half precision on a GPU, as llm-blender loads it."""
    torch.manual_seed(0)
    ranker = Ranker(size).eval()
    ranker = ranker.half().to(device) if device == "cuda" else ranker
    collator = SimpleNamespace(source_maxlength=size.longest_prompt, candidate_maxlength=size.longest_response)
    config = SimpleNamespace(device=device)
    return SimpleNamespace(ranker=ranker, ranker_tokenizer=TOKENIZER, ranker_collator=collator, ranker_config=config)

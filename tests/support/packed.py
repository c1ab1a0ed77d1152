"""Small models of several architectures, random pairs, and the log-probabilities of their responses one at a time."""

import random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from stages.method import packing

Row = dict[str, Any]
Lengths = list[tuple[int, int, int]]
"""Tokens of the prompt, the chosen and the rejected response of each pair."""

VOCABULARY = 40
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
}
GEMMA = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}


def make_model(config: type[PreTrainedConfig], **changes: Any) -> Any:
    """Make a small model of an architecture, with random weights large enough that every token matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**(SIZES | changes)))
    for weights in model.parameters():
        weights.data.normal_(0, 0.5)
    return model


def make_rows(lengths: Lengths) -> list[Row]:
    """Make pairs of random tokens with these lengths."""
    draw = random.Random(0)
    names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    return [
        {"prompt_id": str(index)}
        | {name: [draw.randrange(VOCABULARY) for _ in range(length)] for name, length in zip(names, triple, strict=True)}
        for index, triple in enumerate(lengths)
    ]


def compute_logps(model: Any, rows: list[Row]) -> Tensor:
    """Compute the log-probability of each response in a call of its own, from all logits: (2B,)."""
    logps = []
    for side in ("chosen", "rejected"):
        for row in rows:
            prompt, response = row["prompt_token_ids"], row[f"{side}_token_ids"]
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum())
    return torch.stack(logps)


def make_sharp(dtype: torch.dtype, sharpness: float = 4, *, fused: bool = False) -> Any:
    """Make a model of four layers that is confident of most tokens, with logits up to about 30."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    model = make_model(LlamaConfig, **sizes)
    for weights in model.parameters():
        weights.data.fill_(1) if weights.dim() == 1 else weights.data.mul_(0.6)
    model.lm_head.weight.data.mul_(sharpness)
    return packing.enable_scoring(model.to(dtype), fused=fused)

"""A plain float32 loop: log-probabilities and training with nothing but torch and transformers, one text at a time.

This is the oracle of the stages reference and train, so it shares no code with them: no packing, no DeepSpeed, no Trainer, no
gradient checkpointing. Every step trains on all pairs, hence their order does not matter.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Pairs = list[dict[str, Any]]
"""Pairs: three lists of token IDs, `prompt_token_ids` and, for each side, `SIDE_token_ids`; and `SIDE_probability`."""
SIDES = ("chosen", "rejected")


def response_logp(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Compute the log-probability of a response after a prompt: a scalar, float32, in nats."""
    ids = torch.tensor([prompt + response], device=model.device)
    logps: Tensor = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logps[positions, torch.tensor(response)].sum()


def score(model: Any, pairs: Pairs) -> list[list[float]]:
    """Return each pair's two log-probabilities, chosen and rejected."""
    with torch.no_grad():
        return [
            [response_logp(model, pair["prompt_token_ids"], pair[f"{side}_token_ids"]).item() for side in SIDES]
            for pair in pairs
        ]


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Return the rate of a step, counted from 0: linear from 0 to `highest` in `warmup` steps, then linear to 0."""
    return highest * (step / warmup if step < warmup else (steps - step) / (steps - warmup))


def train(model: Any, pairs: Pairs, reference: list[list[float]], eta: float, rates: list[float]) -> list[float]:
    """Train with eq. 4.7 and RMSProp, a step for each rate. Returns the loss before each step."""
    optimizer = torch.optim.RMSprop(model.parameters())
    losses = []
    for rate in rates:
        total = 0.0
        for pair, logps in zip(pairs, reference, strict=True):
            for side, start in zip(SIDES, logps, strict=True):
                ratio = response_logp(model, pair["prompt_token_ids"], pair[f"{side}_token_ids"]) - start
                loss = (ratio - eta * (pair[f"{side}_probability"] - 0.5)) ** 2 / (2 * len(pairs))
                loss.backward()
                total += loss.item()
        losses.append(total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run(folder: Path, eta: float, rates: list[float]) -> None:
    """Score and train the model and the pairs in a folder; write `plain.json` there: logps and losses."""
    from transformers import AutoModelForCausalLM

    pairs = json.loads((folder / "pairs.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    logps = score(model, pairs)
    losses = train(model, pairs, logps, eta, rates)
    (folder / "plain.json").write_text(json.dumps({"logps": logps, "losses": losses}))

"""Training steps computed without Trainer, packing, padding or DeepSpeed, to compare train with."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

Row = dict[str, Any]
"""A row of schemas.PAIRS."""


@dataclass(frozen=True)
class Plan:
    """Settings of `train_by_hand`: those of the paper's training, one global batch of all pairs per epoch."""

    eta: float = 10.0
    learning_rate: float = 1e-3
    epochs: int = 12
    """Optimizer steps of the schedule."""
    steps: int = 7
    """Optimizer steps before training stops."""
    warmup: int = 2
    """Steps of linear warm-up."""
    max_grad_norm: float = 20.0
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.RMSprop
    decay: bool = True
    """Whether the learning rate falls linearly to 0 after the warm-up."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * step / self.warmup
        return self.learning_rate * ((self.epochs - step) / (self.epochs - self.warmup) if self.decay else 1)


def make_rows(count: int) -> list[Row]:
    """Make pairs of random tokens, without the reference's log-probabilities."""
    rng = random.Random(0)

    def tokens(longest: int) -> list[int]:
        return [rng.randrange(200) for _ in range(rng.randint(1, longest))]

    return [
        {
            **{f"{text}_token_ids": tokens(8) for text in ("prompt", "chosen", "rejected")},
            "chosen_probability": rng.uniform(0.6, 0.9),
            "rejected_probability": rng.uniform(0.1, 0.4),
        }
        for _ in range(count)
    ]


def score(model: Any, row: Row, side: str) -> Tensor:
    """Sum the log-probabilities of a response's tokens, in nats, from one sequence without padding."""
    prompt, response = row["prompt_token_ids"], row[f"{side}_token_ids"]
    logps = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    total: Tensor = logps[torch.arange(len(response)), response].sum()
    return total


def add_reference(rows: list[Row], model_path: Path) -> list[Row]:
    """Return rows with the log-probabilities of their responses under the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        scores = [
            {f"{side}_reference_logps": score(model, row, side).item() for side in ("chosen", "rejected")} for row in rows
        ]
    return [row | both for row, both in zip(rows, scores, strict=True)]


def train_by_hand(model_path: Path, rows: list[Row], plan: Plan) -> tuple[list[dict[str, float]], Any]:
    """Train the model in a folder with eq. 4.7 on all rows at every step, accumulating the gradient row by row.

    Returns a record of schemas.LOG_COLUMNS per step, and the trained model.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = plan.optimizer(model.parameters(), lr=0.0)
    records = []
    for step in range(plan.steps):
        optimizer.zero_grad()
        losses: list[float] = []
        ratios: dict[str, list[float]] = {"chosen": [], "rejected": []}
        for row in rows:
            for side, found in ratios.items():
                ratio = score(model, row, side) - row[f"{side}_reference_logps"]
                loss = (ratio - plan.eta * (row[f"{side}_probability"] - 0.5)) ** 2
                (loss / (2 * len(rows))).backward()
                losses.append(loss.item())
                found.append(ratio.item())
        norm = math.sqrt(sum(weights.grad.double().square().sum().item() for weights in model.parameters()))
        for weights in model.parameters():
            weights.grad.mul_(min(1.0, plan.max_grad_norm / norm))
        optimizer.param_groups[0]["lr"] = plan.rate(step)
        optimizer.step()
        records.append(
            {
                "step": step + 1,
                "loss": sum(losses) / len(losses),
                "learning_rate": plan.rate(step),
                "gradient_norm": norm,
                "clipped": int(norm > plan.max_grad_norm),
                "chosen_log_ratio": sum(ratios["chosen"]) / len(rows),
                "rejected_log_ratio": sum(ratios["rejected"]) / len(rows),
                "kl": sum(ratio**2 for both in ratios.values() for ratio in both) / (4 * len(rows)),
            }
        )
    return records, model

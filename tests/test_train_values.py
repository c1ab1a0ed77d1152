"""What training is told to do, and the log of a whole training, recomputed in plain torch."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from stages import train
from stages.artifacts import files, schemas, tables
from stages.engines import training
from stages.runtime import params
from stages.runtime.paths import ROOT
from support.running import TINY, run_stage, set_params

SETTINGS = {
    "learning_rate": 3e-4,
    "global_batch": 32,
    "device_batch": 4,
    "devices": 2,
    "epochs": 6.0,
    "stop_epoch": 2.0,
    "warmup_ratio": 0.2,
    "max_grad_norm": 0.7,
    "checkpoint_steps": 5,
    "gradient_checkpointing": True,
    "offload": "optimizer",
}


def test_the_trainer_gets_every_setting_of_params(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[Any] = []
    monkeypatch.setattr(training, "training_arguments", lambda *values, **options: called.append((values, options)))
    settings = params.load("train", path=ROOT / "params.yaml").train.model_copy(update=SETTINGS)
    train.policy_arguments(settings, 7, tmp_path, "iter1")
    ((values, options),) = called
    assert values == (tmp_path, 4, "float32", 7)
    expected = {
        "optim": "rmsprop",
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.2,
        "max_grad_norm": 0.7,
        "num_train_epochs": 2,
        "accumulation": 4,  # of 4 pairs on each of 2 devices: 32
        "checkpoint_steps": 5,
        "gradient_checkpointing": True,
        "offload": "optimizer",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }
    assert {name: options[name] for name in expected} == expected


def sum_logps(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Return log pi(response | prompt), one sequence at a time."""
    logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + place - 1, token] for place, token in enumerate(response))


def retrain(folder: Path, eta: float, settings: dict[str, Any]) -> pd.DataFrame:
    """Train on all pairs at once, one step per epoch, by the paper's equation and PyTorch's RMSprop. Returns the log."""
    from transformers import AutoModelForCausalLM

    pairs = tables.read(folder / "pairs.parquet", schemas.PAIRS).to_pylist()
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    optimizer = torch.optim.RMSprop(model.parameters())
    target = eta * (torch.tensor([[row["chosen_probability"], row["rejected_probability"]] for row in pairs]) - 0.5)
    before = torch.tensor([[row["chosen_reference_logps"], row["rejected_reference_logps"]] for row in pairs])
    warm = math.ceil(settings["warmup_ratio"] * settings["epochs"])
    rows = []
    for step in range(int(settings["stop_epoch"])):
        rate = settings["learning_rate"] * min(step / warm, (settings["epochs"] - step) / (settings["epochs"] - warm))
        now = torch.stack(
            [
                torch.stack(
                    [sum_logps(model, row["prompt_token_ids"], row[f"{side}_token_ids"]) for side in ("chosen", "rejected")]
                )
                for row in pairs
            ]
        )
        loss = ((now - before - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"]).item()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        ratios = (now - before).detach()
        means = [ratios[:, 0].mean().item(), ratios[:, 1].mean().item(), (ratios**2).mean().item() / 2]
        rows.append([step + 1, loss.item(), rate, norm, int(norm > settings["max_grad_norm"]), *means])
    return pd.DataFrame(rows, columns=schemas.LOG_COLUMNS)


@pytest.mark.slow
def test_a_training_is_that_of_the_equation(pairs: Path) -> None:
    """Loss, learning rate, gradient norm, log-ratios and KL of five steps; the clipping is in force, the schedule goes on."""
    settings = {"learning_rate": 1e-4, "epochs": 10, "stop_epoch": 5, "warmup_ratio": 0.2, "max_grad_norm": 0.5}
    folder = pairs / "values"
    folder.mkdir()
    overrides = {f"train.{name}": value for name, value in settings.items()}
    set_params(folder, TINY | overrides | {"train.global_batch": 20, "train.device_batch": 4, "eta": 20})
    options = ("--model", "../base", "--pairs", "../pairs.parquet", "--out", "iter1")
    done = run_stage(folder, "train", *options, "--out-log", "iter1.csv", "--out-update", "iter1.json")
    assert done.returncode == 0, done.stderr
    expected, log = retrain(pairs, 20, settings), pd.read_csv(folder / "iter1.csv")
    pd.testing.assert_frame_equal(log, expected, rtol=5e-3, atol=2e-3, check_dtype=False)
    assert expected["loss"].is_monotonic_decreasing
    update = files.read_json(folder / "iter1.json")
    assert (update["steps"], update["effective_steps"]) == (5, 4), "the first has a learning rate of 0"

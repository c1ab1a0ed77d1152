"""Loss, log and schedule of SPPOTrainer, computed by hand. The trainer is not started: it has no model."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from transformers import TrainingArguments

from stages.artifacts import schemas
from stages.engines import trainer as trainers
from stages.method import attention, dealing, packing
from stages.runtime import params
from stages.runtime.paths import ROOT

INPUTS = {"reference_logps": torch.tensor([-10.0, -20.0, -30.0, -40.0]), "probabilities": torch.tensor([0.9, 0.7, 0.2, 0.4])}
RATIOS = [1.0, 3.0, -2.0, -6.0]
"""Log-ratios of two chosen responses, then of two rejected ones."""


def make_trainer(step: int = 0, **changes: Any) -> Any:
    """Return an SPPOTrainer with eta 10 after `step` steps."""
    trainer: Any = object.__new__(trainers.SPPOTrainer)
    trainer.settings = params.load("train", path=ROOT / "params.yaml").train.model_copy(update=changes)
    trainer.eta, trainer.state, trainer.batch_metrics = 10, SimpleNamespace(global_step=step), []
    return trainer


@pytest.mark.parametrize("step", [1, 2, 50])
def test_the_loss_and_its_metrics_are_those_of_the_equation_at_every_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logps = (INPUTS["reference_logps"] + torch.tensor(RATIOS)).requires_grad_()
    monkeypatch.setattr(packing, "batch_logps", lambda model, inputs: logps)
    trainer = make_trainer(step)
    loss = trainer.compute_loss(None, INPUTS)
    targets = [4, 2, -3, -1]  # eta (P^ - 1/2)
    assert loss.item() == pytest.approx(sum((ratio - target) ** 2 for ratio, target in zip(RATIOS, targets, strict=True)) / 4)
    (metrics,) = trainer.batch_metrics
    squares = sum(ratio**2 for ratio in RATIOS)
    assert metrics.tolist() == pytest.approx([loss.item(), 2, -4, squares / 4 / 2])
    loss.backward()
    expected = [2 * (ratio - target) / 4 for ratio, target in zip(RATIOS, targets, strict=True)]
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("limit", "clipped"), [(0.0, 0), (0.5, 1), (2.0, 0)])
def test_a_record_has_the_means_of_its_batches(limit: float, clipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(3, max_grad_norm=limit)
    trainer.batch_metrics = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.0, 4.0, 5.0, 6.0])]
    trainer.model, trainer.args = None, SimpleNamespace(output_dir=str(Path()))
    trainer.accelerator = SimpleNamespace(reduce=lambda values, how: values)
    monkeypatch.setattr(trainers, "has_finite_weights", lambda model: True)
    record = trainer._step_record({"grad_norm": 1.5, "learning_rate": 1e-5})
    assert record == dict(zip(schemas.LOG_COLUMNS, [3, 2, 1e-5, 1.5, clipped, 3, 4, 5], strict=True))
    assert trainer.batch_metrics == []


def test_the_schedule_spans_all_epochs_although_training_stops_earlier(tmp_path: Path) -> None:
    """20 steps until train.stop_epoch 2, of 60 until train.epochs 6; 12 steps of warm-up."""
    trainer = make_trainer(epochs=6, stop_epoch=2)
    options: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup_steps": 0.2, "use_cpu": True, "report_to": "none"}
    trainer.args = TrainingArguments(str(tmp_path), learning_rate=1, **options)
    trainer.lr_scheduler = None
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    scheduler = trainer.create_scheduler(20, optimizer)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([step / 12 if step < 12 else (60 - step) / (60 - 12) for step in range(20)])


@pytest.mark.parametrize(("devices", "device_batch"), [(1, 8), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("taken", [0, 3, 4])
@pytest.mark.parametrize("count", [dealing.count_positions, sum])
def test_the_pairs_of_a_step_are_the_same_on_any_number_of_devices(
    devices: int, device_batch: int, taken: int, count: dealing.Count
) -> None:
    """Those that accelerate's sampler gives without dealing, in the epoch of the steps taken: three of eight pairs each."""
    draw = random.Random(1)
    settings = params.load("train", path=ROOT / "params.yaml").train
    settings = settings.model_copy(update={"global_batch": 8, "devices": devices, "device_batch": device_batch})
    sizes = [draw.randint(1, 99) for _ in range(24)]
    shuffled, alone = (SeedableRandomSampler(range(24), data_seed=5) for _ in range(2))
    alone.set_epoch(taken // 3)
    order, dealt = list(alone), list(trainers.DealtSampler(shuffled, sizes, settings, count, lambda: taken))
    for start in range(0, 24, 8):
        expected, found = order[start : start + 8], dealt[start : start + 8]
        assert set(found) == set(expected)
        assert device_batch < 8 or found == expected, "one batch keeps its order"
    assert len(trainers.DealtSampler(shuffled, sizes, settings, count, lambda: taken)) == 24


ROWS = [
    {"prompt_token_ids": [1] * prompt, "chosen_token_ids": [2] * chosen, "rejected_token_ids": [3] * rejected}
    for prompt, chosen, rejected in ((2, 3, 1), (1, 4, 1), (3, 2, 1))
]


@pytest.mark.parametrize("fused", [True, False])
def test_the_fused_kernel_is_checked_and_gets_all_pairs_in_one_row(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    checked: list[Any] = []
    made: dict[str, Any] = {}
    monkeypatch.setattr(attention, "check_kernel", lambda *inputs: checked.append(inputs))
    monkeypatch.setattr(trainers.Trainer, "__init__", lambda _, **options: made.update(options))
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention.FUSED if fused else "sdpa"))
    trainers.PackedTrainer(model, SimpleNamespace(device="a device"))
    assert checked == ([(model, "a device")] if fused else [])
    assert made["data_collator"](ROWS)["input_ids"].shape == ((1, 128) if fused else (3, 6))


@pytest.mark.parametrize(("fused", "count"), [(True, sum), (False, dealing.count_positions)])
def test_pairs_are_dealt_out_by_what_their_batches_compute(fused: bool, count: dealing.Count) -> None:
    trainer = make_trainer()
    trainer.fused, trainer.train_dataset = fused, Dataset.from_list(ROWS)
    sampler = trainer._get_train_sampler()
    assert sampler.count is count
    assert sampler.sizes == [6, 6, 6]

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from stages import train
from stages.artifacts import schemas
from stages.engines import trainer, training
from stages.method import packing
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support import steps
from support.messages import assert_message
from support.models import make_model
from support.steps import Plan, Row

REFERENCE = torch.tensor([-100.0, -300.0])


@pytest.mark.parametrize("column", ["loss", "gradient_norm", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_metric_that_is_not_finite_is_one_line(tmp_path: Path, column: str, value: float) -> None:
    record: dict[str, float] = dict.fromkeys(schemas.LOG_COLUMNS, 0.5) | {"step": 7}
    trainer.check_step(record, True, tmp_path)
    with pytest.raises(StageError) as raised:
        trainer.check_step(record | {column: value}, True, tmp_path)
    assert_message(str(raised.value), "step 7", f"{column} is {value}", "lower train.learning_rate or eta", "no checkpoint")


def test_a_step_with_weights_that_are_not_finite_is_one_line(tmp_path: Path) -> None:
    record: dict[str, float] = dict.fromkeys(schemas.LOG_COLUMNS, 0.5) | {"step": 7}
    with pytest.raises(StageError) as raised:
        trainer.check_step(record, False, tmp_path)
    assert_message(str(raised.value), "step 7", "weights are not finite", "lower train.learning_rate or eta")


@pytest.mark.parametrize("ratio", [0.0, 0.19, -0.19])
def test_a_policy_that_equals_its_reference_may_start(ratio: float) -> None:
    loss = torch.tensor(1.0)
    trainer.check_start(loss, loss, torch.tensor([ratio, ratio]), REFERENCE, tolerance=0.2)


@pytest.mark.parametrize("ratio", [0.21, -0.21, math.nan])
def test_a_policy_that_differs_from_its_reference_is_one_line(ratio: float) -> None:
    with pytest.raises(StageError) as raised:
        trainer.check_start(torch.tensor(2.0), torch.tensor(1.0), torch.tensor([ratio, ratio]), REFERENCE, tolerance=0.2)
    assert_message(str(raised.value), "first loss is 2", "must be 1", "re-run reference")


LOSSES = {"sppo": None, "sppo_hard": None, "dpo": 0.1, "ipo": 0.1}
"""Loss -> beta."""
World = tuple[Path, list[Row]]
"""A policy's folder, and pairs with their log-probabilities under it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    set_seed(0)
    folder = make_model(tmp_path_factory.mktemp("policy"))
    return folder, steps.add_reference(steps.make_rows(4), folder)


@pytest.fixture
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers.Trainer train by itself; tests/test_train.py trains under DeepSpeed."""
    monkeypatch.setattr(training, "zero3_config", lambda *_: None)
    monkeypatch.setattr(trainer, "has_finite_weights", lambda _: True)


def run_trainer(world: World, folder: Path, plan: Plan, **overrides: Any) -> list[dict[str, Any]]:
    """Train on one global batch of all pairs, in two halves. Returns the log's records."""
    model_path, rows = world
    root: params.Train = params.load("train", path=ROOT / "params.yaml").train
    ours = {
        "global_batch": len(rows),
        "device_batch": len(rows) // 2,
        "learning_rate": plan.learning_rate,
        "epochs": plan.epochs,
        "stop_epoch": plan.steps,
        "warmup_ratio": plan.warmup / plan.epochs,
        "max_grad_norm": plan.max_grad_norm,
        "checkpoint_steps": 0,
    }
    settings = root.model_copy(update=ours | overrides)
    arguments = train.policy_arguments(settings, 0, folder, "policy")
    model = packing.enable_scoring(training.load_policy(model_path, "float32"))
    subject = trainer.SPPOTrainer(model, arguments, settings, plan.eta, Dataset.from_list(rows), None)
    subject.train()
    return [record for record in subject.state.log_history if "kl" in record]


def deviation(records: list[dict[str, Any]], expected: list[dict[str, float]]) -> float:
    """Return the largest difference between two logs, relative to the largest value of its column."""
    assert len(records) == len(expected)
    return max(
        abs(ours[name] - theirs[name]) / (max(abs(one[name]) for one in expected) or 1)
        for ours, theirs in zip(records, expected, strict=True)
        for name in schemas.LOG_COLUMNS
    )


@pytest.mark.usefixtures("without_deepspeed")
def test_every_logged_value_is_that_of_a_loop_written_by_hand(world: World, tmp_path: Path) -> None:
    """Some of the steps are clipped. The schedule goes on after the last step."""
    expected, _ = steps.train_by_hand(*world, Plan())
    assert {record["clipped"] for record in expected} == {0, 1}
    assert deviation(run_trainer(world, tmp_path, Plan()), expected) < 5e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        Plan(max_grad_norm=1e9),
        Plan(optimizer=torch.optim.AdamW),
        Plan(optimizer=torch.optim.SGD),
        Plan(decay=False),
        Plan(epochs=Plan.steps),
        Plan(warmup=1),
        Plan(learning_rate=1e-2),
        Plan(eta=11),
    ],
    ids=["no clipping", "AdamW", "SGD", "constant", "spans stop_epoch", "shorter warm-up", "ten times the rate", "eta"],
)
def test_that_loop_would_tell_another_training_apart(world: World, other: Plan) -> None:
    """Even without looking at the columns that show the setting itself."""
    shown = {"clipped", "learning_rate"}
    logs = [[record | dict.fromkeys(shown, 0) for record in steps.train_by_hand(*world, plan)[0]] for plan in (Plan(), other)]
    assert deviation(*logs) > 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("without_deepspeed")
@pytest.mark.parametrize("loss", LOSSES)
def test_training_raises_the_chosen_response_and_lowers_the_rejected_one(world: World, tmp_path: Path, loss: str) -> None:
    records = run_trainer(world, tmp_path, Plan(warmup=0, steps=4), loss=loss, beta=LOSSES[loss])
    assert records[0]["chosen_log_ratio"] == pytest.approx(0, abs=1e-4)
    assert records[0]["rejected_log_ratio"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["chosen_log_ratio"] > 0.5
    assert records[-1]["rejected_log_ratio"] < -0.5
    assert records[-1]["loss"] < records[0]["loss"]

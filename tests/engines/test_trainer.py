import math
from pathlib import Path

import pytest
import torch

from stages.artifacts import schemas
from stages.engines import trainer
from stages.runtime.errors import StageError
from support.messages import assert_message

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
    trainer.check_start(loss, loss, torch.tensor([ratio, ratio]), REFERENCE, tolerance=0.001)


@pytest.mark.parametrize("ratio", [0.21, -0.21, math.nan])
def test_a_policy_that_differs_from_its_reference_is_one_line(ratio: float) -> None:
    with pytest.raises(StageError) as raised:
        trainer.check_start(torch.tensor(2.0), torch.tensor(1.0), torch.tensor([ratio, ratio]), REFERENCE, tolerance=0.001)
    assert_message(str(raised.value), "first loss is 2", "must be 1", "re-run reference")

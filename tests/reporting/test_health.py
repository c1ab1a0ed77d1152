from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stages.artifacts import files, schemas
from stages.artifacts import tables as parquet
from stages.reporting import health
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.params import Train
from stages.runtime.paths import ROOT
from support import tables
from support.messages import assert_message
from support.reports import UPDATE, read_rows, write_iteration

ETA = 10


@pytest.fixture(scope="module")
def train() -> Train:
    return params.validate(ROOT / "params.yaml").train


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with two prompts of iter1, one of them a tie, and two training steps."""
    write_iteration(tmp_path)
    return tmp_path


def test_every_metric_is_measured(data: Path, train: Train) -> None:
    result = health.measure_health("iter1", data, ETA, train.model_copy(update={"global_batch": 1}))
    assert set(result.metrics) == set(health.METRICS)
    counts = {"prompts": 2, "responses": 6, "duplicates": 2, "empty": 2, "responses_cut": 4, "tokens": 14, "contaminated": 7}
    counts |= {"ties": 1, "pairs_too_long": 0, "pairs": 1, "training_prompts_cut": 0, "training_responses_cut": 1, "steps": 2}
    counts |= {"ranker_prompts_cut": 0, "ranker_responses_cut": 0, "pairs_used": 1, "effective_steps": 1}
    assert {name: result.metrics[name] for name in counts} == counts
    assert all(isinstance(result.metrics[name], int) for name in counts)
    values = {"chosen_probability": 0.75, "rejected_probability": 0.25, "first_loss": 6.25, "last_loss": 5.25, "kl": 0.75}
    values |= {"gradient_norm": 40, "clipped_steps": 0.5, "length_50": 3, "length_5": 1, "reward_margin": 0.2}
    values |= {"weights_changed": 0.75, "update_survived": 0.875}
    assert {name: result.metrics[name] for name in values} == pytest.approx(values)


def test_log_and_histogram_name_the_iteration(data: Path, train: Train) -> None:
    result = health.measure_health("iter1", data, ETA, train)
    assert list(result.log.columns) == [*schemas.LOG_COLUMNS, "iteration"]
    assert set(result.log["iteration"]) == set(result.histogram["iteration"]) == {"iter1"}


def test_the_theoretical_loss_is_that_of_the_configured_loss(train: Train) -> None:
    pairs = pd.DataFrame({"chosen_probability": [0.75, 0.9], "rejected_probability": [0.25, 0.3]})
    sppo = 100 * (0.25**2 + 0.4**2 + 0.25**2 + 0.2**2) / 4
    assert health.theoretical_loss(pairs, ETA, train) == pytest.approx(sppo)
    ipo = train.model_copy(update={"loss": "ipo", "beta": 0.1})
    assert health.theoretical_loss(pairs, ETA, ipo) == pytest.approx(25)


def test_truncated_prompts_and_dropped_pairs_are_counted(data: Path, train: Train) -> None:
    rows = [row | {"prompt_truncated": True, "responses_truncated": 2} for row in tables.rankings()]
    rows[0] = rows[1] | {"prompt_id": rows[0]["prompt_id"]}
    parquet.write(rows, schemas.RANKINGS, data / "rankings" / "iter1.parquet")
    pairs = [row | {"prompt_tokens_cut": 3, "rejected_tokens_cut": 1} for row in tables.pairs()[:1]]
    parquet.write(pairs, schemas.PAIRS, data / "pairs" / "iter1.parquet")
    metrics = health.measure_health("iter1", data, ETA, train).metrics
    expected = {"ranker_prompts_cut": 2, "ranker_responses_cut": 4, "ties": 0, "pairs_too_long": 1}
    expected |= {"training_prompts_cut": 1, "training_responses_cut": 2}
    assert {name: metrics[name] for name in expected} == expected


def test_the_histogram_counts_every_response_once() -> None:
    pairs = pd.DataFrame({"chosen_probability": [0.5, 0.51, 1.0], "rejected_probability": [0.0, 0.05, 0.5]})
    histogram = health.make_histogram(pairs)
    assert list(histogram["response"].unique()) == ["chosen", "rejected"]
    filled = histogram[histogram["responses"] > 0][["response", "probability", "upper", "responses"]].values.tolist()
    assert filled == [
        ["chosen", 0.45, 0.5, 1],
        ["chosen", 0.5, 0.55, 1],
        ["chosen", 0.95, 1.0, 1],
        ["rejected", 0.0, 0.05, 2],
        ["rejected", 0.45, 0.5, 1],
    ]


@pytest.mark.parametrize(
    ("pairs", "steps", "used"),
    [(30, 3, 24), (30, 6, 24), (32, 4, 32), (32, 2, 16), (8, 1, 8)],
    ids=["a rest", "two epochs", "all", "half an epoch", "one batch"],
)
def test_pairs_that_no_step_used_are_not_counted_as_used(pairs: int, steps: int, used: int) -> None:
    batches = [range(start, start + 8) for start in range(0, pairs - 7, 8)]
    assert health.count_used(pairs, steps, 8) == len({pair for step in range(steps) for pair in batches[step % len(batches)]})
    assert health.count_used(pairs, steps, 8) == used


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"steps": 3}, ("'steps' is 3", "2 by the training log")),
        ({"steps": 2.5}, ("'steps' is 2.5",)),
        ({"effective_steps": 2}, ("'effective_steps' is 2", "1 by the training log")),
        ({"effective_steps": True}, ("'effective_steps' is True",)),
        ({"weights": 0}, ("'weights' is 0", "positive integer")),
        ({"weights": 10.0}, ("'weights' is 10.0", "positive integer")),
        ({"changed": 1.01}, ("'changed' is 1.01", "from 0 to 1")),
        ({"changed": "0.5"}, ("'changed' is",)),
        ({"survived": -0.1}, ("'survived' is -0.1",)),
        ({"survived": None}, ("'survived' is None",)),
        ({"more": 1}, ("exactly the keys", "survived")),
    ],
)
def test_an_update_that_train_cannot_have_written_is_one_line(
    data: Path, train: Train, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    files.write_json(UPDATE | changes, data / "logs" / "iter1.json")
    with pytest.raises(StageError) as error:
        health.measure_health("iter1", data, ETA, train)
    assert_message(str(error.value), str(data / "logs" / "iter1.json"), *parts, "dvc repro")


def test_an_update_without_a_key_is_one_line(data: Path, train: Train) -> None:
    files.write_json({key: value for key, value in UPDATE.items() if key != "survived"}, data / "logs" / "iter1.json")
    with pytest.raises(StageError) as error:
        health.measure_health("iter1", data, ETA, train)
    assert_message(str(error.value), "iter1.json", "exactly the keys", "survived")


@pytest.mark.parametrize(
    "name",
    ["responses/iter1.parquet", "rankings/iter1.parquet", "pairs/iter1.parquet", "logs/iter1.csv", "logs/iter1.json"],
)
def test_a_missing_file_is_named(name: str, data: Path, train: Train) -> None:
    (data / name).unlink()
    with pytest.raises(StageError) as error:
        health.measure_health("iter1", data, ETA, train)
    assert_message(str(error.value), str(data / name), "missing")


def test_the_page_has_a_row_per_metric_and_a_column_per_iteration(data: Path, train: Train) -> None:
    metrics = health.measure_health("iter1", data, ETA, train).metrics
    rows = read_rows(health.format_health({"iter1": metrics, "iter2": metrics}))
    assert rows[0] == ["metric", "iter1", "iter2"]
    assert len(rows) == len(health.METRICS) + 2
    assert ["generated tokens", "14", "14"] in rows
    assert ["loss at the first step", "6.25", "6.25"] in rows
    assert ["effective steps", "1", "1"] in rows
    assert ["share of the update that survives the checkpoint's precision", "0.875", "0.875"] in rows


def test_iterations_whose_every_step_was_clipped_are_named() -> None:
    metrics: dict[str, float] = dict.fromkeys(health.METRICS, 0)
    text = health.format_health({"iter1": metrics | {"clipped_steps": 1.0}, "iter2": metrics | {"clipped_steps": 0.5}})
    warning = text.rpartition("\n**")[2]
    assert "`train.max_grad_norm`" in warning
    assert "iter1" in warning
    assert "iter2" not in warning
    assert "`train.max_grad_norm`" not in health.format_health({"iter2": metrics | {"clipped_steps": 0.5}})

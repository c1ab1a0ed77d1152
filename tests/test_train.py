"""The stage `train` as users run it, on the pairs of a tiny policy."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import train
from stages.artifacts import files, schemas, tables
from stages.runtime import params
from stages.runtime.errors import StageError
from support import tables as valid
from support.messages import assert_message
from support.running import TINY, run_stage, set_params

OUT = ("--out", "iter1", "--out-log", "iter1.csv")


@pytest.fixture(scope="module")
def trained(pairs: Path) -> Path:
    done = run_stage(pairs, "train", "--model", "base", "--pairs", "pairs.parquet", *OUT)
    assert done.returncode == 0, done.stderr
    return pairs


def run_train(pairs: Path, name: str, overrides: dict[str, Any]) -> Path:
    """Train with TINY and overrides in a folder `name` of `pairs`. Returns that folder, with iter1 and iter1.csv."""
    folder = pairs / name
    folder.mkdir()
    set_params(folder, TINY | overrides)
    done = run_stage(folder, "train", "--model", "../base", "--pairs", "../pairs.parquet", *OUT)
    assert done.returncode == 0, done.stderr
    return folder


def fail_to_train(pairs: Path, name: str, overrides: dict[str, Any], table: str = "../pairs.parquet") -> str:
    """Train as `run_train` does, which must fail and leave no policy. Returns the last line of stderr."""
    folder = pairs / name
    folder.mkdir(exist_ok=True)
    set_params(folder, TINY | overrides)
    done = run_stage(folder, "train", "--model", "../base", "--pairs", table, *OUT)
    assert done.returncode == 1
    assert not (folder / "iter1").exists()
    assert not (folder / "iter1.csv").exists()
    return done.stderr.splitlines()[-1]


def test_only_whole_global_batches_are_trained_on() -> None:
    pairs = pa.Table.from_pylist(valid.pairs() + valid.pairs() + valid.pairs()[:1], schema=schemas.PAIRS)
    assert train.select_whole_batches(pairs, 2) == pairs.slice(0, 4)
    assert train.select_whole_batches(pairs, 5) == pairs


def test_fewer_pairs_than_a_batch_is_one_line() -> None:
    pairs = pa.Table.from_pylist(valid.pairs(), schema=schemas.PAIRS)
    with pytest.raises(StageError) as raised:
        train.select_whole_batches(pairs, 64)
    assert_message(str(raised.value), "2 pairs", "global batch of 64", "lower train.global_batch")


def test_keys_outside_the_resume_key_exist() -> None:
    assert set(params.Train.model_fields) > train.NOT_IN_RESUME_KEY


@pytest.mark.slow
def test_the_first_loss_is_what_theory_says(trained: Path) -> None:
    """eta^2 mean((P^ - 1/2)^2), all pairs being one global batch."""
    folder = run_train(trained, "whole", {"train.global_batch": 20, "eta": 1000})
    rows = tables.read(trained / "pairs.parquet", schemas.PAIRS).to_pandas()
    probabilities = pd.concat([rows["chosen_probability"], rows["rejected_probability"]])
    log = pd.read_csv(folder / "iter1.csv")
    assert log["loss"].tolist() == pytest.approx([1e6 * ((probabilities - 0.5) ** 2).mean()], rel=1e-4)
    assert log["learning_rate"].tolist() == [0]  # linear warm-up starts at 0
    assert abs(log["chosen_log_ratio"][0]) < 1e-4


@pytest.mark.slow
def test_the_policy_is_a_trained_model_for_transformers(trained: Path) -> None:
    names = {path.name for path in (trained / "iter1").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    before, after = load_file(trained / "base" / "model.safetensors"), load_file(trained / "iter1" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert AutoModelForCausalLM.from_pretrained(trained / "iter1").num_parameters() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("device_batch", "devices"), [(8, 1), (4, 2)])
def test_the_same_global_batch_trains_the_same_policy(trained: Path, device_batch: int, devices: int) -> None:
    """Two accumulation steps, one, and two processes give the same losses and gradients up to the order of float additions."""
    folder = run_train(trained, f"{device_batch}x{devices}", {"train.device_batch": device_batch, "train.devices": devices})
    accumulated, other = pd.read_csv(trained / "iter1.csv"), pd.read_csv(folder / "iter1.csv")
    assert accumulated["loss"].to_numpy() == pytest.approx(other["loss"].to_numpy(), rel=1e-4)
    assert accumulated["gradient_norm"].to_numpy() == pytest.approx(other["gradient_norm"].to_numpy(), rel=1e-3)


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(trained: Path) -> None:
    options = ("--model", "base", "--pairs", "pairs.parquet", "--out", "again", "--out-log", "again.csv")
    done = run_stage(trained, "train", *options)
    assert done.returncode == 0, done.stderr
    assert files.digest(trained / "again") == files.digest(trained / "iter1")
    assert (trained / "again.csv").read_bytes() == (trained / "iter1.csv").read_bytes()


@pytest.mark.slow
def test_bfloat16_and_gradient_checkpointing_train_too(trained: Path) -> None:
    folder = run_train(trained, "bfloat16", {"train.dtype": "bfloat16", "train.gradient_checkpointing": True})
    assert load_file(folder / "iter1" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert pd.read_csv(folder / "iter1.csv")["loss"][0] == pytest.approx(pd.read_csv(trained / "iter1.csv")["loss"][0], rel=0.1)


@pytest.mark.slow
def test_merged_adapters_change_only_the_linear_layers(trained: Path) -> None:
    folder = run_train(trained, "lora", {"train.lora.rank": 4, "train.loss": "dpo", "train.beta": 0.1})
    assert pd.read_csv(folder / "iter1.csv")["loss"][0] == pytest.approx(0.6931, rel=1e-3)
    before, after = load_file(trained / "base" / "model.safetensors"), load_file(folder / "iter1" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


@pytest.mark.slow
@pytest.mark.parametrize("column", ["chosen_reference_logps", "chosen_token_ids"])
def test_pairs_of_another_policy_stop_at_the_first_step(pairs: Path, column: str) -> None:
    """Reference log-probabilities that are off by a nat, or responses cut at their beginning, as a wrong boundary would."""
    rows = tables.read(pairs / "pairs.parquet", schemas.PAIRS).to_pylist()
    for row in rows:
        row[column] = row[column] - 1 if column.endswith("logps") else row[column][1:]
    tables.write(rows, schemas.PAIRS, pairs / column / "pairs.parquet")
    assert_message(fail_to_train(pairs, column, {}, "pairs.parquet"), "first loss", "re-run reference")


@pytest.mark.slow
def test_the_log_goes_to_tensorboard_too(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_train(trained, "tensorboard", {"train.report_to": "tensorboard"})
    assert (folder / "iter1.csv").read_bytes() == (trained / "iter1.csv").read_bytes()
    events = EventAccumulator(str(folder / "scratch" / "tensorboard" / "iter1"))
    events.Reload()
    for column in ("loss", "kl", "chosen_log_ratio"):
        logged = [event.value for event in events.Scalars(f"train/{column}")]
        assert logged == pytest.approx(pd.read_csv(folder / "iter1.csv")[column].tolist(), rel=1e-4)


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_one_line(trained: Path) -> None:
    line = fail_to_train(trained, "wandb", {"train.report_to": "wandb"})
    assert_message(line, "train: error", "train.report_to", "wandb", "pip install")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "devices", "problems", "kept"),
    [
        (1e30, 1, ("step 3", "gradient_norm is inf"), 2),  # the weights after step 2, around 1e30, are still finite
        (3e38, 2, ("step 2", "weights are not finite"), 1),
    ],
)
def test_numbers_that_are_not_finite_stop_training_before_they_are_saved(
    pairs: Path, rate: float, devices: int, problems: tuple[str, str], kept: int
) -> None:
    """The first step has learning rate 0, the second half of the full rate."""
    overrides = {"train.learning_rate": rate, "train.devices": devices, "train.stop_epoch": 3, "train.checkpoint_steps": 1}
    line = fail_to_train(pairs, f"rate{rate}", overrides)
    (checkpoint,) = (pairs / f"rate{rate}").glob("scratch/train/*/checkpoint-*")
    assert checkpoint.name == f"checkpoint-{kept}"
    where = str(checkpoint.relative_to(pairs / f"rate{rate}"))
    assert_message(line, "train: error", *problems, "lower train.learning_rate or eta", where)

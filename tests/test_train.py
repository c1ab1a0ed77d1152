"""The stage `train` as users run it, on the pairs of a tiny policy."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

from stages import train
from stages.artifacts import files, schemas, tables
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support import steps
from support import tables as valid
from support.messages import assert_message
from support.models import edit_json
from support.running import ALONE, TINY, run_module, run_stage, set_params

OUT = ("--out", "iter1", "--out-log", "iter1.csv", "--out-update", "iter1.json")


@pytest.fixture(scope="module")
def trained(pairs: Path) -> Path:
    done = run_stage(pairs, "train", "--model", "base", "--pairs", "pairs.parquet", *OUT)
    assert done.returncode == 0, done.stderr
    return pairs


def run_train(pairs: Path, name: str, overrides: dict[str, Any]) -> Path:
    """Train with TINY and overrides in a folder `name` of `pairs`. Returns that folder, which then holds the outputs."""
    folder = pairs / name
    folder.mkdir()
    set_params(folder, TINY | overrides)
    done = run_stage(folder, "train", "--model", "../base", "--pairs", "../pairs.parquet", *OUT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trained_by_two(trained: Path) -> Path:
    """The folder of the same training by two processes."""
    return run_train(trained, "two", {"train.devices": 2})


def fail_to_train(pairs: Path, name: str, overrides: dict[str, Any], table: str = "../pairs.parquet") -> str:
    """Train as `run_train` does, which must fail and leave no policy. Returns the last line of stderr."""
    folder = pairs / name
    folder.mkdir(exist_ok=True)
    set_params(folder, TINY | overrides)
    done = run_stage(folder, "train", "--model", "../base", "--pairs", table, *OUT)
    assert done.returncode == 1
    assert not (folder / "iter1").exists()
    assert not (folder / "iter1.csv").exists()
    assert not (folder / "iter1.json").exists()
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


def effective_steps(steps: int, settings: params.Train) -> int:
    """Count the steps with a learning rate above 0 by running transformers' own schedule."""
    total = round(steps * settings.epochs / settings.stop_epoch)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    schedule = get_scheduler("linear", optimizer, math.ceil(total * settings.warmup_ratio), total)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return sum(rate > 0 for rate in rates)


ratios = st.one_of(st.just(0.0), st.floats(0.001, 0.99))


@given(st.integers(1, 5), ratios, st.floats(0.1, 3), st.floats(1, 4))
def test_a_schedule_is_accepted_if_it_has_an_effective_step(batches: int, ratio: float, stop: float, longer: float) -> None:
    root: params.Train = params.load("train", path=ROOT / "params.yaml").train
    settings = root.model_copy(
        update={"global_batch": 8, "warmup_ratio": ratio, "stop_epoch": stop, "epochs": stop * longer, "loss": "sppo"}
    )
    count = math.ceil(stop * batches)
    if effective_steps(count, settings):
        train.check_schedule(8 * batches, settings)
    else:
        with pytest.raises(StageError) as raised:
            train.check_schedule(8 * batches, settings)
        remedies = ("train.warmup_ratio", "train.global_batch", "train.stop_epoch", "train.epochs")
        assert_message(str(raised.value), "1 step", "learning rate of 0", *remedies)


def test_pairs_that_train_nothing_are_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    root: params.Train = params.load("train", path=ROOT / "params.yaml").train
    settings = root.model_copy(update={"global_batch": 8, "stop_epoch": 2, "warmup_ratio": 0.1})
    with caplog.at_level(logging.WARNING):
        train.check_schedule(24, settings.model_copy(update={"warmup_ratio": 0}))
        assert not caplog.messages
        train.check_schedule(24, settings)
    (message,) = caplog.messages
    assert_message(message, "first of 6 steps", "train.warmup_ratio", "8 pairs train nothing")


def test_keys_outside_the_resume_key_exist() -> None:
    assert set(params.Train.model_fields) > train.NOT_IN_RESUME_KEY


@pytest.mark.slow
def test_the_first_loss_is_what_theory_says(trained: Path) -> None:
    """eta^2 mean((P^ - 1/2)^2), all pairs being one global batch."""
    folder = run_train(trained, "whole", {"train.global_batch": 20, "train.stop_epoch": 2, "eta": 1000})
    rows = tables.read(trained / "pairs.parquet", schemas.PAIRS).to_pandas()
    probabilities = pd.concat([rows["chosen_probability"], rows["rejected_probability"]])
    log = pd.read_csv(folder / "iter1.csv")
    assert log["loss"][0] == pytest.approx(1e6 * ((probabilities - 0.5) ** 2).mean(), rel=1e-4)
    assert log["loss"][1] == pytest.approx(log["loss"][0], rel=1e-6)  # linear warm-up starts with a learning rate of 0
    assert log["learning_rate"].tolist() == [0, pytest.approx(5e-5)]
    assert abs(log["chosen_log_ratio"][0]) < 1e-4


@pytest.mark.slow
def test_a_training_without_an_effective_step_is_refused_before_it_starts(trained: Path) -> None:
    line = fail_to_train(trained, "idle", {"train.global_batch": 20})
    assert_message(line, "train: error", "1 step", "train.warmup_ratio", "train.global_batch", "train.epochs")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [steps.Plan.max_grad_norm, 0])
def test_every_step_under_deepspeed_is_that_of_a_loop_written_by_hand(trained: Path, limit: float) -> None:
    """With clipping, which some steps need, and without. All pairs are one global batch."""
    rows = tables.read(trained / "pairs.parquet", schemas.PAIRS).to_pylist()
    plan = steps.Plan(max_grad_norm=limit or math.inf)
    overrides = {
        "eta": plan.eta,
        "train.global_batch": len(rows),
        "train.device_batch": len(rows) // 2,
        "train.learning_rate": plan.learning_rate,
        "train.epochs": plan.epochs,
        "train.stop_epoch": plan.steps,
        "train.warmup_ratio": plan.warmup / plan.epochs,
        "train.max_grad_norm": limit,
        "train.checkpoint_steps": 0,
    }
    folder = run_train(trained, f"by-hand-{limit}", overrides)
    records, model = steps.train_by_hand(trained / "base", rows, plan)
    assert {record["clipped"] for record in records} == ({0, 1} if limit else {0})
    log, expected = pd.read_csv(folder / "iter1.csv"), pd.DataFrame(records)
    for column in schemas.LOG_COLUMNS:
        tolerance = 5e-4 * max(expected[column].abs().max(), 1e-12)
        assert log[column].tolist() == pytest.approx(expected[column].tolist(), abs=tolerance), column
    trained_weights, state = load_file(folder / "iter1" / "model.safetensors"), model.state_dict()
    for name, weights in load_file(trained / "base" / "model.safetensors").items():
        update = (state[name] - weights).norm()
        assert (trained_weights[name] - state[name]).norm() < 0.02 * update, name


@pytest.mark.slow
def test_the_update_is_measured_by_every_process(trained: Path, trained_by_two: Path) -> None:
    """The share that survives in bfloat16, from two processes' shards, equals that of the two checkpoints in float32."""
    full = trained_by_two
    rounded = run_train(trained, "rounded", {"train.devices": 2, "train.checkpoint_dtype": "bfloat16"})
    names = load_file(trained / "base" / "model.safetensors").keys()
    before, after, kept = (
        torch.cat([load_file(path / "model.safetensors")[name].flatten() for name in names])
        for path in (trained / "base", full / "iter1", rounded / "iter1")
    )
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, after.bfloat16())
    left, update = kept.double() - before.bfloat16().double(), after.double() - before.double()
    shares = {"changed": (left != 0).double().mean(), "survived": left.dot(update) / update.dot(update)}
    changed = (after != before).double().mean().item()
    written = json.loads((rounded / "iter1.json").read_text())
    expected = {name: float(share) for name, share in shares.items()}
    assert {name: written[name] for name in shares} == pytest.approx(expected, rel=1e-5)
    assert 0 < written["changed"] < changed
    counts = {"steps": 2, "effective_steps": 1, "weights": len(before)}
    assert {name: written[name] for name in counts} == counts
    unrounded = json.loads((full / "iter1.json").read_text())
    assert (unrounded["changed"], unrounded["survived"]) == (pytest.approx(changed, rel=1e-5), 1)
    for folder, dtype in ((full, "float32"), (rounded, "bfloat16")):
        assert AutoConfig.from_pretrained(folder / "iter1").dtype == getattr(torch, dtype)


@pytest.mark.slow
def test_a_float32_checkpoint_of_a_bfloat16_training_keeps_the_master_weights(trained: Path) -> None:
    """What bfloat16 would lose is passed on: the next iteration starts from it and, at learning rate 1e-30, ends with it."""
    overrides = {"train.dtype": "bfloat16", "train.checkpoint_dtype": "float32", "train.warmup_ratio": 0}
    first = run_train(trained, "masters", overrides)
    weights = load_file(first / "iter1" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not torch.equal(weights["model.embed_tokens.weight"].bfloat16().float(), weights["model.embed_tokens.weight"])
    folder = trained / "again32"
    folder.mkdir()
    set_params(folder, TINY | overrides | {"train.learning_rate": 1e-30})
    start = ("--model", "../masters/iter1")
    options = ("--responses", "../responses.parquet", "--rankings", "../rankings.parquet", "--out", "pairs.parquet")
    for stage in (("reference", *start, *options), ("train", *start, "--pairs", "pairs.parquet", *OUT)):
        done = run_stage(folder, *stage)
        assert done.returncode == 0, done.stderr
    same = load_file(folder / "iter1" / "model.safetensors")
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    assert json.loads((folder / "iter1.json").read_text())["changed"] == 0


@pytest.mark.slow
def test_the_policy_is_a_trained_model_for_transformers(trained: Path) -> None:
    names = {path.name for path in (trained / "iter1").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    before, after = load_file(trained / "base" / "model.safetensors"), load_file(trained / "iter1" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert AutoModelForCausalLM.from_pretrained(trained / "iter1").num_parameters() > 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_a_generation_config_that_transformers_would_not_write_is_kept(trained: Path, rank: int) -> None:
    """And whoever may read the other files may read the weights."""
    folder = trained / f"generation-{rank}"
    shutil.copytree(trained / "base", folder / "start")
    edit_json(folder / "start" / "generation_config.json", do_sample=False, temperature=0.6)
    set_params(folder, TINY | {"train.lora.rank": rank})
    done = run_stage(folder, "train", "--model", "start", "--pairs", "../pairs.parquet", *OUT)
    assert done.returncode == 0, done.stderr
    written = [(path / "generation_config.json").read_bytes() for path in (folder / "start", folder / "iter1")]
    assert written[0] == written[1]
    assert len({file.stat().st_mode for file in (folder / "iter1").iterdir()}) == 1


@pytest.mark.slow
def test_the_same_global_batch_trains_the_same_policy(trained: Path, trained_by_two: Path) -> None:
    """Two accumulation steps, one, and two processes give the same losses and gradients up to the order of float additions.

    The pairs are dealt out differently. The first step has learning rate 0; the second's loss would tell other pairs apart.
    """
    accumulated = pd.read_csv(trained / "iter1.csv")
    for folder in (run_train(trained, "at-once", {"train.device_batch": 8}), trained_by_two):
        other = pd.read_csv(folder / "iter1.csv")
        assert accumulated["loss"].to_numpy() == pytest.approx(other["loss"].to_numpy(), rel=1e-5)
        assert accumulated["gradient_norm"].to_numpy() == pytest.approx(other["gradient_norm"].to_numpy(), rel=1e-5)


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(trained: Path) -> None:
    options = ("--out", "again", "--out-log", "again.csv", "--out-update", "again.json")
    done = run_stage(trained, "train", "--model", "base", "--pairs", "pairs.parquet", *options, **ALONE)
    assert done.returncode == 0, done.stderr
    assert files.digest(trained / "again") == files.digest(trained / "iter1")
    assert (trained / "again.csv").read_bytes() == (trained / "iter1.csv").read_bytes()
    assert (trained / "again.json").read_bytes() == (trained / "iter1.json").read_bytes()


def offload(pairs: Path, name: str, overrides: dict[str, Any]) -> tuple[Path, Path]:
    """Train without offloading and with it; return both folders."""
    without, with_it = (
        run_train(pairs, f"{name}-{where}", overrides | {"train.offload": where}) for where in ("none", "optimizer")
    )
    return without, with_it


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [{}, {"train.dtype": "bfloat16"}, {"train.lora.rank": 4}], ids=["float32", "bfloat16", "lora"]
)
def test_offloading_the_optimizer_gives_the_same_bytes_without_clipping(
    trained: Path, request: pytest.FixtureRequest, overrides: dict[str, Any]
) -> None:
    overrides = overrides | {"train.max_grad_norm": 0, "train.stop_epoch": 2}
    without, with_it = offload(trained, f"unclipped-{request.node.callspec.id}", overrides)
    for name in ("iter1", "iter1.csv", "iter1.json"):
        assert files.digest(with_it / name) == files.digest(without / name), name


@pytest.mark.slowest
def test_offloading_the_optimizer_clips_by_almost_the_same_norm(trained: Path) -> None:
    """DeepSpeed then sums the squared norms in another order, so that the updates differ by their last digits."""
    overrides = {"train.stop_epoch": 2, "train.devices": 2, "train.max_grad_norm": 1.0}
    without, with_it = offload(trained, "clipped", overrides)
    assert set(pd.read_csv(without / "iter1.csv")["clipped"]) == {1}
    start, plain, offloaded = (
        torch.cat([weights.flatten() for _, weights in sorted(load_file(path / "model.safetensors").items())])
        for path in (trained / "base", without / "iter1", with_it / "iter1")
    )
    assert (offloaded - plain).norm() < 1e-4 * (plain - start).norm()


@pytest.mark.slow
def test_bfloat16_and_gradient_checkpointing_train_too(trained: Path) -> None:
    overrides = {"train.dtype": "bfloat16", "train.checkpoint_dtype": "bfloat16", "train.gradient_checkpointing": True}
    folder = run_train(trained, "bfloat16", overrides)
    assert load_file(folder / "iter1" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert pd.read_csv(folder / "iter1.csv")["loss"][0] == pytest.approx(pd.read_csv(trained / "iter1.csv")["loss"][0], rel=0.1)


@pytest.mark.slow
def test_merged_adapters_change_only_the_linear_layers(trained: Path) -> None:
    folder = run_train(trained, "lora", {"train.lora.rank": 4, "train.loss": "dpo", "train.beta": 0.1})
    assert pd.read_csv(folder / "iter1.csv")["loss"][0] == pytest.approx(0.6931, rel=1e-3)
    before, after = load_file(trained / "base" / "model.safetensors"), load_file(folder / "iter1" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    update = json.loads((folder / "iter1.json").read_text())
    share = sum(int((before[name] != after[name]).sum()) for name in before) / sum(map(torch.numel, before.values()))
    assert (update["changed"], update["survived"]) == (pytest.approx(share, rel=1e-5), 1)
    assert changed == {name for name in before if name.endswith("_proj.weight")}


def run_fused(folder: Path, name: str, *options: str) -> None:
    """Run a stage as on a GPU, where train.attention has an effect."""
    done = run_module(
        folder, "support.fused_stage", name, "--model", "../base", *options, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_fused_attention_scores_and_trains_as_the_plain_one(trained: Path, trained_by_two: Path) -> None:
    """Under ZeRO-3, in two processes, up to rounding. Nothing about it is in the policy's configuration."""
    check_fused(trained, trained_by_two, {"train.devices": 2})


@pytest.mark.slowest
def test_the_fused_attention_trains_an_adapter_as_the_plain_one(trained: Path) -> None:
    overrides = {"train.lora.rank": 4, "train.gradient_checkpointing": True}
    check_fused(trained, run_train(trained, "plain-adapter", overrides), overrides)


def check_fused(trained: Path, plain: Path, overrides: dict[str, Any]) -> None:
    """Compare a training with fused attention with that in the folder `plain`."""
    fused = plain.with_name(f"{plain.name}-fused")
    fused.mkdir()
    set_params(fused, TINY | overrides | {"train.attention": "fused", "train.devices": 1})
    tables_of = ("--responses", "../responses.parquet", "--rankings", "../rankings.parquet")
    run_fused(fused, "reference", *tables_of, "--out", "pairs.parquet")
    ours, expected = (tables.read(folder / "pairs.parquet", schemas.PAIRS) for folder in (fused, trained))
    for column in schemas.REFERENCE_LOGPS:
        assert ours[column].to_pylist() == pytest.approx(expected[column].to_pylist(), rel=1e-5)
    set_params(fused, TINY | overrides | {"train.attention": "fused"})
    run_fused(fused, "train", "--pairs", "pairs.parquet", *OUT)
    logs = [pd.read_csv(folder / "iter1.csv") for folder in (fused, plain)]
    for column in ("loss", "gradient_norm"):
        assert logs[0][column].to_numpy() == pytest.approx(logs[1][column].to_numpy(), rel=1e-4)
    assert len({(folder / "iter1" / "config.json").read_bytes() for folder in (fused, plain)}) == 1


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
        (3e38, 1, ("step 2", "weights are not finite"), 1),
        pytest.param(3e38, 2, ("step 2", "weights are not finite"), 1, marks=pytest.mark.slowest),
    ],
)
def test_numbers_that_are_not_finite_stop_training_before_they_are_saved(
    pairs: Path, rate: float, devices: int, problems: tuple[str, str], kept: int
) -> None:
    """The first step has learning rate 0, the second half of the full rate."""
    overrides = {"train.learning_rate": rate, "train.devices": devices, "train.stop_epoch": 3, "train.checkpoint_steps": 1}
    folder = pairs / f"rate{rate}-{devices}"
    line = fail_to_train(pairs, folder.name, overrides)
    (checkpoint,) = folder.glob("scratch/train/*/checkpoint-*")
    assert checkpoint.name == f"checkpoint-{kept}"
    where = str(checkpoint.relative_to(folder))
    assert_message(line, "train: error", *problems, "lower train.learning_rate or eta", where)

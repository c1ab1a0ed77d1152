"""Train pi_t+1 from pi_t on chosen and rejected responses, with the squared loss of eq. 4.7 or a baseline's loss.

The learning-rate schedule spans train.epochs; training stops at train.stop_epoch, like the published models' "6 epochs, stop
at 1". The global batch consists of the same pairs in the same order on any number of devices.
"""

import argparse
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from stages.artifacts import files, models, pointers, schemas, tables
from stages.engines import checkpoints, distributed, training
from stages.method import seeding
from stages.runtime import params, scratch
from stages.runtime.devices import is_main_process
from stages.runtime.errors import StageError
from stages.runtime.logs import log

NOT_IN_RESUME_KEY = {"checkpoint_steps", "nodes", "report_to"}
"""Keys of `train` that do not affect the result. They are left out of the scratch folder's key, so that interrupted training
resumes from its checkpoint even if they change."""


WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Names of the files in a policy's folder that hold its weights."""


class Outputs(NamedTuple):
    """The paths that training writes."""

    policy: Path
    """A transformers checkpoint."""
    log: Path
    """CSV of schemas.LOG_COLUMNS."""
    update: Path
    """JSON of schemas.UPDATE_KEYS."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="the policy pi_t")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs with their reference log-probabilities")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: the policy pi_t+1")
    parser.add_argument("--out-log", type=Path, required=True, help="CSV to write: the training log")
    parser.add_argument("--out-update", type=Path, required=True, help="JSON to write: steps, and how much they changed")


def main(args: argparse.Namespace) -> None:
    loaded = params.load("seed", "eta", "train")
    work = partial(run, args, loaded.train, loaded.eta, loaded.seed)
    distributed.launch(loaded.train.devices, {"model": args.model, "pairs": args.pairs}, work, loaded.train.nodes)


def run(args: argparse.Namespace, settings: params.Train, eta: float, seed: int, group: distributed.Group) -> None:
    """Train in one process of the group, resuming from a checkpoint if there is one."""
    key = {**group.digests, "eta": eta, "train": settings.model_dump(exclude=NOT_IN_RESUME_KEY), "seed": seed}
    folder = scratch.folder("train", key)
    pairs = select_whole_batches(tables.read(args.pairs, schemas.PAIRS), settings.global_batch)
    check_schedule(len(pairs), settings)
    training.check_tracker(settings.report_to)
    training.quiet_libraries()
    if is_main_process():
        models.check_policy(args.model)
        refuse_foreign(args.out, models.rehearse_saving(args.model))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(scratch.FOLDER / "tensorboard" / args.out.name))
    distributed.start_group(group)
    seeding.make_deterministic(seed)
    train_policy(pairs, args.model, eta, settings, seed, folder, Outputs(args.out, args.out_log, args.out_update))


def refuse_foreign(out: Path, description: list[str]) -> None:
    """Raise StageError, before days of training, for what is in the folder `out` and no part of a policy.

    description: the names of its files besides the weights.
    """
    files.refuse_foreign(out, lambda name: name in description or bool(WEIGHTS.fullmatch(name)))


def select_whole_batches(pairs: pa.Table, global_batch: int) -> pa.Table:
    """Drop the pairs beyond the last whole global batch: how they are batched would depend on the number of devices.

    Raises StageError if there are fewer pairs than one global batch.
    """
    steps = len(pairs) // global_batch
    if not steps:
        raise StageError(
            f"{len(pairs)} pairs are fewer than one global batch of {global_batch}: lower train.global_batch, or train on more "
            "prompts"
        )
    selected = pairs.slice(0, steps * global_batch)
    dropped = len(pairs) - len(selected)
    log.info("%d pairs, %d steps per epoch; %d pairs beyond the last whole batch dropped", len(selected), steps, dropped)
    return selected


def check_schedule(pairs: int, settings: params.Train) -> None:
    """Warn about steps whose learning rate is 0, which train nothing. Raises StageError if there is no other step.

    pairs: their number, a multiple of train.global_batch. Linear warm-up, if any, starts at 0 with the first step; the decay
    would reach 0 just after the last step.
    """
    steps = math.ceil(settings.stop_epoch * (pairs // settings.global_batch))
    idle = int(settings.warmup_ratio > 0)
    if steps == idle:
        raise StageError(
            f"training has {steps} step, and linear warm-up starts with a learning rate of 0, so it would train nothing: set "
            "train.warmup_ratio to 0, lower train.global_batch, or raise train.stop_epoch and train.epochs"
        )
    if idle and is_main_process():
        log.warning(
            "the learning rate of the first of %d steps is 0 (train.warmup_ratio): its %d pairs train nothing",
            steps,
            settings.global_batch,
        )


def train_policy(
    pairs: pa.Table, model_path: Path, eta: float, settings: params.Train, seed: int, folder: Path, outputs: Outputs
) -> None:
    """Train on a table of schemas.PAIRS and write the outputs.

    Call this within the distributed group, with the seed set. folder: for checkpoints; training resumes from its newest one.
    Raises StageError if the first loss is not as expected, or if a metric or a weight is not finite.
    """
    from stages.engines import updates
    from stages.engines.trainer import SPPOTrainer

    arguments = policy_arguments(settings, seed, folder, run_name=outputs.policy.name)
    model = training.load_scored_policy(model_path, settings.dtype, settings.attention)
    first = None
    if settings.lora.rank:
        model = training.add_adapters(model, settings.lora)
    else:
        first = training.load_start(model_path, model, arguments, settings.dtype)
    trainer = SPPOTrainer(model, arguments, settings, eta, to_dataset(pairs), first)
    start = checkpoints.find_start(folder)
    if start:
        log.info("resuming from %s", start)
    trainer.train(resume_from_checkpoint=start and str(start))
    # All processes take part in gathering the weights and in measuring their update; the main one gets them.
    masters = settings.dtype == "bfloat16" and (settings.checkpoint_dtype == "float32" or settings.lora.rank > 0)
    weights = training.gather_weights(trainer, masters=masters)
    sums = None
    if first is not None:
        sums = updates.measure_shards(model, first, settings.checkpoint_dtype)
        sums = trainer.accelerator.reduce(sums.to(trainer.accelerator.device), "sum")  # offloaded weights are on the host
    if is_main_process():
        write_results(trainer, weights, sums, model_path, outputs)


def policy_arguments(settings: params.Train, seed: int, folder: Path, run_name: str) -> Any:
    """Return TrainingArguments with RMSProp, a linear schedule after warm-up, and logging at every step."""
    return training.training_arguments(
        folder,
        settings.device_batch,
        settings.dtype,
        seed,
        accumulation=training.accumulation_steps(settings.global_batch, settings.device_batch, settings.devices),
        max_grad_norm=settings.max_grad_norm,
        offload=settings.offload,
        checkpoint_steps=settings.checkpoint_steps,
        optim="rmsprop",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,  # transformers takes a value below 1 as a fraction of the schedule
        num_train_epochs=settings.stop_epoch,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        report_to=settings.report_to,
        run_name=run_name,
        logging_nan_inf_filter=False,
    )


def to_dataset(table: pa.Table) -> Any:
    """Wrap a table as the dataset that Trainer takes. Rows are converted when they are accessed."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table), fingerprint="")  # not used; the default is a slow hash of all rows


def write_results(trainer: Any, weights: dict[str, Any], sums: Any, model_path: Path, outputs: Outputs) -> None:
    """Write a trained policy, with the tokenizer of the model at `model_path`, the training log and the update's summary.

    trainer: an SPPOTrainer. weights: the state dict of its model, gathered from all processes. sums: from
    `updates.compare_weights` over all weights; None if adapters were trained, which are merged and measured here.
    """
    import pandas as pd
    import torch

    from stages.engines import updates

    settings, source = trainer.settings, pointers.resolve(model_path)
    records = [record for record in trainer.state.log_history if "kl" in record]
    log.info("loss %.4g at the first step, %.4g at the last", records[0]["loss"], records[-1]["loss"])
    with files.replacing(outputs.policy) as partial_policy, files.replacing(outputs.log) as partial_log:
        if settings.lora.rank:
            adapted = training.load_adapters(model_path, settings.lora, weights)
            sums = updates.measure_adapters(adapted, settings.checkpoint_dtype)
            model = adapted.merge_and_unload().to(getattr(torch, settings.checkpoint_dtype))
            weights = model.state_dict()
        else:
            model = trainer.accelerator.unwrap_model(trainer.model)
            weights = training.convert_weights(weights, settings.checkpoint_dtype)
        models.save_policy(model, weights, settings.checkpoint_dtype, source, partial_policy)
        pd.DataFrame(records, columns=schemas.LOG_COLUMNS).to_csv(partial_log, index=False, float_format="%.6g")
    effective = sum(record["learning_rate"] > 0 for record in records)
    update = {"steps": len(records), "effective_steps": effective, **updates.summarize(sums)}
    log.info("%(effective_steps)d of %(steps)d steps had a learning rate above 0", update)
    log.info(
        "%.4g of the weights changed; %.4g of the update survives in the checkpoint", update["changed"], update["survived"]
    )
    files.write_json(update, outputs.update)

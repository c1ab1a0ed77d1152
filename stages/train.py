"""Train pi_t+1 from pi_t on chosen and rejected responses, with the squared loss of eq. 4.7 or a baseline's loss.

The learning-rate schedule spans train.epochs; training stops at train.stop_epoch, like the published models' "6 epochs, stop
at 1". The global batch consists of the same pairs in the same order on any number of devices.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import files, pointers, schemas, tables
from stages.engines import checkpoints, distributed, training
from stages.method import packing, seeding
from stages.runtime import params, scratch
from stages.runtime.devices import is_main_process
from stages.runtime.errors import StageError
from stages.runtime.logs import log

NOT_IN_RESUME_KEY = {"checkpoint_steps", "report_to"}
"""Keys of `train` that do not affect the result. They are left out of the scratch folder's key, so that interrupted training
resumes from its checkpoint even if they change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="the policy pi_t")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs with their reference log-probabilities")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: the policy pi_t+1")
    parser.add_argument("--out-log", type=Path, required=True, help="CSV to write: the training log")


def main(args: argparse.Namespace) -> None:
    loaded = params.load("seed", "eta", "train")
    work = partial(run, args, loaded.train, loaded.eta, loaded.seed)
    distributed.launch(loaded.train.devices, {"model": args.model, "pairs": args.pairs}, work)


def run(args: argparse.Namespace, settings: params.Train, eta: float, seed: int, group: distributed.Group) -> None:
    """Train in one process of the group, resuming from a checkpoint if there is one."""
    key = {**group.digests, "eta": eta, "train": settings.model_dump(exclude=NOT_IN_RESUME_KEY), "seed": seed}
    folder = scratch.folder("train", key)
    pairs = select_whole_batches(tables.read(args.pairs, schemas.PAIRS), settings.global_batch)
    training.check_tracker(settings.report_to)
    training.quiet_libraries()
    distributed.start_group(group)
    seeding.make_deterministic(seed)
    train_policy(pairs, args.model, eta, settings, seed, folder, args.out, args.out_log)


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


def train_policy(
    pairs: pa.Table,
    model_path: Path,
    eta: float,
    settings: params.Train,
    seed: int,
    folder: Path,
    out: Path,
    out_log: Path,
) -> None:
    """Train on a table of schemas.PAIRS; write the new policy as a transformers checkpoint and the training log as CSV.

    Call this within the distributed group, with the seed set. folder: for checkpoints; training resumes from its newest one.
    Raises StageError if the first loss is not as expected, or if a metric or a weight is not finite.
    """
    from stages.engines.trainer import SPPOTrainer

    arguments = policy_arguments(settings, seed, folder, run_name=out.name)
    model = packing.enable_scoring(training.load_policy(model_path, settings.dtype))
    if settings.lora.rank:
        model = training.add_adapters(model, settings.lora)
    trainer = SPPOTrainer(model, arguments, settings, eta, train_dataset=to_dataset(pairs))
    start = checkpoints.newest_checkpoint(folder)
    if start:
        log.info("resuming from %s", start)
    trainer.train(resume_from_checkpoint=start and str(start))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes take part, the main one gets them
    if is_main_process():
        write_results(trainer, weights, model_path, out, out_log)


def policy_arguments(settings: params.Train, seed: int, folder: Path, run_name: str) -> Any:
    """Return TrainingArguments with RMSProp, a linear schedule after warm-up, and logging at every step."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(scratch.FOLDER / "tensorboard" / run_name))
    return training.training_arguments(
        folder,
        settings.device_batch,
        settings.dtype,
        seed,
        accumulation=training.accumulation_steps(settings.global_batch, settings.device_batch, settings.devices),
        max_grad_norm=settings.max_grad_norm,
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


def write_results(trainer: Any, weights: dict[str, Any], model_path: Path, out: Path, out_log: Path) -> None:
    """Write a trained policy, with the tokenizer of the model at `model_path`, and the training log.

    trainer: an SPPOTrainer. weights: the state dict of its model, gathered from all processes.
    """
    import pandas as pd
    from transformers import AutoTokenizer

    settings = trainer.settings
    records = [record for record in trainer.state.log_history if "kl" in record]
    log.info("loss %.4g at the first step, %.4g at the last", records[0]["loss"], records[-1]["loss"])
    with files.replacing(out) as partial_out, files.replacing(out_log) as partial_log:
        if settings.lora.rank:
            training.merge_adapters(model_path, settings.dtype, settings.lora, weights).save_pretrained(partial_out)
        else:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(partial_out, state_dict=weights)
        AutoTokenizer.from_pretrained(pointers.resolve(model_path), trust_remote_code=False).save_pretrained(partial_out)
        pd.DataFrame(records, columns=schemas.LOG_COLUMNS).to_csv(partial_log, index=False, float_format="%.6g")

"""One iteration: from pi_t to pi_t+1 by the squared loss of eq. 4.7 on winners and losers, or by a baseline's loss.

The learning-rate schedule spans train.epochs, training stops at train.stop_epoch: the published models' "6 epochs, stop
at 1". The global batch is the same pairs in the same order on any number of devices.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import cli, files, params, pointers, policy, schemas, scratch, sppo
from stages.cli import StageError

CANNOT_CHANGE_RESULTS = {"checkpoint_steps", "report_to"}
"""Of the parameters in `train`."""

WHOLE = "whole"
"""The last file of a checkpoint: names and sizes of the others."""


def train(
    pairs: pa.Table,
    model_path: Path,
    eta: float,
    settings: params.Train,
    seed: int,
    folder: Path,
    out: Path,
    log: Path,
) -> None:
    """Train on a table of schemas.PAIRS; write the new policy as a transformers checkpoint and the training log as CSV.

    folder: of the checkpoints on the way; training goes on from the one that is there.
    Raises StageError where there are fewer pairs than one global batch, where the first loss is not what it must be, or
    where a loss, a gradient or a weight is not finite.
    """
    import pandas as pd
    import torch
    from transformers import AutoTokenizer, PrinterCallback, Trainer

    count = len(pairs)
    steps = count // settings.global_batch
    if not steps:
        raise StageError(f"{count} pairs are less than one global batch: lower train.global_batch {settings.global_batch}")
    kept = pairs.slice(0, steps * settings.global_batch)  # whole batches, else the last would depend on the number of devices
    cli.log.info(
        "%d pairs, %d steps an epoch; %d pairs beyond the last whole batch left out", len(kept), steps, count - len(kept)
    )
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(scratch.FOLDER / "tensorboard" / out.name))
    arguments = policy.trainer_arguments(
        folder,
        settings.devices,
        settings.device_batch,
        settings.dtype,
        seed,
        accumulation=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        checkpoint_steps=settings.checkpoint_steps,
        optim="rmsprop",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,  # below 1 it is a ratio of the schedule
        num_train_epochs=settings.stop_epoch,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        report_to=settings.report_to,
        run_name=out.name,
        logging_nan_inf_filter=False,
    )
    model = policy.scoring(policy.load(model_path, settings.dtype))
    if settings.lora.rank:
        model = adapted(model, settings.lora)

    class SPPOTrainer(Trainer):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs, not over tokens
            self.batch_metrics: list[torch.Tensor] = []

        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs  # on their device already; Trainer would round reference log-probabilities to bfloat16

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            return super().create_scheduler(round(num_training_steps * settings.epochs / settings.stop_epoch), optimizer)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            logps = policy.batch_logps(model, inputs)
            reference, probabilities = inputs["reference_logps"], inputs["probabilities"]
            loss = sppo.loss(settings.loss, logps, reference, probabilities, eta, settings.beta)
            ratios = (logps - reference).detach()
            if not self.state.global_step:
                start = sppo.loss(settings.loss, reference, reference, probabilities, eta, settings.beta)
                check_start(loss, start, ratios, reference, policy.TOLERANCE[settings.dtype])
            chosen, rejected = ratios.chunk(2)
            kl = ratios.square().mean() / 2
            self.batch_metrics.append(torch.stack([loss.detach(), chosen.mean(), rejected.mean(), kl]))
            return (loss, None) if return_outputs else loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                metrics = torch.stack(self.batch_metrics).mean(0)
                self.batch_metrics.clear()
                sound = metrics.new_tensor([float(finite(self.model))])
                *means, sound_everywhere = self.accelerator.reduce(torch.cat([metrics, sound]), "mean").tolist()
                norm = float(logs["grad_norm"])
                clipped = int(0 < settings.max_grad_norm < norm)
                values = [self.state.global_step, means[0], logs["learning_rate"], norm, clipped, *means[1:]]
                record = dict(zip(schemas.LOG_COLUMNS, values, strict=True))
                check_step(record, sound_everywhere == 1, folder)
                logs = logs | record
            super().log(logs, start_time)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            """Nothing: of a checkpoint DeepSpeed's part holds the weights, and the policy is written at the end."""

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            if self.state.global_step == self.state.max_steps:
                return  # the policy itself comes next
            path = folder / f"checkpoint-{self.state.global_step}"
            if cli.is_main():
                files.remove(path)  # a killed process' half
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if cli.is_main():
                (path / WHOLE).write_text(listing(path))
                for old in set(folder.glob("checkpoint-*")) - {path}:
                    files.remove(old)

    trainer = SPPOTrainer(model=model, args=arguments, data_collator=policy.collate, train_dataset=rows(kept))
    trainer.remove_callback(PrinterCallback)  # the log is a file
    start = newest_checkpoint(folder)
    if start:
        cli.log.info("going on from %s", start)
    trainer.train(resume_from_checkpoint=start and str(start))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every process takes part, the first one gets it
    if cli.is_main():
        records = [line for line in trainer.state.log_history if "kl" in line]
        cli.log.info("loss %.4g at the first step, %.4g at the last", records[0]["loss"], records[-1]["loss"])
        with files.replacing(out) as partial, files.replacing(log) as partial_log:
            if settings.lora.rank:
                merged(model_path, settings, weights).save_pretrained(partial)
            else:
                trainer.accelerator.unwrap_model(trainer.model).save_pretrained(partial, state_dict=weights)
            AutoTokenizer.from_pretrained(pointers.resolve(model_path), trust_remote_code=False).save_pretrained(partial)
            pd.DataFrame(records, columns=schemas.LOG_COLUMNS).to_csv(partial_log, index=False, float_format="%.6g")


def rows(table: pa.Table) -> Any:
    """The table's rows as Trainer takes them, by their number: each is made when it is asked for."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table), fingerprint="")  # unused, and else the hash of all rows


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest of the folder's checkpoints that are whole, written to the end and unharmed."""
    found = [
        path for path in folder.glob("checkpoint-*") if (path / WHOLE).exists() and (path / WHOLE).read_text() == listing(path)
    ]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def listing(folder: Path) -> str:
    """Size and name of all files in the folder but WHOLE, a line each."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != WHOLE)
    return "".join(f"{path.stat().st_size} {path.relative_to(folder)}\n" for path in found)


def check_start(loss: Any, expected: Any, ratios: Any, reference_logps: Any, tolerance: float) -> None:
    """Raise StageError where the first loss is not the one of a policy that is its own reference, but for rounding.

    For SPPO that is eta^2 mean((P^ - 1/2)^2). What is compared are the log-ratios it is made of, (2B,), which must be 0:
    where P^ is large against them, or all of it near a half, the loss itself would show too little or too much.
    """
    off, size = ratios.abs().mean().item(), reference_logps.abs().mean().item()
    if not off <= tolerance * size:
        raise StageError(
            f"the first loss is {loss.item():.4g} and must be {expected.item():.4g}: before any step the policy is {off:.3g} "
            f"nats of {size:.3g} a response off the reference. The pairs are of another model, template or truncation: run "
            "reference again"
        )


def check_step(record: dict[str, float], finite_weights: bool, folder: Path) -> None:
    """Raise StageError where a number of a step's LOG_COLUMNS or a weight after it is not finite, before it is saved anywhere.

    An infinite gradient norm stands for NaN too: DeepSpeed leaves such a step's update out and goes on.
    """
    wrong = [f"{name} is {value}" for name, value in record.items() if not math.isfinite(value)]
    wrong += [] if finite_weights else ["weights are not finite after it"]
    if wrong:
        checkpoint = newest_checkpoint(folder)
        raise StageError(
            f"step {record['step']}: {', '.join(wrong)}: lower train.learning_rate or eta; "
            + (f"{checkpoint} is the last checkpoint before it" if checkpoint else "there is no checkpoint before it")
        )


def finite(model: Any) -> bool:
    """Whether all weights are finite in the parts that ZeRO-3 has given this process."""
    import torch

    rank = torch.distributed.get_rank()
    parts = ((weights.ds_tensor.flatten(), weights.ds_numel) for weights in model.parameters())
    # what the last part has beyond the weights' end is anything
    return all(bool(part[: max(0, numel - rank * part.numel())].isfinite().all()) for part, numel in parts)


def adapted(model: Any, lora: params.Lora) -> Any:
    """The model with LoRA adapters on all its linear layers, all else frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def merged(model_path: Path, settings: params.Train, weights: dict[str, Any]) -> Any:
    """The model at `model_path` with the adapters in `weights` (an adapted model's) merged into it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else the model would be loaded in ZeRO-3's parts, which the other processes hold
    model = adapted(policy.load(model_path, settings.dtype), settings.lora)
    model.load_state_dict(weights)
    return model.merge_and_unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the policy pi_t")
    parser.add_argument("pairs", type=Path, help="pairs with reference log-probabilities")
    parser.add_argument("out", type=Path, help="folder of the policy pi_t+1")
    parser.add_argument("log", type=Path, help="CSV of the training log")
    args = parser.parse_args()
    wanted = params.load("seed", "eta", "train")

    def run(digests: dict[str, str]) -> None:
        key = digests | {
            "eta": wanted.eta,
            "train": wanted.train.model_dump(exclude=CANNOT_CHANGE_RESULTS),
            "seed": wanted.seed,
        }
        folder = scratch.folder("train", key)
        pairs = files.read_table(args.pairs, schemas.PAIRS)
        train(pairs, args.model, wanted.eta, wanted.train, wanted.seed, folder, args.out, args.log)

    policy.launch(wanted.train.devices, {"model": args.model, "pairs": args.pairs}, run)


if __name__ == "__main__":
    cli.run(main)

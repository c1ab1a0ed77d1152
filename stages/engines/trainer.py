"""Subclasses of transformers.Trainer: LogpsScorer for the reference, SPPOTrainer for training.

Stages import this module only once there is something to compute: loading transformers' Trainer takes seconds.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from stages.artifacts import files, schemas
from stages.engines import checkpoints
from stages.method import attention, dealing, packing, sppo
from stages.runtime import params
from stages.runtime.devices import is_main_process
from stages.runtime.errors import StageError


class PackedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for packed batches of pairs."""

    def __init__(self, model: Any, args: Any, **more: Any) -> None:
        """Prepare. model: after `enable_scoring`. Raises StageError if its fused attention computes wrong numbers."""
        self.fused = attention.is_fused(model)
        if self.fused:
            attention.check_kernel(model, args.device)
        super().__init__(model=model, args=args, data_collator=partial(packing.collate, one_row=self.fused), **more)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Return the batch as is: it is already on its device. Trainer would cast its floats, P^ and logps, to bfloat16."""
        return inputs


class LogpsScorer(PackedTrainer):
    """Predicts the log-probabilities of pairs: (N, 2) float32, in nats, chosen and rejected, for N rows.

    longest: the pair with the longest text, on which the first batch checks that packing supports the model.
    dtype: the model's.
    """

    def __init__(self, model: Any, args: Any, longest: dict[str, Any], dtype: params.Precision) -> None:
        super().__init__(model, args)
        self.longest, self.dtype = longest, dtype
        self.checked = False
        self.remove_callback(ProgressCallback)  # the stage shows one bar for all shards

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Score one batch. Raises StageError if packing does not support the model."""
        with torch.no_grad():
            if not self.checked:
                packing.check_packing(model, self.longest, self.dtype)
                self.checked = True
            logps = packing.batch_logps(model, inputs)
        return None, torch.stack(logps.chunk(2), 1), None


class DealtSampler(torch.utils.data.Sampler[int]):
    """The pairs of an epoch, one global batch after the other, each dealt out to accumulation steps and devices.

    Which pairs a global batch has depends on the shuffled order only, and so does the loss of a step, because all its batches
    have the same number of pairs. torch's loader cuts the order into batches, and accelerate gives them to the devices in turn.
    """

    def __init__(
        self, shuffled: Any, sizes: list[int], settings: params.Train, count: dealing.Count, get_step: Callable[[], int]
    ) -> None:
        """Prepare to sample.

        shuffled: a SeedableRandomSampler of the same pairs. sizes: tokens of each pair, a multiple of settings.global_batch of
        them. count: the measure by which batches are made equal. get_step: returns the steps taken so far. The epoch follows
        from them, also after a resume: accelerate's samplers that skip batches do not pass the epoch on if there are several
        processes.
        """
        self.shuffled, self.sizes, self.settings = shuffled, sizes, settings
        self.count, self.get_step = count, get_step

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        size, devices, device_batch = self.settings.global_batch, self.settings.devices, self.settings.device_batch
        self.shuffled.set_epoch(self.get_step() // (len(self.sizes) // size))
        order = list(self.shuffled)
        for start in range(0, len(order), size):
            pairs = order[start : start + size]
            for batch in dealing.deal_out([self.sizes[pair] for pair in pairs], devices, device_batch, self.count):
                yield from (pairs[index] for index in batch)


class StartCallback(TrainerCallback):  # type: ignore[misc]
    """Sets the float32 master weights before the first step, unless training resumes from a checkpoint that holds them."""

    def __init__(self, start: list[torch.Tensor]) -> None:
        self.start = start

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Set each weight's shard in this process, in the order of the model's parameters."""
        from deepspeed.utils import safe_set_local_fp32_param

        if not state.global_step:
            for weights, shard in zip(model.parameters(), self.start, strict=True):
                safe_set_local_fp32_param(weights, shard)


class SPPOTrainer(PackedTrainer):
    """Trains a policy on pairs with the loss that `settings` names; logs schemas.LOG_COLUMNS and checks them at every step.

    Checkpoints in args.output_dir hold DeepSpeed's state, which includes the weights; the policy itself is written at the end
    by the stage.
    """

    def __init__(
        self, model: Any, args: Any, settings: params.Train, eta: float, train_dataset: Any, start: list[torch.Tensor] | None
    ) -> None:
        """Prepare the training. start: this process's shards of the master weights; None: let DeepSpeed copy the model's."""
        super().__init__(model, args, train_dataset=train_dataset)
        self.settings, self.eta = settings, eta
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs, not over tokens
        self.batch_metrics: list[torch.Tensor] = []
        self.remove_callback(PrinterCallback)  # the log is written to a file
        if start:
            self.add_callback(StartCallback(start))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Deal each global batch out by the pairs' lengths. Its pairs are those that Trainer would take by itself."""
        columns = [self.train_dataset.data.column(f"{text}_token_ids") for text in packing.TEXTS]
        sizes = sum(pc.list_value_length(column).to_numpy() for column in columns).tolist()
        count: dealing.Count = sum if self.fused else dealing.count_positions
        shuffled = SeedableRandomSampler(self.train_dataset)
        return DealtSampler(shuffled, sizes, self.settings, count, lambda: self.state.global_step)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Span the learning-rate schedule over settings.epochs; training stops at settings.stop_epoch."""
        steps = round(num_training_steps * self.settings.epochs / self.settings.stop_epoch)
        return super().create_scheduler(steps, optimizer)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Compute the loss of one batch and collect its metrics. Raises StageError as `check_start` does."""
        logps, reference = packing.batch_logps(model, inputs), inputs["reference_logps"]
        loss = self._loss(logps, inputs)
        ratios = (logps - reference).detach()
        if not self.state.global_step:
            tolerance = packing.mean_tolerance(reference, inputs["lengths"], self.settings.dtype)
            check_start(loss, self._loss(reference, inputs), ratios, reference, tolerance)
        chosen, rejected = ratios.chunk(2)
        kl = ratios.square().mean() / 2
        self.batch_metrics.append(torch.stack([loss.detach(), chosen.mean(), rejected.mean(), kl]))
        return (loss, None) if return_outputs else loss

    def _loss(self, logps: torch.Tensor, inputs: Any) -> torch.Tensor:
        settings = self.settings
        return sppo.loss(settings.loss, logps, inputs["reference_logps"], inputs["probabilities"], self.eta, settings.beta)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step, with means over its global batch. Raises StageError as `check_step` does."""
        if "loss" in logs:
            logs = logs | self._step_record(logs)
        super().log(logs, start_time)

    def _step_record(self, logs: dict[str, float]) -> dict[str, float]:
        """Return a checked record of LOG_COLUMNS, averaged over all processes, and start collecting the next step's metrics."""
        metrics = torch.stack(self.batch_metrics).mean(0)
        self.batch_metrics.clear()
        finite = metrics.new_tensor([float(has_finite_weights(self.model))])
        loss, *means, finite_everywhere = self.accelerator.reduce(torch.cat([metrics, finite]), "mean").tolist()
        norm = float(logs["grad_norm"])
        clipped = int(0 < self.settings.max_grad_norm < norm)
        values = [self.state.global_step, loss, logs["learning_rate"], norm, clipped, *means]
        record = dict(zip(schemas.LOG_COLUMNS, values, strict=True))
        check_step(record, finite_everywhere == 1, Path(self.args.output_dir))
        return record

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Do nothing: DeepSpeed's part of a checkpoint holds the weights."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step == self.state.max_steps:
            return  # the stage writes the policy next
        path = checkpoints.checkpoint_path(Path(self.args.output_dir), self.state.global_step)
        if is_main_process():
            files.remove(path)  # an incomplete checkpoint, left by a killed process
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        checkpoints.mark_complete(path)


def check_start(
    loss: torch.Tensor, expected: torch.Tensor, ratios: torch.Tensor, reference_logps: torch.Tensor, tolerance: float
) -> None:
    """Check that the first loss is that of a policy equal to its reference, up to rounding; raise StageError if it is not.

    For SPPO that loss is eta^2 mean((P^ - 1/2)^2). The check compares the log-ratios in it, which must be 0, rather than the
    loss: if eta (P^ - 1/2) is large compared with them, or close to 0, the loss would hide a difference or exaggerate it.
    loss, expected: scalars, for the message. ratios, reference_logps: (2B,), in nats. tolerance: of the ratios' mean magnitude,
    in nats.
    """
    difference, size = ratios.abs().mean().item(), reference_logps.abs().mean().item()
    if not difference <= tolerance:
        raise StageError(
            f"the first loss is {loss.item():.4g} but must be {expected.item():.4g}: before any step, the policy's "
            f"log-probabilities differ from the reference's by {difference:.3g} nats per response (mean magnitude {size:.3g}). "
            "The pairs are from another model, chat template or truncation: re-run reference"
        )


def check_step(record: dict[str, float], finite_weights: bool, folder: Path) -> None:
    """Raise StageError if a metric of a step (LOG_COLUMNS) or a weight after it is not finite, before anything is saved.

    An infinite gradient norm may also stand for NaN: DeepSpeed skips the update of such a step and continues.
    folder: holds the checkpoints, for the message.
    """
    problems = [f"{name} is {value}" for name, value in record.items() if not math.isfinite(value)]
    problems += [] if finite_weights else ["weights are not finite after this step"]
    if problems:
        checkpoint = checkpoints.newest_checkpoint(folder)
        raise StageError(
            f"step {record['step']}: {', '.join(problems)}: lower train.learning_rate or eta "
            + (f"(last checkpoint before it: {checkpoint})" if checkpoint else "(no checkpoint before it)")
        )


def has_finite_weights(model: Any) -> bool:
    """Return whether all weights in this process's ZeRO-3 shards are finite."""
    rank = torch.distributed.get_rank()
    shards = ((weights.ds_tensor.flatten(), weights.ds_numel) for weights in model.parameters())
    # The last shard is padded with arbitrary values beyond the weights' end.
    return all(bool(shard[: max(0, size - rank * shard.numel())].isfinite().all()) for shard, size in shards)

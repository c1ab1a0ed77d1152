"""One iteration of SPPO: from pi_t to pi_t+1 by the squared loss of eq. 4.7 on winners and losers.

The learning-rate schedule spans train.epochs, training stops at train.stop_epoch: the published models' "6 epochs, stop
at 1". The global batch is the same pairs in the same order on any number of devices.
"""

import argparse
from pathlib import Path
from typing import Any

from stages import cli, files, params, policy, sppo
from stages.cli import StageError

LOG_COLUMNS = [
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "clipped",
    "chosen_log_ratio",
    "rejected_log_ratio",
]
"""training log: mean over the step's global batch, log-ratios log pi_theta/pi_t in nats; gradient norm before
clipping, clipped: 1 where it was above train.max_grad_norm."""


def train(
    rows: list[dict[str, Any]], model_path: Path, eta: float, settings: params.Train, seed: int, out: Path, log: Path
) -> None:
    """Train on rows of files.PAIRS; write the new policy as a transformers checkpoint and the training log as CSV.

    Raises StageError where there are fewer pairs than one global batch.
    """
    import pandas as pd
    import torch
    from transformers import PrinterCallback, Trainer

    steps = len(rows) // settings.global_batch
    if not steps:
        raise StageError(f"{len(rows)} pairs are less than one global batch: lower train.global_batch {settings.global_batch}")
    kept = rows[: steps * settings.global_batch]  # only whole batches, else the last would depend on the number of devices
    cli.log.info(
        "%d pairs, %d steps an epoch; %d pairs beyond the last whole batch left out", len(kept), steps, len(rows) - len(kept)
    )
    arguments = policy.trainer_arguments(
        settings.devices,
        settings.device_batch,
        settings.dtype,
        seed,
        accumulation=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        optim="rmsprop",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,  # below 1 it is a ratio of the schedule
        num_train_epochs=settings.stop_epoch,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
    )
    model, tokenizer = policy.load(model_path, settings.dtype)
    records: list[dict[str, float]] = []

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
            loss = sppo.sppo_loss(logps, inputs["reference_logps"], inputs["probabilities"], eta)
            chosen, rejected = (logps - inputs["reference_logps"]).detach().chunk(2)
            self.batch_metrics.append(torch.stack([loss.detach(), chosen.mean(), rejected.mean()]))
            return (loss, None) if return_outputs else loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                means = self.accelerator.reduce(torch.stack(self.batch_metrics).mean(0), "mean").tolist()
                self.batch_metrics.clear()
                if not all(map(torch.isfinite, torch.tensor(means))):
                    raise StageError(f"step {self.state.global_step}: the loss is {means[0]}: lower the learning rate or eta")
                norm = float(logs["grad_norm"])
                clipped = int(0 < settings.max_grad_norm < norm)
                values = [self.state.global_step, means[0], logs["learning_rate"], norm, clipped, *means[1:]]
                records.append(dict(zip(LOG_COLUMNS, values, strict=True)))
            super().log(logs, start_time)

    trainer = SPPOTrainer(model=model, args=arguments, data_collator=policy.collator(tokenizer), train_dataset=kept)
    trainer.remove_callback(PrinterCallback)  # the log is a file
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every process takes part, the first one gets it
    if policy.is_main():
        cli.log.info("loss %.4g at the first step, %.4g at the last", records[0]["loss"], records[-1]["loss"])
        with files.replacing(out) as partial, files.replacing(log) as partial_log:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            pd.DataFrame(records, columns=LOG_COLUMNS).to_csv(partial_log, index=False, float_format="%.6g")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the policy pi_t")
    parser.add_argument("pairs", type=Path, help="pairs with reference log-probabilities")
    parser.add_argument("out", type=Path, help="folder of the policy pi_t+1")
    parser.add_argument("log", type=Path, help="CSV of the training log")
    args = parser.parse_args()
    wanted = params.load("seed", "eta", "train")
    rows = files.read_table(args.pairs, files.PAIRS).to_pylist()
    policy.launch(
        wanted.train.devices, lambda: train(rows, args.model, wanted.eta, wanted.train, wanted.seed, args.out, args.log)
    )


if __name__ == "__main__":
    cli.run(main)

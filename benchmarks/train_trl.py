"""The baseline of benchmarks/train.py: TRL's DPOTrainer, which is installed in the environment `bench` only."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from benchmarks.train import Turns
from benchmarks.train_sides import ETA, SEED, Rows
from stages.engines import training
from stages.runtime import params

COLUMNS = {"prompt_token_ids": "prompt_ids", "chosen_token_ids": "chosen_ids", "rejected_token_ids": "rejected_ids"}
"""Our column -> TRL's."""


class TurnDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """A DPOTrainer on tokenized pairs that takes turns also when it computes the reference's log-probabilities."""

    def __init__(self, turns: Turns, **arguments: Any) -> None:
        self.turns = turns
        super().__init__(**arguments)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Return the dataset as it is: DPOTrainer would tokenize texts."""
        return dataset

    def compute_ref_log_probs(self, *arguments: Any) -> Any:
        self.turns.begin()
        logps = super().compute_ref_log_probs(*arguments)
        self.turns.end()
        return logps


def run(rows: Rows, settings: params.Train, folder: Path, turns: Turns, *, precompute: bool) -> None:
    """Train on the same tokens, with the arguments of the stage train. precompute: score the reference before training."""
    arguments = training.training_arguments(folder / "scratch", settings.device_batch, settings.dtype, SEED)
    config = DPOConfig(
        output_dir=str(folder / f"trl-{precompute}"),
        deepspeed=arguments.deepspeed,
        per_device_train_batch_size=settings.device_batch,
        learning_rate=settings.learning_rate,
        optim="rmsprop",
        max_grad_norm=0,
        loss_type=["sppo_hard"],
        beta=1 / ETA,
        max_length=None,
        precompute_ref_log_probs=precompute,
        precompute_ref_batch_size=settings.device_batch,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=arguments.use_cpu,
        logging_steps=1,
        num_train_epochs=1,
        warmup_steps=settings.warmup_ratio,
        seed=SEED,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = Dataset.from_list(rows).rename_columns(COLUMNS).remove_columns("prompt_id")
    model, tokenizer = training.load_policy(folder / "model", settings.dtype), AutoTokenizer.from_pretrained(folder / "model")
    TurnDPOTrainer(turns, model=model, args=config, train_dataset=dataset, processing_class=tokenizer).train()

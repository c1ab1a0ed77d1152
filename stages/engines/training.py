"""Policies under transformers.Trainer and DeepSpeed ZeRO-3: the libraries' settings, and loading a model to train or score."""

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

from stages.artifacts import pointers
from stages.runtime import params
from stages.runtime.errors import StageError


def quiet_libraries() -> None:
    """Turn off the libraries' routine messages and, when stderr is not a terminal, their progress bars."""
    import deepspeed
    from transformers.utils import logging as transformers_logging

    deepspeed.utils.logger.setLevel("WARNING")
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # warns that accumulation is left to DeepSpeed, as intended
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def check_tracker(report_to: str) -> None:
    """Raise StageError if the package to report the training log to is not installed. report_to: its name, or `none`."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise StageError(
            f"train.report_to is {report_to}, which is not installed: run "
            f"`.venv/uv/bin/uv pip install --python .venv/main {report_to}`"
        )


def accumulation_steps(global_batch: int, device_batch: int, devices: int) -> int:
    """Return the number of batches over which each device accumulates gradients before an optimizer step."""
    return global_batch // (device_batch * devices)


def zero3_config(device_batch: int, dtype: params.Precision, accumulation: int, max_grad_norm: float) -> dict[str, Any]:
    """Return DeepSpeed's configuration: ZeRO-3, with float32 master weights if dtype is bfloat16."""
    return {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": dtype == "bfloat16"},
        "train_micro_batch_size_per_gpu": device_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,  # RMSprop, for which DeepSpeed has no implementation of its own
        "steps_per_print": 10**9,
    }


def training_arguments(
    folder: Path,
    device_batch: int,
    dtype: params.Precision,
    seed: int,
    *,
    accumulation: int = 1,
    max_grad_norm: float = 0,
    checkpoint_steps: int = 0,
    report_to: str = "none",
    **more: Any,
) -> Any:
    """Return TrainingArguments for ZeRO-3. Call this within the distributed group, and before loading the model to partition.

    folder: for checkpoints. device_batch: pairs per device and forward pass. max_grad_norm: 0 disables clipping.
    checkpoint_steps: optimizer steps between checkpoints, 0 for none. report_to: where the log goes besides its file.
    more: other arguments of TrainingArguments.
    """
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        deepspeed=zero3_config(device_batch, dtype, accumulation, max_grad_norm),
        bf16=dtype == "bfloat16",
        per_device_train_batch_size=device_batch,
        per_device_eval_batch_size=device_batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=max_grad_norm,
        report_to=report_to,
        seed=seed,
        save_strategy="steps" if checkpoint_steps else "no",
        save_steps=checkpoint_steps or 1,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
        **more,
    )


def load_policy(path: Path, dtype: params.Precision) -> Any:
    """Load a causal language model from safetensors, without running code that comes with it.

    path: a folder with the model or a pointer to it. Raises StageError if the model is incomplete or corrupted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    local = pointers.check_model(path)
    model = AutoModelForCausalLM.from_pretrained(
        local, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
    )
    pointers.cap_attention(model)
    return model


def add_adapters(model: Any, lora: params.Lora) -> Any:
    """Return the model with LoRA adapters on all its linear layers and every other weight frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def merge_adapters(model_path: Path, dtype: params.Precision, lora: params.Lora, weights: dict[str, Any]) -> Any:
    """Load the model at `model_path` and merge trained adapters into it.

    weights: the state dict of the model that `add_adapters` returned, after training.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # otherwise the model would be loaded in ZeRO-3's shards, most of them in other processes
    model = add_adapters(load_policy(model_path, dtype), lora)
    model.load_state_dict(weights)
    return model.merge_and_unload()

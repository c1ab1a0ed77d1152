"""Policies under transformers.Trainer and DeepSpeed ZeRO-3: the libraries' settings, and loading a model to train or score."""

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

from stages.artifacts import pointers
from stages.method import packing
from stages.runtime import params
from stages.runtime.devices import is_main_process
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


def zero3_config(
    device_batch: int, dtype: params.Precision, accumulation: int, max_grad_norm: float, offload: str = "none"
) -> dict[str, Any]:
    """Return DeepSpeed's configuration: ZeRO-3, with float32 master weights if dtype is bfloat16.

    accumulation: batches per step. Their gradients, in dtype and averaged over the devices in dtype, are summed in float32, in
    the host's memory or not; in bfloat16 a sum of many would lose the small ones. A single batch needs no sum.
    offload: `train.offload`; `optimizer` keeps the master weights and the optimizer's state in the host's memory.
    """
    zero: dict[str, Any] = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    if offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # or offloading would require DeepSpeed's own Adam instead of RMSprop
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32" if accumulation > 1 else None},
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
    offload: str = "none",
    checkpoint_steps: int = 0,
    report_to: str = "none",
    **more: Any,
) -> Any:
    """Return TrainingArguments for ZeRO-3. Call this within the distributed group, and before loading the model to partition.

    folder: for checkpoints. device_batch: pairs per device and forward pass. max_grad_norm: 0 disables clipping.
    offload: see `zero3_config`. checkpoint_steps: optimizer steps between checkpoints, 0 for none. report_to: where the log
    goes besides its file. more: other arguments of TrainingArguments.
    """
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        deepspeed=zero3_config(device_batch, dtype, accumulation, max_grad_norm, offload),
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


def select_fused(attention: str) -> bool:
    """Return whether policies attend by the fused kernel: on a GPU, if train.attention says so."""
    import torch

    return attention == "fused" and torch.cuda.is_available()


def load_policy(path: Path, dtype: params.Precision) -> Any:
    """Load a causal language model from safetensors, without dropout and without running code that comes with it.

    path: a folder with the model or a pointer to it. dtype: what the weights are converted to, whatever they are stored in.
    Raises StageError if the model is incomplete or corrupted.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    local = pointers.check_model(path)
    config = AutoConfig.from_pretrained(local, trust_remote_code=False)
    disable_dropout(config)
    model = AutoModelForCausalLM.from_pretrained(
        local, config=config, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
    )
    pointers.cap_attention(model)
    return model


def load_scored_policy(path: Path, dtype: params.Precision, attention: str) -> Any:
    """Load a policy as `load_policy` does, and prepare its forward pass for `packing.batch_logps`.

    attention: train.attention. Raises StageError if packing or the fused attention does not support the model.
    """
    return packing.enable_scoring(load_policy(path, dtype), fused=select_fused(attention))


def disable_dropout(config: Any) -> None:
    """Set every dropout probability in a transformers configuration to 0, as the released code does by hand.

    With dropout, the policy would differ from its reference before the first step. Architectures differ in how they name the
    probabilities (attention_dropout, resid_pdrop, layerdrop) and in whether a module copies them, so they are changed in the
    configuration, before the model is built from it.
    """
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float) and value > 0:
                setattr(part, name, 0.0)


def has_float32_weights(path: Path) -> bool:
    """Return whether any weight of a model is stored in float32. path: a folder with the model or a pointer to it."""
    from safetensors import safe_open

    folder = pointers.resolve(path)
    for name in pointers.list_weights(folder):
        with safe_open(folder / name, "pt") as weights:
            if any(weights.get_slice(tensor).get_dtype() == "F32" for tensor in weights.keys()):  # noqa: SIM118 - not a dict
                return True
    return False


def load_start(path: Path, model: Any, arguments: Any, dtype: params.Precision) -> list[Any]:
    """Return this process's ZeRO-3 shards of the weights that training starts from, one per parameter, on the CPU.

    They are copies of the model's shards, unless the model was converted to bfloat16 from a float32 checkpoint: in that case
    they are read from the checkpoint again, so that the previous iteration's float32 weights are not rounded.
    path: the model's folder or a pointer to it. model: from `load_policy`. arguments: from `training_arguments`.
    """
    if dtype == "bfloat16" and has_float32_weights(path):
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, set_hf_deepspeed_config

        config = HfDeepSpeedConfig(zero3_config(1, "float32", 1, 0))  # transformers loads models according to the newest one
        model = load_policy(path, "float32")
        set_hf_deepspeed_config(arguments.hf_deepspeed_config)
        del config
    return [weights.ds_tensor.detach().to("cpu", copy=True) for weights in model.parameters()]


def add_adapters(model: Any, lora: params.Lora) -> Any:
    """Return the model with LoRA adapters on all its linear layers and every other weight frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def load_adapters(model_path: Path, lora: params.Lora, weights: dict[str, Any]) -> Any:
    """Load the model at `model_path` in float32, with trained adapters that are not merged yet.

    weights: from `gather_weights`, after training the model that `add_adapters` returned.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # otherwise the model would be loaded in ZeRO-3's shards, most of them in other processes
    model = add_adapters(load_policy(model_path, "float32"), lora)
    model.load_state_dict({name: tensor for name, tensor in weights.items() if "lora_" in name}, strict=False)
    return model


def gather_weights(trainer: Any, *, masters: bool) -> dict[str, Any]:
    """Gather a trained model's state dict from all processes, each of which must call this; only the main one gets it.

    trainer: a transformers.Trainer under ZeRO-3. masters: take trained weights from the optimizer's float32 copy rather than
    from the model, which may be in bfloat16.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    names: dict[Any, list[str]] = {}  # tied weights have several names
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, same in names.items():
        if masters and parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            if is_main_process():
                weights |= dict.fromkeys(same, full.cpu())
    return weights


def convert_weights(weights: dict[str, Any], dtype: params.Precision) -> dict[str, Any]:
    """Convert a state dict's floating-point tensors to dtype. Names that share a tensor still share one afterwards."""
    import torch

    converted: dict[int, Any] = {}
    for tensor in weights.values():
        if id(tensor) not in converted:
            converted[id(tensor)] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
    return {name: converted[id(tensor)] for name, tensor in weights.items()}

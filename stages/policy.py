"""A policy under transformers.Trainer and DeepSpeed ZeRO-3: what reference and train share.

Both run on `train.devices` processes, a GPU each where there are GPUs. Called without a launcher they start torchrun for
more than one process; under DeepSpeed's launcher or torchrun (several nodes, say, with one `scratch` for all) they take the
place it gives them.
"""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stages import cli, files, params, pointers, processes, sppo
from stages.cli import StageError

ERROR_FILE = "SPPO_ERROR_FILE"
"""In the environment of a launched process: where its StageError goes, to be said last, below what torchrun says of it."""


DIGESTS = "SPPO_DIGESTS"
"""In the environment of a launched process: JSON, the digests of the stage's inputs, which are not hashed once for each."""


GROUP_FILE = "SPPO_GROUP_FILE"
"""In the environment of a process alone: what its distributed group meets in, instead of a port that is open to the network."""


def launch(devices: int, inputs: dict[str, Path], run: Callable[[dict[str, str]], None]) -> None:
    """Call `run` in each of `devices` processes of one distributed group, with the digests of the inputs by their names.

    Raises StageError where there are fewer GPUs than `devices` (processors take any number), or where a process fails.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    memory = cli.within_memory("lower train.device_batch; more accumulation takes its place")
    if "LOCAL_RANK" in os.environ:
        if not cli.is_main():
            cli.log.setLevel(logging.WARNING)  # else every process would say the same
        try:
            with memory:
                run(json.loads(os.environ[DIGESTS]) if DIGESTS in os.environ else digests(inputs))
        except StageError as error:
            if ERROR_FILE in os.environ:
                Path(os.environ[ERROR_FILE]).write_text(str(error))
            raise
        return
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise StageError(
            f"train.devices is {devices}, and this machine has {torch.cuda.device_count()} GPUs: set train.devices to that "
            "(the global batch stays as it is: more accumulation takes the missing devices' place)"
        )
    found = digests(inputs)
    if devices == 1:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with tempfile.TemporaryDirectory() as folder, memory:
            os.environ[GROUP_FILE] = f"{folder}/group"
            run(found)
            if torch.distributed.is_initialized():  # not where nothing was left to do
                torch.distributed.destroy_process_group()  # before its file goes
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    bound = partial(processes.end_with, os.getpid(), signal.SIGKILL)  # and each process with torchrun; Ctrl-C is for us alone
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "error"
        values = os.environ | {ERROR_FILE: str(said), DIGESTS: json.dumps(found)}
        launched = [*command, *sys.orig_argv[1:]]
        if subprocess.run(launched, env=values, check=False, preexec_fn=bound, start_new_session=True).returncode:
            raise StageError(said.read_text() if said.exists() else "a training process failed: its message stands above")


def digests(inputs: dict[str, Path]) -> dict[str, str]:
    return {name: files.digest(path) for name, path in inputs.items()}


def trainer_arguments(
    folder: Path,
    devices: int,
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
    """TrainingArguments under DeepSpeed ZeRO-3, with `more` of their own; call it within the distributed group.

    folder: where a checkpoint goes every `checkpoint_steps` steps, 0 for none.
    Raises StageError where a package to report to is missing, or where a launcher started another number of processes than
    `devices`.
    """
    import deepspeed
    import torch
    from transformers import TrainingArguments
    from transformers.utils import logging as transformers_logging

    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise StageError(
            f"train.report_to is {report_to}, which is not installed: "
            f"`.venv/uv/bin/uv pip install --python .venv/main {report_to}`"
        )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a minute's C++ build at the first start on CPU
    deepspeed.utils.logger.setLevel("WARNING")
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns that accumulation is DeepSpeed's, as is meant
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if GROUP_FILE in os.environ:
        meet = {"auto_mpi_discovery": False, "init_method": f"file://{os.environ[GROUP_FILE]}", "rank": 0, "world_size": 1}
        deepspeed.init_distributed(verbose=False, **meet)
    else:
        deepspeed.init_distributed(verbose=False)
    if int(os.environ["WORLD_SIZE"]) != devices:
        raise StageError(f"the launcher started {os.environ['WORLD_SIZE']} processes: train.devices is {devices}")
    cli.deterministic(seed)
    zero3 = {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": dtype == "bfloat16"},  # with float32 master weights
        "train_micro_batch_size_per_gpu": device_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,  # RMSprop, which DeepSpeed has no kernel of its own for
        "steps_per_print": 10**9,
    }
    return TrainingArguments(
        output_dir=str(folder),
        deepspeed=zero3,
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


def load(path: Path, dtype: params.Precision) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint, in safetensors only and without remote code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = pointers.model(path)
    model = AutoModelForCausalLM.from_pretrained(
        local, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
    )
    pointers.cap_attention(model)
    return model, AutoTokenizer.from_pretrained(local, trust_remote_code=False)


def collator(tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """`collate` with the tokenizer's padding token, or its end token where it has none: the attention mask hides either."""
    return partial(collate, pad=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def collate(rows: list[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Rows of schemas.PAIRS -> one right-padded batch of 2B sequences: the chosen half first, the rejected half after it.

    input_ids, attention_mask, labels: (2B, L) int64, labels -100 outside the response. Of the columns that are there,
    probabilities: (2B,) float32, P^; reference_logps: (2B,) float32, nats.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    sides = [(row, side) for side in ("chosen", "rejected") for row in rows]
    ids = [torch.tensor(row["prompt_token_ids"] + row[f"{side}_token_ids"]) for row, side in sides]
    labels = [torch.tensor([-100] * len(row["prompt_token_ids"]) + row[f"{side}_token_ids"]) for row, side in sides]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    for name, column in (("probabilities", "probability"), ("reference_logps", "reference_logps")):
        if f"chosen_{column}" in rows[0]:
            batch[name] = torch.tensor([row[f"{side}_{column}"] for row, side in sides], dtype=torch.float32)
    return batch


def batch_logps(model: Any, batch: dict[str, Any]) -> Any:
    """Summed log-probability of each response of a collated batch: (2B,) float32, nats.

    Logits are computed from the position before the batch's first response token on: those before it predict prompts.
    """
    labels = batch["labels"]
    first = int((labels != -100).int().argmax(1).min())
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        logits_to_keep=labels.size(1) - first + 1,
    ).logits
    return sppo.response_logps(logits[:, :-1], labels[:, first:])

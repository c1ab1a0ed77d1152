"""A policy under transformers.Trainer and DeepSpeed ZeRO-3: what reference and train share.

Pairs are packed: no padding to speak of, a prompt computed once for both of its responses, logits of response tokens only.

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

TOLERANCE = {"float32": 0.001, "bfloat16": 0.01}
"""How far log-probabilities of the same tokens may lie apart, relatively: rounding, in another batch."""


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
            leave_group()
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
            leave_group()  # before its file goes
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    bound = partial(processes.end_with, os.getpid(), signal.SIGKILL)  # and each process with torchrun; Ctrl-C is for us alone
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "error"
        values = os.environ | {ERROR_FILE: str(said), DIGESTS: json.dumps(found)}
        launched = [*command, *sys.orig_argv[1:]]
        if subprocess.run(launched, env=values, check=False, preexec_fn=bound, start_new_session=True).returncode:
            raise StageError(said.read_text() if said.exists() else "a training process failed: its message stands above")


def leave_group() -> None:
    """End the distributed group, if there is one: its threads may abort a process that ends with them."""
    import torch

    if torch.distributed.is_initialized():  # not where nothing was left to do
        torch.distributed.destroy_process_group()


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


def load(path: Path, dtype: params.Precision) -> Any:
    """The model of a checkpoint, in safetensors only and without remote code."""
    import torch
    from transformers import AutoModelForCausalLM

    local = pointers.model(path)
    model = AutoModelForCausalLM.from_pretrained(
        local, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
    )
    pointers.cap_attention(model)
    return model


def scoring(model: Any) -> Any:
    """The causal language model, called from now on with what `batch_logps` gives it, to return log-probabilities of tokens.

    Its parameters and names stay what they are; called with `plain` it is what it was. Both are calls of the modules
    themselves, as ZeRO-3, which hands out the weights at such calls, and PEFT want it.
    """
    decoder, head = model.base_model, model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def head_forward(hidden: Any, targets: Any = None) -> Any:
        if targets is None:
            return type(head).forward(head, hidden)
        return sppo.token_logps(hidden, head.weight, targets, bias=head.bias, softcap=softcap)

    def forward(input_ids: Any, predicting: Any = None, targets: Any = None, plain: bool = False, **inputs: Any) -> Any:
        if plain:
            return type(model).forward(model, input_ids, use_cache=False)
        hidden = decoder(input_ids, use_cache=False, **inputs).last_hidden_state
        return head(hidden.flatten(0, 1)[predicting], targets)

    model.forward, head.forward = forward, head_forward
    return model


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of schemas.PAIRS -> one batch of B pairs, packed: a prompt stands once, before its two responses.

    input_ids, position_ids, segments: (R, L) int64, as few rows of the longest pair's length as first-fit-decreasing finds.
    The prompt of pair i is segment 3i, its responses 3i + 1 and 3i + 2; -1 is padding. Both responses continue the prompt's
    positions.
    predicting, targets: (T,) int64: the tokens of all responses, the chosen ones' first, and where in the R * L positions
    each is predicted. lengths: (2B,) int64, in tokens, of the responses.
    Of the columns that are there, probabilities: (2B,) float32, P^; reference_logps: (2B,) float32, nats.
    """
    import torch

    texts = [[row[f"{part}_token_ids"] for part in ("prompt", "chosen", "rejected")] for row in rows]
    sizes = [sum(map(len, parts)) for parts in texts]
    length = max(sizes)
    packed: list[list[int]] = []
    for pair in sorted(range(len(rows)), key=lambda pair: -sizes[pair]):
        fits = (others for others in packed if sum(sizes[other] for other in others) + sizes[pair] <= length)
        if (others := next(fits, None)) is None:
            packed.append(others := [])
        others.append(pair)
    input_ids = torch.zeros(len(packed), length, dtype=torch.long)
    position_ids, segments = torch.zeros_like(input_ids), torch.full_like(input_ids, -1)
    predicting: dict[tuple[int, int], Any] = {}
    for index, pairs in enumerate(packed):
        end = 0
        for pair in pairs:
            prompt = len(texts[pair][0])
            last = end + prompt - 1  # the prompt's last token predicts the first one of either response
            for part, ids in enumerate(texts[pair]):
                start, end = end, end + len(ids)
                first = prompt if part else 0
                input_ids[index, start:end] = torch.tensor(ids)
                position_ids[index, start:end] = torch.arange(first, first + len(ids))
                segments[index, start:end] = 3 * pair + part
                where = torch.arange(start - 1, end - 1)
                where[:1] = last
                predicting[part, pair] = index * length + where
    order = [(part, pair) for part in (1, 2) for pair in range(len(rows))]
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segments": segments,
        "predicting": torch.cat([predicting[one] for one in order]),
        "targets": torch.cat([torch.tensor(texts[pair][part]) for part, pair in order]),
        "lengths": torch.tensor([len(texts[pair][part]) for part, pair in order]),
    }
    for name, column in (("probabilities", "probability"), ("reference_logps", "reference_logps")):
        if f"chosen_{column}" in rows[0]:
            found = [row[f"{side}_{column}"] for side in ("chosen", "rejected") for row in rows]
            batch[name] = torch.tensor(found, dtype=torch.float32)
    return batch


def batch_logps(model: Any, batch: dict[str, Any]) -> Any:
    """Summed log-probability of each response of a collated batch under a model that is `scoring`: (2B,) float32, nats.

    A token attends to its own segment and to its prompt's, up to itself; padding to padding.
    """
    import torch

    segments = batch["segments"]
    mine, other = segments[:, :, None], segments[:, None, :]
    seen = (mine == other) | ((mine // 3 == other // 3) & (other % 3 == 0))
    seen = seen.tril()
    mask = torch.zeros_like(seen, dtype=next(model.parameters()).dtype).masked_fill(~seen, float("-inf"))
    logps = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=mask[:, None],
        predicting=batch["predicting"],
        targets=batch["targets"],
    )
    return torch.stack([one.sum() for one in logps.split(batch["lengths"].tolist())])


def check_packing(model: Any, row: dict[str, Any], dtype: params.Precision) -> None:
    """Raise StageError where a pair's log-probabilities are not those of the model's own, plain calls, but for rounding.

    row: the longest pair. An architecture may attend, or scale its logits, in ways that packing does not know.
    """
    import torch

    config, prompt = getattr(model, "module", model).config, row["prompt_token_ids"]
    texts = [prompt + row[f"{side}_token_ids"] for side in ("chosen", "rejected")]
    longest, window = max(map(len, texts)), getattr(config.get_text_config(), "sliding_window", None)
    if window and longest > window:
        raise StageError(
            f"prompt {row['prompt_id']} and a response have {longest} tokens, and {config.model_type} looks back over {window}"
            f": set lengths.total to {window} at most"
        )
    device = next(model.parameters()).device
    found = batch_logps(model, {key: tensor.to(device) for key, tensor in collate([row]).items()}).tolist()
    for logps, text in zip(found, texts, strict=True):
        ids = torch.tensor([text], device=device)
        logits = model(input_ids=ids, plain=True).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum().item()
        if not abs(logps - expected) <= TOLERANCE[dtype] * abs(expected):
            raise StageError(
                f"prompt {row['prompt_id']}: a response's log-probability is {logps:.5g} packed and {expected:.5g} by "
                f"{config.model_type}'s own forward: stages/policy.py does not know how this architecture attends or makes "
                "its logits: take another"
            )

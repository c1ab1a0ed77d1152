"""reference and train against TRL's DPOTrainer with `sppo_hard`, the same pairs, batches, model, precision and ZeRO-3.

The model is a Llama of 20 million parameters with a vocabulary of 32,000, on one process in float32; the pairs' lengths are
drawn like UltraFeedback's and cut as in recipes/llama-3-8b. Each side is a process of its own that waits for its turn before
each step. The losses of each step must agree. Memory is what a process takes on top of what it holds before the first step.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import measure
from stages import cli, files, params, policy, reference, schemas, train

VOCABULARY = 32000
BATCH = 4
LENGTHS = [256, 1024]
"""Of the longest prompt and response together, in tokens."""
SIDES = ["train", "reference", "trl", "trl-precomputed"]
ETA = 1000.0
UNUSED = {f"{side}_probability": 0.5 for side in ("chosen", "rejected")}
UNUSED |= {f"{part}_cut": 0 for part in ("prompt", "chosen", "rejected")}
"""Columns of pairs that sppo_hard does not read."""
MODEL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}


def settings(batch: int, dtype: params.Precision = "float32", *, gradient_checkpointing: bool = False) -> params.Train:
    """Those of recipes/llama-3-8b on one device, with sppo_hard, the only form of the loss that TRL has."""
    return params.Train(
        loss="sppo_hard",
        beta=None,
        lora=params.Lora(rank=0, alpha=16),
        learning_rate=5e-7,
        global_batch=batch,
        device_batch=batch,
        devices=1,
        epochs=1,
        stop_epoch=1,
        warmup_ratio=0.1,
        max_grad_norm=0,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        checkpoint_steps=0,
        report_to="none",
    )


def make_model(folder: Path, vocabulary: int, shape: dict[str, int], dtype: params.Precision = "float32") -> None:
    """A random Llama with a tokenizer that gives it its special tokens."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=2048, dtype=dtype, **shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def make_pairs(length: int, count: int, vocabulary: int) -> list[dict[str, Any]]:
    """Pairs of random tokens: prompts of 190 and responses of 380 on average for a length of 1024, else in proportion."""
    draw, pairs = random.Random(0), []

    def text(mean: float) -> list[int]:
        count = max(
            2, round(draw.lognormvariate(0, 0.8) * mean * length / 1024 / 1.38)
        )  # 1.38: the mean of lognormvariate(0, 0.8)
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    for index in range(count):
        prompt = text(190)[-length // 2 :]
        pair = {"prompt_id": str(index), "prompt_token_ids": prompt}
        pairs.append(pair | {f"{side}_token_ids": text(380)[: length - len(prompt)] for side in ("chosen", "rejected")})
    return pairs


def prepare(folder: Path, shape: dict[str, int], vocabulary: int, length: int, wanted: params.Train) -> list[dict[str, Any]]:
    """Write what the sides read: a model, its settings, and a batch of pairs for each round and two more. Returns the pairs."""
    make_model(folder / "model", vocabulary, shape, wanted.dtype)
    pairs = make_pairs(length, wanted.global_batch * (measure.ROUNDS + 2), vocabulary)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "settings.json").write_text(wanted.model_dump_json())
    return pairs


def read_settings(folder: Path) -> params.Train:
    return params.Train.model_validate_json((folder / "settings.json").read_text())


class Turns:
    """A side's turns: `begin` waits for one on stdin, `end` says on stdout what it took."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        self.start = 0.0
        self.held = 0

    def begin(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # nobody asks any more
        if not self.held:
            self.held = measure.memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        self.start = time.perf_counter()

    def end(self, loss: float | None = None) -> None:
        import torch

        if self.start:  # else nobody asked
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took = {"seconds": time.perf_counter() - self.start, "loss": loss, "memory": measure.memory("VmHWM") - self.held}
            print(json.dumps(took), file=self.answers, flush=True)


def side(name: str, folder: Path) -> None:
    """Run one of SIDES, a batch a turn, until nobody asks any more."""
    turns, rows = Turns(), json.loads((folder / "pairs.json").read_text())
    cli.quiet()
    from transformers import TrainerCallback, trainer

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                turns.end(logs["loss"])

        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            turns.end()
            turns.begin()

    trainer.DEFAULT_CALLBACKS.append(Callback)
    others = partial(trl, turns=turns, precomputed=name == "trl-precomputed")
    run = {"reference": ours_reference, "train": ours_train}.get(name, others)
    policy.launch(1, {}, lambda _: run(rows, folder))


def ours_reference(rows: list[dict[str, Any]], folder: Path) -> None:
    """`python -m stages.reference` but for reading and writing the pairs' file; its first batch is not timed."""
    same = read_settings(folder)
    arguments = policy.trainer_arguments(folder / "scratch", 1, same.device_batch, same.dtype, 0)
    table = pa.Table.from_pylist([row | UNUSED for row in rows], schema=schemas.CHOSEN)
    reference.score(table, folder / "model", same.dtype, arguments, folder / "logps")


def ours_train(rows: list[dict[str, Any]], folder: Path) -> None:
    """`python -m stages.train`, of the log-probabilities that ours_reference has left."""
    logps = [row for path in sorted((folder / "logps").iterdir()) for row in files.read_table(path, schemas.LOGPS).to_pylist()]
    full = [row | UNUSED | scored for row, scored in zip(rows, logps, strict=True)]
    table = pa.Table.from_pylist(full, schema=schemas.PAIRS)
    train.train(table, folder / "model", ETA, read_settings(folder), 0, folder / "scratch", folder / "out", folder / "log.csv")


def trl(rows: list[dict[str, Any]], folder: Path, *, turns: Turns, precomputed: bool) -> None:
    """DPOTrainer on the same tokens, with the arguments of stages.train; `precomputed`: the reference is a pass before."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    same = read_settings(folder)
    plain = policy.trainer_arguments(folder / "scratch", 1, same.device_batch, same.dtype, 0)
    config = DPOConfig(
        output_dir=str(folder / f"trl-{precomputed}"),
        deepspeed=plain.deepspeed,
        per_device_train_batch_size=same.device_batch,
        learning_rate=same.learning_rate,
        optim="rmsprop",
        max_grad_norm=0,
        loss_type=["sppo_hard"],
        beta=1 / ETA,
        max_length=None,
        precompute_ref_log_probs=precomputed,
        precompute_ref_batch_size=same.device_batch,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=plain.use_cpu,
        logging_steps=1,
        num_train_epochs=1,
        warmup_steps=same.warmup_ratio,
        seed=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    compute = DPOTrainer.compute_ref_log_probs

    def in_turn(*args: Any) -> Any:
        turns.begin()
        logps = compute(*args)
        turns.end()
        return logps

    DPOTrainer.compute_ref_log_probs = in_turn
    DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # of texts it would make tokens
    names = {"prompt_token_ids": "prompt_ids", "chosen_token_ids": "chosen_ids", "rejected_token_ids": "rejected_ids"}
    dataset = Dataset.from_list(rows).rename_columns(names).remove_columns("prompt_id")
    model, tokenizer = policy.load(folder / "model", same.dtype), AutoTokenizer.from_pretrained(folder / "model")
    DPOTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer).train()


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.train", name, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn(process: subprocess.Popen[str]) -> dict[str, float]:
    """Let a side do a batch. Returns seconds, memory and, of a training step, the loss."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit("a side of the benchmark failed: its message stands above")
    took: dict[str, float] = json.loads(answer)
    return took


def take_turns(sides: dict[str, subprocess.Popen[str]]) -> dict[str, list[dict[str, float]]]:
    """What each batch took on each side, but for the first one."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for batch in range(measure.ROUNDS + 1):
        for name in measure.rotated(list(sides), batch):
            taken[name].append(turn(sides[name]))
    return {name: found[1:] for name, found in taken.items()}


def compare(length: int, folder: Path) -> list[measure.Figure]:
    """The figures of one size."""
    prepare(folder, MODEL, VOCABULARY, length, settings(BATCH))
    sides = {name: start(name, folder) for name in ("reference", "trl-precomputed")}
    turn(sides["trl-precomputed"])  # the batch that ours_reference does untimed
    scored = take_turns(sides)
    sides["reference"].communicate("\n")  # it may write
    sides["train"], sides["trl"] = start("train", folder), start("trl", folder)
    trained = take_turns({name: sides[name] for name in ("train", "trl", "trl-precomputed")})
    for process in sides.values():
        process.kill()
    losses = {name: [took["loss"] for took in found] for name, found in trained.items()}
    for ours, theirs, same in zip(losses["train"], losses["trl"], losses["trl-precomputed"], strict=True):
        # TRL adds the means over winners and losers, eq. 4.7 is the mean over both
        if max(abs(2 * ours - theirs), abs(same - theirs)) > 1e-3 * theirs:
            sys.exit(f"the losses are not the same: {losses}")
    seconds = {name: [took["seconds"] for took in found] for name, found in trained.items()}
    mine, other = ([took["seconds"] for took in scored[name]] for name in ("reference", "trl-precomputed"))
    both = [a + b for a, b in zip(mine, seconds["train"], strict=True)]
    other_both = [a + b for a, b in zip(other, seconds["trl-precomputed"], strict=True)]
    size = f"up to {length} tokens"
    figures = [
        measure.figure("reference, pairs/s against TRL's", size, BATCH, mine, other),
        measure.figure("train, pairs/s against TRL, precomputed", size, BATCH, seconds["train"], seconds["trl-precomputed"]),
        measure.figure("both, pairs/s against TRL, precomputed", size, BATCH, both, other_both, ">= 1.5"),
        measure.figure("both, pairs/s against TRL, not precomputed", size, BATCH, both, seconds["trl"], ">= 1.5"),
    ]
    gib = {name: max(took["memory"] for took in found) / 2**30 for name, found in trained.items()}
    for name, what in (("trl-precomputed", "precomputed"), ("trl", "not precomputed")):
        ours, theirs = gib["train"], gib[name]
        subject = f"train, GiB against TRL, {what}"
        figures.append(measure.of_rounds(subject, size, [ours], [theirs], [theirs / ours], ">= 1.43"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", nargs="?", choices=SIDES, help="used within: run one side")
    parser.add_argument("folder", nargs="?", type=Path)
    args = parser.parse_args()
    if args.side:
        side(args.side, args.folder)
        return
    for length in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            measure.report(compare(length, Path(folder)))


if __name__ == "__main__":
    main()

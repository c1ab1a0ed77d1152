"""reference and train against TRL's DPOTrainer with `sppo_hard`: same pairs, batches, model, precision and ZeRO-3.

The model is a Llama with 20 million parameters and a vocabulary of 32,000, on one process in float32. The pairs' lengths are
drawn like UltraFeedback's and truncated as in recipes/llama-3-8b. Each side is a process of its own that waits for its turn
before each step. The losses of every step must agree. Memory is what a process takes on top of what it held before the first
step.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measure
from stages.runtime import logs, params

VOCABULARY = 32000
BATCH = 4
LENGTHS = [256, 1024]
"""Maximum length of a prompt and a response together, in tokens."""
SIDES = ["reference", "train", "trl", "trl-precomputed"]
MODEL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}

Took = dict[str, float]
"""What a side took for a batch: seconds, memory (bytes) and, for a training step, loss."""


def make_settings(batch: int, dtype: params.Precision = "float32", *, gradient_checkpointing: bool = False) -> params.Train:
    """Return the settings of recipes/llama-3-8b on one device, but with sppo_hard, the only form of the loss that TRL has."""
    return params.Train(
        loss="sppo_hard",
        beta=None,
        lora=params.Lora(rank=0, alpha=16),
        learning_rate=5e-7,
        global_batch=batch,
        device_batch=batch,
        devices=1,
        nodes=1,
        epochs=1,
        stop_epoch=1,
        warmup_ratio=0.1,
        max_grad_norm=0,
        dtype=dtype,
        checkpoint_dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        attention="plain",
        offload="none",
        checkpoint_steps=0,
        report_to="none",
    )


def make_model(vocabulary: int, shape: dict[str, int], dtype: params.Precision, out: Path) -> None:
    """Write a Llama with random weights, and a tokenizer that reads any text and knows every token.

    vocabulary: at least 259.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=8192, dtype=dtype, **shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(out)
    make_tokenizer(vocabulary).save_pretrained(out)


def make_tokenizer(vocabulary: int) -> Any:
    """Make a tokenizer: three special tokens, a token for each byte, and words that only random token IDs stand for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"w{index}." for index in range(len(tokens), vocabulary)]
    model = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def make_pairs(length: int, count: int, vocabulary: int) -> list[dict[str, Any]]:
    """Make pairs of random tokens whose prompt and response have at most `length` tokens together."""
    rng, pairs = random.Random(0), []
    for index in range(count):
        prompt = draw_tokens(rng, 190 * length / 1024, vocabulary)[-length // 2 :]
        pair = {"prompt_id": str(index), "prompt_token_ids": prompt}
        for side in ("chosen", "rejected"):
            pair[f"{side}_token_ids"] = draw_tokens(rng, 380 * length / 1024, vocabulary)[: length - len(prompt)]
        pairs.append(pair)
    return pairs


def draw_tokens(rng: random.Random, mean: float, vocabulary: int) -> list[int]:
    """Draw random token ids, `mean` of them on average."""
    count = max(2, round(rng.lognormvariate(0, 0.8) * mean / 1.38))  # 1.38: the mean of lognormvariate(0, 0.8)
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def prepare(folder: Path, shape: dict[str, int], vocabulary: int, length: int, settings: params.Train) -> list[dict[str, Any]]:
    """Write what the sides read: a model, settings, and pairs for each round, the warm-up and one more. Returns the pairs."""
    make_model(vocabulary, shape, settings.dtype, folder / "model")
    pairs = make_pairs(length, settings.global_batch * (measure.ROUNDS + 2), vocabulary)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "settings.json").write_text(settings.model_dump_json())
    return pairs


class Turns:
    """A side's turns: `begin` waits for one on stdin, `end` prints what it took to stdout."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not be read as an answer
        self.start = 0.0
        self.held = 0

    def begin(self) -> None:
        """Wait for the next turn. Exits if there will be none."""
        if not sys.stdin.readline():
            os._exit(0)
        if not self.held:
            self.held = measure.read_memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
        self.start = time.perf_counter()

    def end(self, loss: float | None = None) -> None:
        """Answer with the seconds and memory of this turn, if one has begun."""
        import torch

        if self.start:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            memory = measure.read_memory("VmHWM") - self.held
            took = {"seconds": time.perf_counter() - self.start, "loss": loss, "memory": memory}
            print(json.dumps(took), file=self.answers, flush=True)


def start_side(name: str, folder: Path) -> subprocess.Popen[str]:
    """Start one of SIDES as a process, in this environment."""
    command = [sys.executable, "-m", "benchmarks.train", name, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_side(name: str, folder: Path) -> None:
    """Run one of SIDES in this process, one batch per turn."""
    turns = Turns()
    logs.setup_logging()
    from benchmarks import train_sides  # imports transformers, which reads what the two lines above have set

    train_sides.run(name, folder, turns)


def take_turn(process: subprocess.Popen[str]) -> Took:
    """Let a side process a batch. Exits if the side has failed."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit("one side of the benchmark failed: see its message above")
    took: Took = json.loads(answer)
    return took


def take_turns(sides: dict[str, subprocess.Popen[str]]) -> dict[str, list[Took]]:
    """Return what each side took for each batch after the first."""
    taken: dict[str, list[Took]] = {name: [] for name in sides}
    for batch in range(measure.ROUNDS + 1):
        for name in measure.rotate(list(sides), batch):
            taken[name].append(take_turn(sides[name]))
    return {name: took[1:] for name, took in taken.items()}


def run_sides(folder: Path) -> tuple[dict[str, list[Took]], dict[str, list[Took]]]:
    """Run all sides on prepared inputs. Returns what scoring and what training took, by side."""
    sides = {name: start_side(name, folder) for name in ("reference", "trl-precomputed")}
    take_turn(sides["trl-precomputed"])  # the batch that the reference processes before its first turn
    scored = take_turns(sides)
    sides["reference"].communicate("\n")  # let it write its results, which train reads
    sides["train"], sides["trl"] = start_side("train", folder), start_side("trl", folder)
    trained = take_turns({name: sides[name] for name in ("train", "trl", "trl-precomputed")})
    for process in sides.values():
        process.kill()
    return scored, trained


def check_losses(trained: dict[str, list[Took]]) -> None:
    """Exit if the losses of the three trainings differ."""
    losses = {name: [step["loss"] for step in steps] for name, steps in trained.items()}
    for ours, theirs, precomputed in zip(losses["train"], losses["trl"], losses["trl-precomputed"], strict=True):
        # TRL adds the means over chosen and rejected responses, eq. 4.7 is the mean over both
        if max(abs(2 * ours - theirs), abs(precomputed - theirs)) > 1e-3 * theirs:
            sys.exit(f"the losses differ: {losses}")


def compare(length: int, folder: Path) -> list[measure.Comparison]:
    """Compare ours with TRL at one maximum length."""
    prepare(folder, MODEL, VOCABULARY, length, make_settings(BATCH))
    scored, trained = run_sides(folder)
    check_losses(trained)
    size = f"up to {length} tokens"
    return [*compare_seconds(size, list_seconds(scored), list_seconds(trained)), *compare_memory(size, trained)]


def list_seconds(taken: dict[str, list[Took]]) -> dict[str, list[float]]:
    return {name: [step["seconds"] for step in steps] for name, steps in taken.items()}


def compare_seconds(size: str, scored: dict[str, list[float]], trained: dict[str, list[float]]) -> list[measure.Comparison]:
    """Compare scoring, training and both together, from the seconds of each batch."""
    ours, theirs = scored["reference"], scored["trl-precomputed"]
    ours_both = [a + b for a, b in zip(ours, trained["train"], strict=True)]
    theirs_both = [a + b for a, b in zip(theirs, trained["trl-precomputed"], strict=True)]
    return [
        measure.compare_rates(f"{subject}, pairs per second, against {baseline}", size, BATCH, ours, theirs, target)
        for subject, baseline, ours, theirs, target in (
            ("reference", "TRL", ours, theirs, ""),
            ("train", "TRL, precomputed", trained["train"], trained["trl-precomputed"], ""),
            ("both", "TRL, precomputed", ours_both, theirs_both, ">= 1.5"),
            ("both", "TRL, not precomputed", ours_both, trained["trl"], ">= 1.5"),
        )
    ]


def compare_memory(size: str, trained: dict[str, list[Took]]) -> list[measure.Comparison]:
    """Compare the peak memory of training."""
    gib = {name: max(step["memory"] for step in steps) / 2**30 for name, steps in trained.items()}
    return [
        measure.summarize(
            f"train, GiB, against TRL, {label}", size, [gib["train"]], [gib[name]], [gib[name] / gib["train"]], ">= 1.43"
        )
        for name, label in (("trl-precomputed", "precomputed"), ("trl", "not precomputed"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", nargs="?", choices=SIDES, help="internal: run one side")
    parser.add_argument("folder", nargs="?", type=Path, help="internal: its inputs")
    args = parser.parse_args()
    if args.side:
        run_side(args.side, args.folder)
        return
    for length in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            measure.report(compare(length, Path(folder)))


if __name__ == "__main__":
    main()

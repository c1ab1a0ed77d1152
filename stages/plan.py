"""What `dvc repro` would run and what that takes: forward passes, tokens, FLOPs, disk, dollars, and hours on named GPUs.

Which stages would run is DVC's answer, and whatever depends on them: an artifact that comes out as it was still stops there.
What an earlier run left (prompts, lengths of texts, the policy's size) is taken from it, the rest from the assumptions
below, which are printed with the table.
"""

import argparse
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages import markdown, params, pointers, repository
from stages.cli import StageError

PARAMETERS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8.03e9,
    "mistralai/Mistral-7B-Instruct-v0.2": 7.24e9,
    "google/gemma-2-9b-it": 9.24e9,
}
"""Of policies by their id on the Hub, from their model cards, until their files are here."""

PROMPTS = 20_000
PROMPT_TOKENS, RESPONSE_TOKENS = 190, 380
"""A third of UltraFeedback, the mean lengths of its prompts and of Llama-3-8B-Instruct's responses: estimates."""

RANKER_FLOPS_PER_TOKEN, RANKER_FLOPS_PER_PASS = 0.75e9, 51.5e9
"""PairRM, a DeBERTa-v3-large of 0.4 billion parameters: arithmetic of its layers, and of the relative positions of a pass."""

INSTRUCTIONS = 805
HARNESS_TOKENS = 82_500_000
"""Prefill of the six tasks with their few-shot examples: an estimate."""
JUDGE_TOKENS = 1_250
"""Of a request to AlpacaEval's judge: two answers and the instruction. 805 of them are its README's "less than 10 dollars"."""

BYTES_PER_TOKEN = 6
"""Of a response in its Parquet file, text and token ids compressed: as measured on the miniature, rounded up."""


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 peak in FLOP/s, what share of it is reached, and tokens a second of a model of 8 billion parameters."""

    peak: float
    sample: float
    forward: float
    rank: float
    train: float


GPUS = {
    "H100": Gpu(peak=989e12, sample=12_500, forward=0.4, rank=0.35, train=0.3),
    "A100": Gpu(peak=312e12, sample=7_500, forward=0.4, rank=0.35, train=0.33),
}
"""peak: NVIDIA's data sheets (SXM). sample: vLLM, third parties' figures (H100), 7,516 in vLLM's pull request 5046 (A100, 7B).
train: from 18.4 pairs a second of 8 x H100, padded to 1024 tokens, the padding counted as work, since pairs are packed here
(a prefix-sharing DPO repository's baseline; packed as here it reports 53.2), and 11.5 of 8 x A100 (zephyr-7b-dpo-full), the
padding not counted. forward, rank: estimates."""


@dataclass
class Work:
    """What a stage does: passes of texts through a model, tokens in them, FLOPs (sampled: tokens), bytes kept, dollars."""

    passes: float = 0
    tokens: float = 0
    sampled: float = 0
    forward: float = 0
    rank: float = 0
    train: float = 0
    disk: float = 0
    dollars: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


@dataclass(frozen=True)
class Size:
    """What the work follows from: prompts of an iteration, mean tokens of a prompt and a response, the policy's parameters."""

    prompts: float
    prompt_tokens: float
    response_tokens: float
    parameters: float


def work(stage: str, wanted: params.Params, size: Size) -> Work:
    """The work of one stage (its name before the @); none where it takes seconds."""
    k = wanted.generate.samples
    count = len(wanted.iterations) + 1
    prompt, response, n = size.prompt_tokens, size.response_tokens, size.parameters
    kept = min(prompt, wanted.lengths.prompt)
    pair = kept + 2 * min(response, wanted.lengths.total - kept)  # packed: the prompt once
    weights = 2 * n if wanted.train.dtype == "bfloat16" else 4 * n
    instructions = wanted.assets.alpaca_eval.count or INSTRUCTIONS
    if stage == "generate":
        sampled = size.prompts * k * response
        return Work(size.prompts * k, sampled, sampled=sampled, disk=sampled * BYTES_PER_TOKEN)
    if stage == "rank":
        return ranked(size.prompts * k * (k - 1), prompt + 2 * response, wanted.assets.ranker)
    if stage == "reference":
        tokens = size.prompts * pair
        return Work(2 * size.prompts, tokens, forward=2 * n * tokens, disk=tokens * BYTES_PER_TOKEN)
    if stage == "train":
        pairs = size.prompts * wanted.train.stop_epoch
        per_token = (8 if wanted.train.gradient_checkpointing else 6) * n
        return Work(2 * pairs, pairs * pair, train=per_token * pairs * pair, disk=weights)
    if stage.startswith("answer"):
        texts = instructions + wanted.split.hold_out
        return Work(texts, texts * response, sampled=texts * response, disk=texts * response * BYTES_PER_TOKEN)
    if stage == "compare":
        return ranked(wanted.split.hold_out * count * (count - 1), prompt + 2 * response, wanted.assets.ranker)
    if stage.startswith("evaluate-alpaca") and wanted.evaluate_alpaca.judge != "gold":
        price = wanted.evaluate_alpaca.price_per_million_tokens or float("nan")
        return Work(instructions, instructions * JUDGE_TOKENS, dollars=instructions * JUDGE_TOKENS * price / 1e6)
    if stage.startswith("evaluate-lm") and not any(task.made_here for task in harness(wanted)):
        return Work(tokens=HARNESS_TOKENS, forward=2 * n * HARNESS_TOKENS)
    return Work()


def harness(wanted: params.Params) -> list[params.EvaluationAsset]:
    return [getattr(wanted.assets.harness, name) for name in params.HarnessAsset.model_fields]


def ranked(passes: float, tokens: float, ranker: params.RankerAsset) -> Work:
    """The work of so many passes of the ranker, of so many tokens each; the miniature's own ranker costs next to nothing."""
    flops = 0 if ranker.made_here else passes * (tokens * RANKER_FLOPS_PER_TOKEN + RANKER_FLOPS_PER_PASS)
    return Work(passes, passes * tokens, rank=flops)


def hours(done: Work, gpu: Gpu, parameters: float, gpus: int) -> float:
    """Hours on so many GPUs, start-up left out."""
    seconds = done.sampled / (gpu.sample * 8e9 / parameters)
    seconds += done.forward / (gpu.peak * gpu.forward) + done.rank / (gpu.peak * gpu.rank) + done.train / (gpu.peak * gpu.train)
    return seconds / gpus / 3600


def size_of(folder: Path, wanted: params.Params) -> tuple[Size, list[str]]:
    """The sizes of the experiment in `folder`, and what was assumed. Raises StageError where the policy's is unknown."""
    assumed = []
    drawn = sorted((folder / "data/responses").glob("*.parquet"))
    prompts = float(wanted.split.prompts_per_iteration or 0)
    if drawn:
        table = pq.read_table(drawn[0], columns=["prompt_token_ids", "token_counts"])
        lengths = pc.mean(pc.list_value_length(table["prompt_token_ids"])), pc.mean(pc.list_flatten(table["token_counts"]))
        prompt_tokens, response_tokens = (value.as_py() for value in lengths)
        prompts = prompts or table.num_rows
    else:
        prompt_tokens, response_tokens = PROMPT_TOKENS, RESPONSE_TOKENS
        assumed.append(f"{PROMPT_TOKENS} tokens a prompt and {RESPONSE_TOKENS} a response")
    if not prompts:
        prompts = PROMPTS
        assumed.append(f"{PROMPTS:,} prompts an iteration")
    return Size(prompts, prompt_tokens, response_tokens, policy_parameters(folder, wanted)), assumed


def policy_parameters(folder: Path, wanted: params.Params) -> float:
    """How many parameters the policy has: by its files where they are here. Raises StageError where nothing says."""
    base = folder / "data/models/base"
    per_parameter = 2 if wanted.engine.dtype == "bfloat16" else 4
    if (base / pointers.NAME).exists():
        files = pointers.read(base)["files"]
        return float(sum(file["size"] for name, file in files.items() if name.endswith(".safetensors")) / per_parameter)
    if base.exists():
        return sum(file.stat().st_size for file in base.glob("*.safetensors")) / per_parameter
    asset = wanted.assets.policy
    if asset.repo in PARAMETERS:
        return PARAMETERS[asset.repo]
    if asset.miniature:
        width, vocabulary = asset.miniature.hidden_size, asset.miniature.vocabulary
        return float(12 * asset.miniature.layers * width**2 + 2 * vocabulary * width)
    raise StageError(f"the size of {asset.repo} is not known: `dvc repro assets-policy` fetches it")


def would_run(folder: Path) -> dict[str, str]:
    """Stage -> why it would run: `changed` by DVC's status, or `follows` where it depends on such a one."""
    with repository.opened(folder) as repo:
        file = str(folder / "dvc.yaml")
        stages = {stage.addressing: stage for stage in repo.index.stages if Path(stage.path).samefile(file)}
        changed = set(repo.status(targets=[file]))
        pending = [stages[name] for name in stages if name in changed]
        follows: set[str] = set()
        while pending:
            for stage in repo.index.graph.predecessors(pending.pop()):  # those that need it
                if stage.addressing not in changed | follows:
                    follows.add(stage.addressing)
                    pending.append(stage)
        return {
            stage.name: "changed" if name in changed else "follows"
            for name, stage in stages.items()
            if name in changed | follows
        }


def page(folder: Path, gpus: int) -> str:
    """The plan of the experiment in `folder` as Markdown."""
    document = params.read(folder / "params.yaml")
    wanted = params.validate_unpinned(document, folder / "params.yaml")
    reasons = would_run(folder)
    if not reasons:
        return "Nothing would run: data and pipelines are up to date.\n"
    size, assumed = size_of(folder, wanted)
    rows: dict[str, tuple[list[str], Work]] = {}
    for name, reason in reasons.items():
        stage = name.partition("@")[0].removesuffix("-base")
        before = rows.get(stage, ([], Work()))
        rows[stage] = [*before[0], reason], before[1] + work(stage, wanted, size)
    total = sum((done for _, done in rows.values()), Work())

    def cells(done: Work) -> list[str]:
        flops = done.forward + done.rank + done.train + 2 * size.parameters * done.sampled
        spent = [hours(done, gpu, size.parameters, gpus) for gpu in GPUS.values()]
        counts = [f"{done.passes:,.0f}" if done.passes else "–", short(done.tokens), short(flops)]
        money = "–" if not done.dollars else f"{done.dollars:,.0f}" if done.dollars == done.dollars else "unknown"
        return [*counts, f"{done.disk / 1e9:.1f}" if done.disk else "–", money, *(f"{h:.2f}" if h else "–" for h in spent)]

    header = ["stage", "runs", "texts", "tokens", "FLOP", "GB kept", "dollars", *(f"hours, {gpus} × {name}" for name in GPUS)]
    table = [[stage, f"{len(why)}, {why.count('changed')} changed", *cells(done)] for stage, (why, done) in rows.items()]
    table.append(["all", str(len(reasons)), *cells(total)])
    return (
        markdown.table(header, table)
        + f"\n{size.prompts:,.0f} prompts an iteration, {size.prompt_tokens:.0f} tokens a prompt, {size.response_tokens:.0f} a "
        f"response, a policy of {size.parameters / 1e9:.3g} billion parameters"
        + (f" (assumed: {'; '.join(assumed)})" if assumed else " (of what is here already)")
        + ". A stage that only follows a changed one does not run where what it needs comes out as it was. Hours are "
        "estimates from published rates, without start-up and compilation: stages/plan.py names the sources.\n"
    )


def short(value: float) -> str:
    """A large number to two digits."""
    return f"{value:.1e}".replace("e+", "e") if value else "–"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.plan", description=__doc__)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path(), help="the folder of dvc.yaml (this one)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs to run on (%(default)s)")
    args = parser.parse_args()
    print(page(args.recipe, args.gpus), end="")


if __name__ == "__main__":
    try:
        main()
    except StageError as error:  # not cli.run: this is no stage
        sys.exit(f"plan: error: {error}")

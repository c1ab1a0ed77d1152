"""Estimate what `dvc repro` would run: stages, tokens, FLOPs, disk, memory, dollars, and hours on named GPUs.

The plan includes the stages that have changed, according to DVC, and all stages that depend on them; `dvc repro` skips those
whose inputs turn out unchanged.

Sizes (prompts, lengths of texts, the policy's parameters) are taken from an earlier run, or from local files that params.yaml
names, if there are any, otherwise from the assumptions in this module, which are printed with the table. stages/tools/memory.py
estimates the memory. The tool only reads, and takes none of DVC's locks, so it also works while `dvc repro` runs.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.compute as pc
import pyarrow.parquet as pq
from dvc.lock import LockNoop

from stages.artifacts import files, harness_sets, pointers
from stages.assets import alpaca_eval, prompts
from stages.reporting import markdown
from stages.runtime import params
from stages.runtime.errors import StageError, describe
from stages.runtime.params import Asset, EvaluationParams, Params
from stages.tools import options, repository
from stages.tools.memory import SHAPES, Memory, Shape, estimate_memory

Source = TypeVar("Source", bound=Asset)

PROMPTS = 20_000
PROMPT_TOKENS, RESPONSE_TOKENS = 190, 380
"""Estimates: a third of UltraFeedback, the mean lengths of its prompts and of Llama-3-8B-Instruct's responses."""

RANKER_FLOPS_PER_TOKEN, RANKER_FLOPS_PER_PASS = 0.75e9, 51.5e9
"""PairRM, a DeBERTa-v3-large of 0.4 billion parameters: its layers per token, and its relative positions per pass."""

INSTRUCTIONS = 805
"""Of AlpacaEval's set on the Hub."""
HARNESS_TOKENS = {
    "arc_challenge": 9_000_000,
    "truthfulqa_mc2": 500_000,
    "winogrande": 400_000,
    "gsm8k": 1_200_000,
    "hellaswag": 34_400_000,
    "mmlu": 37_000_000,
}
"""Estimate: prefill of each task with its few-shot examples. One GPU computes a task as a whole."""
JUDGE_TOKENS = 1_250
"""Per request to AlpacaEval's judge: instruction and two answers. Its README: 805 requests cost "less than 10 dollars"."""

BYTES_PER_TOKEN = 6
"""Disk space of a response's compressed text and token IDs in Parquet: measured on the miniature, rounded up."""

CHECKPOINT_BYTES = 8
"""Of a parameter in a training checkpoint: float32 weights and RMSProp's mean squares."""


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes and speed of one GPU: dense bf16 peak in FLOP/s, tokens per second sampled from a model of 8 billion
    parameters, and the fractions of the peak reached by forward passes of the policy, by the ranker and in training."""

    memory: float
    peak: float
    sample: float
    forward: float
    rank: float
    train: float


GPUS = {
    "H100": Gpu(memory=80e9, peak=989e12, sample=12_500, forward=0.4, rank=0.09, train=0.3),
    "A100": Gpu(memory=80e9, peak=312e12, sample=7_500, forward=0.4, rank=0.16, train=0.33),
    "RTX 4090": Gpu(memory=24e9, peak=165e12, sample=1_700, forward=0.35, rank=0.16, train=0.3),
}
"""peak: NVIDIA's data sheets (H100 and A100: SXM). sample: third-party benchmarks of vLLM (H100); vLLM's pull request 5046,
which reports 7,516 (A100, 7B); a guess for a KV cache of 8 GiB (RTX 4090). train (H100): from 18.4 pairs per second on 8 GPUs,
padded to 1024 tokens, in the baseline of a prefix-sharing DPO repository, which reports 53.2 when packed as here; padding
counts as work, since pairs are packed here. train (A100): from 11.5 pairs per second on 8 GPUs (zephyr-7b-dpo-full); padding
does not count. rank: limited by the memory's bandwidth; PairRM moves 22 MB per token at 1,000 tokens per pass, as counted on
torch's meta device, and is assumed to reach 70% of the bandwidth. Everything else: estimates."""

HOST_BANDWIDTH, OFFLOADED_BYTES = 100e9, 80
"""Bytes per second of the host's memory, and what an optimizer step there moves per parameter: gradients, clipping, RMSprop's
operations one by one, and the new weights. Estimates."""


@dataclass(frozen=True)
class Work:
    """Work of a stage: passes of texts through a model, their tokens, sampled tokens, FLOPs (forward, rank, train), bytes
    kept on disk, dollars. alone: the part of `forward` that one GPU does by itself; offloaded: bytes that optimizer steps move
    in the host's memory."""

    passes: float = 0
    tokens: float = 0
    sampled: float = 0
    forward: float = 0
    rank: float = 0
    train: float = 0
    alone: float = 0
    offloaded: float = 0
    disk: float = 0
    dollars: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


@dataclass(frozen=True)
class Size:
    """Sizes that work depends on: prompts per iteration, mean tokens of a prompt and of a response, the policy's parameters,
    and AlpacaEval's instructions.

    prompts: 0 if there are no iterations.
    """

    prompts: float
    prompt_tokens: float
    response_tokens: float
    parameters: float
    instructions: int = INSTRUCTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe_option(parser)
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    print(format_plan(args.recipe, args.gpus), end="")


def estimate_work(stage: str, settings: Params | EvaluationParams, size: Size) -> Work:
    """Estimate the work of one stage, by its name in `python -m stages NAME`; none for a stage that takes seconds."""
    if stage in EVALUATION_ESTIMATES:
        return EVALUATION_ESTIMATES[stage](settings, size)
    if isinstance(settings, Params) and stage in TRAINING_ESTIMATES:
        return TRAINING_ESTIMATES[stage](settings, size)
    return Work()


def estimate_generate(settings: Params, size: Size) -> Work:
    responses = size.prompts * settings.generate.samples
    return _sample(responses, responses * size.response_tokens)


def estimate_rank(settings: Params, size: Size) -> Work:
    samples = settings.generate.samples
    return _compare_responses(size.prompts * samples * (samples - 1), settings, size)


def estimate_reference(settings: Params, size: Size) -> Work:
    tokens = size.prompts * _pair_tokens(settings, size)
    return Work(2 * size.prompts, tokens, forward=2 * size.parameters * tokens, disk=tokens * BYTES_PER_TOKEN)


def estimate_train(settings: Params, size: Size) -> Work:
    pairs = size.prompts * settings.train.stop_epoch
    tokens = pairs * _pair_tokens(settings, size)
    per_token = (8 if settings.train.gradient_checkpointing else 6) * size.parameters
    weights = 2 * size.parameters if settings.train.checkpoint_dtype == "bfloat16" else 4 * size.parameters
    steps = (
        pairs // settings.train.global_batch if settings.train.offload == "optimizer" and not settings.train.lora.rank else 0
    )
    moved = steps * size.parameters * OFFLOADED_BYTES
    return Work(2 * pairs, tokens, train=per_token * tokens, offloaded=moved, disk=weights)


def estimate_answer_reference(settings: Params | EvaluationParams, size: Size) -> Work:
    """The miniature samples its own reference outputs; every other set comes with them."""
    count = settings.assets.alpaca_eval.count
    return _sample(count, count * size.response_tokens) if count else Work()


def estimate_answer(settings: Params | EvaluationParams, size: Size) -> Work:
    texts = size.instructions + (settings.split.hold_out if isinstance(settings, Params) else 0)
    return _sample(texts, texts * size.response_tokens)


def estimate_evaluate_alpaca(settings: Params | EvaluationParams, size: Size) -> Work:
    if settings.evaluate_alpaca.judge == "gold":
        return Work()
    price = settings.evaluate_alpaca.price_per_million_tokens or math.nan
    tokens = size.instructions * JUDGE_TOKENS
    return Work(size.instructions, tokens, dollars=tokens * price / 1e6)


def estimate_evaluate_lm(settings: Params | EvaluationParams, size: Size) -> Work:
    names = harness_sets.select_tasks(settings.evaluate_lm.tasks)
    if any(getattr(settings.assets.harness, name).made_here for name in names):
        return Work()
    tokens = [HARNESS_TOKENS[name] for name in names]
    each = 2 * size.parameters
    return Work(tokens=sum(tokens), forward=each * sum(tokens), alone=each * max(tokens))


def estimate_compare(settings: Params, size: Size) -> Work:
    models = len(settings.iterations) + 1
    return _compare_responses(settings.split.hold_out * models * (models - 1), settings, size)


def estimate_compare_answers(settings: Params | EvaluationParams, size: Size) -> Work:
    assert isinstance(settings, EvaluationParams)
    models = len(settings.models) + len(settings.answers)
    return _compare_responses(size.instructions * models * (models - 1), settings, size)


EVALUATION_ESTIMATES: dict[str, Callable[[Params | EvaluationParams, Size], Work]] = {
    "answer-reference": estimate_answer_reference,
    "answer": estimate_answer,
    "evaluate-alpaca": estimate_evaluate_alpaca,
    "evaluate-alpaca-answers": estimate_evaluate_alpaca,
    "compare-answers": estimate_compare_answers,
    "evaluate-lm": estimate_evaluate_lm,
}
TRAINING_ESTIMATES: dict[str, Callable[[Params, Size], Work]] = {
    "generate": estimate_generate,
    "rank": estimate_rank,
    "reference": estimate_reference,
    "train": estimate_train,
    "compare": estimate_compare,
}
"""The work of each stage that takes longer than seconds: of any pipeline, and of one with training."""


def _sample(texts: float, tokens: float) -> Work:
    return Work(texts, tokens, sampled=tokens, disk=tokens * BYTES_PER_TOKEN)


def _compare_responses(passes: float, settings: Params | EvaluationParams, size: Size) -> Work:
    """Passes of the ranker, each over a prompt and two responses; the miniature's own ranker costs almost nothing."""
    tokens = size.prompt_tokens + 2 * size.response_tokens
    flops = passes * (tokens * RANKER_FLOPS_PER_TOKEN + RANKER_FLOPS_PER_PASS)
    free = isinstance(settings, Params) and settings.assets.ranker.made_here
    return Work(passes, passes * tokens, rank=0 if free else flops)


def _pair_tokens(settings: Params, size: Size) -> float:
    """Tokens of a packed pair, which contains the prompt once."""
    prompt = min(size.prompt_tokens, settings.lengths.prompt)
    return prompt + 2 * min(size.response_tokens, settings.lengths.total - prompt)


def estimate_hours(work: Work, gpu: Gpu, parameters: float, gpus: int) -> float:
    """Estimate the hours on this many GPUs, not counting start-up."""
    shared = work.sampled / (gpu.sample * 8e9 / parameters)
    shared += work.rank / (gpu.peak * gpu.rank) + work.train / (gpu.peak * gpu.train)
    forward = max(work.forward / gpus, work.alone) / (gpu.peak * gpu.forward)
    return (shared / gpus + forward + work.offloaded / HOST_BANDWIDTH) / 3600


def measure_size(folder: Path, settings: Params | EvaluationParams) -> tuple[Size, list[str]]:
    """Return the sizes of the experiment in `folder`, and the assumptions made for lack of an earlier run.

    Raises StageError if the policy's number of parameters is unknown.
    """
    assumed = []
    sampled = sorted((folder / "data/responses").glob("*.parquet"))
    count = count_prompts(folder, settings) if isinstance(settings, Params) else 0
    if sampled:
        table = pq.read_table(sampled[0], columns=["prompt_token_ids", "token_counts"])
        lengths = pc.mean(pc.list_value_length(table["prompt_token_ids"])), pc.mean(pc.list_flatten(table["token_counts"]))
        prompt_tokens, response_tokens = (value.as_py() for value in lengths)
        count = table.num_rows if count is None else count
    else:
        prompt_tokens, response_tokens = PROMPT_TOKENS, RESPONSE_TOKENS
        assumed.append(f"{PROMPT_TOKENS} tokens per prompt and {RESPONSE_TOKENS} per response")
    if count is None:
        count = PROMPTS
        assumed.append(f"{PROMPTS:,} prompts per iteration")
    parameters, instructions = count_parameters(folder, settings), count_instructions(folder, settings)
    return Size(count, prompt_tokens, response_tokens, parameters, instructions), assumed


def count_prompts(folder: Path, settings: Params) -> float | None:
    """Return the number of prompts per iteration: `split.prompts_per_iteration` or, if it is null, the mean number that a local
    data set assigns to an iteration. None if that is not known before the data set is fetched."""
    asset = settings.assets.prompts
    if settings.split.prompts_per_iteration or asset.made_here:
        return settings.split.prompts_per_iteration
    if asset.on_hub or (asset.assignment and asset.assignment.on_hub):
        return None
    assigned = asset.assignment and locate(asset.assignment, folder)
    rows = prompts.read_prompts(locate(asset, folder).model_copy(update={"assignment": assigned}))
    return sum(iteration in settings.iterations for _, iteration in rows) / len(settings.iterations)


def count_instructions(folder: Path, settings: Params | EvaluationParams) -> int:
    """Count AlpacaEval's instructions: those of the miniature, of a local set, of an earlier run, or of the set on the Hub."""
    asset, fetched = settings.assets.alpaca_eval, folder / "data/alpaca_eval_set/instructions.json"
    if asset.count:
        return asset.count
    original = folder / asset.repo / alpaca_eval.REFERENCE_OUTPUTS
    if asset.on_hub and not fetched.exists():
        return INSTRUCTIONS
    return len(files.read_records(fetched if asset.on_hub or not original.exists() else original, ["instruction"]))


def locate(asset: Source, folder: Path) -> Source:
    """Return a local asset with a path that does not depend on the current folder. folder: that of params.yaml."""
    return asset.model_copy(update={"repo": str((folder / asset.repo).resolve())})


def count_parameters(folder: Path, settings: Params | EvaluationParams) -> float:
    """Count the base policy's parameters in its files or, if they are not on this machine, by their size; otherwise look them
    up. Raises StageError if unknown."""
    base = find_base(folder, settings)
    if not base:
        return find_shape(folder, settings).parameters
    try:
        return count_weights(pointers.resolve(base))
    except StageError:
        if not (base / pointers.NAME).exists():
            raise
    bytes_each = 2 if settings.engine.dtype == "bfloat16" else 4
    listed = pointers.read(base)["files"]  # a snapshot that is no longer in the Hub cache
    return float(sum(file["size"] for name, file in listed.items() if name.endswith(".safetensors")) / bytes_each)


def count_weights(folder: Path) -> float:
    """Count the parameters of a model by the headers of its safetensors files, whatever their precision. Raises StageError."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for name in pointers.list_weights(folder):
        try:
            with safe_open(files.require(folder / name), "np") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StageError(f"{folder / name} is corrupted ({describe(error)}): recreate it") from error
    return float(total)


def find_shape(folder: Path, settings: Params | EvaluationParams) -> Shape:
    """Return the shape of the base policy from its files, if they exist, or look it up. Raises StageError if unknown."""
    asset, base = get_base_asset(settings), find_base(folder, settings)
    if asset.repo in SHAPES:
        return SHAPES[asset.repo]
    if base:
        return read_shape(pointers.resolve(base) / "config.json", count_parameters(folder, settings))
    if isinstance(asset, params.PolicyAsset) and asset.miniature:
        width, vocabulary, layers = asset.miniature.hidden_size, asset.miniature.vocabulary, asset.miniature.layers
        return Shape(float(12 * layers * width**2 + 2 * vocabulary * width), layers, width, 2 * width, width, vocabulary)
    stage = "assets-policy" if isinstance(settings, Params) else "assets-model@base"
    raise StageError(f"{folder}: the number of parameters of {asset.repo} is unknown: fetch it with `dvc repro {stage}`")


def get_base_asset(settings: Params | EvaluationParams) -> Asset:
    return settings.assets.policy if isinstance(settings, Params) else settings.models[params.BASE]


def find_base(folder: Path, settings: Params | EvaluationParams) -> Path | None:
    """Return the folder of the base policy, or of its pointer: the pipeline's or, before it has run, the local original."""
    asset = get_base_asset(settings)
    places = [folder / "data/models/base", *([folder / asset.repo] if asset.is_local else [])]
    return next((place for place in places if place.is_dir()), None)


def read_shape(path: Path, parameters: float) -> Shape:
    """Read a model's shape from its config.json. Raises StageError if a size is missing."""
    config = files.read_json(path)
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        key_width = config.get("num_key_value_heads", heads) * (config.get("head_dim") or hidden // heads)
        return Shape(
            parameters, config["num_hidden_layers"], hidden, config["intermediate_size"], key_width, config["vocab_size"]
        )
    except KeyError as error:
        raise StageError(f"{path}: {error} is missing, so the memory cannot be estimated: use a model like Llama") from error


def find_stale_stages(folder: Path) -> dict[str, str]:
    """Return the stages of folder/dvc.yaml that would run: name -> `changed` itself, or `follows` a stage that changed.

    `dvc repro` would run the stage `code` first, which refreshes the other stages' fingerprints. In DVC's graph every stage
    depends on `code`; here only the stages whose fingerprint would differ count as changed. Read-only: DVC's locks are kept in
    a temporary folder, so that a running `dvc repro` is neither waited for nor disturbed. A recipe that its .dvcignore hides
    from DVC has not run: all of its stages would.
    """
    with repository.open_repository(folder) as repo, tempfile.TemporaryDirectory() as locks:
        repo.tmp_dir, repo.lock = locks, LockNoop()
        file = str(folder / "dvc.yaml")
        if repo.dvcignore.is_ignored_file(str(Path(file).resolve())):
            return dict.fromkeys(repository.list_stages(repo, folder), "changed")
        stages = {stage.addressing: stage for stage in repo.index.stages if Path(stage.path).samefile(file)}
        changed = set(repo.status(targets=[file]))
        changed |= {name for name, stage in stages.items() if has_changed_code(stage, folder)}
        follows: set[str] = set()
        pending = [stage for name, stage in stages.items() if name in changed and stage.name != "code"]
        while pending:
            for stage in repo.index.graph.predecessors(pending.pop()):  # the stages that depend on this one
                if stage.addressing not in changed | follows:
                    follows.add(stage.addressing)
                    pending.append(stage)
    return {
        stage.name: "changed" if name in changed else "follows" for name, stage in stages.items() if name in changed | follows
    }


def has_changed_code(stage: Any, folder: Path) -> bool:
    """Return whether the code of a stage (a DVC object) differs from its fingerprint in `folder`."""
    paths = [folder / dep.def_path for dep in stage.deps if Path(dep.def_path).parent == repository.FINGERPRINTS]
    return any(path.exists() and repository.find_changed_code(path.stem, path) for path in paths)


def format_plan(folder: Path, gpus: int) -> str:
    """Format the plan of the experiment in `folder` as Markdown. Raises StageError."""
    document, path = params.read(folder / "params.yaml"), folder / "params.yaml"
    validate = params.validate_evaluation if params.is_evaluation(document) else params.validate_unpinned
    settings: Params | EvaluationParams = validate(document, path)
    reasons = find_stale_stages(folder)
    if not reasons:
        return "Nothing would run: data and pipelines are up to date.\n"
    size, assumed = measure_size(folder, settings)
    shape = find_shape(folder, settings)
    rows: dict[str, tuple[list[str], Work]] = {}
    for name, reason in reasons.items():
        stage = name.partition("@")[0].removesuffix("-base")
        others, work = rows.get(stage, ([], Work()))
        rows[stage] = [*others, reason], work + estimate_work(stage, settings, size)
    costs = {
        stage: (work, estimate_memory(stage, settings, shape, gpus) if work != Work() else Memory())
        for stage, (_, work) in rows.items()
    }
    header = ["stage", "runs", "texts", "tokens", "FLOP", "GB kept", "dollars", "GB per GPU", "GB host"]
    table = [
        [stage, f"{len(why)}, {why.count('changed')} changed", *format_cells([costs[stage]], size, gpus)]
        for stage, (why, _) in rows.items()
    ]
    table.append(["all", str(len(reasons)), *format_cells(list(costs.values()), size, gpus)])
    return markdown.table(header + [f"hours, {gpus} × {name}" for name in GPUS], table) + explain_plan(size, assumed, settings)


def format_cells(costs: list[tuple[Work, Memory]], size: Size, gpus: int) -> list[str]:
    """Format the cells of a row: passes, tokens, FLOPs, GB on disk, dollars, GB of memory, and hours on each of GPUS.

    costs: the work and memory of the row's stages, which run one after the other.
    """
    work = sum((work for work, _ in costs), Work())
    memory = Memory(max(memory.gpu for _, memory in costs), max(memory.host for _, memory in costs))
    flops = work.forward + work.rank + work.train + 2 * size.parameters * work.sampled
    return [
        f"{work.passes:,.0f}" if work.passes else "–",
        format_count(work.tokens),
        format_count(flops),
        f"{work.disk / 1e9:.1f}" if work.disk else "–",
        "–" if not work.dollars else "unknown" if math.isnan(work.dollars) else f"{work.dollars:,.0f}",
        *(f"{value / 1e9:.1f}" if value else "–" for value in (memory.gpu, memory.host)),
        *(format_hours([work for work, _ in costs], memory, gpu, size.parameters, gpus) for gpu in GPUS.values()),
    ]


def format_hours(works: list[Work], memory: Memory, gpu: Gpu, parameters: float, gpus: int) -> str:
    """Format the hours of stages that run one after the other, or say that they need more memory than the GPU has."""
    hours = sum(estimate_hours(work, gpu, parameters, gpus) for work in works)
    if not hours:
        return "–"
    return "too little memory" if memory.gpu > gpu.memory else f"{hours:.2f}"


def format_count(value: float) -> str:
    """Format a large number with two digits, or zero as a dash."""
    return f"{value:.1e}".replace("e+", "e") if value else "–"


def explain_plan(size: Size, assumed: list[str], settings: Params | EvaluationParams) -> str:
    """Describe the sizes and assumptions behind the table."""
    source = f"assumed: {'; '.join(assumed)}" if assumed else "measured on the data of an earlier run"
    prompts = f"{size.prompts:,.0f} prompts per iteration, " if size.prompts else ""
    devices = f" reference and train use {settings.train.devices} (`train.devices`)." if isinstance(settings, Params) else ""
    cache = (
        " vLLM takes 90% of a GPU, because `engine.kv_cache_gib` is null; its rows have the least that it needs, a KV cache "
        "for one request of `engine.max_model_length` tokens."
        if settings.engine.kv_cache_gib is None
        else ""
    )
    return (
        f"\n{prompts}{size.prompt_tokens:.0f} tokens per prompt, {size.response_tokens:.0f} per response, a policy of "
        f"{size.parameters / 1e9:.3g} billion parameters ({source}). A stage that only follows a changed one is skipped if its "
        f"inputs turn out unchanged. Memory: the peak of one stage, on each GPU and on the host.{devices}{cache}"
        f"{explain_checkpoints(size, settings)} Hours are estimates from published speeds, without start-up and compilation: "
        "allow twice as long. stages/tools/plan.py and stages/tools/memory.py name the sources.\n"
    )


def explain_checkpoints(size: Size, settings: Params | EvaluationParams) -> str:
    """Describe the disk space of the checkpoints that all weights are trained with, which is not in the table."""
    if not isinstance(settings, Params) or settings.train.lora.rank or not settings.train.checkpoint_steps:
        return ""
    return (
        f" While it trains, train takes another {2 * CHECKPOINT_BYTES * size.parameters / 1e9:.3g} GB in scratch/, for two "
        "checkpoints (none with `train.checkpoint_steps=0`)."
    )

"""Estimate what `dvc repro` would run: stages, tokens, FLOPs, disk, memory, dollars, and hours on named GPUs.

The plan includes the stages that have changed, according to DVC, and all stages that depend on them; `dvc repro` skips those
whose inputs turn out unchanged.

The estimates are in stages/tools/planning/: sizes of the experiment, the work that follows from them, rates with their sources,
hours and memory. The tool only reads, and takes none of DVC's locks, so it also works while `dvc repro` runs.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from dvc.lock import LockNoop

from stages.reporting import markdown
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.params import EvaluationParams, Params
from stages.tools import options, repository
from stages.tools.planning.hours import Machine, estimate_seconds
from stages.tools.planning.memory import Memory, Shape, estimate_memory, name_remedy
from stages.tools.planning.methods import CURRENT
from stages.tools.planning.rates import GPUS, Gpu
from stages.tools.planning.sizes import Size, find_shape, measure_size
from stages.tools.planning.work import CHECKPOINT_BYTES, Work, estimate_work


class Cost(NamedTuple):
    """What the runs of one stage cost together: work and seconds on each of GPUS; and the memory of one run."""

    work: Work
    memory: Memory
    seconds: dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe_option(parser)
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    print(format_plan(args.recipe, args.gpus), end="")


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
    if gpus < 1 or gpus % settings.engine.tensor_parallel:
        raise StageError(
            f"--gpus {gpus} is not a multiple of engine.tensor_parallel ({settings.engine.tensor_parallel}): change one"
        )
    reasons = find_stale_stages(folder)
    if not reasons:
        return "Nothing would run: data and pipelines are up to date.\n"
    size, assumed = measure_size(folder, settings)
    shape = find_shape(folder, settings)
    runs: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        runs.setdefault(name.partition("@")[0].removesuffix("-base"), []).append(reason)
    costs = {stage: estimate_cost(stage, len(why), settings, size, shape, gpus) for stage, why in runs.items()}
    header = ["stage", "runs", "texts", "tokens", "FLOP", "GB kept", "dollars", "GB per GPU", "GB host"]
    table = [
        [stage, f"{len(why)}, {why.count('changed')} changed", *format_cells([costs[stage]], size)]
        for stage, why in runs.items()
    ]
    table.append(["all", str(len(reasons)), *format_cells(list(costs.values()), size)])
    return (
        markdown.table(header + [f"hours, {gpus} × {name}" for name in GPUS], table)
        + explain_plan(size, assumed, settings)
        + warn_of_memory(costs, settings)
    )


def estimate_cost(stage: str, runs: int, settings: Params | EvaluationParams, size: Size, shape: Shape, gpus: int) -> Cost:
    """Estimate what `runs` runs of a stage cost, by its name in `python -m stages NAME`, on `gpus` GPUs of each kind."""
    work = sum([estimate_work(stage, settings, size, CURRENT)] * runs, Work())
    memory = estimate_memory(stage, settings, shape, gpus) if work != Work() else Memory()
    seconds = {
        name: runs * estimate_seconds(stage, settings, size, shape, Machine(gpu, gpus, CURRENT)).total
        for name, gpu in GPUS.items()
    }
    return Cost(work, memory, seconds)


def format_cells(costs: list[Cost], size: Size) -> list[str]:
    """Format the cells of a row: passes, tokens, FLOPs, GB on disk, dollars, GB of memory, and hours on each of GPUS.

    costs: those of the row's stages, which run one after the other.
    """
    work = sum((cost.work for cost in costs), Work())
    gpu, host = max(cost.memory.gpu for cost in costs), max(cost.memory.host for cost in costs)
    flops = work.forward + work.rank + work.train + 2 * size.parameters * work.sampled
    return [
        f"{work.passes:,.0f}" if work.passes else "–",
        format_count(work.tokens),
        format_count(flops),
        f"{work.disk / 1e9:.1f}" if work.disk else "–",
        "–" if not work.dollars else "unknown" if math.isnan(work.dollars) else f"{work.dollars:,.0f}",
        *(f"{value / 1e9:.1f}" if value else "–" for value in (gpu, host)),
        *(
            format_hours(sum(cost.seconds[name] for cost in costs), all(fits(cost.memory, kind) for cost in costs))
            for name, kind in GPUS.items()
        ),
    ]


def fits(memory: Memory, gpu: Gpu) -> bool:
    """Return whether a stage needs no more memory than it may take of a GPU."""
    return memory.gpu <= memory.share * gpu.memory.value


def format_hours(seconds: float, fitting: bool) -> str:
    """Format the hours of stages, or say that a GPU has too little memory for them. fitting: as `fits` returns."""
    if not seconds:
        return "–"
    return f"{seconds / 3600:.2f}" if fitting else "too little memory"


def format_count(value: float) -> str:
    """Format a large number with two digits, or zero as a dash."""
    return f"{value:.1e}".replace("e+", "e") if value else "–"


def explain_plan(size: Size, assumed: list[str], settings: Params | EvaluationParams) -> str:
    """Describe the sizes and assumptions behind the table."""
    source = f"assumed: {'; '.join(assumed)}" if assumed else "measured on the data of an earlier run"
    prompts = f"{size.prompts:,.0f} prompts per iteration, " if size.prompts else ""
    devices = f" reference and train use {settings.train.devices} (`train.devices`)." if isinstance(settings, Params) else ""
    cache = (
        f" vLLM takes {settings.engine.gpu_memory_utilization:.0%} of a GPU, because `engine.kv_cache_gib` is null; its rows "
        "have the least that it needs, a KV cache for one request of `engine.max_model_length` tokens."
        if settings.engine.kv_cache_gib is None
        else ""
    )
    return (
        f"\n{prompts}{size.prompt_tokens:.0f} tokens per prompt, {size.response_tokens:.0f} per response, a policy of "
        f"{size.parameters / 1e9:.3g} billion parameters ({source}). A stage that only follows a changed one is skipped if its "
        f"inputs turn out unchanged. Memory: the peak of one stage, on each GPU and on the host.{devices}{cache}"
        f"{explain_checkpoints(size, settings)} Hours are estimates from published speeds and guesses, with start-up, without "
        "downloads: allow twice as long. docs/performance.md lists the rates and their sources.\n"
    )


def explain_checkpoints(size: Size, settings: Params | EvaluationParams) -> str:
    """Describe the disk space of the checkpoints that all weights are trained with, which is not in the table."""
    if not isinstance(settings, Params) or settings.train.lora.rank or not settings.train.checkpoint_steps:
        return ""
    return (
        f" While it trains, train takes another {2 * CHECKPOINT_BYTES * size.parameters / 1e9:.3g} GB in scratch/, for two "
        "checkpoints (none with `train.checkpoint_steps=0`)."
    )


def warn_of_memory(costs: dict[str, Cost], settings: Params | EvaluationParams) -> str:
    """Return a line for each stage and kind of GPU that has too little memory for it, with the parameter to change."""
    lines = [
        f"- {stage} needs {cost.memory.gpu / 1e9:.1f} GB on a GPU, and {describe_available(cost.memory, name)}: "
        f"{name_remedy(stage, settings)}"
        for stage, cost in costs.items()
        for name, gpu in GPUS.items()
        if not fits(cost.memory, gpu)
    ]
    return "".join(["\nToo little memory:\n\n", *(f"{line}\n" for line in lines)]) if lines else ""


def describe_available(memory: Memory, name: str) -> str:
    """Describe what a stage may take of a GPU of a kind, a key of GPUS."""
    available = GPUS[name].memory.value / 1e9
    if memory.share == 1:
        return f"{name} has {available:.0f} GB"
    return f"vLLM may take {memory.share * available:.1f} of the {available:.0f} GB of {name}"

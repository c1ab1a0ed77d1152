"""Where the results come from: the method's parameters, the assets and their hashes, each stage's devices and tools."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.reporting import markdown
from stages.reporting.inputs import REMEDY
from stages.reporting.published import TASKS
from stages.runtime.errors import StageError
from stages.runtime.params import Asset, Assets

ASSETS = {
    "policy": "models/base",
    "ranker": "ranker",
    "prompts": "prompts.parquet",
    "alpaca-eval": "alpaca_eval_set",
    "harness": "harness_sets",
}
"""Asset -> its path in the data folder."""
TOO_LONG = {
    "drop": "drop: left out",
    "truncate": "truncate: the start of the prompt, then the end of the responses, as far as needed",
    "released": "released: the prompt to its limit, then the responses to the rest of the total",
}
"""Value of lengths.too_long -> the value and its rule, for pairs that do not fit."""


def format_provenance(settings: Any, data: Path) -> str:
    """Format provenance.md.

    settings: the sections that `format_method` needs, `assets` and `iterations`, as returned by `params.load`; data: the folder
    with the assets and records. Raises StageError if an asset is missing or a record is invalid.
    """
    return (
        "# Provenance\n\n## Method\n\n"
        "Parameters for which the released code deviates from the paper, or which the paper leaves open. A dash means that the "
        "value is not stated. Other bugs of the released code are fixed unconditionally; see `docs/method.md`.\n\n"
        + format_method(settings)
        + "\n## Assets\n\n"
        + format_assets(settings.assets, data)
        + "\nMD5: the hash that DVC records for the asset. `dvc.lock` of the same commit has the hashes of all other artifacts "
        "and the parameters of every stage.\n" + "\n## Stages\n\n" + format_stages(data / "records", settings.iterations)
    )


def format_models_provenance(settings: Any, data: Path) -> str:
    """Format provenance.md of a pipeline that evaluates existing models.

    settings: the sections of EvaluationParams, as returned by `params.load`; data: the folder with the models, answers, assets
    and records. Raises StageError if one of them is missing or a record is invalid.
    """
    harness = [getattr(settings.assets.harness, task) for task in TASKS]
    models = {name: (name_source(asset), data / "models" / name) for name, asset in settings.models.items()}
    answers = {name: (path, data / "answers" / f"{name}.json") for name, path in settings.answers.items()}
    assets = {
        "alpaca-eval": (name_source(settings.assets.alpaca_eval), data / ASSETS["alpaca-eval"]),
        "harness": (name_sources(harness), data / ASSETS["harness"]),
    }
    for name, asset in settings.rankers.items():
        assets[name] = (name_sources([asset, asset.base]), data / "models" / name)
    names = [*settings.models, *settings.answers, *settings.rankers]
    return (
        f"# Provenance\n\n## Settings\n\n{format_settings(settings)}\n## Models\n\n{format_sources('model', models | answers)}"
        "\nMD5: the hash that DVC records for the checkpoint, for the pointer to one on the Hub, or for the answers. "
        "`dvc.lock` of the same commit has the hashes of all other artifacts and the parameters of every stage.\n"
        f"\n## Assets\n\n{format_sources('asset', assets)}"
        f"\n## Stages\n\n{format_stages(data / 'records', names)}"
    )


def format_settings(settings: Any) -> str:
    """Format the table of the parameters of an evaluation. settings: the sections of EvaluationParams that are not assets."""
    ranked = ["rank"] if settings.rankers else []
    sections = {name: getattr(settings, name) for name in ("engine", "answer", *ranked, "evaluate_alpaca", "evaluate_lm")}
    values = {"seed": settings.seed, "numerics": settings.numerics}
    for name, section in sections.items():
        values |= {f"{name}.{key}": value for key, value in section.model_dump(exclude_unset=True).items()}
    rows = [[key, "null" if value is None else str(value)] for key, value in values.items()]
    return markdown.table(["parameter", "value"], rows, text=True)


def format_method(settings: Any) -> str:
    """Format the table of `list_method`."""
    return markdown.table(["setting", "parameter", "this run", "paper", "released code"], list_method(settings), text=True)


def list_method(settings: Any) -> list[list[str]]:
    """List the parameters in which the released code deviates from the paper, or which the paper leaves open.

    settings: the sections numerics, eta, generate, rank, lengths and train, as returned by `params.load`.
    A row: setting, parameter, and its value in this run, in the paper and in the released code; a dash: not stated.
    """
    train, generate, rank, lengths = settings.train, settings.generate, settings.rank, settings.lengths
    clipping, adapters = train.max_grad_norm, train.lora.rank
    return [
        ["loss", "train.loss", train.loss, "sppo", "sppo"],
        ["step size η", "eta", f"{settings.eta:g}", "1000", "1000 (1 / 0.001)"],
        ["P^ from logits", "rank.probability", rank.probability, "pairwise", "aggregate"],
        ["scale of the logits", "rank.scale", f"{rank.scale:g}", "–", "– (llm-blender: 1)"],
        ["ranker input", "rank.input", rank.input, "–", "templated"],
        ["responses per prompt (K)", "generate.samples", str(generate.samples), "5", "5"],
        [
            "temperature, top-p",
            "generate.temperature, top_p",
            f"{generate.temperature}, {generate.top_p}",
            "1.0, 1.0",
            "0.7, 0.9",
        ],
        ["maximum response length", "generate.max_new_tokens", str(generate.max_new_tokens), "–", "2048"],
        ["maximum length of prompt, pair", "lengths.prompt, total", f"{lengths.prompt}, {lengths.total}", "–", "512, 1024"],
        ["pairs that are too long", "lengths.too_long", TOO_LONG[lengths.too_long], "–", TOO_LONG["released"]],
        [
            "epochs of the schedule, stop after",
            "train.epochs, stop_epoch",
            f"{train.epochs:g}, {train.stop_epoch:g}",
            "18 or 6, 1",
            "1, 1",
        ],
        ["learning rate", "train.learning_rate", f"{train.learning_rate:g}", "5e-07", "5e-07"],
        ["global batch size", "train.global_batch", str(train.global_batch), "64", "64"],
        ["gradient clipping", "train.max_grad_norm", f"{clipping:g}" if clipping else "none", "–", "none"],
        ["LoRA rank", "train.lora.rank", str(adapters) if adapters else "none", "none", "none"],
        ["precision of training", "train.dtype", train.dtype, "–", "bfloat16"],
        ["precision between iterations", "train.checkpoint_dtype", train.checkpoint_dtype, "–", "bfloat16"],
        ["numerics on CPUs", "numerics", settings.numerics, "–", "–"],
    ]


def format_assets(assets: Assets, data: Path) -> str:
    """Format the table of the assets' sources, pinned revisions and hashes. Raises StageError if an asset is missing."""
    sources: dict[str, list[Asset]] = {
        "policy": [assets.policy],
        "ranker": [assets.ranker, *filter(None, [assets.ranker.base])],
        "prompts": [assets.prompts, *filter(None, [assets.prompts.assignment])],
        "alpaca-eval": [assets.alpaca_eval],
        "harness": [getattr(assets.harness, task) for task in TASKS],
    }
    return format_sources("asset", {name: (name_sources(parts), data / ASSETS[name]) for name, parts in sources.items()})


def name_sources(assets: Iterable[Asset]) -> str:
    """Return where assets come from, each source once: the seed, a directory, or a revision on the Hub."""
    return ", ".join(dict.fromkeys(map(name_source, assets)))


def name_source(asset: Asset) -> str:
    if asset.made_here:
        return "generated from the seed"
    return f"{asset.repo}@{asset.revision}" if asset.on_hub else asset.repo


def format_sources(kind: str, sources: dict[str, tuple[str, Path]]) -> str:
    """Format a table of sources and hashes. kind: what the rows are. sources: name -> source, and the file or folder to hash.

    Raises StageError if a file or folder is missing.
    """
    rows = [[name, source, files.dvc_md5(files.require(path))] for name, (source, path) in sources.items()]
    return markdown.table([kind, "source", "MD5"], rows, text=True, hashes=True)


def format_stages(records: Path, names: Collection[str]) -> str:
    """Format the table of the devices, numerics and tools of each stage; stages that ran with the same ones share a row.

    records: the folder of the stages' records. Those of iterations or models that are not in `names` are left out.
    Raises StageError for an invalid record.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(records.glob("*.json")):
        _, at, name = path.stem.partition("@")
        if at and name not in names:
            continue  # left by an earlier run that had this iteration or model
        record = files.read_json(path)
        try:
            tools = ", ".join(f"{name} {version}" for name, version in sorted(record["tools"].items()))
            device = f"{record['device']['count']} x {record['device']['kind']}"
            groups.setdefault((device, record["numerics"] or "–", record["python"], tools), []).append(path.stem)
        except (KeyError, TypeError, AttributeError) as error:
            raise StageError(f"{path}: not a valid record of a stage ({error}): {REMEDY}") from error
    rows = [[", ".join(names), *key] for key, names in groups.items()]
    return markdown.table(["stages", "devices", "numerics", "Python", "tools"], rows, text=True)

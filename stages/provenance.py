"""Where the figures come from: the form of the method, the assets and their hashes, the tools and devices of every stage."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages import files, markdown, params
from stages.cli import StageError


def method(wanted: Any) -> str:
    """The parameters in which the released code departs from the paper, and their values here.

    wanted: what params.load gives for the keys below.
    """
    train, generate, rank = wanted.train, wanted.generate, wanted.rank
    rows = [
        ["loss", "train.loss", train.loss, "sppo", "sppo"],
        ["step size η", "eta", f"{wanted.eta:g}", "1000", "1 / 0.001"],
        ["P^ from logits", "rank.probability", rank.probability, "pairwise", "aggregate"],
        ["the ranker's prompt", "rank.input", rank.input, "–", "templated"],
        ["K", "generate.samples", str(generate.samples), "5", "5"],
        [
            "temperature, top-p",
            "generate.temperature, top_p",
            f"{generate.temperature}, {generate.top_p}",
            "1.0, 1.0",
            "0.7, 0.9",
        ],
        ["longest response", "generate.max_new_tokens", str(generate.max_new_tokens), "–", "2048"],
        ["longest prompt, pair", "lengths.prompt, total", f"{wanted.lengths.prompt}, {wanted.lengths.total}", "–", "512, 1024"],
        ["too long", "lengths.too_long", wanted.lengths.too_long, "–", "truncate"],
        [
            "epochs of the schedule, stop at",
            "train.epochs, stop_epoch",
            f"{train.epochs:g}, {train.stop_epoch:g}",
            "18 or 6, 1",
            "1, 1",
        ],
        ["learning rate", "train.learning_rate", f"{train.learning_rate:g}", "5e-07", "5e-07"],
        ["global batch", "train.global_batch", str(train.global_batch), "64", "64"],
        [
            "gradient clipping",
            "train.max_grad_norm",
            f"{train.max_grad_norm:g}" if train.max_grad_norm else "none",
            "–",
            "none",
        ],
        ["adapters", "train.lora.rank", str(train.lora.rank) if train.lora.rank else "none", "none", "none"],
        ["precision between iterations", "train.dtype", train.dtype, "–", "bfloat16"],
    ]
    return markdown.table(["", "parameter", "here", "paper", "released code"], rows, text=True)


def assets(wanted: params.Assets, lock: dict[str, Any]) -> str:
    """The assets' sources, pinned revisions and the hashes under which DVC keeps what was made of them."""
    sources: dict[str, list[params.Asset]] = {
        "policy": [wanted.policy],
        "ranker": [wanted.ranker, *filter(None, [wanted.ranker.base])],
        "prompts": [wanted.prompts, *filter(None, [wanted.prompts.parts])],
        "alpaca-eval": [wanted.alpaca_eval],
        "harness": [getattr(wanted.harness, task) for task in params.HarnessAsset.model_fields],
    }
    rows = []
    for name, found in sources.items():
        outs = lock.get("stages", {}).get(f"assets-{name}", {}).get("outs", [])
        hashes = ", ".join(out["md5"] for out in outs if not out["path"].startswith("data/records"))
        origins = dict.fromkeys("made here from the seed" if one.made_here else f"{one.repo}@{one.revision}" for one in found)
        rows.append([name, ", ".join(origins), hashes or "not in dvc.lock"])
    return markdown.table(["asset", "source", "MD5 in dvc.lock"], rows, text=True)


def circumstances(records: Path, iterations: dict[str, str]) -> str:
    """Which stages ran with which tools on which devices: stages of the same circumstances share a row."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for path in sorted(records.glob("*.json")):
        _, at, iteration = path.stem.partition("@")
        if at and iteration not in iterations:
            continue  # of an earlier run with other iterations
        record = files.read_json(path)
        try:
            tools = ", ".join(f"{name} {version}" for name, version in sorted(record["tools"].items()))
            device = f"{record['device']['count']} x {record['device']['kind']}"
            groups.setdefault((device, record["python"], tools), []).append(path.stem)
        except (KeyError, TypeError, AttributeError) as error:
            raise StageError(f"{path}: no record of a stage ({error}): make it with `dvc repro`") from error
    rows = [[", ".join(names), *key] for key, names in groups.items()]
    return markdown.table(["stages", "devices", "Python", "tools"], rows, text=True)


def page(wanted: Any, data: Path, lock: Path) -> str:
    """provenance.md."""
    locked: dict[str, Any] = YAML(typ="safe").load(lock) if lock.exists() else {}
    return (
        "# Provenance\n\n## Method\n\n"
        "A dash: not stated. What else the released code does otherwise is mended for good: README.md.\n\n"
        + method(wanted)
        + "\n## Assets\n\n"
        + assets(wanted.assets, locked)
        + "\nThe hashes of every other artifact, and the parameters of every stage, are in `dvc.lock` of the same commit.\n"
        + "\n## Stages\n\n"
        + circumstances(data / "records", wanted.iterations)
    )

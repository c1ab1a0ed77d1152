"""Record which results a run reproduced on which machine: reproductions/NAME.json.

Run it after the experiment. The file compares the run with the committed one (HEAD), and describes the machine, the
versions and the headline metrics. docs/reproductions.md says how to share it.
"""

import argparse
import hashlib
import platform
import re
from collections import Counter
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.artifacts.machine import describe_machine
from stages.artifacts.records import FOLDER as RECORDS
from stages.artifacts.records import MACHINES
from stages.reporting import reproductions, seeds
from stages.runtime import params
from stages.runtime.errors import StageError, quote
from stages.runtime.params import BASE
from stages.tools import changes, git, locks, options, plan, revisions

FOLDER = "reproductions"
"""In the root of the repository."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe_option(parser)
    parser.add_argument("--name", help="name of the file, without .json (default: CPU-commit)")
    parser.add_argument("--emulated", metavar="TEXT", help="if this CPU is emulated: what emulates it, and on which real CPU")


def main(args: argparse.Namespace) -> None:
    """Write the file and print where, and whether the results are the same."""
    values = collect(args.recipe, args.emulated)
    run = reproductions.validate(values, f"results in {args.recipe}", "recreate them with `dvc repro`")
    name = args.name or f"{slugify(run.machine.processor)}-{run.commit[:7]}"
    if name != slugify(name):
        raise StageError(f"--name {name!r}: use a-z, 0-9 and '-', such as {slugify(name)!r}")
    path = git.root(args.recipe) / FOLDER / f"{name}.json"
    files.write_json(values, path)
    result = "same results as" if run.same else f"results differ, from stage {run.first_difference} on, from"
    print(f"{FOLDER}/{path.name}: {result} commit {run.commit[:7]}. `make sync` adds it to docs/reproductions.md.")


def slugify(text: str) -> str:
    """Turn a text into a file name of a-z, 0-9 and single hyphens."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def collect(folder: Path, emulated: str | None) -> dict[str, Any]:
    """Collect the content of the file: the run in `folder` (of dvc.yaml), this machine, and the comparison with HEAD.

    Raises StageError if the run is missing or incomplete, or HEAD has no results.
    """
    committed, current = revisions.read_revision("HEAD", folder), revisions.read_revision(revisions.WORKSPACE, folder)
    require_complete(folder, current)
    if committed.stages is None:
        raise StageError(f"HEAD has no {folder / revisions.LOCK} to compare this run with: commit the run instead")
    comparison = locks.compare(committed.stages, current.stages or {})
    machine = describe_machine()
    paths = list_records(folder, current)
    records = [read_record(path) for path in paths]
    return {
        "commit": git.head(folder),
        "dirty": bool(git.find_uncommitted(folder)),
        "recipe": folder.resolve().relative_to(git.root(folder)).as_posix(),
        "lock_sha256": hashlib.sha256((folder / revisions.LOCK).read_bytes()).hexdigest(),
        "machine": machine | {"gpus": dict(Counter(machine["gpus"])) or None, "emulated": emulated},
        "numerics": summarize_numerics(records),
        "versions": collect_versions(records),
        "stages": comparison.stages,
        "first_difference": comparison.first_difference,
        "outputs": comparison.outputs,
        "differing_outputs": comparison.differing,
        "not_run_here": find_foreign_stages(paths, folder, machine),
        "figures": collect_figures(current.metrics or {}, folder / revisions.PARAMS),
        "note": None,
    }


def require_complete(folder: Path, run: revisions.Revision) -> None:
    """Raise StageError unless the experiment in `folder` has run to completion."""
    for name, content in ((revisions.LOCK, run.stages), (revisions.METRICS, run.metrics)):
        if content is None:
            raise revisions.no_run(folder / name)
    stale = [stage for stage in plan.find_stale_stages(folder) if stage != locks.CODE]
    if stale:
        raise StageError(
            f"{folder / revisions.LOCK}: {len(stale)} stages would run, first {stale[0]}: finish the run with `dvc repro`"
        )


def list_records(folder: Path, run: revisions.Revision) -> list[Path]:
    """Return the records of the run's stages, in the order of dvc.lock."""
    outs = [path for entry in (run.stages or {}).values() for path in revisions.hash_outputs(entry)]
    return [folder / path for path in outs if Path(path).parent == RECORDS]


def read_record(path: Path) -> dict[str, Any]:
    """Read a stage's record of its versions and numerics. Raises StageError if it is not valid."""
    record: dict[str, Any] = files.read_json(path)
    tools = record.get("tools") if isinstance(record, dict) else None
    texts = [*tools, *tools.values(), record.get("numerics") or ""] if isinstance(tools, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise StageError(f"{path}: {quote(record)} has no texts under 'tools' and 'numerics': {files.suggest_remedy(path)}")
    return record


def summarize_numerics(records: list[dict[str, Any]]) -> str | None:
    """Return the numerics that the stages recorded, `mixed` if they are not the same, or None if no stage recorded any."""
    used = {record["numerics"] for record in records if record.get("numerics")}
    return "mixed" if len(used) > 1 else next(iter(used), None)


def collect_versions(records: list[dict[str, Any]]) -> dict[str, str]:
    """Return the exact version of Python, and of each library in the records; several versions are joined by commas."""
    versions: dict[str, set[str]] = {}
    for record in records:
        for name, version in record["tools"].items():
            versions.setdefault(name, set()).add(version)
    return {"python": platform.python_version()} | {name: ", ".join(sorted(found)) for name, found in versions.items()}


def find_foreign_stages(records: list[Path], folder: Path, machine: dict[str, Any]) -> list[str]:
    """Return the stages that, according to what they wrote in scratch/, did not run on this machine's processor and GPUs."""
    foreign = []
    for record in records:
        path = folder / MACHINES / record.name
        ran_on = files.read_json(path) if path.exists() else {}
        ran_on = ran_on if isinstance(ran_on, dict) else {}
        if any(ran_on.get(key) != machine[key] for key in ("processor", "instruction_set", "gpus")):
            foreign.append(record.stem)
    return foreign


def collect_figures(metrics: changes.Flat, path: Path) -> dict[str, Any]:
    """Return the win rate of every model, and the gain of the last iteration (in params.yaml, `path`) with its paired error.

    Raises StageError if metrics.json lacks one of them.
    """
    iterations = list(changes.read_starts(params.read(path), str(path)))
    if not iterations:
        raise StageError(f"{path}: 'iterations' has none: add one")
    last = iterations[-1]
    rates = {key[1]: value for key, value in metrics.items() if key[0] == "alpaca_eval" and key[2:] == ("win_rate",)}
    for name in (BASE, last):
        if not seeds.is_number(rates.get(name)):
            raise StageError(
                f"{path.parent / revisions.METRICS}: 'alpaca_eval.{name}.win_rate' is missing or not a number: "
                "recreate it with `dvc repro`"
            )
    paired = ("alpaca_eval", last, "vs_base")
    gain = {"difference": rates[last] - rates[BASE], "standard_error": None}
    gain |= {key: metrics[*paired, key] for key in gain if (*paired, key) in metrics}
    return {"win_rates": rates, "last": last, "gain": gain}

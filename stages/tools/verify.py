"""Check that every artifact in dvc.lock exists, matches its hash and schema, and reproduces the reports.

DVC does not re-read files that it has hashed: it trusts the modification time of a file in the workspace and the write
protection of a file in its cache. This tool reads every file in both places, and every file in the Hub's cache that a pointer
stands for. It then checks the schemas of intact copies, and regenerates the reports from them, byte for byte, in a temporary
folder. Nothing else is written: paths in dvc.lock and in the cache's listings that lead out of the experiment's folder are
refused. Inputs that no stage writes, such as local assets, are compared with dvc.lock too.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dvc.ignore import DvcIgnoreFilter
from tqdm import tqdm

from stages.artifacts import files, pointers, schemas, tables
from stages.runtime import catalog, params
from stages.runtime.errors import StageError, escape_controls, one_line, quote
from stages.runtime.paths import ROOT
from stages.tools import locks, options, repository, revisions

INTACT, MISSING, CORRUPTED = "intact", "missing", "corrupted"
REPORTS = ("report", "report-models")
"""The stages that write reports; a pipeline has one of them."""
RESTORE = "restore dvc.lock with Git, or run the experiment with `dvc repro`"

Copies = dict[Path, Path | None]
"""Path in the workspace of a file that dvc.lock covers -> an intact copy, or None if there is none."""


@dataclass(frozen=True)
class Artifact:
    """An output in dvc.lock."""

    stage: str
    path: Path
    """Its path in the workspace."""
    md5: str
    """MD5 of a file's bytes or, with the suffix `.dir`, of a folder's listing."""
    size: int
    """Number of files."""
    cached: bool
    """Whether DVC caches it; otherwise it is in Git."""
    recreate: str
    """The command that runs its stage again."""


@dataclass(frozen=True)
class Cache:
    """DVC's cache, and the MD5s computed so far: files in the workspace may be links to the cache."""

    folder: Path
    ignore: DvcIgnoreFilter
    """What DVC leaves out of folders in the workspace."""
    known: dict[files.Inode, str] = field(default_factory=dict)

    def locate(self, md5: str) -> Path:
        """Return the path of a file or a folder's listing in the cache."""
        return self.folder / md5[:2] / md5[2:]

    def check(self, path: Path, md5: str) -> str:
        """Return the state of a file or folder, in the cache or elsewhere, whose MD5 must be `md5`."""
        if not path.is_file() and not path.is_dir():  # a device or a pipe could be read without end
            return MISSING
        return INTACT if repository.hash_path(path, self.ignore, self.known) == md5 else CORRUPTED


@dataclass
class Result:
    """The result of a check: faults, one line each; the files that it covered; the number of tables with a schema."""

    faults: list[str] = field(default_factory=list)
    copies: Copies = field(default_factory=dict)
    tables: int = 0

    def extend(self, other: "Result") -> None:
        self.faults += other.faults
        self.copies |= other.copies
        self.tables += other.tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe_option(parser)


def main(args: argparse.Namespace) -> None:
    """Print the faults. Exits with code 1 if there are any."""
    faults, summary = verify(args.recipe)
    for line in faults:
        print(escape_controls(line))
    count = pluralize(len(faults), "fault") if faults else "no faults"
    print(f"{count}: {summary}", file=sys.stderr if faults else sys.stdout)
    sys.exit(bool(faults))


def verify(folder: Path) -> tuple[list[str], str]:
    """Check the experiment in `folder` (of dvc.yaml).

    Returns the faults, one line each, and a summary of what was checked. Raises StageError if there is no dvc.lock.
    """
    started = time.monotonic()
    stages = read_lock(folder / "dvc.lock")
    with repository.open_repository(folder) as repo:
        cache = Cache(Path(repo.cache.local.path), repo.dvcignore)
    artifacts = list_artifacts(folder, stages)
    result = Result()
    with tqdm(total=sum(artifact.size for artifact in artifacts), desc="verifying", unit="file") as bar:
        for artifact in artifacts:
            result.extend(check_artifact(artifact, folder, cache, bar))
    result.faults += check_inputs(folder, stages, cache)
    faults, reports = check_reports(folder, stages, result.copies, cache)
    size = sum(copy.stat().st_size for copy in result.copies.values() if copy)
    summary = (
        f"{pluralize(len(artifacts), 'artifact')}, {reports}, {pluralize(len(result.copies), 'file')} ({result.tables} with "
        f"schemas), {size:,} bytes, {time.monotonic() - started:.1f} s"
    )
    return result.faults + faults, summary


def pluralize(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def read_lock(path: Path) -> dict[str, Any]:
    """Return the stages of dvc.lock.

    Raises StageError if it is missing, not valid YAML or has another structure than DVC's, or if an output leads out of the
    folder of dvc.lock, has no MD5, or is in another output.
    """
    stages = revisions.read_lock(path)
    known = dict[PurePosixPath, str]()
    for stage, entry in stages.items():
        for out in entry.get("outs", []):
            place = f"{path}: stage {stage}: {quote(out['path'])}"
            if not files.is_inside(out["path"]):
                raise StageError(f"{place} is not a path below {path.resolve().parent}: {RESTORE}")
            if not revisions.is_md5(out.get("md5")):
                raise StageError(f"{place}: its hash is {quote(out.get('md5'))}, expected an MD5: {RESTORE}")
            known[PurePosixPath(out["path"])] = place
    for name, place in known.items():
        if inside := next((other for other in known if other in name.parents), None):
            raise StageError(f"{place} is in another output, {quote(str(inside))}: {RESTORE}")
    return stages


def list_artifacts(folder: Path, stages: dict[str, Any]) -> list[Artifact]:
    """List the outputs of the stages in folder/dvc.lock."""
    uncached = find_uncached(params.read(folder / "dvc.yaml"))
    return [
        Artifact(
            stage=stage,
            path=folder / out["path"],
            md5=out["md5"],
            size=out.get("nfiles", 1),
            cached=out["path"] not in uncached,
            recreate=recreate_command(folder, stage),
        )
        for stage, entry in stages.items()
        for out in entry.get("outs", [])
    ]


def find_uncached(document: dict[str, Any]) -> set[str]:
    """Return the outputs in a dvc.yaml that are in Git instead of DVC's cache."""
    stages = document.get("stages")
    found = [stage.get("do", stage) for stage in stages.values() if isinstance(stage, dict)] if isinstance(stages, dict) else []
    outs = [out for stage in found if isinstance(stage, dict) for out in stage.get("outs") or [] if isinstance(out, dict)]
    settings = [item for out in outs for item in out.items()]
    return {path for path, values in settings if isinstance(values, dict) and values.get("cache") is False}


def recreate_command(folder: Path, stage: str) -> str:
    """Return the command that runs one stage again, in backquotes."""
    address = stage if folder == Path() else f"{folder}/dvc.yaml:{stage}"
    return f"`dvc repro --force --single-item {shlex.quote(address)}`"


def check_artifact(artifact: Artifact, folder: Path, cache: Cache, bar: "tqdm[Any]") -> Result:
    """Check an artifact's files in the workspace and in DVC's cache, and the contents of its intact copies.

    bar: the progress bar, which counts files.
    """
    if not artifact.cached:
        result = check_uncached(artifact, cache, bar)
    elif artifact.md5.endswith(".dir"):
        result = check_folder(artifact, cache, bar)
    else:
        result = check_files(artifact, {artifact.path: artifact.md5}, cache, bar)
    check_contents(artifact, folder, result)
    result.faults = [f"{artifact.stage}: {line}" for line in result.faults]
    return result


def check_uncached(artifact: Artifact, cache: Cache, bar: "tqdm[Any]") -> Result:
    """Check an artifact that is in the workspace only."""
    state = cache.check(artifact.path, artifact.md5)
    bar.update()
    if state == INTACT:
        return Result(copies={artifact.path: artifact.path})
    return Result([f"{artifact.path}: {state} in the workspace: {artifact.recreate}"], {artifact.path: None})


def check_folder(artifact: Artifact, cache: Cache, bar: "tqdm[Any]") -> Result:
    """Check a folder: its listing in the cache, and the files in the listing."""
    out = artifact.path
    listing = cache.locate(artifact.md5)
    there = cache.check(listing, artifact.md5.removesuffix(".dir"))
    if there != INTACT:  # only the workspace can tell which files belong to the artifact
        here = cache.check(out, artifact.md5)
        copies: Copies = {path: path for path in repository.list_files(out, cache.ignore)} if here == INTACT else {out: None}
        return Result([describe_fault(artifact, out, here, there, listing)], copies)
    md5s = {out / name: md5 for name, md5 in read_listing(listing).items()}
    strays = [path for path in repository.list_files(out, cache.ignore) if path not in md5s]
    result = Result([f"{path}: does not belong to this artifact: remove it" for path in strays])
    result.extend(check_files(artifact, md5s, cache, bar))
    if not out.exists() and not result.faults:
        result.faults = [describe_fault(artifact, out, MISSING, INTACT, listing)]
    return result


def read_listing(path: Path) -> dict[str, str]:
    """Read a folder's listing in DVC's cache: path of a file in the folder -> MD5.

    Raises StageError if it is not valid, or a path leads out of the folder.
    """
    try:
        entries = {entry["relpath"]: entry["md5"] for entry in json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StageError(f"{path}: not a listing of a folder by DVC: remove it, then `dvc pull` or `dvc repro`") from error
    for name, md5 in entries.items():
        if not files.is_inside(name) or not revisions.is_md5(md5):
            raise StageError(f"{path}: {quote(name)} is not a file with an MD5 below the folder: {RESTORE}")
    return entries


def check_files(artifact: Artifact, md5s: dict[Path, str], cache: Cache, bar: "tqdm[Any]") -> Result:
    """Check an artifact's files (path in the workspace -> MD5) in both places.

    If a whole folder is missing in the workspace, files that are only missing there are not reported one by one.
    """
    result = Result()
    absent = artifact.md5.endswith(".dir") and not artifact.path.exists()
    for path, md5 in md5s.items():
        cached = cache.locate(md5)
        here, there = cache.check(path, md5), cache.check(cached, md5)
        if there != INTACT or (here != INTACT and not absent):
            result.faults.append(describe_fault(artifact, path, here, there, cached))
        result.copies[path] = cached if there == INTACT else path if here == INTACT else None
        bar.update()
    return result


def describe_fault(artifact: Artifact, path: Path, here: str, there: str, cached: Path) -> str:
    """Describe in one line the states of a file in the workspace (here) and in the cache (there), and the remedy.

    path: the artifact or one of its files. cached: its place in the cache.
    """
    cache = "DVC's cache"
    states = f"{here} in the workspace and in {cache}" if here == there else f"{here} in the workspace, {there} in {cache}"
    # DVC trusts corrupted files, and keeps them, until they are removed.
    corrupted = [str(place) for place, state in ((path, here), (cached, there)) if state == CORRUPTED]
    removal = f"`rm -rf {shlex.join(corrupted)}`, then " if corrupted else ""
    out = shlex.quote(str(artifact.path))
    return f"{path}: {states}: {removal}" + (
        f"`dvc checkout {out}`" if there == INTACT else f"`dvc pull {out}` or {artifact.recreate}"
    )


def check_contents(artifact: Artifact, folder: Path, result: Result) -> None:
    """Check schemas, pointers and disjointness of the artifact's intact copies, and add the faults to the result."""
    disjoint: dict[Path, Path] = {}
    for path, copy in result.copies.items():
        if copy and path.name == pointers.NAME and path.exists():
            result.faults += check_pointer(path.parent, folder)
        name = path.relative_to(folder)
        schema = find_schema(name)
        if copy and schema:
            faults = check_schema(path, copy, schema, artifact.recreate)
            result.faults += faults
            result.tables += 1
            if not faults and name.match(schemas.DISJOINT):
                disjoint[path] = copy
    result.faults += check_disjoint(disjoint, artifact.recreate)


def find_schema(name: Path) -> Any:
    """Return the schema of a file by its path relative to dvc.yaml's folder, or None."""
    matching = [schema for patterns, schema in schemas.ARTIFACTS.items() if any(map(name.match, patterns.split(", ")))]
    return matching[0] if matching else None


def check_schema(path: Path, copy: Path, schema: Any, recreate: str) -> list[str]:
    """Check a copy of a Parquet file against its schema."""
    try:
        tables.read(copy, schema)
    except StageError as error:
        fault = str(error).removeprefix(f"{copy}: ").rpartition(": ")[0]  # its remedy assumes a file in the workspace
        return [f"{path}: {fault}: {recreate}"]
    return []


def check_disjoint(copies: dict[Path, Path], recreate: str) -> list[str]:
    """Check that no two files of schema SPLIT (path -> copy) contain the same prompt."""
    faults, holders = [], dict[str, Path]()
    for path, copy in copies.items():
        ids = tables.read(copy, schemas.SPLIT)["prompt_id"].to_pylist()
        shared = [holders[prompt] for prompt in ids if prompt in holders]
        if shared:
            faults.append(f"{path}: {len(shared)} of its prompts are also in {shared[0]}: {recreate}")
        holders |= dict.fromkeys(ids, path)
    return faults


def check_pointer(path: Path, folder: Path) -> list[str]:
    """Check every byte of the files in the Hub's cache that the pointer in the folder `path` stands for.

    folder: the experiment's, for the remedy.
    """
    try:
        snapshot = pointers.resolve(path)
    except StageError as error:
        return [str(error)]
    corrupted = []
    for name, expected in pointers.read(path)["files"].items():
        with (snapshot / name).open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != expected["sha256"]:
                corrupted.append((snapshot / name).resolve())
    fetch = f"`python -m stages.tools hub --fetch --recipe {shlex.quote(str(folder))}`"
    return [f"{path}: {file} is {CORRUPTED}: `rm {shlex.quote(str(file))}`, then {fetch}" for file in corrupted]


def check_inputs(folder: Path, stages: dict[str, Any], cache: Cache) -> list[str]:
    """Compare with dvc.lock the inputs that no stage writes, such as local assets: a fault for each that has changed since.

    A stage does write the link to a local asset, but not what the link leads to. Missing links are left to the artifact that
    contains them. The code and the inputs of the reports are left out: a change of them matters only if it changes a report.
    """
    outs = {PurePosixPath(out["path"]) for entry in stages.values() for out in entry.get("outs", [])}
    faults = []
    for stage, entry in stages.items():
        for dep in entry.get("deps", []) if stage not in (locks.CODE, *REPORTS) else ():
            name = PurePosixPath(dep["path"])
            is_asset = locks.is_link(dep["path"]) and (folder / name).is_symlink()
            is_written = bool(outs & {name, *name.parents}) or any(name in out.parents for out in outs)
            if (is_written and not is_asset) or dep.get("nfiles") == 0:
                continue
            state = cache.check(folder / name, dep.get("md5", ""))
            if state != INTACT:
                word = {MISSING: "is missing", CORRUPTED: "has changed since"}[state]
                faults.append(f"{stage}: the input {folder / name} {word}: restore it, or run `dvc repro`")
    return faults


def check_reports(folder: Path, stages: dict[str, Any], copies: Copies, cache: Cache) -> tuple[list[str], str]:
    """Regenerate the reports if all of their inputs are intact. Returns the faults, and a phrase for the summary."""
    report = next((name for name in REPORTS if name in stages), None)
    if report is None:
        return [], "no reports among them"
    deps = [folder / dep["path"] for dep in stages[report].get("deps", [])]
    data = {path: copy for path, copy in copies.items() if path.is_relative_to(folder / "data")}
    inputs = {path: copy for path, copy in data.items() if any(path.is_relative_to(dep) for dep in deps)}
    intact = {path: copy for path, copy in inputs.items() if copy}
    if len(intact) < len(inputs):
        return [], "the reports not regenerated because their inputs have faults"
    faults = regenerate_reports(folder, report, stages[report], intact, cache)
    return [f"{report}: {line}" for line in faults], "the reports regenerated"


def regenerate_reports(folder: Path, report: str, entry: dict[str, Any], copies: dict[Path, Path], cache: Cache) -> list[str]:
    """Run the stage `report` on the copies, and return a fault for each report that differs from its entry in dvc.lock."""
    changes = list(find_changes(folder, entry, copies, cache))
    remedy = f"changed since: {', '.join(changes)}: `dvc repro`" if changes else recreate_command(folder, report)
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        for path, copy in copies.items():
            link = temporary / path.relative_to(folder)  # inside it: read_lock and read_listing refuse other paths
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(copy.resolve())
        arguments = ["--data", temporary / "data", "--published", "published.yaml", "--out", temporary / "reports"]
        command = [sys.executable, "-m", "stages", report, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SPPO_SCRATCH": str(temporary / "scratch")}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        if done.returncode:
            cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [f"the reports cannot be regenerated ({one_line(cause)}): {remedy}"]
        regenerated = Cache(temporary, cache.ignore)
        states = {folder / out["path"]: regenerated.check(temporary / out["path"], out["md5"]) for out in entry.get("outs", [])}
    verbs = {MISSING: "is missing", CORRUPTED: "differs"}
    return [f"{path}: {verbs[state]} when regenerated: {remedy}" for path, state in states.items() if state != INTACT]


def find_changes(folder: Path, entry: dict[str, Any], copies: dict[Path, Path], cache: Cache) -> Iterator[str]:
    """Yield a stage's code, other files outside data/, and parameters that differ from its dvc.lock entry."""
    for dep in entry.get("deps", []):
        path = folder / dep["path"]
        if path.parent == folder / repository.FINGERPRINTS and path.stem in catalog.stage_modules():
            yield from repository.find_changed_code(path.stem, copies.get(path, path))
        elif dep["path"].startswith("data/") or dep.get("nfiles") == 0:  # DVC treats a folder below .dvc as empty
            continue
        elif cache.check(path, dep.get("md5", "")) != INTACT:
            yield dep["path"]
    for name, values in entry.get("params", {}).items():
        document = params.read(folder / name)
        yield from (f"{key} in {name}" for key, value in values.items() if look_up(document, key) != value)


def look_up(document: dict[str, Any], key: str) -> Any:
    """Return the value under a dotted key, or None."""
    value: Any = document
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value

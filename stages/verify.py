"""Whether everything that dvc.lock names is there, unharmed and of its schema, and makes the reports again to the byte.

DVC believes what it has hashed once: the times of a file in the workspace, the write protection of one in its cache. Here
every file is read, in both places, and what a pointer stands for in the Hub's cache. A copy that has its hash then stands for
the file: its schema is checked, and the reports are made of such copies, in a temporary folder. Nothing else is written.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages import documents, files, params, pointers, repository, schemas
from stages.cli import ROOT, StageError

RIGHT, MISSING, CHANGED = "right", "missing", "changed"
REPORT = "report"

Copies = dict[Path, Path | None]
"""Files that dvc.lock names, in the workspace, and a copy of each that has its hash, where there is one."""

_known: dict[tuple[int, int], str] = {}
"""Device and inode -> MD5: what the workspace links to the cache is read once."""


def md5(path: Path) -> str:
    """The MD5 of a file's bytes, or of a folder's listing, as dvc.lock has it."""
    if path.is_dir():
        entries = [{"md5": md5(file), "relpath": file.relative_to(path).as_posix()} for file in files_in(path)]
        text = json.dumps(sorted(entries, key=lambda entry: entry["relpath"]), sort_keys=True)
        return hashlib.md5(text.encode()).hexdigest() + ".dir"
    status = path.stat()
    key = status.st_dev, status.st_ino
    if key not in _known:
        with path.open("rb") as handle:
            _known[key] = hashlib.file_digest(handle, "md5").hexdigest()
    return _known[key]


def files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def state(path: Path, wanted: str) -> str:
    """Whether a file or folder has the hash that is wanted."""
    if not path.exists():
        return MISSING
    return RIGHT if md5(path) == wanted else CHANGED


def fault(path: Path, out: Path, here: str, there: str, cached: Path, again: str) -> str:
    """What is wrong with a file in the workspace (here) and in the cache (there), and the remedy, in one line.

    out: the artifact that the file is, or is in; cached: its place in the cache; again: the command that makes it again.
    """
    what = (
        f"{here} in the workspace and in DVC's cache" if here == there else f"{here} in the workspace, {there} in DVC's cache"
    )
    harmed = [str(place) for place, found in ((path, here), (cached, there)) if found == CHANGED]
    first = f"`rm -rf {' '.join(harmed)}`, then " if harmed else ""  # else DVC believes it to be right, and keeps it
    return f"{path}: {what}: {first}" + (f"`dvc checkout {out}`" if there == RIGHT else f"`dvc pull {out}` or {again}")


def check(out: Path, wanted: str, cache: Path, again: str, bar: "tqdm[Any]") -> tuple[list[str], Copies]:
    """The faults of a cached artifact, and its files."""
    listed = cache / wanted[:2] / wanted[2:]
    entries = {out: wanted}
    lines: list[str] = []
    absent = False
    if wanted.endswith(".dir"):
        found = state(listed, wanted.removesuffix(".dir"))
        if found != RIGHT:  # what the files are, the workspace alone can tell
            here = state(out, wanted)
            copies: Copies = {path: path for path in files_in(out)} if here == RIGHT else {out: None}
            return [fault(out, out, here, found, listed, again)], copies
        entries = {out / entry["relpath"]: entry["md5"] for entry in json.loads(listed.read_text())}
        absent = not out.exists()
        lines = [f"{path}: not of this artifact: remove it" for path in files_in(out) if path not in entries]
    copies = {}
    for path, hashed in entries.items():
        cached = cache / hashed[:2] / hashed[2:]
        here, there = state(path, hashed), state(cached, hashed)
        if there != RIGHT or (here != RIGHT and not absent):
            lines.append(fault(path, out, here, there, cached, again))
        copies[path] = cached if there == RIGHT else path if here == RIGHT else None
        bar.update()
    if absent and not lines:
        lines = [fault(out, out, MISSING, RIGHT, listed, again)]
    return lines, copies


def uncached(document: dict[str, Any]) -> set[str]:
    """The outs in a dvc.yaml that are Git's and not in DVC's cache."""
    stages = [stage.get("do", stage) for stage in document["stages"].values()]
    outs = [out for stage in stages for out in stage.get("outs", []) if isinstance(out, dict)]
    return {path for out in outs for path, options in out.items() if options.get("cache") is False}


def declared(name: str) -> Any:
    """The schema of a file by its name in the folder of dvc.yaml, or None."""
    found = [schema for patterns, schema in schemas.ARTIFACTS.items() if any(map(Path(name).match, patterns.split(", ")))]
    return found[0] if found else None


def schema_faults(path: Path, copy: Path, schema: Any, again: str) -> list[str]:
    """What a copy of a Parquet file lacks of its schema."""
    try:
        files.read_table(copy, schema)
    except StageError as error:
        what = str(error).removeprefix(f"{copy}: ").rpartition(": ")[0]  # its remedy is of another case
        return [f"{path}: {what}: {again}"]
    return []


def shared_faults(parts: dict[Path, Path], again: str) -> list[str]:
    """The files of parts, each with a copy of it, that hold prompts of one before."""
    lines, held = [], dict[str, Path]()
    for path, copy in parts.items():
        ids = files.read_table(copy, schemas.PART)["prompt_id"].to_pylist()
        shared = [held[one] for one in ids if one in held]
        if shared:
            lines.append(f"{path}: {len(shared)} of its prompts are in {shared[0]} too: {again}")
        held |= dict.fromkeys(ids, path)
    return lines


def pointer_faults(folder: Path) -> list[str]:
    """What is wrong with the files in the Hub's cache that the pointer in a folder stands for: every byte is read."""
    try:
        snapshot = pointers.resolve(folder)
    except StageError as error:
        return [str(error)]
    harmed = []
    for name, wanted in pointers.read(folder)["files"].items():
        with (snapshot / name).open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != wanted["sha256"]:
                harmed.append((snapshot / name).resolve())
    again = "then `python -m stages.assets --fetch RECIPE` (RECIPE: the folder of params.yaml)"
    return [f"{folder}: {path} is {CHANGED}: `rm {path}`, {again}" for path in harmed]


def changed_since(folder: Path, entry: dict[str, Any]) -> list[str]:
    """The code and the parameters of a stage that are others than in its entry in dvc.lock."""
    # a folder without files to DVC, which ignores what is in .dvc, says nothing
    code = [dep for dep in entry["deps"] if not dep["path"].startswith("data/") and dep.get("nfiles") != 0]
    names = [dep["path"] for dep in code if state(folder / dep["path"], dep["md5"]) != RIGHT]
    for name, values in entry.get("params", {}).items():
        now = params.read(folder / name)
        names += [f"{key} in {name}" for key, value in values.items() if now.get(key) != value]
    return names


def report_faults(folder: Path, entry: dict[str, Any], copies: dict[Path, Path], again: str) -> list[str]:
    """The reports that differ from those in dvc.lock when `stages.report` makes them again of the copies."""
    since = changed_since(folder, entry)
    remedy = f"changed since: {', '.join(since)}: `dvc repro`" if since else again
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        for path, copy in copies.items():
            link = made / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(copy.resolve())
        command = [sys.executable, "-m", "stages.report", str(made / "data"), str(made / "reports")]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SPPO_SCRATCH": str(made / "scratch")}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [f"the reports cannot be made again ({why}): {remedy}"]
        states = {out["path"]: state(made / out["path"], out["md5"]) for out in entry["outs"]}
    return [f"{folder / path}: {found} when made again: {remedy}" for path, found in states.items() if found != RIGHT]


def verify(folder: Path) -> tuple[list[str], str]:
    """The faults, a line each, of the experiment in `folder` (of dvc.yaml), and what was looked at. Raises StageError."""
    started = time.monotonic()
    _known.clear()
    lock = folder / "dvc.lock"
    if not lock.is_file():
        raise StageError(f"{lock} is missing: run the experiment with `dvc repro`")
    stages: dict[str, Any] = documents.mapping(lock.read_bytes(), str(lock)).get("stages", {})
    with repository.opened(folder) as repo:
        cache = Path(repo.cache.local.path)
    of_git = uncached(params.read(folder / "dvc.yaml"))
    again = {
        stage: f"`dvc repro --force --single-item {stage if folder == Path() else f'{folder}/dvc.yaml:{stage}'}`"
        for stage in stages
    }

    artifacts = [(stage, out) for stage, entry in stages.items() for out in entry.get("outs", [])]
    lines: list[str] = []
    copies: Copies = {}
    tables = 0
    with tqdm(total=sum(out.get("nfiles", 1) for _, out in artifacts), desc="verifying", unit="file") as bar:
        for stage, out in artifacts:
            path = folder / out["path"]
            if out["path"] in of_git:
                found = state(path, out["md5"])
                lines += [f"{stage}: {path}: {found} in the workspace: {again[stage]}"] if found != RIGHT else []
                copies[path] = path if found == RIGHT else None
                bar.update()
                continue
            wrong, inside = check(path, out["md5"], cache, again[stage], bar)
            parts: dict[Path, Path] = {}
            for file, copy in inside.items():
                if copy and file.name == pointers.NAME and file.exists():
                    wrong += pointer_faults(file.parent)
                name = file.relative_to(folder).as_posix()
                schema = declared(name)
                if copy and schema:
                    lacks = schema_faults(file, copy, schema, again[stage])
                    wrong += lacks
                    tables += 1
                    if not lacks and Path(name).match(schemas.DISJOINT):
                        parts[file] = copy
            wrong += shared_faults(parts, again[stage])
            lines += [f"{stage}: {line}" for line in wrong]
            copies |= inside

    looked = f"{len(artifacts)} artifacts"
    if REPORT not in stages:
        looked += ", no reports among them"
    else:
        deps = [folder / dep["path"] for dep in stages[REPORT]["deps"]]
        needed = {path: copy for path, copy in copies.items() if any(path.is_relative_to(dep) for dep in deps)}
        right = {path: copy for path, copy in needed.items() if copy}
        if len(right) == len(needed):
            lines += [f"{REPORT}: {line}" for line in report_faults(folder, stages[REPORT], right, again[REPORT])]
            looked += ", the reports made again"
        else:
            looked += ", the reports not made again: what they are made of is at fault"
    size = sum(copy.stat().st_size for copy in copies.values() if copy)
    looked += f", {len(copies)} files ({tables} with schemas), {size:,} bytes, {time.monotonic() - started:.1f} s"
    return lines, looked


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.verify", description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path(), help="the folder of dvc.yaml (this one)")
    lines, looked = verify(parser.parse_args().recipe)
    for line in lines:
        print(line)
    print(f"{len(lines) or 'no'} fault{'s' if len(lines) != 1 else ''}: {looked}", file=sys.stderr if lines else sys.stdout)
    sys.exit(bool(lines))


if __name__ == "__main__":
    try:
        main()
    except StageError as error:  # not cli.run: this is no stage
        sys.exit(f"verify: error: {error}")

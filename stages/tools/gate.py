"""Check that each dvc.lock is what `dvc repro` would leave, without data and without running it.

A lock has to be of this dvc.yaml, these parameters, this code and these files, and has to agree with itself: what a stage read
is what the stages before it wrote. Local assets are compared if they are in Git. Files that Git ignores are not read.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc.dependency import ParamsDependency
from dvc.dvcfile import load_file
from dvc.exceptions import DvcException

from stages.artifacts import files
from stages.reporting import listings
from stages.runtime import catalog, documents, params
from stages.runtime.errors import StageError, escape_controls, one_line
from stages.runtime.fingerprint import fingerprint
from stages.tools import locks, repository, revisions

PIPELINE = "dvc.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> None:
    """Check the pipeline in this folder and those in recipes/, and print what is wrong. Exits with code 1 if anything is."""
    folders = find_pipelines(Path())
    faults = [line for folder in folders for line in check_pipeline(folder)]
    for line in faults:
        print(escape_controls(line))
    if faults:
        print("gate: run `dvc repro` for each pipeline named above, then commit its dvc.lock and reports", file=sys.stderr)
    else:
        print(f"current: {', '.join(str(folder / revisions.LOCK) for folder in folders)}")
    sys.exit(bool(faults))


def find_pipelines(root: Path) -> list[Path]:
    """Return the folder `root`, whose pipeline must have a lock, and the folders of the recipes that have one."""
    return [root, *sorted(path.parent for path in root.glob(f"recipes/*/{revisions.LOCK}"))]


def check_pipeline(folder: Path) -> list[str]:
    """Return what is wrong with folder/dvc.lock, one line each."""
    lock = folder / revisions.LOCK
    try:
        return [f"{lock}: {line}" for line in _find_faults(folder)]
    except StageError as error:
        return [str(error)]
    except DvcException as error:
        return [f"{folder / PIPELINE}: DVC cannot read it, or its {revisions.LOCK}: {one_line(error)}"]
    except AssertionError:  # DVC's own, for a stage of a foreach whose key is empty
        return [f"{folder / PIPELINE}: DVC cannot name a stage: remove empty names from params.yaml, such as of an iteration"]


def _find_faults(folder: Path) -> Iterator[str]:
    locked = revisions.read_lock(folder / revisions.LOCK)
    with repository.open_repository(folder) as repo:
        declared = _load_stages(repo, folder)
        for name, stage in declared.items():
            reasons = find_changes(stage, locked[name], folder) if name in locked else ["it has not run"]
            yield from (f"{name}: {reason}" for reason in reasons)
    yield from (f"{name}: {PIPELINE} has no such stage: remove its entry" for name in locked if name not in declared)
    current = {name: entry for name, entry in locked.items() if name in declared}
    for name, paths in locks.find_outdated(current, _read_listings(folder, current)).items():
        yield f"{name}: it has not run since these were written: {', '.join(paths)}"


def _load_stages(repo: Any, folder: Path) -> dict[str, Any]:
    """Return the stages of folder/dvc.yaml, name -> dvc.stage.Stage. Raises StageError for what DVC's YAML reader fails on."""
    try:
        for path in filter(Path.is_file, (folder / PIPELINE, folder / "params.yaml")):
            documents.check_nesting(path.read_bytes())  # DVC's reader would end the process
        loaded = load_file(repo, str(folder / PIPELINE)).stages
        return {name: loaded[name] for name in loaded}
    except ValueError as error:  # lists that are nested too deeply, or a number of too many digits
        raise StageError(
            f"{folder / PIPELINE}: DVC cannot read it, or its params.yaml ({one_line(error)}): restore both from Git"
        ) from error


def _read_listings(folder: Path, stages: locks.Stages) -> dict[str, str]:
    """Return the listings in the reports, path -> MD5; none if no stage writes them, or if they are missing."""
    paths = [folder / out for entry in stages.values() for out in revisions.hash_outputs(entry)]
    found = [path for path in paths if path.name == listings.NAME and path.is_file()]
    return listings.read_listings(found[0]) if found else {}


def find_changes(stage: Any, entry: dict[str, Any], folder: Path) -> Iterator[str]:
    """Yield how a stage of folder/dvc.yaml, a dvc.stage.Stage, differs from its entry in dvc.lock, and both from the files."""
    keys = [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]
    deps = [dep for dep in stage.deps if dep not in keys]
    locked = {kind: {file["path"]: file.get("md5", "") for file in entry.get(kind, [])} for kind in ("deps", "outs")}
    if entry.get("cmd") != stage.cmd:
        yield "its command has changed"
    yield from _compare_paths({dep.def_path for dep in deps}, locked["deps"], "dependency")
    yield from _compare_paths({out.def_path for out in stage.outs}, locked["outs"], "output")
    yield from (f"{path} has no MD5" for paths in locked.values() for path, md5 in paths.items() if not revisions.is_md5(md5))
    yield from (name for dep in keys for name in _find_changed_params(dep))
    in_git = [] if stage.name == locks.CODE else list(deps)  # a comment changes the code's files, but not their fingerprints
    in_git += [out for out in stage.outs if not out.use_cache]
    for file in in_git:
        yield from _compare_file(file, (locked["deps"] | locked["outs"]).get(file.def_path))
    yield from _find_changed_assets(locked["deps"], folder, stage.repo)
    yield from _find_changed_code(locked["outs"] if stage.name == locks.CODE else locked["deps"])


def _compare_paths(declared: set[str], locked: dict[str, str], kind: str) -> Iterator[str]:
    yield from (f"it has not run with the {kind} {path}" for path in sorted(declared - locked.keys()))
    yield from (f"{PIPELINE} has no {kind} {path}: remove it from the entry" for path in locked if path not in declared)


def _find_changed_params(dep: Any) -> Iterator[str]:
    for file, status in dep.workspace_status().items():  # compares as DVC does: 1 and 1.0 are the same
        changes = status.items() if isinstance(status, dict) else [(key, status) for key in dep.params]
        yield from (f"{key} in {file} is {change}" for key, change in changes)


def _compare_file(file: Any, md5: str | None) -> Iterator[str]:
    """Compare a dependency or output in the working tree with its hash in dvc.lock, unless it is outside Git."""
    path = Path(file.fs_path)
    if md5 is None or not file.is_in_repo or file.repo.scm.is_ignored(str(path)):
        return
    if not path.exists():
        yield f"{file.def_path} is missing: commit it"
    elif repository.hash_path(path, file.repo.dvcignore) != md5:
        yield f"{file.def_path} has changed"


def _find_changed_assets(hashes: dict[str, str], folder: Path, repo: Any) -> Iterator[str]:
    """Compare hashes in dvc.lock (path -> MD5) of links to local assets with the directories in Git that params.yaml names.

    Git ignores the links. Directories elsewhere, and those that are not here, are left out.
    """
    linked = {path: md5 for path, md5 in hashes.items() if locks.is_link(path)}
    document = params.read(folder / revisions.PARAMS) if linked else {}
    for path, md5 in linked.items():
        name = _find_directory(path.removeprefix(f"{locks.LOCAL}/"), document)
        target = (folder / name).resolve() if name else None
        in_git = target and target.is_dir() and target.is_relative_to(Path(repo.root_dir).resolve())
        if not target or not in_git or repo.scm.is_ignored(str(target)):
            continue
        if repository.hash_path(target, repo.dvcignore) != md5:
            yield f"the files of {name} in Git are not those that it read"


def _find_directory(key: str, document: dict[str, Any]) -> str | None:
    """Return the directory that params.yaml names for a link's name (stages/artifacts/links.py), None if it names none."""
    value: Any = document if key.startswith(("models.", "rankers.")) else document.get("assets")
    for part in [*key.split("."), "repo"]:
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, str) and params.unchecked_asset(value).is_local else None


def _find_changed_code(hashes: dict[str, str]) -> Iterator[str]:
    """Compare hashes in dvc.lock (path -> MD5) of fingerprints of the code with those of the current code."""
    fingerprints = {Path(path).stem: md5 for path, md5 in hashes.items() if Path(path).parent == repository.FINGERPRINTS}
    changed = [name for name, md5 in fingerprints.items() if md5 != _hash_fingerprint(name)]
    if changed:
        yield f"the code of {', '.join(changed)} has changed"


@functools.cache
def _hash_fingerprint(stage: str) -> str | None:
    """Return the MD5 of the file that the stage `code` would write for a stage now, None if there is no such stage."""
    if stage not in catalog.stage_modules():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{stage}.json")
        files.write_json(fingerprint(stage), path)
        return files.dvc_md5(path)

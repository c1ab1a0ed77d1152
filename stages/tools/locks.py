"""Compare the stages of two dvc.lock files, or those of one with each other, by their hashes alone.

Of two runs: which results differ, and whether code or parameters explain it. Within a run: which stages read something else
than the stages that they depend on wrote.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from stages.reporting import per_item
from stages.runtime.errors import StageError
from stages.tools import revisions

CODE = "code"
RECORDS = "data/records/"
LOCAL = "data/local"
"""The folder of links to local assets. Its own hash is not theirs: only that of a link, as a dependency, is."""
NOT_RESULTS = ("data/code/", RECORDS, LOCAL)
"""Outputs that are not results: the fingerprints of the code, the records of versions and devices, links to local assets."""

Stages = dict[str, Any]
"""Stage -> its entry in dvc.lock."""


@dataclass(frozen=True)
class Comparison:
    """Two runs of one pipeline."""

    stages: dict[str, bool]
    """Stage, after all stages that it depends on -> whether its results have the same hashes in both runs."""
    outputs: int
    """Number of outputs of both runs together, without NOT_RESULTS."""
    differing: int
    """Number of these whose hashes differ, or which one run lacks."""
    changed_records: list[str]
    """Records of versions, numerics and devices that differ."""
    changed_inputs: list[str]
    """What differs between the inputs of the two runs: parameters, code, commands, files."""

    @property
    def first_difference(self) -> str | None:
        """The first stage with different results: all stages it depends on have the same. None: all results are the same."""
        return next((stage for stage, same in self.stages.items() if not same), None)


def compare(committed: Stages, current: Stages) -> Comparison:
    """Compare the results and inputs of two runs."""
    states: dict[str, bool] = {}
    records: list[str] = []
    outputs = differing = 0
    for stage in sort_stages({**current, **committed}):
        before, after = (revisions.hash_outputs(stages.get(stage, {})) for stages in (committed, current))
        changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
        records += [path for path in changed if path.startswith(RECORDS)]
        results = [path for path in changed if not path.startswith(NOT_RESULTS)]
        states[stage] = not results and stage in committed and stage in current
        outputs += sum(not path.startswith(NOT_RESULTS) for path in {**before, **after})
        differing += len(results)
    return Comparison(states, outputs, differing, records, find_changed_inputs(committed, current))


def sort_stages(stages: Stages) -> list[str]:
    """Return the stages in an order in which each follows all that it depends on; otherwise in the order of dvc.lock.

    Raises StageError if stages depend on each other.
    """
    owners = {path: stage for stage, entry in stages.items() for path in revisions.hash_outputs(entry)}
    graph = {stage: [owner for dep in _hash_deps(entry) for owner in _find(dep, owners)] for stage, entry in stages.items()}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise StageError(f"{revisions.LOCK}: stages depend on each other: {circle}: {per_item.REMEDY}") from error


def is_link(path: str) -> bool:
    """Return whether a path in dvc.lock is that of the link to one asset, whose hash is that of the asset."""
    return path.startswith(f"{LOCAL}/")


def _hash_deps(entry: dict[str, Any]) -> dict[str, str]:
    return {dep["path"]: dep.get("md5", "") for dep in entry.get("deps", [])}


def _find(dep: str, owners: dict[str, str]) -> list[str]:
    """Return the stages (path -> stage) that write a dependency, a part of it, or the folder that it is in."""
    return [stage for path, stage in owners.items() if path == dep or path.startswith(f"{dep}/") or dep.startswith(f"{path}/")]


def find_changed_inputs(committed: Stages, current: Stages) -> list[str]:
    """List the parameters, code, commands and files in which two runs differ, other than the results of their own stages.

    Code is compared by its fingerprints (stages/code.py), so changes to comments do not count.
    """
    before, after = _list_inputs(committed), _list_inputs(current)
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _list_inputs(stages: Stages) -> dict[str, Any]:
    """Return name -> value or hash of each input of a run."""
    owners = {path: stage for stage, entry in stages.items() for path in revisions.hash_outputs(entry)}
    fingerprints = revisions.hash_outputs(stages.get(CODE, {}))
    inputs: dict[str, Any] = {
        f"code of {path.rpartition('/')[2].removesuffix('.json')}": md5 for path, md5 in fingerprints.items()
    }
    for stage, entry in stages.items():
        inputs[f"command of {stage}"] = entry.get("cmd")
        for file, values in entry.get("params", {}).items():
            inputs |= {f"{'.'.join(key)} in {file}": value for key, value in revisions.flatten(values).items()}
        if stage != CODE:
            inputs |= {path: md5 for path, md5 in _hash_deps(entry).items() if is_link(path) or not _find(path, owners)}
    return inputs


def find_outdated(stages: Stages, listings: Mapping[str, str]) -> dict[str, list[str]]:
    """Find the stages that have not run since a stage that they depend on wrote something else.

    A folder has a single hash in dvc.lock, that of its listing. If a stage reads a part of a folder, or a folder of folders,
    the two hashes can only be compared by way of the files: those that stages depend on one by one, and those in `listings`,
    path -> MD5 (stages/reporting/listings.py). They are believed only if their hash is that of the folder.

    Returns stage -> its dependencies that differ from what was written, or cannot be shown to be the same; without the others.
    """
    outs = {path: md5 for entry in stages.values() for path, md5 in revisions.hash_outputs(entry).items()}
    known = {path: md5 for entry in stages.values() for path, md5 in _hash_deps(entry).items() if not _is_folder(md5)}
    known |= listings
    outdated = {}
    for stage, entry in stages.items():
        deps = _hash_deps(entry)
        written = {path: _hash_written(path, outs, known) for path in deps if _find(path, outs) and not is_link(path)}
        outdated[stage] = [path for path, md5 in written.items() if md5 != deps[path]]
    return {stage: paths for stage, paths in outdated.items() if paths}


def _is_folder(md5: str) -> bool:
    return md5.endswith(".dir")


def _hash_written(dep: str, outs: Mapping[str, str], known: Mapping[str, str]) -> str | None:
    """Return the hash of a file or folder as the stages wrote it, None if it cannot be known from theirs.

    dep: an output, a part of one, or a folder of outputs. outs, known: path -> hash of all outputs, and of files.
    """
    if dep in outs:
        return outs[dep]
    files: dict[str, str] = {}
    for path in _find(dep, {path: path for path in outs}):
        inside = _select(known, path) if _is_folder(outs[path]) else {path: outs[path]}
        if _is_folder(outs[path]) and hash_listing(inside, path) != outs[path]:
            return None
        files |= inside
    return files.get(dep) or hash_listing(_select(files, dep), dep)


def _select(files: Mapping[str, str], folder: str) -> dict[str, str]:
    return {path: md5 for path, md5 in files.items() if path.startswith(f"{folder}/")}


def hash_listing(files: Mapping[str, str], folder: str) -> str:
    """Return the hash that dvc.lock has for a folder with these files: path, which begins with the folder's -> MD5."""
    listing = [{"md5": md5, "relpath": path.removeprefix(f"{folder}/")} for path, md5 in files.items()]
    text = json.dumps(sorted(listing, key=lambda entry: entry["relpath"]), sort_keys=True)
    return hashlib.md5(text.encode()).hexdigest() + ".dir"

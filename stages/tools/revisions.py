"""An experiment at one revision: its parameters, metrics, results for each item and dvc.lock.

A revision is anything that DVC resolves: a commit, a branch, a tag, the name of an experiment, or `workspace` for the working
tree. Only files in Git are read, neither the data nor DVC's cache, and nothing heavier than DVC is imported.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvc.fs import GitFileSystem
from dvc.scm import SCM, RevError, SCMError, resolve_rev

from stages.reporting import markdown, per_item, seeds
from stages.runtime import documents
from stages.runtime.errors import StageError, quote
from stages.tools import changes
from stages.tools.changes import NO_ITEMS, Flat, Items, Key, Published

WORKSPACE = "workspace"
PARAMS, METRICS, LOCK, PUBLISHED = "params.yaml", "reports/metrics.json", "dvc.lock", "published.yaml"
SEEDS = "reports/seeds.json"
MD5 = r"[0-9a-f]{32}(\.dir)?"
REMEDY = "restore it with Git, or remove it and run `dvc repro`, which takes from DVC's cache what has run before"
"""For a dvc.lock that is not valid: DVC refuses it too, so `dvc repro` alone does not help."""


@dataclass(frozen=True)
class Revision:
    """An experiment at one revision; None for a file that the revision lacks."""

    title: str
    params: Flat | None
    metrics: Flat | None
    stages: dict[str, Any] | None
    """The stages of dvc.lock."""
    items: Items = NO_ITEMS
    limits: dict[str, float] | None = None
    """Metric, its keys joined by dots -> the largest difference that noise explains, from seeds.json."""
    published: list[Published] = field(default_factory=list)
    """published.yaml's results."""

    @property
    def shown(self) -> str:
        """The title as Markdown, in which GitHub links the commit."""
        return markdown.escape(self.title, hashes=True)


def read_revision(rev: str, folder: Path) -> Revision:
    """Read the experiment in `folder` (of dvc.yaml) at a revision.

    Raises StageError if the revision is unknown, the folder is not in its repository, or a file is not valid.
    """
    scm, commit = resolve(rev)
    root, inside = Path(scm.root_dir).resolve(), folder.resolve()
    if not inside.is_relative_to(root):
        raise StageError(
            f"{folder} is outside the Git repository {root}: name a folder in it with --recipe, or run this in the other one"
        )

    def read(name: str) -> bytes | None:
        path = inside / name
        return _read_file(path) if commit is None else _read_blob(scm, commit, path.relative_to(root))

    def read_mapping(name: str) -> dict[str, Any] | None:
        content = read(name)
        return None if content is None else documents.load_mapping(content, f"{folder / name} at {rev}")

    params, metrics, runs = (read_mapping(name) for name in (PARAMS, METRICS, SEEDS))
    lock = read(LOCK)
    stages = None if lock is None else parse_lock(lock, f"{folder / LOCK} at {rev}")
    return Revision(
        title=rev if commit is None else commit[:7] if commit.startswith(rev) else f"{rev} ({commit[:7]})",
        params=None if params is None else flatten(params),
        metrics=None if metrics is None else read_metrics(metrics, f"{folder / METRICS} at {rev}"),
        stages=stages,
        items=read_items(read, f"{folder} at {rev}", params or {}, stages or {}),
        limits=None if runs is None else seeds.read_limits(runs, f"{folder / SEEDS} at {rev}"),
        published=changes.list_published(read_mapping(PUBLISHED) or {}, f"{folder / PUBLISHED} at {rev}"),
    )


def read_metrics(document: dict[str, Any], where: str) -> Flat:
    """Flatten the content of metrics.json. Raises StageError for a number that no metric can have.

    where: the file in messages, as in `read_stages`.
    """
    metrics = flatten(document)
    for key, value in metrics.items():
        if isinstance(value, int | float) and not abs(value) <= seeds.LARGEST:  # also for NaN
            name = ".".join(key)
            raise StageError(f"{where}: '{name}' is {quote(value)}, expected a number: {per_item.REMEDY}")
    return metrics


def read_lock(path: Path) -> dict[str, Any]:
    """Return the stages of a dvc.lock in the working tree as `read_stages` does. Raises StageError, also if it is missing."""
    if not path.is_file():
        raise no_run(path)
    return parse_lock(path.read_bytes(), str(path))


def no_run(path: Path) -> StageError:
    """Return the error for a missing file that every run leaves, such as dvc.lock."""
    return StageError(f"{path} is missing: restore it with Git, or run the experiment with `dvc repro`, then commit it")


def parse_lock(content: bytes, where: str) -> dict[str, Any]:
    """Return the stages of dvc.lock as `read_stages` does. Raises StageError, also if the content is not valid YAML."""
    try:
        lock = documents.load_mapping(content, where)
    except StageError as error:
        raise StageError(f"{error}: {REMEDY}") from error
    return read_stages(lock, where)


def is_md5(value: object) -> bool:
    """Return whether a value is an MD5 as in dvc.lock, and so leads to a place in DVC's cache."""
    return isinstance(value, str) and re.fullmatch(MD5, value) is not None


def read_stages(lock: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the stages of dvc.lock, none if it has no such key. Raises StageError if one has another structure than DVC's."""
    stages = lock.get("stages", {})
    if not isinstance(stages, dict):
        raise StageError(f"{where}: 'stages' is {quote(stages)}, expected a mapping: {REMEDY}")
    for name, entry in stages.items():
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise StageError(f"{where}: stage {quote(name)} is {quote(entry)}, expected a mapping: {REMEDY}")
        for key in ("deps", "outs"):
            if not _is_file_list(entry.get(key, [])):
                raise StageError(f"{where}: '{key}' of stage {name} is not a list of paths and hashes: {REMEDY}")
        params = entry.get("params", {})
        if not isinstance(params, dict) or not all(isinstance(values, dict) for values in params.values()):
            raise StageError(f"{where}: 'params' of stage {name} is {quote(params)}, expected mappings: {REMEDY}")
    return stages


def _is_file_list(files: object) -> bool:
    return isinstance(files, list) and all(isinstance(file, dict) and _is_file(file) for file in files)


def _is_file(file: dict[str, Any]) -> bool:
    path, counts = file.get("path"), [file.get(key, 0) for key in ("size", "nfiles")]
    return isinstance(path, str) and path != "" and isinstance(file.get("md5", ""), str) and all(type(n) is int for n in counts)


def read_items(read: Callable[[str], bytes | None], where: str, params: dict[str, Any], stages: dict[str, Any]) -> Items:
    """Read a revision's results for each instruction and question.

    read: returns a file's content, None if there is none; where: the folder and the revision, for messages. Raises StageError.
    """
    preferences, scores = (read(f"reports/{name}") for name in (per_item.PREFERENCES, per_item.HARNESS))
    return Items(
        preferences=per_item.parse_preferences(decode(preferences), f"{per_item.PREFERENCES} in {where}")
        if preferences
        else {},
        scores=per_item.parse_scores(decode(scores), f"{per_item.HARNESS} in {where}") if scores else {},
        instructions=find_hash(stages, "data/alpaca_eval_set"),
        questions=find_hash(stages, "data/harness_sets"),
        starts=changes.read_starts(params, f"{PARAMS} in {where}"),
    )


def decode(content: bytes) -> str:
    """Decode a CSV file; what is not UTF-8 becomes characters that no number contains."""
    return content.decode(errors="replace")


def resolve(rev: str) -> tuple[Any, str | None]:
    """Return this folder's Git repository (a DVC SCM) and the revision's commit, None for the workspace. Raises StageError."""
    try:
        scm = SCM(".")
        return scm, None if rev == WORKSPACE else resolve_rev(scm, rev)
    except RevError as error:
        raise StageError(f"{rev!r} is not a revision: name a commit, branch, tag or experiment (`dvc exp show`)") from error
    except SCMError as error:
        raise StageError(f"{Path.cwd()} is not in a Git repository: go to the folder of dvc.yaml") from error


def _read_file(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _read_blob(scm: Any, commit: str, path: Path) -> bytes | None:
    fs, name = GitFileSystem(scm=scm, rev=commit), f"/{path.as_posix()}"
    content: bytes | None = fs.open(name, "rb").read() if fs.isfile(name) else None
    return content


def find_limits(a: Revision, b: Revision) -> tuple[dict[str, float], str]:
    """Return the limits of noise, and the title of the revision that has them: b if it does, or else a."""
    revision = a if b.limits is None else b
    return revision.limits or {}, revision.title


def flatten(nested: dict[str, Any], path: Key = ()) -> Flat:
    """Flatten nested mappings; lists and empty mappings are leaves."""
    leaves: Flat = {}
    for key, value in nested.items():
        inner = (*path, str(key))
        leaves |= flatten(value, inner) if isinstance(value, dict) and value else {inner: value}
    return leaves


def find_changes(a: Flat, b: Flat) -> list[Key]:
    """Return the keys whose leaves differ, in the order of `a`, new keys last. 1 and 1.0 differ, as they do to DVC."""
    return [key for key in {**a, **b} if format_leaf(a, key) != format_leaf(b, key)]


def format_leaf(leaves: Flat, key: Key) -> str:
    """Format a leaf as JSON, or as a dash if there is none."""
    return json.dumps(leaves[key], ensure_ascii=False, default=str, skipkeys=True) if key in leaves else "–"


def hash_outputs(entry: dict[str, Any]) -> dict[str, str]:
    """Return path -> hash for the outputs in a stage's dvc.lock entry."""
    return {out["path"]: out.get("md5", "") for out in entry.get("outs", [])}


def find_hash(stages: dict[str, Any], path: str) -> str | None:
    """Return the hash of an output in dvc.lock's stages, or None."""
    hashes = [hash_outputs(entry).get(path) for entry in stages.values()]
    return next((value for value in hashes if value), None)

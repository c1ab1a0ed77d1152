"""Fetch models and data sets from the Hugging Face Hub at a pinned revision, or from a local directory in the same format.

Only data is fetched: a model's safetensors, JSON and tokenizer files, and the rows of data sets; no pickles, no code.
"""

import atexit
import contextlib
import hashlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.artifacts import files, front_matter, pointers
from stages.runtime import scratch
from stages.runtime.errors import StageError, one_line
from stages.runtime.logs import log
from stages.runtime.params import Asset

WEIGHTS = "*.safetensors"
DESCRIPTIONS = ["*.json", "*.jinja", "*.txt", "*.model"]
"""Configuration, tokenizer and chat template."""
PICKLE_INDEX = ".bin.index.json"
IGNORED = ["*/*", f"*{PICKLE_INDEX}"]
"""Subfolders, which hold the weights in other formats, and the index of pickled weights."""


def fetch_model(asset: Asset, out: Path, *, weights: bool = True) -> None:
    """Create the folder `out`: a pointer to the model's snapshot in the Hub cache, or a copy of a local directory.

    weights: whether to fetch the model's weights too, or only its configuration and tokenizer.
    Raises StageError if the model cannot be fetched or has no safetensors weights.
    """
    patterns = [WEIGHTS, *DESCRIPTIONS] if weights else DESCRIPTIONS
    if asset.on_hub:
        _point_to_model(asset, out, patterns, weights)
    else:
        _copy_model(asset, out, patterns, weights)


def fetch_ranker(asset: Asset, base: Asset, out: Path) -> None:
    """Fetch PairRM into out/PairRM, and the configuration and tokenizer of its base model into out/base; see `fetch_model`.

    asset: PairRM, or another ranker of its architecture. base: the DeBERTa model that it is based on. Raises StageError.
    """
    fetch_model(asset, out / "PairRM")
    fetch_model(base, out / "base", weights=False)


def _copy_model(asset: Asset, out: Path, patterns: list[str], weights: bool) -> None:
    source = require_directory(asset)
    names = _list_files(source, patterns)
    pointers.check_complete(asset.repo, names, weights)
    with files.replacing(out) as partial:
        partial.mkdir()
        for name in names:
            shutil.copyfile(source / name, partial / name)
    log.info("%s: %d files copied from %s", out, len(names), source)


def _point_to_model(asset: Asset, out: Path, patterns: list[str], weights: bool) -> None:
    snapshot = _fetch_snapshot(asset.repo, asset.revision, "model", patterns)
    names = _list_files(snapshot, patterns)
    pointers.check_complete(asset.repo, names, weights)
    hashes = {name: _hash_file(snapshot / name) for name in tqdm(names, desc="hashing", unit="file")}
    pointer = {"repo": asset.repo, "revision": asset.revision, "repo_type": "model", "files": hashes}
    with files.replacing(out) as partial:
        partial.mkdir()
        files.write_json(pointer, partial / pointers.NAME)
    size = sum(file["size"] for file in hashes.values()) / 1e9
    log.info("%s: points to %d files, %.2f GB, of %s at %s", out, len(names), size, asset.repo, asset.revision)


def fetch_pointer(folder: Path) -> None:
    """Fetch the snapshot that the pointer in `folder` names, and check the SHA-256 of every file. Raises StageError."""
    pointer = pointers.read(folder)
    snapshot = _fetch_snapshot(pointer["repo"], pointer["revision"], pointer["repo_type"], list(pointer["files"]))
    for name, expected in pointer["files"].items():
        if _hash_file(files.require(snapshot / name)) != expected:
            raise StageError(f"{snapshot / name} does not match {folder / pointers.NAME}: remove it, then fetch again")
    log.info("%s: all %d files of %s at %s are present", folder, len(pointer["files"]), pointer["repo"], pointer["revision"])


def fetch_texts(asset: Asset, patterns: list[str]) -> list[Path]:
    """Return the files of a model's repository, or of a local directory, that match the patterns; fetch them if need be.

    Raises StageError if the repository or directory is not there.
    """
    folder = _fetch_snapshot(asset.repo, asset.revision, "model", patterns) if asset.on_hub else require_directory(asset)
    return [folder / name for name in _list_files(folder, patterns)]


def fetch_file(asset: Asset, filename: str, repo_type: str = "dataset") -> Path:
    """Return the path of a file in a local directory, or of one fetched from a Hub repository. Raises StageError."""
    if not asset.on_hub:
        path = require_directory(asset) / filename
        if not path.is_file():
            raise StageError(f"{path} is missing: put it there or set repo to another directory")
        return path
    from huggingface_hub import hf_hub_download

    with _explain_hub_errors(f"{filename} of {asset.repo} at {asset.revision}", asset.repo, repo_type):
        return Path(hf_hub_download(asset.repo, filename, repo_type=repo_type, revision=asset.revision))


def load_rows(asset: Asset, config: str | None, split: str) -> Any:
    """Load one split of a Hub data set, or of a local directory in the Hub's format, as a datasets.Dataset.

    config: the data set's configuration; None if it has only one. Loading scripts are never run.
    Raises StageError that names the data set, configuration, split and available splits, or data outside the data set.
    """
    import datasets

    if asset.on_hub and Path(asset.repo).is_dir():  # `datasets` would prefer it
        raise StageError(
            f"{asset.repo} in params.yaml is a data set on the Hub, but {Path(asset.repo).resolve()} exists too: rename it or "
            f"set repo to ./{asset.repo} without a revision to use it"
        )
    cache = None if asset.on_hub else _create_private_cache(asset)
    name = f"{asset.repo}{f', configuration {config}' if config else ''}"
    available: list[str]
    with _explain_hub_errors(f"split {split!r} of {name}", asset.repo, "dataset"):
        _check_front_matter(asset)
        available = datasets.get_dataset_split_names(asset.repo, config, revision=asset.revision, cache_dir=cache)
        if split not in available:
            raise StageError(f"{name} has no split {split!r}: set split in params.yaml to one of {', '.join(available)}")
        rows = datasets.load_dataset(asset.repo, config, split=split, revision=asset.revision, cache_dir=cache)
    log.info("%s, split %s: %d rows", name, split, len(rows))
    return rows


def find_texts(asset: Asset, split: str) -> tuple[str, list[Path], str]:
    """Find the CSV or JSON files of a split, local or fetched from the Hub, as they are stored.

    Returns `csv` or `json`, the files in the order of the split's rows, and what separates cells; no files if the data set is
    in another format. Raises StageError if `datasets` cannot tell, or for data outside the data set.
    """
    import datasets

    cache = None if asset.on_hub else _create_private_cache(asset)
    with _explain_hub_errors(f"split {split!r} of {asset.repo}", asset.repo, "dataset"):
        _check_front_matter(asset)
        builder = datasets.load_dataset_builder(asset.repo, revision=asset.revision, cache_dir=cache)
    if builder.name not in ("csv", "json"):
        return builder.name, [], ""
    names = (builder.config.data_files or {}).get(split, [])
    separator = builder.config.sep if builder.name == "csv" else ""
    if not asset.on_hub:
        return builder.name, [Path(name) for name in names], separator
    inside = [name.partition("@")[2].partition("/")[2] for name in names]  # of hf://datasets/REPO@REVISION/NAME
    return builder.name, [fetch_file(asset, name) for name in inside], separator


def _check_front_matter(asset: Asset) -> None:
    """Raise StageError if a data set's front matter names data outside the data set, which no revision pins."""
    if not asset.on_hub:
        front_matter.check(require_directory(asset))
        return
    from huggingface_hub import errors, hf_hub_download

    for name in front_matter.NAMES:
        with contextlib.suppress(errors.EntryNotFoundError):
            front_matter.check_file(Path(hf_hub_download(asset.repo, name, repo_type="dataset", revision=asset.revision)))


def find_revision(repo: str, repo_type: str, revision: str | None) -> str:
    """Return the 40-digit commit that a branch or tag (None: the default branch) refers to now. Raises StageError."""
    from huggingface_hub import HfApi

    with _explain_hub_errors(f"the revision of {repo}", repo, repo_type):
        commit = HfApi().repo_info(repo, repo_type=repo_type, revision=revision).sha
    if not commit:
        raise StageError(f"{repo}: the Hub returned no commit: set revision to one that {_page(repo, repo_type)} lists")
    return commit


def _fetch_snapshot(repo: str, revision: str | None, repo_type: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _explain_hub_errors(f"{repo} at {revision}", repo, repo_type):
        return Path(
            snapshot_download(repo, repo_type=repo_type, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED)
        )


def _create_private_cache(asset: Asset) -> str:
    """Create a cache for this process: `datasets` does not notice when a file of a local directory changes."""
    require_directory(asset)
    scratch.FOLDER.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="datasets-", dir=scratch.FOLDER)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _list_files(folder: Path, patterns: list[str]) -> list[str]:
    names = {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(name for name in names if not name.endswith(PICKLE_INDEX))


def require_directory(asset: Asset) -> Path:
    """Return the local directory of an asset that has one.

    Raises StageError if it is not there, or for what is in it if DVC would not see its changes.
    """
    path = Path(asset.repo)
    if not path.is_dir():
        raise StageError(
            f"{asset.repo} is not a directory (relative to {Path.cwd()}): correct repo in params.yaml or, if this is a queued "
            f"experiment, which runs in a copy of what Git tracks, `git add {shlex.quote(asset.repo)}` before queueing it, or "
            "set repo to an absolute path"
        )
    for parent, folders, names in os.walk(path):
        for name in sorted(folders) + sorted(names):
            if fault := _find_unseen(Path(parent) / name):
                raise StageError(f"{Path(parent) / name} {fault}")
    return path


def _find_unseen(path: Path) -> str | None:
    """Describe why DVC would not see the content of something in a local directory, or wait for it for ever."""
    if path.name == ".dvcignore":
        return "would hide files from DVC, which could not tell when they change: remove it"
    if path.is_symlink() and not path.is_file():
        target = "a folder, which DVC does not follow" if path.is_dir() else "no file"
        return f"is a link to {target}: replace the link by a copy of the files, or remove it"
    if not path.is_file() and not path.is_dir():
        return "is neither a file nor a folder, and cannot be read: remove it"
    return None


def _hash_file(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file in a snapshot. Raises StageError if the SHA-256 differs from the Hub's."""
    with path.open("rb") as handle:
        entry = {"size": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}
    announced = path.resolve().name  # the Hub cache names large files by their SHA-256
    if len(announced) == 64 and announced != entry["sha256"]:
        raise StageError(f"{path} is corrupted (its SHA-256 is {entry['sha256']}): remove {path.resolve()} and fetch it again")
    return entry


@contextmanager
def _explain_hub_errors(what: str, repo: str, repo_type: str) -> Iterator[None]:
    """Convert exceptions of huggingface_hub and datasets, which vary between versions, into a StageError."""
    from huggingface_hub import errors

    page = _page(repo, repo_type)
    try:
        yield
    except StageError:
        raise
    except errors.GatedRepoError as error:
        raise StageError(f"{what}: accept its license at {page}, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise StageError(f"{what}: not on the Hub, or private: correct repo in params.yaml or run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise StageError(f"{what}: no such revision: set revision to one of {page}/commits/main") from error
    except Exception as error:
        remedy = "check its files" if Path(repo).is_dir() else f"check the network and {page}"
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        messages = [f"{type(each).__name__}: {one_line(hide_token(str(each)))}" for each in dict.fromkeys((error, cause))]
        raise StageError(f"{what}: cannot be fetched ({', caused by '.join(messages)}): {remedy}") from error


def _page(repo: str, repo_type: str) -> str:
    return f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo}"


def hide_token(text: str) -> str:
    """Remove the user's access token from an error message, which may quote the server's reply."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "...") if token else text

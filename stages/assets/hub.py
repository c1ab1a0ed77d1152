"""What comes from the Hugging Face Hub, at a pinned revision, or from a local directory in the same form.

Only data is taken: safetensors, JSON and tokenizer files of a model, rows of a data set; no pickles, no code.
"""

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages import cli, files, pointers, scratch
from stages.cli import StageError
from stages.params import Asset

WEIGHTS = "*.safetensors"
DESCRIPTIONS = ["*.json", "*.jinja", "*.txt", "*.model"]
"""Configuration, tokenizer and chat template."""
NOT_WANTED = ["*/*", "*.bin.index.json"]
"""Folders (weights in another form), and the index of pickled weights."""


def fetch_model(asset: Asset, out: Path, *, weights: bool = True) -> None:
    """Make folder `out`: a pointer to the Hub's snapshot, fetched and hashed, or a copy of a local directory.

    weights: whether the model's weights are wanted, or its configuration and tokenizer only.
    Raises StageError where the model cannot be had or has no weights as safetensors.
    """
    patterns = [WEIGHTS, *DESCRIPTIONS] if weights else DESCRIPTIONS
    if not asset.on_hub:
        source = _directory(asset)
        names = _names(source, patterns)
        pointers.complete(asset.repo, names, weights)
        with files.replacing(out) as partial:
            partial.mkdir()
            for name in names:
                shutil.copyfile(source / name, partial / name)
        cli.log.info("%s: %d files copied from %s", out, len(names), source)
        return
    snapshot = _snapshot(asset.repo, asset.revision, "model", patterns)
    names = _names(snapshot, patterns)
    pointers.complete(asset.repo, names, weights)
    fingerprints = {name: _fingerprint(snapshot / name) for name in tqdm(names, desc="hashing", unit="file")}
    pointer = {"repo": asset.repo, "revision": asset.revision, "repo_type": "model", "files": fingerprints}
    with files.replacing(out) as partial:
        partial.mkdir()
        files.write_json(pointer, partial / pointers.NAME)
    size = sum(file["size"] for file in fingerprints.values()) / 1e9
    cli.log.info("%s: points to %d files, %.2f GB, of %s at %s", out, len(names), size, asset.repo, asset.revision)


def fetch_pointer(folder: Path) -> None:
    """Fetch the snapshot that the pointer in `folder` names, and check every file's SHA-256. Raises StageError."""
    pointer = pointers.read(folder)
    snapshot = _snapshot(pointer["repo"], pointer["revision"], pointer["repo_type"], list(pointer["files"]))
    for name, expected in pointer["files"].items():
        if _fingerprint(files.present(snapshot / name)) != expected:
            raise StageError(f"{snapshot / name} is not the file that {folder / pointers.NAME} names: remove it, fetch again")
    cli.log.info("%s: %d files of %s at %s are here", folder, len(pointer["files"]), pointer["repo"], pointer["revision"])


def fetch_file(asset: Asset, filename: str, repo_type: str = "dataset") -> Path:
    """The path of one file of a Hub repository at its revision, fetched, or of a local directory. Raises StageError."""
    if not asset.on_hub:
        path = _directory(asset) / filename
        if not path.is_file():
            raise StageError(f"{path} is missing: put it there, or name another directory as repo")
        return path
    from huggingface_hub import hf_hub_download

    with _reaching(f"{filename} of {asset.repo} at {asset.revision}", asset.repo, repo_type):
        return Path(hf_hub_download(asset.repo, filename, repo_type=repo_type, revision=asset.revision))


def load_rows(asset: Asset, config: str | None, split: str) -> Any:
    """The rows (datasets.Dataset) of one split of a Hub data set at its revision, or of a local directory in the Hub's form.

    config: the data set's configuration, None where it has one only. Loading scripts are refused.
    Raises StageError that names data set, configuration and split, and those there are.
    """
    import datasets

    cache = None if asset.on_hub else _unshared_cache(asset)
    there: list[str]
    what = f"{asset.repo}{f', configuration {config}' if config else ''}"
    with _reaching(f"split {split!r} of {what}", asset.repo, "dataset"):
        there = datasets.get_dataset_split_names(asset.repo, config, revision=asset.revision, cache_dir=cache)
        if split not in there:
            raise StageError(f"{what} has no split {split!r}: it has {', '.join(there)}; name one of them in params.yaml")
        rows = datasets.load_dataset(asset.repo, config, split=split, revision=asset.revision, cache_dir=cache)
    cli.log.info("%s, split %s: %d rows", what, split, len(rows))
    return rows


def find_revision(repo: str, repo_type: str, revision: str | None) -> str:
    """The 40-digit commit that a branch or tag (None: the default branch) stands for now. Raises StageError."""
    from huggingface_hub import HfApi

    with _reaching(f"the revision of {repo}", repo, repo_type):
        found = HfApi().repo_info(repo, repo_type=repo_type, revision=revision).sha
    if not found:
        raise StageError(f"{repo}: the Hub names no commit: look it up on its page")
    return found


def _snapshot(repo: str, revision: str | None, repo_type: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _reaching(f"{repo} at {revision}", repo, repo_type):
        return Path(
            snapshot_download(repo, repo_type=repo_type, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_WANTED)
        )


def _unshared_cache(asset: Asset) -> str:
    """A cache for this process alone: `datasets` does not see that a file of a local directory has changed."""
    _directory(asset)
    scratch.FOLDER.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="datasets-", dir=scratch.FOLDER)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _names(folder: Path, patterns: list[str]) -> list[str]:
    names = {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(name for name in names if not name.endswith(".bin.index.json"))


def _directory(asset: Asset) -> Path:
    path = Path(asset.repo)
    if not path.is_dir():
        raise StageError(f"{asset.repo} is no directory (looked from {Path.cwd()}): correct repo in params.yaml")
    return path


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a snapshot's file. Raises StageError where they are not those that the Hub announced."""
    with path.open("rb") as handle:
        found = {"size": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}
    announced = path.resolve().name  # the cache names large files by their SHA-256
    if len(announced) == 64 and announced != found["sha256"]:
        raise StageError(f"{path} is damaged (its SHA-256 is {found['sha256']}): remove {path.resolve()} and fetch it again")
    return found


@contextmanager
def _reaching(what: str, repo: str, repo_type: str) -> Iterator[None]:
    """Turn what the Hub's clients raise, which differs between their versions, into a StageError of one line."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    try:
        yield
    except StageError:
        raise
    except errors.GatedRepoError as error:
        raise StageError(f"{what}: accept its licence at {page}, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise StageError(f"{what}: not on the Hub, or not for you: correct repo in params.yaml, or `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise StageError(f"{what}: the repository has no such revision: see {page}/commits/main") from error
    except Exception as error:
        remedy = "check the files in it" if Path(repo).is_dir() else f"check the network, and {page}"
        raise StageError(f"{what}: cannot be had ({type(error).__name__}: {cli.folded(_hidden(error))}): {remedy}") from error


def _hidden(error: Exception) -> str:
    """What an error says, without the token, which a server may have quoted."""
    from huggingface_hub import get_token

    text, token = str(error), get_token()
    return text.replace(token, "...") if token else text

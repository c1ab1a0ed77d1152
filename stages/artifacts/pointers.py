"""Hub models without copies: a folder with `pointer.json` stands for a snapshot in the local Hub cache.

A pointer is {"repo", "revision", "repo_type", "files": {name: {"size" in bytes, "sha256"}}}. A stage depends on the pointer, a
few lines that change whenever the weights do; the weights themselves stay in the Hub cache.

All models, with or without a pointer, are validated here before any library loads them, because the libraries' own errors
are long or missing.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.runtime.errors import StageError, describe, quote

NAME = "pointer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RECREATE = "recreate the model, or use another one"
PATTERNS = {"repo": r"[\w-][\w.-]*(/[\w-][\w.-]*)?", "repo_type": "model|dataset", "revision": "[0-9a-f]{40}"}
"""What the strings in a pointer look like. None can lead out of the Hub cache."""
KEYS = ("files", *PATTERNS)


def resolve(path: Path) -> Path:
    """Return the directory to load a model from: `path` itself or, if it holds a pointer, the snapshot it points to.

    Does not use the network. Raises StageError if `path`, the snapshot or one of its files is missing, or if a file's size
    differs from the pointer's.
    """
    if not (files.require(path) / NAME).exists():
        return path
    pointer = read(path)
    from huggingface_hub import snapshot_download

    remedy = "fetch it with `python -m stages.tools hub --fetch --recipe RECIPE` (RECIPE: the folder of params.yaml)"
    try:
        snapshot = Path(
            snapshot_download(
                pointer["repo"],
                repo_type=pointer["repo_type"],
                revision=pointer["revision"],
                allow_patterns=list(pointer["files"]),
                local_files_only=True,
            )
        )
    except (OSError, ValueError) as error:
        raise StageError(
            f"{path}: {pointer['repo']} at {pointer['revision']} is missing from this machine's Hub cache, or incomplete: "
            f"{remedy}, or force the stage that wrote the pointer: `dvc repro --force --single-item STAGE`"
        ) from error
    for name, expected in pointer["files"].items():
        file = snapshot / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            raise StageError(f"{file} is missing: {remedy}")
        if size != expected["size"]:
            raise StageError(f"{file} has {size} bytes, expected {expected['size']}: remove it, then {remedy}")
    return snapshot


def list_files(path: Path) -> list[Path]:
    """List the files that are read where a model, a ranker or a file is loaded from `path`: those in the folder and, if it
    holds pointers, those that they point to. Raises StageError as `resolve` does."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file())
    folders = [file.parent for file in found if file.name == NAME]
    return found + [resolve(folder) / name for folder in folders for name in read(folder)["files"]]


def read(path: Path) -> dict[str, Any]:
    """Read the pointer in the folder `path`. Raises StageError if it is not a valid pointer."""
    pointer = files.read_json(path / NAME)
    remedy = "recreate it with `dvc repro`"
    if not isinstance(pointer, dict) or set(pointer) != set(KEYS):
        raise StageError(f"{path / NAME}: expected an object with {', '.join(KEYS)}: {remedy}")
    for key, pattern in PATTERNS.items():
        if not isinstance(pointer[key], str) or not re.fullmatch(pattern, pointer[key]):
            raise StageError(f"{path / NAME}: {key} is {quote(pointer[key])}, expected a match of {pattern}: {remedy}")
    if not isinstance(pointer["files"], dict) or not pointer["files"]:
        raise StageError(f"{path / NAME}: files: expected a non-empty object: {remedy}")
    for name, expected in pointer["files"].items():
        if not files.is_file_name(name):
            raise StageError(f"{path / NAME}: files.{name}: not the name of a file in the snapshot: {remedy}")
        entry = expected if isinstance(expected, dict) else {}
        if set(entry) != {"size", "sha256"} or type(entry["size"]) is not int or not isinstance(entry["sha256"], str):
            raise StageError(f"{path / NAME}: files.{name}: expected size and sha256: {remedy}")
    return pointer


def check_model(path: Path, *, weights: bool = True, tokenizer: bool = True) -> Path:
    """Return `resolve(path)` after checking that it is a model that loads without pickles and without custom code.

    weights: whether to require weights and check the length of each file against its header. tokenizer: whether to require a
    tokenizer and a config.json that transformers understands. Raises StageError if a required file is missing or corrupted, or
    if the tokenizer has tokens that the model has no embeddings for.
    """
    folder = resolve(path)
    check_complete(str(folder), {file.name for file in folder.iterdir()}, weights)
    config = files.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise StageError(f"{folder / 'config.json'}: expected a JSON object: {RECREATE}")
    if weights:
        for name in list_weights(folder):
            _check_weights(files.require(folder / name))
    if tokenizer:
        _check_tokenizer(folder, has_code="auto_map" in config)
    return folder


def list_weights(folder: Path) -> list[str]:
    """List the names of a model's files of weights: those that its index names, and model.safetensors.

    Raises StageError if the index is not valid or names anything but a .safetensors file in the folder itself: no other file
    is copied, hashed or checked.
    """
    index = folder / INDEX
    if not index.exists():
        return [WEIGHTS]
    content = files.read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise StageError(f"{index}: weight_map: expected a non-empty object, tensor -> file: {RECREATE}")
    for tensor, name in shards.items():
        if not files.is_file_name(name) or not name.endswith(".safetensors"):
            raise StageError(f"{index}: weight_map: {tensor}: {quote(name)} is not a .safetensors file in {folder}: {RECREATE}")
    return sorted({*shards.values(), *([WEIGHTS] if (folder / WEIGHTS).exists() else [])})


def cap_attention(model: Any) -> None:
    """Make transformers cap a loaded model's attention logits if its configuration says so (Gemma 2's does), as vLLM does.

    Transformers' default attention kernel ignores the cap.
    """
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def check_complete(place: str, names: Collection[str], weights: bool) -> None:
    """Raise StageError if the file names of a model lack config.json or, if `weights` are required, safetensors weights.

    place: where the files are, for the message.
    """
    if "config.json" not in names:
        raise StageError(f"{place} has no config.json, so it is not a transformers model: specify another or recreate it")
    if weights and not {WEIGHTS, INDEX} & set(names):
        raise StageError(
            f"{place} has no weights as .safetensors, and pickled weights (.bin, .pt) are never loaded: convert them once with "
            "transformers, `AutoModelForCausalLM.from_pretrained(REPO).save_pretrained(DIRECTORY)` (or the model's own class), "
            "save the tokenizer there too, and set repo to that directory"
        )


def _check_weights(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise StageError(
            f"{file} is corrupted ({describe(error)}): recreate it or, if it comes from the Hub, remove {file.resolve()} and "
            "fetch it again; `make verify` lists all corrupted files"
        ) from error


def _check_tokenizer(folder: Path, has_code: bool) -> None:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # some values of tokenizer_config.json matter only now
    except Exception as error:  # tokenizers raise different exceptions for a missing file
        if has_code or "trust_remote_code" in str(error):
            raise StageError(
                f"{folder} requires code of its own, which is never run: use a model that transformers supports natively"
            ) from error
        raise StageError(
            f"{folder}: cannot read its configuration or tokenizer ({describe(error)}): check that config.json, "
            "tokenizer_config.json and tokenizer.json or tokenizer.model exist and are complete"
        ) from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise StageError(f"{folder}: config.json: vocab_size is {quote(vocabulary)}, expected a number: {RECREATE}")
    if largest >= vocabulary:
        raise StageError(
            f"{folder}: the tokenizer has token IDs up to {largest} but the model has only {vocabulary} embeddings: use the "
            "model's own tokenizer"
        )

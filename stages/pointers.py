"""Hub models without copies: a folder that holds `pointer.json` stands for a snapshot in the local Hub cache.

A pointer is {"repo", "revision", "repo_type", "files": {name: {"size" in bytes, "sha256"}}}: what a stage depends on is
the pointer, a few lines that change when the weights do; the weights themselves stay in the Hub's cache.

A model, pointed to or not, is looked over here before any library loads it, for what they say in many lines or not at all.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from stages import files
from stages.cli import StageError, reason

NAME = "pointer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve(path: Path) -> Path:
    """The directory to load a model from: `path` itself or, where it holds a pointer, the snapshot it points to.

    No network. Raises StageError where `path`, the snapshot or one of its files is missing, or a file's size differs.
    """
    if not (files.present(path) / NAME).exists():
        return path
    pointer = read(path)
    from huggingface_hub import snapshot_download

    remedy = "fetch it with `python -m stages.assets --fetch RECIPE` (RECIPE: the folder of params.yaml)"
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
            f"{path}: {pointer['repo']} at {pointer['revision']} is not in this machine's Hub cache, or not whole: {remedy}, "
            "or by forcing the stage that wrote the pointer: `dvc repro --force --single-item STAGE`"
        ) from error
    for name, expected in pointer["files"].items():
        file = snapshot / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["size"]:
            found = "is missing" if size is None else f"has {size} bytes, not {expected['size']}: remove it"
            raise StageError(f"{file} {found}: {remedy}")
    return snapshot


def read(path: Path) -> dict[str, Any]:
    """The pointer in folder `path`. Raises StageError where it lacks a key."""
    pointer = files.read_json(path / NAME)
    keys = {"repo", "revision", "repo_type", "files"}
    if not isinstance(pointer, dict) or set(pointer) != keys or not isinstance(pointer["files"], dict) or not pointer["files"]:
        raise StageError(f"{path / NAME}: an object with {', '.join(sorted(keys))} is wanted: make it with `dvc repro`")
    for name, expected in pointer["files"].items():
        if name == ".." or Path(name).name != name:
            raise StageError(f"{path / NAME}: files.{name}: not the name of a file in the snapshot: make it with `dvc repro`")
        if not isinstance(expected, dict) or set(expected) != {"size", "sha256"}:
            raise StageError(f"{path / NAME}: files.{name}: size and sha256 are wanted: make it with `dvc repro`")
    return pointer


def model(path: Path, *, weights: bool = True, tokenizer: bool = True) -> Path:
    """What `resolve` gives, if it holds a model to be loaded without pickles and without code of its own.

    weights: whether they are wanted; their headers are read, which say how long a file must be. tokenizer: whether that is
    wanted, and config.json in the form of transformers. Raises StageError for what is missing or damaged, and where the
    tokenizer has tokens that the model has no embeddings for.
    """
    folder = resolve(path)
    complete(str(folder), {file.name for file in folder.iterdir()}, weights)
    config = files.read_json(folder / "config.json")
    if weights:
        index = folder / INDEX
        parts = set(files.read_json(index)["weight_map"].values()) if index.exists() else {WEIGHTS}
        for part in sorted(parts):
            _whole(files.present(folder / part))
    if tokenizer:
        _check_tokens(folder, needs_code="auto_map" in config)
    return folder


def cap_attention(model: Any) -> None:
    """Have transformers cap a loaded model's attention logits, where its configuration says so, as vLLM does.

    Gemma 2's does; transformers' default kernel leaves the capping out.
    """
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def complete(place: str, names: Collection[str], weights: bool) -> None:
    """Raise StageError where the names of a model's files lack config.json or, if they are wanted, weights as safetensors."""
    if "config.json" not in names:
        raise StageError(f"{place} has no config.json: it is no model in the form of transformers: name one, or make it again")
    if weights and not {WEIGHTS, INDEX} & set(names):
        raise StageError(
            f"{place} has no weights as .safetensors, and pickled ones (.bin, .pt) are not loaded: convert them once with "
            "transformers, `AutoModelForCausalLM.from_pretrained(REPO).save_pretrained(DIRECTORY)` (or the class of the "
            "model), the tokenizer likewise, and name that directory as repo"
        )


def _whole(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise StageError(
            f"{file} is damaged ({reason(error)}): make it again, or remove {file.resolve()} and fetch it again where it is "
            "the Hub's; `make verify` names all that is damaged"
        ) from error


def _check_tokens(folder: Path, needs_code: bool) -> None:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what is raised for a missing file differs between tokenizers
        if needs_code or "trust_remote_code" in str(error):
            raise StageError(
                f"{folder} has code of its own, which is not run: take a model that transformers knows without"
            ) from error
        raise StageError(
            f"{folder}: configuration or tokenizer cannot be read ({reason(error)}): see that config.json, "
            "tokenizer_config.json and tokenizer.json or tokenizer.model are there and whole"
        ) from error
    last, vocabulary = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if last >= vocabulary:
        raise StageError(
            f"{folder}: the tokenizer has tokens up to {last}, and the model embeddings for {vocabulary} only: they are not of "
            "one model; take the model's own tokenizer"
        )

"""What a data set's README.md may name in its front matter: files of the data set itself.

`datasets` would follow `../`, absolute paths and URLs, which nothing pins.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.runtime import documents
from stages.runtime.errors import StageError, describe, quote

NAMES = ("README.md", ".huggingface.yaml")
"""The files in which `datasets` looks for the configurations of a data set."""


def check(folder: Path) -> None:
    """Raise StageError if a data set in a local directory names data outside it, or its front matter is not valid YAML."""
    for name in NAMES:
        if (folder / name).is_file():
            check_file(folder / name)


def check_file(path: Path) -> None:
    """Raise StageError if a file of NAMES, of a local data set or one from the Hub, names data outside the data set."""
    for name in _list_data(_read_configs(path)):
        if name != "." and (":" in str(name) or not files.is_inside(name)):
            raise StageError(
                f"{path}: configs: {quote(name)} is not a path below the folder of the data set: put the file there, or use "
                "another data set"
            )


def _read_configs(path: Path) -> Any:
    if path.suffix != ".md":
        return documents.load_mapping(path.read_bytes(), str(path)).get("configs")
    from huggingface_hub import DatasetCard

    try:
        return DatasetCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("configs")
    except Exception as error:  # a YAML parser's
        raise StageError(f"{path}: the front matter cannot be read ({describe(error)}): correct it") from error


def _list_data(configs: Any) -> Iterator[object]:
    """Yield the values of `data_dir`, and the paths and patterns in `data_files`."""
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            yield from [config["data_dir"]] if config.get("data_dir") is not None else []
            entries = config.get("data_files")
            for entry in entries if isinstance(entries, list) else [entries]:
                paths = entry.get("path") if isinstance(entry, dict) else entry
                yield from paths if isinstance(paths, list) else [paths] if paths is not None else []

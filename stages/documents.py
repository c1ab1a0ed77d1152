"""YAML, for those who validate parameters and those who only compare them, in environments without pydantic too."""

import json
from typing import Any

from ruamel.yaml import YAML

from stages.cli import StageError, folded


def mapping(content: bytes, where: str) -> dict[str, Any]:
    """The mapping that YAML (and so JSON) holds. Raises StageError where it holds none."""
    try:
        document = YAML(typ="safe").load(content)
        json.dumps(document, default=str, skipkeys=True)  # refuses what contains itself, which YAML can write
    except Exception as error:  # ruamel.yaml lets pass whatever int(), float() and date() raise
        raise StageError(f"{where}: not YAML: {folded(error)}") from error
    if not isinstance(document, dict):
        raise StageError(f"{where}: a mapping of names to values is wanted, not {type(document).__name__}")
    return document

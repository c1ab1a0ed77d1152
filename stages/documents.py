"""YAML, for those who validate parameters and those who only compare them, in environments without pydantic too."""

import json
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent

from stages.cli import StageError, folded


def mapping(content: bytes, where: str) -> dict[str, Any]:
    """The mapping that YAML (and so JSON) holds. Raises StageError where it holds none."""
    try:
        if b"*" in content and any(isinstance(event, AliasEvent) for event in YAML(typ="safe").parse(content)):
            raise ValueError("an alias (*name), which may stand for more than fits into memory: write its value out")
        document = YAML(typ="safe").load(content)
        json.dumps(document, default=str, skipkeys=True)  # refuses a number too long to be printed
    except Exception as error:  # ruamel.yaml lets pass whatever int(), float() and date() raise
        raise StageError(f"{where}: not YAML: {folded(error)}") from error
    if not isinstance(document, dict):
        raise StageError(f"{where}: a mapping of names to values is wanted, not {type(document).__name__}")
    return document

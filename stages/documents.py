"""YAML, for those who validate parameters and those who only compare them, in environments without pydantic too."""

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.cli import StageError


def mapping(content: bytes, where: str) -> dict[str, Any]:
    """The mapping that YAML (and so JSON) holds. Raises StageError where it holds none."""
    try:
        document = YAML(typ="safe").load(content)
    except YAMLError as error:
        raise StageError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise StageError(f"{where}: a mapping of names to values is wanted, not {type(document).__name__}")
    return document

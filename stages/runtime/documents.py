"""Load YAML mappings (no pydantic dependency: `stages.tools diff` runs where only DVC is installed)."""

import json
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent

from stages.runtime.errors import StageError, one_line


def load_mapping(content: bytes, where: str) -> dict[str, Any]:
    """Parse YAML (and so JSON) that must be a mapping. `where` names its source in messages. Raises StageError."""
    try:
        if b"*" in content and any(isinstance(event, AliasEvent) for event in YAML(typ="safe").parse(content)):
            raise ValueError("an alias (*name) may expand to more than fits into memory: replace it with its value")
        document = YAML(typ="safe").load(content)
        # Rejects integers too long to print, and text that cannot be written.
        json.dumps(document, default=str, skipkeys=True, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        character = f"\\u{ord(error.object[error.start]):04x}"
        raise StageError(f"{where}: {character} is half of a character: write the character itself, in UTF-8") from error
    except Exception as error:  # ruamel.yaml does not wrap the exceptions of int(), float() and date()
        raise StageError(f"{where}: not valid YAML: {one_line(error)}") from error
    if not isinstance(document, dict):
        raise StageError(f"{where}: expected a YAML mapping, got {type(document).__name__}")
    return document

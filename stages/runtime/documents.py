"""Load YAML mappings (no pydantic dependency: `stages.tools diff` runs where only DVC is installed)."""

import contextlib
import json
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from stages.runtime.errors import StageError, one_line

DEEPEST = 100
"""Mappings and lists within each other. On many thousands, ruamel.yaml's parser in C overflows the stack: the process ends."""
HALF = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
"""JSON escapes a character beyond U+FFFF as two of these, which YAML does not join."""


def load_mapping(content: bytes, where: str) -> dict[str, Any]:
    """Parse YAML (and so JSON) that must be a mapping. `where` names its source in messages. Raises StageError."""
    try:
        check_nesting(content)
        if b"*" in content and any(isinstance(event, AliasEvent) for event in YAML(typ="safe").parse(content)):
            raise ValueError("an alias (*name) may expand to more than fits into memory: replace it with its value")
        document = YAML(typ="safe").load(content)
        # Rejects integers too long to print, and text that cannot be written.
        json.dumps(document, default=str, skipkeys=True, ensure_ascii=False).encode()
    except Exception as error:  # ruamel.yaml does not wrap the exceptions of int(), float() and date()
        half = HALF.search(content)
        if half and (isinstance(error, UnicodeEncodeError) or "Unicode character escape" in str(error)):
            character = half[0].decode()
            raise StageError(f"{where}: {character} is half of a character: write the character itself, in UTF-8") from error
        raise StageError(f"{where}: not valid YAML: {one_line(error)}") from error
    if not isinstance(document, dict):
        raise StageError(f"{where}: expected a YAML mapping, got {type(document).__name__}")
    return document


def check_nesting(content: bytes) -> None:
    """Raise ValueError for YAML that is nested deeper than DEEPEST. What is no YAML is left to those who load it."""
    depth = 0
    with contextlib.suppress(YAMLError):
        for event in YAML(typ="safe").parse(content):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"lists or mappings are nested more than {DEEPEST} deep: take some of them out")

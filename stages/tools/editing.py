"""Edit YAML files without losing their comments."""

from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import CommentMark, YAMLError
from ruamel.yaml.tokens import CommentToken

from stages.runtime.errors import StageError, one_line

END_COMMENT = 2
"""Index of the token in which ruamel.yaml keeps the comment at the end of a key's line and the lines up to the next key."""


def load(source: Path | str) -> Any:
    """Load a file or text so that `dump` reproduces its unchanged lines."""
    return _round_trip().load(source)


def dump(document: Any) -> str:
    """Format a document as YAML, with the comments that it was loaded with."""
    text = StringIO()
    _round_trip().dump(document, text)
    return text.getvalue()


def parse_value(text: str, where: str) -> Any:
    """Parse one value as it would appear in a YAML file. `where` names its source in messages. Raises StageError."""
    try:
        return load(text)
    except YAMLError as error:
        raise StageError(f"{where}: not valid YAML: {one_line(error)}") from error


def find_assets(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, mapping) for `node` and every mapping within it that has a `repo`. Names start with `name`."""
    if isinstance(node, dict):
        if isinstance(node.get("repo"), str):
            yield name, node
        for key, value in node.items():
            yield from find_assets(value, f"{name}.{key}")


def get_comment(section: CommentedMap, key: str) -> str | None:
    """Return the comment at the end of a key's line."""
    tokens = section.ca.items.get(key)
    text: str = tokens[END_COMMENT].value.partition("\n")[0] if tokens and tokens[END_COMMENT] else ""
    return text or None


def set_value(document: CommentedMap, key: str, value: Any, comment: str) -> None:
    """Set a dotted key of params.yaml; `comment` replaces the comment at the end of its line, which described the old value.

    Raises StageError if there is no section for the key.
    """
    *parents, last = key.split(".")
    section = owner = document
    name = parents[0] if parents else last
    for depth, parent in enumerate(parents):
        section = section.get(parent)
        if not isinstance(section, CommentedMap):
            raise StageError(f"{key}: params.yaml has no section {'.'.join(parents[: depth + 1])}: correct the key")
        if not section.fa.flow_style():  # within { } a comment would end the line too early
            owner, name = section, [*parents, last][depth + 1]
    above = name if name in owner or not owner else next(reversed(owner))
    section[last] = value
    _replace_comment(owner, name, above, comment)


def remove_value(document: CommentedMap, key: str) -> CommentedMap:
    """Return the document without a dotted key of params.yaml, its value, and the comments on their lines.

    Raises StageError if there is no such key.
    """
    section, last = _find_parent(document, key)
    if section.fa.flow_style():
        del section[last]
        return document
    lines = dump(document).splitlines(keepends=True)
    section, last = _find_parent(load("".join(lines)), key)  # where it is in this text
    start, column = section.lc.key(last)
    end = start + 1
    for number, line in enumerate(lines[end:], end):
        content = line.lstrip()
        indent = len(line) - len(content)
        if not content or content.startswith("#"):
            continue  # belongs to the value only if more of it follows
        if indent < column or (indent == column and not content.startswith("- ")):
            break
        end = number + 1
    remaining: CommentedMap = load("".join(lines[:start] + lines[end:]))
    return remaining


def _find_parent(document: CommentedMap, key: str) -> tuple[CommentedMap, str]:
    """Return the mapping that holds a dotted key, and the key's last part. Raises StageError if there is none."""
    *parents, last = key.split(".")
    section: Any = document
    for parent in parents:
        section = section.get(parent) if isinstance(section, CommentedMap) else None
    if not isinstance(section, CommentedMap) or last not in section:
        raise StageError(f"{key}: params.yaml has no such key: correct it, or do not unset it")
    return section, last


def _replace_comment(owner: CommentedMap, name: str, above: str, comment: str) -> None:
    """Set the comment at the end of a key's line, in the old one's column.

    above: the key itself or, for a new one, the key that it follows. The lines between it and the next key, such as a blank
    line and the comment that heads the next section, move below the new line.
    """
    token = owner.ca.items.get(above, [None] * 4)[END_COMMENT]
    old, newline, rest = token.value.partition("\n") if token else ("", "\n", "")
    column = token.start_mark.column if old else 0
    if above != name and token:
        owner.ca.items[above][END_COMMENT] = CommentToken(old + newline, CommentMark(column), None)
    tokens = owner.ca.items.setdefault(name, [None] * 4)
    text = (comment if column else f" {comment}") + newline + rest
    tokens[END_COMMENT] = CommentToken(text, CommentMark(column), None)


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10**6
    yaml.representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml

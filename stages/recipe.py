"""A new recipe from an existing one, with some parameters otherwise.

python -m stages.recipe NEW --from RECIPE [--with VARIANT.yaml] [--set KEY=VALUE ...]

makes recipes/NEW: params.yaml with its comments, dvc.yaml and published.yaml. `--from .` is the miniature.
"""

import argparse
import os
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import CommentMark, YAMLError
from ruamel.yaml.tokens import CommentToken

from stages import cli, files, params
from stages.cli import ROOT, StageError


def create(name: str, source: Path, variant: Path | None, settings: list[str]) -> Path:
    """Make recipes/<name> from the recipe in `source`. Returns its folder.

    variant: a file of params.Variant. settings: `key=value`, after the variant's, values as they would stand in params.yaml.
    Raises StageError, and writes nothing, where the folder exists or the parameters would not be valid.
    """
    target = ROOT / "recipes" / name
    folder = target.relative_to(ROOT)
    if not re.fullmatch("[a-z0-9][a-z0-9.-]*", name):
        raise StageError(f"{name!r} is no name for a recipe: small letters, digits, '-' and '.'")
    if target.exists():
        raise StageError(f"{folder} exists: choose another name, or remove it")
    policy = params.validate_unpinned(params.read(source / "params.yaml"), source / "params.yaml").assets.policy.repo
    params.published(source / "published.yaml")

    document = round_trip().load(source / "params.yaml")
    for _, asset in assets(document["assets"], "assets"):
        if asset["repo"].startswith("."):  # a directory, seen from the recipe
            asset["repo"] = os.path.relpath(source / asset["repo"], target)
    wanted = params.variant(variant) if variant else None
    if variant and wanted:
        comments = round_trip().load(variant)["params"]
        for key, value in wanted.params.items():
            change(document, key, value, comment_of(comments, key) or f"# {variant.name}")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise StageError(f"--set {setting}: KEY=VALUE is wanted, train.loss=dpo for example")
        change(document, key, parsed(setting, value), "# changed by --set")
    origin = source.resolve().relative_to(ROOT) if source.resolve().is_relative_to(ROOT) else source.resolve().name
    changes = ", ".join([*([variant.name] if variant else []), *settings]) or "nothing changed"
    text = re.sub(r"--pin \S+", f"--pin {folder}", dumped(document))
    text = f"# {folder}, made from {origin}: {' '.join(changes.split())}.\n{text}"
    changed = params.validate_unpinned(YAML(typ="safe").load(text), folder / "params.yaml").assets.policy.repo

    if variant and wanted and wanted.published is not None:
        published = dumped({"published": round_trip().load(variant)["published"].get(changed)})
    elif changed != policy:
        published = dumped({"published": None})
    else:
        published = (source / "published.yaml").read_text()
    pipeline = re.sub(r"(?m)^- root: .*$", "- root: ../../", files.present(source / "dvc.yaml").read_text(), count=1)
    with files.replacing(target) as partial:
        partial.mkdir()
        (partial / "params.yaml").write_text(text)
        (partial / "dvc.yaml").write_text(pipeline)
        (partial / "published.yaml").write_text(published)
    return target


def change(document: CommentedMap, key: str, value: Any, comment: str) -> None:
    """Set a dotted key, and give its line `comment` in the place of the one that went with the old value.

    Raises StageError where there is no section to hold the key.
    """
    *parents, last = key.split(".")
    section, line = document, (document, key)
    for depth, part in enumerate([*parents, last]):
        if not section.fa.flow_style():  # within { } a comment would end the line too early
            line = (section, part)
        if depth < len(parents):
            section = section.get(part)
            if not isinstance(section, CommentedMap):
                raise StageError(f"{key}: params.yaml has no section {'.'.join(parents[: depth + 1])}")
    owner, name = line
    before = name if name in owner or not owner else next(reversed(owner))  # whose line the new one takes or follows
    section[last] = value
    old = owner.ca.items.get(before, [None] * 4)[2]
    said, end, rest = old.value.partition("\n") if old else ("", "\n", "")  # rest: what heads the next section
    column = old.start_mark.column if said else 0
    if before != name and old:
        owner.ca.items[before][2] = CommentToken(said + end, CommentMark(column), None)
    tokens = owner.ca.items.setdefault(name, [None] * 4)
    tokens[2] = CommentToken((comment if column else f" {comment}") + end + rest, CommentMark(column), None)


def comment_of(section: CommentedMap, key: str) -> str | None:
    """The comment at the end of the line of a key."""
    tokens = section.ca.items.get(key)
    text: str = tokens[2].value.partition("\n")[0] if tokens and tokens[2] else ""
    return text or None


def parsed(setting: str, value: str) -> Any:
    try:
        return round_trip().load(value)
    except YAMLError as error:
        raise StageError(f"--set {setting}: not YAML: {cli.folded(error)}") from error


def dumped(document: Any) -> str:
    text = StringIO()
    round_trip().dump(document, text)
    return text.getvalue()


def assets(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every mapping with a repo, with its dotted name."""
    if isinstance(node, dict):
        if isinstance(node.get("repo"), str):
            yield name, node
        for key, value in node.items():
            yield from assets(value, f"{name}.{key}")


def round_trip() -> YAML:
    """YAML that leaves every line that did not change as it was."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10**6
    yaml.representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def main() -> None:
    parser = argparse.ArgumentParser("python -m stages.recipe", description="Make a new recipe from an existing one.")
    parser.add_argument("name", metavar="NEW", help="the new recipe is recipes/NEW")
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="RECIPE", help="a recipe's folder, or .")
    parser.add_argument("--with", dest="variant", type=Path, metavar="FILE", help="what is otherwise: recipes/variants/*.yaml")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="one parameter")
    arguments = parser.parse_args()
    target = create(arguments.name, arguments.source, arguments.variant, arguments.settings)
    folder = target.relative_to(ROOT)
    print(f"{folder} is made. Next, in the repository's root:")
    try:
        params.validate(target / "params.yaml")
    except StageError:  # valid but for the revisions, or it would not have been made
        print(f"python -m stages.assets --pin {folder}")
    print(f"dvc repro {folder}/dvc.yaml")


if __name__ == "__main__":
    cli.run(main, record=False)

"""Create a new recipe from an existing one, with some parameters changed.

python -m stages.tools recipe NEW --recipe DIR [--with VARIANT.yaml] [--unset KEY ...] [--set KEY=VALUE ...]

creates recipes/NEW: params.yaml with the comments of the original, dvc.yaml and published.yaml. Without --recipe, the original
is the miniature. A recipe for another policy than the miniature's has to set everything that was chosen for its size.
"""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.reporting.published import Published, read_published
from stages.runtime import documents, params
from stages.runtime.errors import StageError, quote
from stages.runtime.params import Params, Section
from stages.runtime.paths import ROOT
from stages.tools import editing, options

PIPELINE_HEADER = """\
# Generated from ../../dvc.yaml, which explains it, by `python -m stages.tools sync`: edit that file, not this one.
# Only `root` differs, the path from here to the root of the repository.
"""

MINIATURE_SETTINGS = (
    "eta",
    "engine.max_model_length",
    "engine.kv_cache_gib",
    "generate.max_new_tokens",
    "lengths.prompt",
    "lengths.total",
    "train.learning_rate",
    "train.max_grad_norm",
    "answer.max_new_tokens",
    "evaluate_alpaca.judge",
)
"""Parameters whose values in the miniature only suit models of its size, and answers of its toy domain."""


class Variant(Section):
    """recipes/variants/*.yaml: what a variant of a recipe changes."""

    params: dict[str, Any]
    """Dotted key in params.yaml -> value."""
    published: dict[str, Published] | None = None
    """Repository of the base policy -> published results of this variant; absent: the recipe's own results apply."""


@dataclass(frozen=True)
class Change:
    """A parameter to change: dotted key, value, and the comment for its line in params.yaml."""

    key: str
    value: Any
    comment: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NEW", help="the new recipe is recipes/NEW")
    options.add_recipe_option(parser, "folder of the recipe to copy")
    parser.add_argument("--with", dest="variant", type=Path, metavar="FILE", help="changes to make: recipes/variants/*.yaml")
    parser.add_argument("--unset", dest="removals", action="append", default=[], metavar="KEY", help="a parameter to remove")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="a parameter to change"
    )


def main(args: argparse.Namespace) -> None:
    """Create the recipe, and print the commands that come next."""
    target = create_recipe(args.name, args.recipe, args.variant, args.settings, ROOT, args.removals)
    folder = target.relative_to(ROOT)
    print(f"{folder} created. Next, in the root of the repository:")
    try:
        params.validate(target / "params.yaml")
    except StageError:  # valid except for the revisions, otherwise it would not have been created
        print(f"python -m stages.tools hub --pin --recipe {folder}")
    print(f"dvc repro {folder}/dvc.yaml")


def create_recipe(
    name: str, source: Path, variant: Path | None, settings: list[str], root: Path, removals: Sequence[str] = ()
) -> Path:
    """Create root/recipes/<name> from the recipe in `source`, and return its folder.

    removals: keys to remove first. variant: a file with the keys of Variant. settings: `key=value`, applied after the variant,
    with values as in params.yaml. Raises StageError, and writes nothing, if the folder exists, if the parameters would not be
    valid, or if another policy would be used with the miniature's settings.
    """
    if not re.fullmatch("[a-z0-9][a-z0-9.-]*", name):
        raise StageError(f"{quote(name)} is not a valid name for a recipe: use lowercase letters, digits, '-' and '.'")
    target = root / "recipes" / name
    folder = target.relative_to(root)
    if target.exists():
        raise StageError(f"{folder} exists: choose another name, or remove it")
    original = params.validate_unpinned(params.read(source / "params.yaml"), source / "params.yaml")
    read_published(source / "published.yaml")  # raises StageError if it is not valid
    changes = [*(read_variant(variant) if variant else []), *map(parse_setting, settings)]
    text = edit_params(source, target, changes, removals)
    origin = f"created from {describe_source(source, root)}: {describe_changes(variant, removals, settings)}"
    text = f"# {folder}, {' '.join(origin.split())}.\n{text}"
    text = re.sub(r"(hub --pin --recipe) [^\s`]+", rf"\1 {folder}", text)
    document = documents.load_mapping(text.encode(errors="replace"), str(folder / "params.yaml"))
    changed = params.validate_unpinned(document, folder / "params.yaml")
    check_policy(original, changed, {change.key for change in changes}, folder / "params.yaml")
    published = choose_published(source, variant, original, changed)
    pipeline = generate_pipeline(files.require(root / "dvc.yaml").read_text(encoding="utf-8"))
    with files.replacing(target) as partial:
        partial.mkdir()
        (partial / "params.yaml").write_text(text, encoding="utf-8")
        (partial / "dvc.yaml").write_text(pipeline, encoding="utf-8")
        (partial / "published.yaml").write_text(published, encoding="utf-8")
    return target


def read_variant(path: Path) -> list[Change]:
    """Read the changes of a variant, with the comments on their lines. Raises StageError if it is not valid."""
    variant = params.validate_model(Variant, params.read(path), path)
    section = editing.load(path)["params"]
    return [Change(key, value, editing.get_comment(section, key) or f"# {path.name}") for key, value in variant.params.items()]


def parse_setting(setting: str) -> Change:
    """Parse `key=value`. Raises StageError."""
    key, equals, value = setting.partition("=")
    if not equals:
        raise StageError(f"--set {setting}: expected KEY=VALUE, such as train.loss=dpo")
    return Change(key, editing.parse_value(value, f"--set {setting}"), "# changed by --set")


def check_policy(original: Params, changed: Params, keys: set[str], path: Path) -> None:
    """Raise StageError if the policy is another one, and what belongs to the previous one was kept: its licence, its golden
    token IDs or, if it was the miniature's, values that only suit models of that size.

    keys: the dotted keys that were set, perhaps with whole sections. path: the new params.yaml, for the message.
    """
    if "assets.policy.repo" in keys:
        for key in ("assets.policy.license", "assets.policy.golden"):
            name = key.rpartition(".")[2]
            if key not in keys and getattr(changed.assets.policy, name):
                raise StageError(
                    f"{path}: the policy is {changed.assets.policy.repo}, but {key} is still that of "
                    f"{original.assets.policy.repo}: set it too (--set {key}=VALUE), or remove it (--unset {key})"
                )
    if not original.assets.policy.made_here or changed.assets.policy.made_here:
        return
    missing = [key for key in MINIATURE_SETTINGS if key not in keys and key.partition(".")[0] not in keys]
    if missing:
        raise StageError(
            f"{path}: the policy is {changed.assets.policy.repo}, but {', '.join(missing)} still have the miniature's values, "
            "chosen for models of its size: set them too (--set KEY=VALUE), or start from another recipe, such as --recipe "
            "recipes/small"
        )


def edit_params(source: Path, target: Path, changes: list[Change], removals: Sequence[str]) -> str:
    """Return the text of source/params.yaml for the folder `target`, with keys removed and changes made. Raises StageError."""
    document = editing.load(source / "params.yaml")
    for _, asset in editing.find_assets(document["assets"], "assets"):
        if asset["repo"].startswith("."):  # a directory, relative to the recipe
            asset["repo"] = os.path.relpath(source / asset["repo"], target)
    for key in removals:
        document = editing.remove_value(document, key)
    for change in changes:
        editing.set_value(document, change.key, change.value, change.comment)
    return editing.dump(document)


def describe_source(source: Path, root: Path) -> str:
    path = source.resolve()
    if path == root:
        return "the miniature"
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def describe_changes(variant: Path | None, removals: Sequence[str], settings: list[str]) -> str:
    changes = [*([variant.name] if variant else []), *(f"{key} removed" for key in removals), *settings]
    return ", ".join(changes) or "nothing changed"


def choose_published(source: Path, variant: Path | None, original: Params, changed: Params) -> str:
    """Return the text of the new published.yaml: the variant's published results or, for the same base policy, the source's."""
    policy = changed.assets.policy.repo
    results = editing.load(variant).get("published") if variant else None
    if results is not None:
        return editing.dump({"published": results.get(policy)})
    if policy != original.assets.policy.repo:
        return editing.dump({"published": None})
    return (source / "published.yaml").read_text(encoding="utf-8")


def generate_pipeline(text: str) -> str:
    """Return a recipe's dvc.yaml, given the text of the one in the root of the repository."""
    lines = text.splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return PIPELINE_HEADER + re.sub(r"(?m)^- root: .*$", "- root: ../../", "".join(lines[start:]), count=1)

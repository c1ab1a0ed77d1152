"""Pin or fetch the assets that a recipe takes from the Hugging Face Hub.

--pin writes the commit of every asset without one into the recipe's params.yaml. --fetch downloads the models that the pointers
in the recipe's data folder stand for into this machine's Hub cache: run it after `dvc pull` on a new machine.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from stages.artifacts import files, hub, pointers
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.tools import editing, options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--pin", action="store_true", help="write missing revisions into params.yaml")
    action.add_argument("--fetch", action="store_true", help="download the models that data/ points to")
    options.add_recipe_option(parser)


def main(args: argparse.Namespace) -> None:
    if args.pin:
        pin_assets(args.recipe / "params.yaml")
    else:
        fetch_models(args.recipe / "data")


def pin_assets(path: Path) -> None:
    """Write the current commit of every Hub asset whose revision is not a full commit into params.yaml, and print it.

    A revision that is a branch or tag is replaced by its commit; everything else stays as it is. Raises StageError, and writes
    nothing, if a repository or revision is unknown.
    """
    params.read(path)  # raises StageError if it is missing or not valid YAML
    document = editing.load(path)
    unpinned = [(name, asset) for name, asset in editing.find_assets(document.get("assets"), "assets") if not is_pinned(asset)]
    for name, asset in unpinned:
        repo_type = "model" if name.startswith(("assets.policy", "assets.ranker")) else "dataset"
        revision = hub.find_revision(asset["repo"], repo_type, asset.get("revision"))
        if "revision" in asset:
            asset["revision"] = revision
        else:
            asset.insert(list(asset).index("repo") + 1, "revision", revision)
        print(f"{name}: {asset['repo']} {revision}")
    if unpinned:
        with files.replacing(path) as partial:
            partial.write_text(editing.dump(document), encoding="utf-8")
    print(f"{path}: {len(unpinned)} revisions pinned" if unpinned else f"{path}: every asset is already pinned")


def is_pinned(asset: dict[str, Any]) -> bool:
    """Return whether an asset of params.yaml is not on the Hub or has a full commit as its revision."""
    on_hub = params.Asset.model_construct(repo=asset["repo"]).on_hub
    return not on_hub or bool(re.fullmatch("[0-9a-f]{40}", str(asset.get("revision"))))


def fetch_models(data: Path) -> None:
    """Download the files that every pointer below the folder stands for, and check them. Raises StageError."""
    paths = sorted(data.rglob(pointers.NAME))
    if not paths:
        raise StageError(f"no {pointers.NAME} in {data}: run `dvc pull` or `dvc repro` first if a model is from the Hub")
    for path in paths:
        hub.fetch_pointer(path.parent)

"""Look up or fetch what a recipe takes from the Hub.

python -m stages.assets --pin RECIPE     write the commit of every asset without one into RECIPE/params.yaml
python -m stages.assets --fetch RECIPE   fetch the models that pointers below RECIPE/data stand for into this machine's Hub
                                         cache: after `dvc pull` on a new machine
"""

import argparse
import re
import sys
from pathlib import Path

from stages import cli, files, params, pointers, recipe
from stages.assets import hub
from stages.cli import StageError


def pin(path: Path) -> None:
    """Write the newest commit of every Hub asset whose revision is not a full commit into params.yaml, all else kept.

    A branch or tag given as revision is replaced by its commit. Raises StageError, and writes nothing, where one is unknown.
    """
    params.read(path)
    yaml = recipe.round_trip()
    document = yaml.load(path)
    found = 0
    for name, asset in recipe.assets(document.get("assets"), "assets"):
        if not params.Asset.model_construct(repo=asset["repo"]).on_hub:
            continue
        if re.fullmatch("[0-9a-f]{40}", str(asset.get("revision"))):
            continue
        repo_type = "model" if name.startswith(("assets.policy", "assets.ranker")) else "dataset"
        revision = hub.find_revision(asset["repo"], repo_type, asset.get("revision"))
        if "revision" in asset:
            asset["revision"] = revision
        else:
            asset.insert(list(asset).index("repo") + 1, "revision", revision)
        print(f"{name}: {asset['repo']} {revision}")
        found += 1
    if found:
        with files.replacing(path) as partial:
            yaml.dump(document, partial)
    print(f"{path}: {found} pinned" if found else f"{path}: every asset is pinned already")


def fetch(recipe: Path) -> None:
    """Fetch what every pointer below recipe/data stands for, and check it. Raises StageError."""
    found = sorted((recipe / "data").rglob(pointers.NAME))
    if not found:
        raise StageError(
            f"no {pointers.NAME} below {recipe / 'data'}: `dvc pull` or `dvc repro` first, or nothing is from the Hub"
        )
    for pointer in found:
        hub.fetch_pointer(pointer.parent)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m stages.assets", description="Look up or fetch what a recipe takes from the Hub."
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--pin", type=Path, metavar="RECIPE", help="write missing revisions into RECIPE/params.yaml")
    action.add_argument("--fetch", type=Path, metavar="RECIPE", help="fetch the models that RECIPE/data points to")
    arguments = parser.parse_args()
    if arguments.pin:
        pin(arguments.pin / "params.yaml")
    else:
        fetch(arguments.fetch)


if __name__ == "__main__":
    sys.argv[0] = "assets"  # the name in messages, instead of __main__
    cli.run(main, online=True)

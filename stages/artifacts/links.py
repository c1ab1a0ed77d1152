"""data/local: links to the assets that are local directories, by which DVC knows their contents.

A stage of dvc.yaml cannot depend on a directory that only some values of a parameter name. It depends on data/local/KEY
instead: a link to the directory that params.yaml names under KEY or, for an asset that is made here or comes from the Hub, a
file that says so. DVC follows the link: dvc.lock has the hash of the directory's files, and when one of them changes, the stage
runs again.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from stages.artifacts import files, hub
from stages.runtime import params

NOT_LOCAL = "Not a local directory.\n"
"""The content of the file in place of a link."""

Assets = dict[str, params.Asset | None]
"""Key in data/local -> the asset, None if it is absent."""


def list_training_assets(assets: params.Assets) -> Assets:
    """List the assets of a pipeline that trains."""
    return {
        "policy": assets.policy,
        "ranker": assets.ranker,
        "ranker.base": assets.ranker.base,
        "prompts": assets.prompts,
        "prompts.assignment": assets.prompts.assignment,
        **list_sets(assets),
    }


def list_sets(assets: params.EvaluationAssets) -> Assets:
    """List the evaluation sets."""
    tasks = {f"harness.{task}": getattr(assets.harness, task) for task in params.HarnessAsset.model_fields}
    return {"alpaca_eval": assets.alpaca_eval, **tasks}


def write_links(assets: Mapping[str, params.Asset | None], out: Path) -> None:
    """Write the folder `out`, in place of an earlier one.

    Raises StageError, and writes nothing, if a directory is missing, or if there is something else in `out`.
    """
    local = {key: asset for key, asset in assets.items() if asset and asset.is_local}
    targets = {key: (hub.require_directory(asset), Path(asset.repo).is_absolute()) for key, asset in local.items()}
    files.refuse_foreign(out.resolve(), lambda name: _is_link(out / name))
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        old.unlink()  # a link or a file, never what a link leads to
    for key in assets:
        if key in targets:
            path, is_absolute = targets[key]
            (out / key).symlink_to(path if is_absolute else os.path.relpath(path.resolve(), out.resolve()))
        else:
            (out / key).write_text(NOT_LOCAL, encoding="utf-8")


def _is_link(path: Path) -> bool:
    """Return whether this is a link, or what `write_links` writes in the place of one."""
    return path.is_symlink() or (path.is_file() and path.read_bytes() == NOT_LOCAL.encode())

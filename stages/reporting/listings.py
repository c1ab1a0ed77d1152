"""reports/listings.json: the MD5 of every file in the folders that a report reads and that dvc.lock has a single hash for.

With it, `python -m stages.tools gate` can tell from the files in Git alone whether a report is of the evaluations in dvc.lock.
A report depends on the folder of all evaluations, and the evaluation of each model is a folder in it.
"""

from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.runtime.errors import StageError

NAME = "listings.json"
FOLDERS = ("alpaca_eval", "alpaca_eval_set", "harness")
"""Folders of data/ that contain folders which stages write, or of which stages read a part."""


def write_listings(data: Path, folders: tuple[str, ...], out: Path) -> None:
    """Write NAME to the folder `out`: path of each file, beginning with data/ -> MD5. data: the folder that contains `folders`.

    Raises StageError if one of the folders is missing.
    """
    paths = [path for name in folders for path in files.require(data / name).rglob("*") if path.is_file()]
    files.write_json({f"data/{path.relative_to(data).as_posix()}": files.dvc_md5(path) for path in paths}, out / NAME)


def read_listings(path: Path) -> dict[str, str]:
    """Read the file that `write_listings` wrote. Raises StageError if it is not valid."""
    content: Any = files.read_json(path)
    if not isinstance(content, dict) or not all(isinstance(md5, str) for md5 in content.values()):
        raise StageError(f"{path}: expected an object of paths and MD5s: {files.suggest_remedy(path)}")
    return content

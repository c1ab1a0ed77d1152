"""Run one stage of dvc.yaml: python -m stages NAME [options]."""

import argparse
import fnmatch
import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from stages.runtime import catalog, errors, run
from stages.runtime.paths import ROOT

WITHOUT_RECORD = ("code", "assets-local", "assets-local-models", "report", "report-models")
"""Stages without a record: the first three compute no results, and the reports read the records of the other stages."""

MODEL = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""A checkpoint's files, or the pointer to one."""
RANKER = ("PairRM/*", "base/*")
CONTENTS = {
    "assets-alpaca-eval": ("*.json", "*.csv"),
    "assets-harness": ("allenai/*", "truthful_qa/*", "winogrande/*", "gsm8k/*", "hellaswag/*", "hails/*", "exact_match/*"),
    "assets-local": ("*",),
    "assets-local-models": ("*",),
    "assets-model": MODEL,
    "assets-pairrm": RANKER,
    "assets-policy": MODEL,
    "assets-ranker": RANKER,
    "code": ("*",),
    "evaluate-alpaca": ("annotations.json", "metrics.json"),
    "evaluate-lm": ("*.json",),
    "report": ("*",),
    "report-models": ("*",),
    "split": ("*.parquet", "contamination.json"),
    "train": MODEL,
}
"""The stages whose --out is a folder -> patterns of all that may be in it. All other outputs are files."""

NAMES = "--names"
"""In place of a stage: only check the names in params.yaml, as dvc.yaml's commands do before the shell expands the rest."""


def list_stages() -> str:
    """Return the usage text: every stage, its environment and what it does."""
    lines = ["usage: python -m stages NAME [options]     (python -m stages NAME --help: its options)", ""]
    for name, module in catalog.stage_modules().items():
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        lines.append(f"  {name:<20}{catalog.summary(path)}")
    return "\n".join(lines)


def check_names() -> None:
    """Check what dvc.yaml inserts from params.yaml, if there is such a file, into commands and paths: the names of iterations,
    models and rankers, and the files of answers.

    Raises StageError for a name that is not valid, and for a file's name that could end the quotes around it.
    """
    from stages.runtime import params

    path = Path("params.yaml")
    document = params.read(path) if path.is_file() else {}
    for section in ("iterations", "models", "answers", "rankers"):
        values = getattr(params.load(section, path=path), section) if section in document else {}
        for name, file in values.items() if section == "answers" else ():
            if not file.isprintable() or {"'", "\\"} & set(file):
                raise errors.StageError(
                    f"{path}: answers: the file of {name}, {errors.quote(file)}, contains a quotation mark, a backslash or a "
                    "character that cannot be printed: rename the file"
                )


def require_recordable(outputs: list[Path]) -> None:
    """Raise StageError if DVC, which runs this stage, could not record its outputs: in a Git repository, it does not follow
    links to folders outside, but says so only after the stage's work."""
    root = Path(os.environ.get("DVC_ROOT", "")).resolve()
    if "DVC_STAGE" not in os.environ or not (root / ".git").exists():
        return
    for path in outputs:
        if not path.parent.resolve().is_relative_to(root):
            raise errors.StageError(
                f"{path}: {path.parent} leads to {path.parent.resolve()}, and DVC does not record outputs outside of the "
                "repository: replace the link by a folder, and keep only DVC's cache on the other disk, with `dvc cache dir "
                "FOLDER` and `dvc config cache.type symlink`, or mount the disk at the folder"
            )


def refuse_foreign_outputs(name: str, args: argparse.Namespace) -> None:
    """Raise StageError before the stage's work if its outputs would replace what it has hardly written: see `refuse_foreign`,
    which judges by the exact names at the end."""
    from stages.artifacts import files

    for path in run.output_paths(args):
        patterns = CONTENTS.get(name) if path == args.out else None
        files.refuse_foreign(path, partial(matches, patterns) if patterns else None)


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Return whether a name, as of `files.list_names`, matches one of the patterns, in which * stands for slashes too."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def start_numerics(name: str) -> str | None:
    """Set up this process for `numerics` of params.yaml. Returns the numerics in effect, None for a stage that uses none.

    Raises StageError if the parameter or the shim is missing.
    """
    if not catalog.has_numerics(name):
        return None
    from stages.engines import numerics
    from stages.runtime import params

    return numerics.apply(params.load("numerics").numerics)


def run_main(name: str, stage: Any, numerics_used: str | None, args: argparse.Namespace) -> None:
    """Check a stage's outputs, run its `main`, then verify that its numerics were in effect. Raises StageError."""
    require_recordable(run.output_paths(args))
    refuse_foreign_outputs(name, args)
    stage.main(args)
    if numerics_used:
        from stages.engines import numerics

        numerics.verify(numerics_used)


def main(argv: list[str]) -> None:
    """Run the stage named by the first argument in its environment, with the other arguments as its options."""
    if not argv or argv[0] in ("-h", "--help"):
        print(list_stages())
        sys.exit(0 if argv else 2)
    name, modules = argv[0], catalog.stage_modules()
    try:
        if name not in modules and name != NAMES:
            raise errors.StageError(f"{errors.quote(name)} is not a stage: `python -m stages --help` lists them")
        run.enter_environment(catalog.environment_of(name))
    except errors.StageError as error:
        errors.exit_with(error, "stages: ")
    run.prepare_process(online=catalog.may_go_online(name))
    used = None
    try:
        if not {"-h", "--help"} & set(argv):
            check_names()
            used = start_numerics(name) if name != NAMES else None  # before the stage imports numerical libraries
    except Exception as error:
        errors.exit_with(error, "stages: " if name == NAMES else f"{name}: ")
    if name == NAMES:
        return
    from stages.artifacts import records

    stage = importlib.import_module(modules[name])
    args = run.build_parser(f"python -m stages {name}", stage.__doc__, stage.add_arguments).parse_args(argv[1:])
    write_record = None if name in WITHOUT_RECORD else partial(records.write_record, numerics=used)
    run.run_stage(name, partial(run_main, name, stage, used), args, write_record)


if __name__ == "__main__":
    with run.printing():
        main(sys.argv[1:])

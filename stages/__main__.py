"""Run one stage of dvc.yaml: python -m stages NAME [options]."""

import argparse
import importlib
import sys
from functools import partial
from typing import Any

from stages.runtime import catalog, errors, run
from stages.runtime.paths import ROOT

WITHOUT_RECORD = ("code", "report", "report-models")
"""Stages without a record: `code` computes no results, and the reports read the records of the other stages."""


def list_stages() -> str:
    """Return the usage text: every stage, its environment and what it does."""
    lines = ["usage: python -m stages NAME [options]     (python -m stages NAME --help: its options)", ""]
    for name, module in catalog.stage_modules().items():
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        lines.append(f"  {name:<20}{catalog.summary(path)}")
    return "\n".join(lines)


def start_numerics(name: str) -> str | None:
    """Set up this process for `numerics` of params.yaml. Returns the numerics in effect, None for a stage that uses none.

    Raises StageError if the parameter or the shim is missing.
    """
    if not catalog.has_numerics(name):
        return None
    from stages.engines import numerics
    from stages.runtime import params

    return numerics.apply(params.load("numerics").numerics)


def run_main(stage: Any, numerics_used: str | None, args: argparse.Namespace) -> None:
    """Run a stage's `main`, then verify that its numerics were in effect. Raises StageError."""
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
        if name not in modules:
            raise errors.StageError(f"{errors.quote(name)} is not a stage: `python -m stages --help` lists them")
        run.enter_environment(catalog.environment_of(name))
    except errors.StageError as error:
        errors.exit_with(error, "stages: ")
    run.prepare_process(online=catalog.may_go_online(name))
    try:
        used = None if {"-h", "--help"} & set(argv) else start_numerics(name)  # before the stage imports numerical libraries
    except errors.StageError as error:
        errors.exit_with(error, f"{name}: ")
    from stages.artifacts import records

    stage = importlib.import_module(modules[name])
    args = run.build_parser(f"python -m stages {name}", stage.__doc__, stage.add_arguments).parse_args(argv[1:])
    write_record = None if name in WITHOUT_RECORD else partial(records.write_record, numerics=used)
    run.run_stage(name, partial(run_main, stage, used), args, write_record)


if __name__ == "__main__":
    main(sys.argv[1:])

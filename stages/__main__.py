"""Run one stage of dvc.yaml: python -m stages NAME [options]."""

import importlib
import sys

from stages.runtime import catalog, errors, run
from stages.runtime.paths import ROOT

WITHOUT_RECORD = ("code", "report")
"""Stages without a record: `code` computes no results, and `report` reads the records of the other stages."""


def list_stages() -> str:
    """Return the usage text: every stage, its environment and what it does."""
    lines = ["usage: python -m stages NAME [options]     (python -m stages NAME --help: its options)", ""]
    for name, module in catalog.stage_modules().items():
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        lines.append(f"  {name:<20}{catalog.summary(path)}")
    return "\n".join(lines)


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
    from stages.artifacts import records

    stage = importlib.import_module(modules[name])
    args = run.build_parser(f"python -m stages {name}", stage.__doc__, stage.add_arguments).parse_args(argv[1:])
    run.run_stage(name, stage.main, args, None if name in WITHOUT_RECORD else records.write_record)


if __name__ == "__main__":
    main(sys.argv[1:])

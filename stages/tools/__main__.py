"""Run a tool: python -m stages.tools NAME [options]."""

import ast
import importlib
import sys
from pathlib import Path

from stages.runtime import catalog, errors, processes, run

DVC_ONLY = {"diff", "gate", "means", "timings"}
"""Tools that run in any interpreter with DVC; the others switch to the main environment."""
ONLINE = {"hub", "publish"}
"""Tools that may use the network."""
INTERFACE = {"add_arguments", "main"}
"""The functions that every tool defines; modules without them are shared by tools."""


def find_tools() -> dict[str, Path]:
    """Return the file of each tool by its name, without importing any."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.py")) if _is_tool(path)}


def _is_tool(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)} >= INTERFACE and path.stem != "__main__"


def list_tools() -> str:
    """Return the usage text: every tool and what it does."""
    lines = ["usage: python -m stages.tools NAME [options]     (python -m stages.tools NAME --help: its options)", ""]
    lines += [f"  {name:<10}{catalog.summary(path)}" for name, path in find_tools().items()]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Run the tool named by the first argument, with the other arguments as its options, and exit.

    The exit code is 1, with one line on stderr, for an error that the user can fix, and 128 + the signal's number after Ctrl-C,
    SIGTERM or SIGHUP.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(list_tools())
        sys.exit(0 if argv else 2)
    name, *options = argv
    try:
        if name not in find_tools():
            raise errors.StageError(f"{errors.quote(name)} is not a tool: `python -m stages.tools --help` lists them")
        if name not in DVC_ONLY:
            run.enter_environment("main")
    except errors.StageError as error:
        errors.exit_with(error, "tools: ")
    run.prepare_process(online=name in ONLINE)
    processes.handle_stop_signals()
    try:
        tool = importlib.import_module(f"stages.tools.{name}")
        tool.main(run.build_parser(f"python -m stages.tools {name}", tool.__doc__, tool.add_arguments).parse_args(options))
    except processes.Stopped as stopped:
        print(f"{name}: stopped by {stopped.name}", file=sys.stderr)
        raise
    except Exception as error:
        errors.exit_with(error, f"{name}: ")


if __name__ == "__main__":
    with run.printing():
        main(sys.argv[1:])

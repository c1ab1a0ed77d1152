"""Change the meaning of stages/ in one place at a time, and check that some test fails.

`make mutants` writes docs/mutants.md; `python -m support.mutants --only NAME` runs one mutant. A result is kept in
docs/mutants.json until the mutant, its file or its tests change.

mutants.yaml lists the mutants: name -> `meaning`; `file`; `old`, text that occurs exactly once in the file; `new`; `tests`, the
test files that should notice; and, optionally, `slow: true` to run slow tests, too.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
from ruamel.yaml import YAML

from stages.artifacts import files
from stages.reporting.markdown import escape
from stages.runtime.fingerprint import hash_code
from stages.runtime.paths import ROOT

LIST = Path(__file__).with_suffix(".yaml")
DOCUMENT = ROOT / "docs/mutants.md"
RESULTS = ROOT / "docs/mutants.json"
TIME_LIMIT = 900
"""Seconds for one run of tests. A mutant that makes them take longer counts as killed."""
SLOW_IMPORTS = ["torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "datasets", "dvc.repo"]
"""Imported once, before the tests of each mutant run in a fork of this process."""
SURVIVED, STALE, NOT_RUN = "SURVIVED", "STALE", "not run"


@dataclass(frozen=True)
class Mutant:
    """One change of meaning."""

    name: str
    meaning: str
    file: str
    old: str
    new: str
    tests: list[str]
    slow: bool = False

    def apply(self, root: Path) -> str | None:
        """Return the text of the changed file, or None if `old` does not occur exactly once: the mutant is stale."""
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None

    def key(self, root: Path) -> str:
        """Return a hash of what determines the result: the mutant, and the code of its file and its tests."""
        total = hashlib.sha256(json.dumps(vars(self)).encode())
        for path in (self.file, *self.tests, "tests/conftest.py"):
            text = (root / path).read_text() if (root / path).is_file() else ""
            total.update((hash_code(text) if path.endswith(".py") else text).encode())
        return total.hexdigest()[:16]


def read_mutants() -> list[Mutant]:
    """Read the list of mutants."""
    listed: dict[str, dict[str, Any]] = YAML(typ="safe").load(LIST)
    return [Mutant(name, **values) for name, values in listed.items()]


def copy_checkout(folder: Path) -> None:
    """Copy the working tree, without what Git ignores, to a repository of its own; its environments are links to ours."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


def run_tests(folder: Path, tests: list[str], slow: bool) -> str | None:
    """Run tests in a copy of the checkout. Returns the first test that fails, or None if all pass.

    Raises RuntimeError if pytest ran no test.
    """
    marks = "not slowest" if slow else "not slow and not slowest"
    options = ["-n", "0", "-q", "-x", "-p", "no:cacheprovider", "--tb", "no", "--hypothesis-profile=full", "-m", marks, *tests]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = os.fork()
        if not child:
            run_pytest(folder, options, output.fileno())
        ended, deadline = 0, time.monotonic() + TIME_LIMIT
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time limit"
        if not status:
            return None
        output.seek(0)
        text = output.read()
    found = re.search(r"(?m)^(?:FAILED|ERROR) (\S+?)(?:\[| - |$)", text)
    if not found:
        raise RuntimeError(f"pytest {' '.join(tests)}: {text}")
    return found[1]


def run_pytest(folder: Path, options: list[str], output: int) -> NoReturn:
    """Become a process that runs the tests of the copy in `folder`. A fork, because importing SLOW_IMPORTS takes seconds."""
    os.setsid()
    os.chdir(folder)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("stages", "support")]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    sys.modules["__main__"] = ModuleType("__main__")  # spawned workers would run this program
    sys.dont_write_bytecode = True
    os.environ.pop("PYTHONPATH", None)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    code = 3
    with contextlib.suppress(BaseException):
        code = pytest.main(options)
    sys.stdout.flush()
    os._exit(code)


def import_libraries() -> None:
    for name in SLOW_IMPORTS:
        importlib.import_module(name)


@functools.cache
def passes(folder: Path, test: str) -> bool:
    """Return whether a test passes without a mutant."""
    return run_tests(folder, [test], slow=True) is None


def run_mutant(mutant: Mutant, folder: Path) -> str:
    """Apply a mutant to the copy in `folder`, run its tests, and undo it. Returns the test that killed it, or SURVIVED.

    Raises RuntimeError if that test fails without the mutant, too.
    """
    text = mutant.apply(folder)
    if text is None:
        return STALE
    compile(text, mutant.file, "exec")
    path = folder / mutant.file
    original = path.read_text()
    path.write_text(text)
    killer = run_tests(folder, mutant.tests, mutant.slow)
    path.write_text(original)
    if killer and killer != "time limit" and not passes(folder, killer):
        raise RuntimeError(f"{killer} fails without the mutant {mutant.name!r}, too")
    return killer or SURVIVED


def format_results(mutants: list[Mutant], results: dict[str, str]) -> str:
    """Format docs/mutants.md. results: name -> the test that killed the mutant, SURVIVED or STALE."""
    rows = [[mutant.name, mutant.file, mutant.meaning, results.get(mutant.name, NOT_RUN)] for mutant in mutants]
    states = Counter(row[-1] if row[-1] in (SURVIVED, STALE, NOT_RUN) else "killed" for row in rows)
    others = ", ".join(f"{states[state]} {state.lower()}" for state in (SURVIVED, STALE, NOT_RUN) if states[state])
    lines = [
        f"| {escape(name)} | `{file}` | {escape(meaning)} | {format_killer(killer)} |" for name, file, meaning, killer in rows
    ]
    return (
        "# Mutants\n\n"
        "Each row is one change to the meaning of the code in `stages/`, and the first test that failed with it, of those\n"
        "that `tests/support/mutants.yaml` lists for it. If a mutant survives, no test checks that property of the results.\n"
        "Written by `make mutants`.\n\n"
        f"{states['killed']} of {len(rows)} mutants were killed{f'; {others}' if others else ''}.\n\n"
        "| mutant | file | meaning | killed by |\n| --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )


def format_killer(test: str) -> str:
    """Format the test that killed a mutant as code, and any other result as text."""
    return f"`{test}`" if "::" in test else test


def main() -> None:
    """Run the mutants whose results are not known, and write docs/mutants.md. Exits with code 1 if one survived or is stale."""
    parser = argparse.ArgumentParser("python -m support.mutants", description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="run only this mutant, even if its result is known")
    args = parser.parse_args()
    mutants = read_mutants()
    known: dict[str, dict[str, str]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    pending = [mutant for mutant in mutants if known.get(mutant.name, {}).get("key") != mutant.key(ROOT)]
    if args.only:
        pending = [mutant for mutant in mutants if mutant.name == args.only]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sppo"
        if pending:
            copy_checkout(folder)
            import_libraries()
        try:
            for mutant in pending:
                known[mutant.name] = {"key": mutant.key(ROOT), "result": run_mutant(mutant, folder)}
                print(f"{mutant.name}: {known[mutant.name]['result']}", flush=True)
                files.write_json(known, RESULTS)
        finally:  # also when it is interrupted
            results = write_results(mutants, known)
    sys.exit(any(result in (SURVIVED, STALE) for result in results.values()))


def write_results(mutants: list[Mutant], known: dict[str, dict[str, str]]) -> dict[str, str]:
    """Write both files, and return the results of mutants that have not changed since: name -> as of `run_mutant`."""
    current = {mutant.name: known[mutant.name] for mutant in mutants if mutant.name in known}
    files.write_json(current, RESULTS)
    keys = {mutant.name: mutant.key(ROOT) for mutant in mutants}
    results = {name: row["result"] for name, row in current.items() if row["key"] == keys[name]}
    DOCUMENT.write_text(format_results(mutants, results))
    return results


if __name__ == "__main__":
    main()

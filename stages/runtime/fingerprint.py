"""Fingerprints of the code that a stage runs: what DVC and the scratch folders depend on.

A stage's fingerprint covers every module that it imports, directly or not, and every data file beside those modules, except
in stages/runtime and stages/tools, which cannot affect results. Comments, docstrings and formatting do not count.
"""

import ast
import functools
import hashlib
from pathlib import Path

from stages.runtime.catalog import environment_of, has_numerics, stage_modules
from stages.runtime.paths import ROOT

EXCLUDED = ("stages.runtime", "stages.tools")
RECORDS, NUMERICS = "stages.artifacts.records", "stages.engines.numerics"
"""The launcher imports the first for every stage, the second for stages with numerics. No stage imports them."""


@functools.cache
def fingerprint(stage: str) -> dict[str, str]:
    """Return path (relative to the repository) -> SHA-256 of everything that a stage's results depend on, apart from data
    and parameters: its modules, the data files in their packages, and the requirements of its environment."""
    modules = _closure(stage_modules()[stage]) | _closure(RECORDS)
    if has_numerics(stage):
        modules |= _closure(NUMERICS)
    hashes = {_relative(path): _hash_module(path) for path in modules.values()}
    for folder in {path.parent for path in modules.values()} - {ROOT / "stages", ROOT / "stages" / "assets"}:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                hashes[_relative(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((ROOT / "requirements").glob(f"{environment_of(stage)}*.in")):  # main: for CPUs and for GPUs
        hashes[_relative(path)] = hash_requirements(path.read_text(encoding="utf-8"))
    return dict(sorted(hashes.items()))


def hash_code(source: str) -> str:
    """Hash Python source by its syntax tree, without docstrings, comments and formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # Docstrings of modules, classes, functions and attributes alike are statements that consist of a string.
            node.body = [statement for statement in body if not _is_string(statement)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


@functools.cache  # most modules belong to many stages
def _hash_module(path: Path) -> str:
    return hash_code(path.read_text(encoding="utf-8"))


def hash_requirements(text: str) -> str:
    """Hash a requirements file by its requirements, without comments."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return hashlib.sha256("\n".join(sorted(filter(None, lines))).encode()).hexdigest()


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    )


def _closure(module: str) -> dict[str, Path]:
    """Return the project's modules that a module imports, itself included: dotted name -> file."""
    modules: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        path = _file(name)
        if path and name not in modules and not name.startswith(EXCLUDED):
            modules[name] = path
            pending += [name.rpartition(".")[0], *_imports(path)]  # importing a module runs its package first
    return modules


def _file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None) if module.startswith("stages") else None


@functools.cache
def _imports(path: Path) -> list[str]:
    """List the dotted names that a module imports, anywhere in it. `from a import b` may import module a.b."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()

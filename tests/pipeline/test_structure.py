"""The layout's rules: place says role, imports point one way and never in a circle, functions are short, references resolve."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from stages.runtime.paths import ROOT

LONGEST = 60
"""Lines of a function."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "stages").rglob("*.py"))
}
LAYERS = {
    "stages.runtime": ["stages.runtime"],
    "stages.method": ["stages.method", "stages.runtime"],
    "stages.artifacts": ["stages.artifacts", "stages.method", "stages.runtime"],
    "stages.engines": ["stages.engines", "stages.artifacts", "stages.method", "stages.runtime"],
    "stages.miniature": ["stages.miniature", "stages.engines", "stages.artifacts", "stages.method", "stages.runtime"],
    "stages.judges": ["stages.judges", "stages.miniature", "stages.artifacts", "stages.runtime"],
    "stages.reporting": ["stages.reporting", "stages.artifacts", "stages.method", "stages.runtime"],
}
"""A folder of stages/ -> the folders that its modules may import from."""


def imports(module: str) -> Iterator[str]:
    """Yield the project's modules that a module imports, anywhere in it."""
    for node in ast.walk(SYNTAX[MODULES[module]]):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name in MODULES)


SYNTAX = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES.values()}
ARROWS = {module: sorted(set(imports(module)) - {module}) for module in MODULES}


def test_no_imports_form_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in ARROWS[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_imports_point_one_way() -> None:
    """runtime <- method, artifacts <- engines, miniature, judges, reporting <- stages and assets; nothing imports a stage."""
    for module, other in ((module, other) for module, others in ARROWS.items() for other in others):
        layer = next((layer for layer in LAYERS if module.startswith(layer)), None)
        if layer:
            assert other.startswith(tuple(LAYERS[layer])), f"{module} imports {other}"
        elif not module.startswith("stages.tools") and module != "stages.__main__":
            assert other.startswith(tuple(LAYERS)), f"{module}, a stage, imports {other}"


def test_method_knows_no_files_parameters_or_devices() -> None:
    for module in MODULES:
        if module.startswith("stages.method."):
            assert {other for other in ARROWS[module] if not other.startswith("stages.method")} <= {
                "stages.runtime.errors",
                "stages.runtime.logs",
                "stages.runtime.processes",
            }


SIDE_EFFECTS = """
import gc, importlib, json, os, signal, sys
before = dict(os.environ), gc.get_threshold(), [signal.getsignal(n) for n in (1, 2, 15)], os.getcwd()
importlib.import_module(sys.argv[1])
after = dict(os.environ), gc.get_threshold(), [signal.getsignal(n) for n in (1, 2, 15)], os.getcwd()
prefixes = ("SPPO", "GOMP", "TQDM", "CUDA", "HF_", "VLLM", "OMP")
ours = {name for name in set(before[0]) ^ set(after[0]) if name.startswith(prefixes)}
assert before[1:] == after[1:], (before[1:], after[1:])
assert not ours, ours
"""


PACKAGES = ["runtime", "artifacts", "method", "engines", "judges", "miniature", "reporting", "assets", "."]


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_an_import_has_no_side_effects(package: str) -> None:
    """On environment variables, the garbage collector, signals and the working directory."""
    folder = ROOT / "stages" / package
    names = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")]
    prefix = "stages." if package == "." else f"stages.{package}."
    skip = {"stages.engines.trainer", "stages.engines.harness_worker"}  # what transformers and lm-eval do is not ours
    program = SIDE_EFFECTS.replace("importlib.import_module(sys.argv[1])", "[importlib.import_module(m) for m in sys.argv[1:]]")
    modules = [prefix + name for name in names if prefix + name not in skip]
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "TQDM_DISABLE")}
    done = subprocess.run(
        [sys.executable, "-c", program, *modules],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path, tree in SYNTAX.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", node  # type: ignore[misc]


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_no_class_is_defined_in_a_function() -> None:
    assert not [name for name, node in functions() for inner in ast.walk(node) if isinstance(inner, ast.ClassDef)]


def test_the_linter_measures_complexity() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '"C90"' in text or '"C901"' in text
    assert '"PLR0915"' in text
    assert "max-complexity = 10" in text
    for path in MODULES.values():
        exempt = re.findall(r"noqa: *(?:C901|PLR0915)(?!.*[a-z]{4})", path.read_text())
        assert not exempt, f"{path}: an exemption needs a reason"


@pytest.mark.slow
def test_no_test_imports_another_test() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], path


def test_tests_mirror_the_tree() -> None:
    """tests/engines/test_pairrm.py tests stages/engines/pairrm.py, and test_pairrm_values.py its values by another computation;
    tests/gpu_check/test_rows.py tests gpu_check/rows.py; tests/pipeline is about the whole."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests").as_posix()
        if folder not in ("pipeline", "benchmarks"):
            place = ROOT / folder if folder == "gpu_check" else ROOT / "stages" / folder
            module = path.stem.removeprefix("test_").removesuffix("_values")
            assert (place / f"{module}.py").exists() or module == "main", path

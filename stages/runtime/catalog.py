"""The stages of the pipelines: every module directly in stages/ or stages/assets/ is one."""

import ast
from pathlib import Path

from stages.runtime.paths import ROOT

ENVIRONMENTS = {
    "assets-ranker": "rank",
    "rank": "rank",
    "compare": "rank",
    "compare-answers": "rank",
    "evaluate-lm": "harness",
}
"""The environment, a folder of .venv, of each stage that does not run in `main`."""

WITHOUT_ARITHMETIC = (
    "code",
    "split",
    "assets-prompts",
    "assets-alpaca-eval",
    "assets-harness",
    "assets-local",
    "assets-local-models",
    "assets-model",
    "assets-pairrm",
    "assets-answers",
)
"""The stages whose results do not depend on `numerics`: they compute no floating-point numbers."""


def stage_modules() -> dict[str, str]:
    """Return the dotted module of each stage by its name: `evaluate-lm` is stages.evaluate_lm, `assets-policy` is
    stages.assets.policy."""
    modules = {}
    for prefix, folder in (("", ROOT / "stages"), ("assets-", ROOT / "stages" / "assets")):
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("__"):
                modules[prefix + path.stem.replace("_", "-")] = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return modules


def environment_of(stage: str) -> str:
    """Return the environment that the stage runs in: `main`, `rank` or `harness`."""
    return ENVIRONMENTS.get(stage, "main")


def has_numerics(stage: str) -> bool:
    """Return whether the stage's results may depend on `numerics`."""
    return stage not in WITHOUT_ARITHMETIC


def may_go_online(stage: str) -> bool:
    """Return whether the stage may use the network: only assets come from the Hugging Face Hub."""
    return stage.startswith("assets-")


def summary(path: Path) -> str:
    """Return the first line of a module's docstring, without importing the module."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]

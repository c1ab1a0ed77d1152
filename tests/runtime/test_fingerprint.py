"""What makes a stage stale: the code that it runs, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.runtime import catalog, fingerprint
from stages.runtime.paths import ROOT

STAGES = sorted(catalog.stage_modules())
MINIATURE = {"assets-policy", "assets-ranker", "assets-prompts", "assets-alpaca-eval", "assets-harness"}
SOURCE = '''"""Module."""

TABLE = {"a": 1}
"""Attribute."""


def f(x, y=2):
    """Function."""
    # Why.
    return x * 3 + y


class A:
    """Class."""

    def g(self):
        """Only a docstring."""
'''


@pytest.mark.parametrize(
    "changed",
    [
        SOURCE.replace('"""Function."""', '"""Another text,\n    on two lines."""'),
        SOURCE.replace('    """Function."""\n', ""),
        SOURCE.replace('"""Attribute."""', '"""What the table is for."""'),
        SOURCE.replace("# Why.", "# Another reason."),
        SOURCE.replace("x * 3 + y", "((x * 3)\n            + y)"),
        SOURCE.replace("    return", "\n    return"),
        SOURCE.replace('"a"', "'a'"),
        SOURCE.replace('    def g(self):\n        """Only a docstring."""', '    def g(self):\n        """Text."""'),
    ],
)
def test_comments_docstrings_and_formatting_do_not_count(changed: str) -> None:
    assert changed != SOURCE
    assert fingerprint.hash_code(changed) == fingerprint.hash_code(SOURCE)


@pytest.mark.parametrize(
    "changed",
    [
        SOURCE.replace("x * 3", "x * 4"),
        SOURCE.replace("y=2", "y=3"),
        SOURCE.replace('"a": 1', '"b": 1'),
        SOURCE.replace("x * 3 + y", "x * (3 + y)"),
        SOURCE.replace("return x", "x = x + 1\n    return x"),
        SOURCE.replace("def f", "@cache\ndef f"),
        "import os\n" + SOURCE,
    ],
)
def test_every_change_of_meaning_counts(changed: str) -> None:
    assert changed != SOURCE
    assert fingerprint.hash_code(changed) != fingerprint.hash_code(SOURCE)


@given(st.integers(), st.integers())
def test_two_constants_have_one_hash_only_if_they_are_equal(one: int, other: int) -> None:
    assert (fingerprint.hash_code(f"X = {one}") == fingerprint.hash_code(f"X = {other}")) == (one == other)


def test_requirements_count_without_comments() -> None:
    text = "torch==2.13.0  # why\n\n# more\npandas==3.1.1\n"
    assert fingerprint.hash_requirements(text) == fingerprint.hash_requirements("pandas==3.1.1\ntorch==2.13.0\n")
    assert fingerprint.hash_requirements(text) != fingerprint.hash_requirements("torch==2.13.1\npandas==3.1.1\n")


LOADED = """
import importlib, json, sys
from pathlib import Path
from stages.artifacts import records
importlib.import_module(sys.argv[1])
root = Path(sys.argv[2])
files = {Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
print(json.dumps(sorted(f.relative_to(root).as_posix() for f in files if f.is_relative_to(root / "stages"))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_a_stage_loads_counts(stage: str) -> None:
    """Python itself, rather than a reading of the syntax tree, names the modules that are loaded with the stage."""
    environment = ROOT / ".venv" / catalog.environment_of(stage)
    python = environment / "bin/python" if environment.exists() else Path(sys.executable)
    command = [str(python), "-c", LOADED, catalog.stage_modules()[stage], str(ROOT)]
    values = os.environ | {"PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(command, env=values, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    outside = {name for name in json.loads(loaded) if not name.startswith(("stages/runtime/", "stages/tools/"))}
    missing = outside - set(fingerprint.fingerprint(stage))
    assert not missing


@pytest.mark.parametrize("stage", STAGES)
def test_what_cannot_change_a_number_does_not_count(stage: str) -> None:
    assert not [path for path in fingerprint.fingerprint(stage) if path.startswith(("stages/runtime/", "stages/tools/"))]


def test_a_stage_depends_on_its_own_requirements_and_data_files() -> None:
    assert "requirements/rank.in" in fingerprint.fingerprint("rank")
    assert "requirements/harness.in" in fingerprint.fingerprint("evaluate-lm")
    main = {f"requirements/{name}.in" for name in ("main", "main-cpu", "main-gpu")}
    assert main <= fingerprint.fingerprint("generate").keys()
    assert "stages/reporting/page.html.j2" in fingerprint.fingerprint("report")
    assert "stages/judges/configs/gold/prompt.txt" in fingerprint.fingerprint("evaluate-alpaca")


@pytest.mark.parametrize("stage", STAGES)
def test_numerics_count_in_the_stages_that_have_them(stage: str) -> None:
    """The launcher applies them; no stage imports them by itself."""
    counted = {"stages/engines/numerics.py", "stages/engines/mkl_shim.c"} & fingerprint.fingerprint(stage).keys()
    assert len(counted) == (2 if catalog.has_numerics(stage) else 0)


def test_stages_that_share_no_code_do_not_share_fingerprints() -> None:
    trained = {path for path in fingerprint.fingerprint("train") if path.startswith("stages/engines/")}
    ranked = {path for path in fingerprint.fingerprint("rank") if path.startswith("stages/engines/")}
    assert "stages/engines/trainer.py" in trained - ranked
    assert "stages/engines/deberta.py" in ranked - trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "old", "new", "stale"),
    [
        (
            "stages/method/sppo.py",
            "eta * (probabilities - 0.5)",
            "eta * (probabilities - 0.4)",
            {"train", "reference", "rank", "compare", "compare-answers", "report"},
        ),
        ("stages/engines/deberta.py", '"""', '"""Another text. ', set()),
        ("stages/runtime/logs.py", "%(message)s", "%(levelname)s %(message)s", set()),
        ("stages/miniature/domain.py", "2.0 * is_right", "3.0 * is_right", MINIATURE | {"evaluate-alpaca"}),
        ("requirements/harness.in", "lm-eval==0.4.1", "lm-eval==0.4.2", {"evaluate-lm"}),
    ],
)
def test_a_change_makes_those_stages_stale_that_run_it(tmp_path: Path, path: str, old: str, new: str, stale: set[str]) -> None:
    for folder in ("stages", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def write_fingerprints(out: str) -> None:
        command = [sys.executable, "-m", "stages", "code", "--out", out]
        subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=True, capture_output=True)

    write_fingerprints("before")
    text = (tmp_path / path).read_text()
    assert old in text
    (tmp_path / path).write_text(text.replace(old, new, 1))
    write_fingerprints("after")
    before, after = ({file.stem: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("before", "after"))
    assert set(before) == set(STAGES) - {"code"}
    assert {name for name in before if before[name] != after[name]} == stale

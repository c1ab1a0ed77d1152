"""The list of mutants fits the code: a stale mutant tests nothing. `make mutants` runs them."""

import json
from pathlib import Path

import pytest

from stages.runtime.paths import ROOT
from support import mutants

MUTANTS = mutants.read_mutants()


def test_a_mutant_changes_one_place_and_names_its_tests() -> None:
    for mutant in MUTANTS:
        text = mutant.apply(ROOT)
        assert text is not None, f"{mutant.name}: `old` is not in {mutant.file} exactly once: correct it in {mutants.LIST.name}"
        compile(text, mutant.file, "exec")
        assert mutant.tests, mutant.name
        assert all((ROOT / path).is_file() for path in mutant.tests), mutant.name


def test_every_part_of_the_method_and_of_the_reports_has_mutants() -> None:
    folders = {folder for mutant in MUTANTS for folder in [mutant.file.rpartition("/")[0]]}
    packages = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "stages").rglob("__init__.py")}
    assert folders == packages
    assert len(MUTANTS) >= 70


def test_a_result_is_known_until_mutant_file_or_tests_change() -> None:
    mutant = mutants.Mutant("a", "b", "stages/split.py", "old", "new", ["tests/test_split.py"])
    assert mutant.key(ROOT) == mutant.key(ROOT)
    others = [mutants.Mutant("a", "b", "stages/rank.py", "old", "new", ["tests/test_split.py"])]
    others.append(mutants.Mutant("a", "b", "stages/split.py", "old", "new", ["tests/test_rank.py"]))
    others.append(mutants.Mutant("a", "b", "stages/split.py", "old", "newer", ["tests/test_split.py"]))
    assert mutant.key(ROOT) not in {other.key(ROOT) for other in others}


def test_the_page_counts_what_survived() -> None:
    listed = [mutants.Mutant(name, "m", "f", "o", "n", []) for name in "abc"]
    page = mutants.format_results(listed, {"a": "tests/test_split.py::test_x", "b": mutants.SURVIVED})
    assert "1 of 3 mutants were killed; 1 survived, 1 not run." in page
    assert "| b | `f` | m | SURVIVED |" in page


def test_results_of_code_that_has_changed_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "RESULTS", tmp_path / "mutants.json")
    monkeypatch.setattr(mutants, "DOCUMENT", tmp_path / "mutants.md")
    same, changed, new = (mutants.Mutant(name, "m", "stages/split.py", "o", "n", []) for name in "abc")
    known = {
        "a": {"key": same.key(ROOT), "result": "tests/test_split.py::test_x"},
        "b": {"key": "0", "result": mutants.SURVIVED},
        "removed": {"key": "0", "result": mutants.SURVIVED},
    }
    assert mutants.write_results([same, changed, new], known) == {"a": "tests/test_split.py::test_x"}
    assert "1 of 3 mutants were killed; 2 not run." in (tmp_path / "mutants.md").read_text()
    assert json.loads((tmp_path / "mutants.json").read_text()).keys() == {"a", "b"}

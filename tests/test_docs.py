"""The documents name what there is: files, commands, parameters that are valid."""

import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides

from stages import params, readme, recipe
from stages.cli import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(document: Path) -> list[str]:
    """The lines of its bash blocks, comments apart."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)
    return [" ".join(shlex.split(line, comments=True)) for block in blocks for line in block.splitlines() if line.strip()]


COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document)]
EXPERIMENTS = sorted({command for _, command in COMMANDS if command.startswith("dvc exp run")})


@pytest.mark.parametrize("document", readme.documents(ROOT), ids=lambda path: path.name)
def test_what_is_filled_in_is_up_to_date(document: Path) -> None:
    assert document.read_text() == readme.documents(ROOT)[document], "run `make readme`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document: Path) -> None:
    named = re.findall(r"`((?:stages|tests|recipes|docs|requirements)/[\w./-]+)`", document.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_module_and_target_that_is_called_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert EXPERIMENTS
    for document, command in COMMANDS:
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets, f"{document.name}: {command}"
        if words[:2] == ["python", "-m"] and words[2].startswith("stages."):
            module = ROOT / words[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), f"{document.name}: {command}"


@pytest.mark.parametrize("command", EXPERIMENTS)
def test_every_experiment_has_valid_parameters(command: str, tmp_path: Path) -> None:
    words = command.split()
    overrides = [following for word, following in itertools.pairwise(words) if word == "-S"]
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    if "--queue" in words:  # one experiment for each of several values
        overrides = [override.partition(",")[0] for override in overrides]
    apply_overrides(tmp_path / "params.yaml", overrides)
    params.validate(tmp_path / "params.yaml")


RECIPES = sorted({command for _, command in COMMANDS if command.startswith("python -m stages.recipe")})


@pytest.mark.parametrize("command", RECIPES)
def test_every_new_recipe_is_valid(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recipes", "params.yaml", "dvc.yaml", "published.yaml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, tmp_path / name)
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["recipe", *command.split()[3:]])
    monkeypatch.chdir(tmp_path)
    recipe.main()
    made = tmp_path / "recipes" / command.split()[3]
    params.validate_unpinned(params.read(made / "params.yaml"), made / "params.yaml")

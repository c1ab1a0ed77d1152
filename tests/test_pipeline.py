"""dvc.yaml declares everything its stages read: DVC follows neither imports nor reads of params.yaml."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML
from running import run_stage

from stages import params
from stages.scratch import CANNOT_CHANGE_RESULTS

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.parent for path in ROOT.glob("recipes/*/dvc.yaml"))
STAGES = {stage.addressing: stage for stage in Repo(ROOT).index.stages if getattr(stage, "cmd", None)}
PER_ITERATION = ["generate", "rank", "reference", "train", "answer", "evaluate-alpaca", "evaluate-lm"]


def imports(path: Path) -> Iterator[str]:
    """The names that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def closure(module: str, found: set[str]) -> set[str]:
    """The project's files that a module imports, and theirs."""
    path = module.replace(".", "/") + ".py"
    if module.startswith("stages") and (ROOT / path).is_file() and path not in found:
        found.add(path)
        for name in imports(ROOT / path):
            closure(name, found)
    return found


def module_of(stage) -> str:
    return re.search(r"python -m (\S+)", stage.cmd)[1]


def code_deps(stage) -> set[str]:
    paths = {Path(dep.fs_path).resolve().relative_to(ROOT).as_posix() for dep in stage.deps if not hasattr(dep, "params")}
    return {path for path in paths if path.startswith("stages/")}


def loaded_keys(module: str) -> set[str]:
    """The keys that the module's calls of params.load name."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "params.load"]
    return {argument.value for call in calls for argument in call.args}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_depends_on_exactly_the_code_it_imports(stage):
    wanted = closure(module_of(stage), set()) - CANNOT_CHANGE_RESULTS
    assert {path for path in code_deps(stage) if path.endswith(".py")} == wanted


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_declares_exactly_the_parameters_it_reads(stage):
    declared = {key for dep in stage.deps if hasattr(dep, "params") for key in dep.params}
    assert declared == loaded_keys(module_of(stage))


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_depends_on_the_versions_of_its_environment(stage):
    source = (ROOT / (module_of(stage).replace(".", "/") + ".py")).read_text()
    environment = re.search(r'cli\.run\(main.*environment="(\w+)"', source)
    wanted = f"requirements/{environment[1] if environment else 'main'}.in"
    assert wanted in {
        Path(dep.fs_path).resolve().relative_to(ROOT).as_posix() for dep in stage.deps if not hasattr(dep, "params")
    }


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_no_shell_stands_between_dvc_and_a_stage(stage):
    """It would outlive DVC where that is killed, and hide its end from the stage."""
    assert stage.cmd.startswith("exec env ")


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_dependency_and_output_is_in_the_command(stage):
    """A path that the command does not name is one the stage cannot know (the reports, records and code apart)."""
    if stage.addressing.endswith("report"):
        return
    record = f"data/records/{stage.addressing.rpartition(':')[2]}.json"
    data = [out.def_path for out in stage.outs if out.def_path != record] + [
        dep.def_path for dep in stage.deps if dep.def_path.startswith("data/")
    ]
    words = stage.cmd.split()
    assert all(path in words or any(path.startswith(word + "/") for word in words) for path in data)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_has_a_record_where_the_report_looks_for_it(stage):
    name = stage.addressing.rpartition(":")[2]
    assert (f"data/records/{name}.json" in {out.def_path for out in stage.outs}) == (name != "report")


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_only_the_reports_are_uncached(stage):
    """But for the page, which Git would keep a copy of from every run."""
    uncached = {out.def_path for out in stage.outs if not out.use_cache}
    reports = {out.def_path for out in stage.outs if out.def_path.startswith("reports/")} - {"reports/index.html"}
    assert uncached == reports
    assert not any(out.persist for out in stage.outs)


@pytest.mark.parametrize("folder", [ROOT, *RECIPES], ids=lambda path: path.name)
def test_every_iteration_has_its_stages(folder):
    prefix = "" if folder == ROOT else f"{folder.relative_to(ROOT).as_posix()}/dvc.yaml:"
    for name in params.read(folder / "params.yaml")["iterations"]:
        for stage in PER_ITERATION:
            assert f"{prefix}{stage}@{name}" in STAGES


def test_no_dependency_is_an_empty_folder():
    """DVC looks into no folder below .dvc: as a dependency it would never change."""
    stages = YAML(typ="safe").load(ROOT / "dvc.lock")["stages"]
    assert not [(name, dep["path"]) for name, stage in stages.items() for dep in stage["deps"] if dep.get("nfiles") == 0]


def test_there_is_a_recipe():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_has_the_same_pipeline_but_for_the_root(recipe):
    load = YAML(typ="safe").load
    ours, theirs = load(ROOT / "dvc.yaml"), load(recipe / "dvc.yaml")
    assert theirs.pop("vars") == [{"root": "../../"}]
    assert ours.pop("vars") == [{"root": ""}]
    assert ours == theirs


def test_analytics_are_off():
    assert "analytics = false" in (ROOT / ".dvc/config").read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_dry_run_lists_the_recipes_stages(recipe, tmp_path):
    """With something in the place of every input: DVC looks for them even when it only says what it would run."""
    for name in ("stages", "requirements", ".dvc/config", ".dvc/plots", "params.yaml", "dvc.yaml"):
        (shutil.copytree if (ROOT / name).is_dir() else copy_file)(ROOT / name, tmp_path / name)
    there = tmp_path / recipe.relative_to(ROOT)
    shutil.copytree(recipe, there)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    prefix = f"{recipe.relative_to(ROOT).as_posix()}/dvc.yaml:"
    ours = {name.removeprefix(prefix): stage for name, stage in STAGES.items() if name.startswith(prefix)}
    for stage in ours.values():
        for out in stage.outs:
            (there / out.def_path).parent.mkdir(parents=True, exist_ok=True)
            (there / out.def_path).touch()
    parts = [f"{name}.parquet" for name in ("hold-out", *params.read(recipe / "params.yaml")["iterations"])]
    for folder, names in (("split", [*parts, "contamination.json"]), ("alpaca_eval_set", ["instructions.json"])):
        (there / "data" / folder).unlink()
        (there / "data" / folder).mkdir()
        for name in names:
            (there / "data" / folder / name).touch()
    dvc = [sys.executable, "-m", "dvc", "repro", "--dry"]
    done = subprocess.run(dvc, cwd=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"Running stage '(\S+)'", done.stdout)) == set(ours)
    assert "exec env PYTHONPATH=../../ python -m stages.train data/models/base data/pairs/iter1.parquet" in done.stdout


def copy_file(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_that_is_not_pinned_is_refused(recipe):
    done = run_stage(recipe, "assets.ranker", "data/ranker")
    assert done.returncode == 1
    assert f"python -m stages.assets --pin {recipe.relative_to(ROOT).as_posix()}" in done.stderr.splitlines()[-1]
    assert not (recipe / "data").exists()

"""dvc.yaml declares everything that its stages read: DVC follows neither imports nor reads of params.yaml."""

import ast
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from stages.__main__ import WITHOUT_RECORD
from stages.artifacts.schemas import model_names
from stages.reporting.published import read_published
from stages.runtime import catalog, params
from stages.runtime.paths import ROOT
from stages.tools import sync
from stages.train import NOT_IN_RESUME_KEY
from support.messages import assert_message
from support.plots import load_plots, name_source
from support.running import run_stage

ALL_RECIPES = sorted(path.parent for path in ROOT.glob("recipes/*/dvc.yaml"))
RECIPES = [path for path in ALL_RECIPES if not params.is_evaluation(params.read(path / "params.yaml"))]
EVALUATIONS = [path for path in ALL_RECIPES if path not in RECIPES]
"""The recipes that evaluate existing models, without training any."""
EVALUATION = ROOT / sync.EVALUATION
COPY = tempfile.TemporaryDirectory()
"""The pipelines alone, without the files .dvcignore in recipes/ that hide recipes from DVC until they have been run."""
for source in [path / name for path in (ROOT, *ALL_RECIPES) for name in ("dvc.yaml", "params.yaml")]:
    (target := Path(COPY.name) / source.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
REPOSITORY = Repo.init(COPY.name, no_scm=True)
STAGES = {
    f"{Path(stage.path).relative_to(REPOSITORY.root_dir).as_posix()}:{stage.name}".removeprefix("dvc.yaml:"): stage
    for stage in REPOSITORY.index.stages
    if getattr(stage, "cmd", None)
}
"""Address in the repository, as DVC writes it in its root -> stage."""
PIPELINES = {
    str(folder): {address: stage for address, stage in STAGES.items() if Path(stage.wdir).samefile(COPY.name / folder)}
    for folder in [path.relative_to(ROOT) for path in (ROOT, *ALL_RECIPES)]
}
"""Each pipeline's part of STAGES. A test for each stage would take longer to report than to run."""
in_each_pipeline = pytest.mark.parametrize("stages", PIPELINES.values(), ids=PIPELINES)
PER_ITERATION = ["generate", "rank", "reference", "train", "answer", "evaluate-alpaca", "evaluate-lm"]
UNNAMED = {"report": "--data data", "report-models": "--data data", "code": "--out data/code"}
"""Stages whose options name a folder instead of each file in it."""
ONE_OF = {"assets-model": "models", "assets-pairrm": "rankers"}
"""Stage that gets one of the entries of a mapping in params.yaml -> the mapping."""
ANSWERS_ONLY = {"assets-answers"}
"""Stages that run only for `answers` in params.yaml, which no recipe has: tests/pipeline/test_evaluation.py runs them."""


def command_of(stage: Any) -> str:
    """Return NAME of the stage's `python -m stages NAME`."""
    match = re.search(r"exec env PYTHONPATH=\S* python -m stages (\S+)", stage.cmd)
    assert match
    return match[1]


def data_deps(stage: Any) -> set[str]:
    return {dep.def_path for dep in stage.deps if not hasattr(dep, "params")}


@functools.cache
def loaded_keys(name: str) -> set[str]:
    """Return the keys that the stage's calls of params.load name, and the launcher's."""
    path = ROOT.joinpath(*catalog.stage_modules()[name].split(".")).with_suffix(".py")
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "params.load"]
    own = {argument.value for call in loads for argument in call.args if isinstance(argument, ast.Constant)}
    if "train" in own:  # loaded as a whole; some of its keys cannot change a result, so that a change of them re-runs nothing
        own = own - {"train"} | {f"train.{key}" for key in params.Train.model_fields}
    own -= {f"train.{key}" for key in NOT_IN_RESUME_KEY}
    return own | ({"numerics"} if catalog.has_numerics(name) else set())


def test_every_module_in_stages_and_assets_is_a_stage_of_dvc_yaml() -> None:
    """The rule of the layout: place says role."""
    prefix = f"{sync.EVALUATION}/dvc.yaml:"
    training = {command_of(stage) for address, stage in STAGES.items() if not address.startswith("recipes/")}
    evaluation = {command_of(stage) for address, stage in STAGES.items() if address.startswith(prefix)}
    assert training | evaluation | ANSWERS_ONLY == set(catalog.stage_modules())
    trains = {"assets-policy", "assets-prompts", "assets-ranker", "split", "generate", "rank", "reference", "train"}
    assert training - evaluation == trains | {"assets-local", "compare", "report"}
    assert evaluation - training == {"assets-local-models", "assets-model", "assets-pairrm", "compare-answers", "report-models"}


def test_every_stage_belongs_to_a_pipeline() -> None:
    assert all(PIPELINES.values())
    assert sum(map(len, PIPELINES.values())) == len(STAGES)


@in_each_pipeline
def test_a_stage_depends_on_the_fingerprint_of_its_code(stages: dict[str, Any]) -> None:
    for address, stage in stages.items():
        name = command_of(stage)
        fingerprints = {path for path in data_deps(stage) if path.startswith("data/code/")}
        assert fingerprints == (set() if name == "code" else {f"data/code/{name}.json"}), address


def test_the_stage_code_sees_all_code_and_writes_a_fingerprint_for_every_other_stage() -> None:
    code = STAGES["code"]
    assert data_deps(code) == {"stages", "requirements"}
    assert {out.def_path for out in code.outs} == {f"data/code/{name}.json" for name in set(catalog.stage_modules()) - {"code"}}


@in_each_pipeline
def test_a_stage_declares_exactly_the_parameters_it_reads(stages: dict[str, Any]) -> None:
    for address, stage in stages.items():
        declared = {key for dep in stage.deps if hasattr(dep, "params") for key in dep.params}
        if command_of(stage) in ONE_OF:  # reads a mapping, and uses one of its entries
            section = ONE_OF[command_of(stage)]
            declared = {key.partition(".")[0] for key in declared if key == f"{section}.{address.partition('@')[2]}"}
        assert declared == loaded_keys(command_of(stage)), address


@in_each_pipeline
def test_no_shell_stands_between_dvc_and_a_stage(stages: dict[str, Any]) -> None:
    """It would outlive DVC if that is killed, and hide DVC's end from the stage. tests/pipeline/test_names.py: what `--names`
    is for."""
    for address, stage in stages.items():
        first, _, rest = stage.cmd.rpartition("exec env ")
        assert re.fullmatch(r"(env PYTHONPATH=\S* python -m stages --names \|\| exit; )?", first), address
        assert rest, address


@in_each_pipeline
def test_every_stage_says_what_it_does(stages: dict[str, Any]) -> None:
    assert not [address for address, stage in stages.items() if len((stage.desc or "").split()) < 4]


@in_each_pipeline
def test_a_command_names_every_dependency_and_output(stages: dict[str, Any]) -> None:
    """A path that the command does not name is one that the stage cannot know, except for its record, code and local assets."""
    for address, stage in stages.items():
        words = shlex.split(stage.cmd.partition("exec env ")[2])
        assert all(word.startswith("--") for word in words[words.index("stages") + 2 :: 2]), f"{address}: options are named"
        if command_of(stage) in UNNAMED:
            assert UNNAMED[command_of(stage)] in stage.cmd, address
            continue
        outs = {out.def_path for out in stage.outs} - {f"data/records/{address.rpartition(':')[2]}.json"}
        deps = {path for path in data_deps(stage) if path.startswith("data/")}
        paths = outs | {path for path in deps if not path.startswith(("data/code/", "data/local/"))}
        named = {word for word in words if word.startswith("data/")}
        unnamed = [path for path in paths if path not in named and not path.startswith(tuple(f"{word}/" for word in named))]
        undeclared = [word for word in named if word not in paths and not any(path.startswith(f"{word}/") for path in paths)]
        assert (unnamed, undeclared) == ([], []), address


@in_each_pipeline
def test_a_stage_has_a_record_where_the_report_looks_for_it(stages: dict[str, Any]) -> None:
    for address, stage in stages.items():
        name = address.rpartition(":")[2]
        records = {out.def_path for out in stage.outs if out.def_path.startswith("data/records")}
        assert records == (set() if name in WITHOUT_RECORD else {f"data/records/{name}.json"})


@in_each_pipeline
def test_only_reports_and_links_are_uncached(stages: dict[str, Any]) -> None:
    """index.html is cached, or Git would keep a copy from every run. What data/local links to stays where it is."""
    for address, stage in stages.items():
        uncached = {out.def_path for out in stage.outs if not out.use_cache}
        links = {out.def_path for out in stage.outs if out.def_path == "data/local"}
        reports = {out.def_path for out in stage.outs if out.def_path.startswith("reports/")} - {"reports/index.html"}
        assert uncached == reports | links, address
        persistent = {out.def_path for out in stage.outs if out.persist}
        assert persistent == links | reports | ({"reports/index.html"} if reports else set()), (
            f"{address}: a stage that fails leaves them as they were"
        )


@pytest.mark.parametrize("folder", [ROOT, *RECIPES], ids=lambda path: path.name)
def test_every_iteration_has_its_stages(folder: Path) -> None:
    prefix = "" if folder == ROOT else f"{folder.relative_to(ROOT).as_posix()}/dvc.yaml:"
    for name in params.read(folder / "params.yaml")["iterations"]:
        for stage in PER_ITERATION:
            assert f"{prefix}{stage}@{name}" in STAGES


def test_split_needs_no_model() -> None:
    """Neither directly nor through what it depends on."""
    graph = REPOSITORY.index.graph
    pending, needed = [STAGES["split"]], set()
    while pending:
        needed.add(pending[-1].name)
        pending += list(graph.successors(pending.pop()))
    assert needed == {"split", "assets-prompts", "assets-alpaca-eval", "assets-local", "code"}


def test_the_pipeline_is_short_enough_to_read() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 400


def test_no_dependency_is_an_empty_folder() -> None:
    """DVC does not look into folders below .dvc: as a dependency, one would never change."""
    stages = YAML(typ="safe").load(ROOT / "dvc.lock")["stages"]
    assert not [(name, dep["path"]) for name, stage in stages.items() for dep in stage["deps"] if dep.get("nfiles") == 0]


def test_there_is_a_recipe() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_has_the_same_pipeline_except_for_the_root(recipe: Path) -> None:
    load = YAML(typ="safe").load
    ours, theirs = load(ROOT / "dvc.yaml"), load(recipe / "dvc.yaml")
    assert theirs.pop("vars") == [{"root": "../../"}]
    assert ours.pop("vars") == [{"root": ""}]
    assert ours == theirs


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipes_published_metrics_are_those_of_its_models(recipe: Path) -> None:
    published = read_published(recipe / "published.yaml")
    assert (published is None) == (recipe.name in ("small", "smollm2-135m"))
    if published is None:
        return
    names = model_names(params.read(recipe / "params.yaml")["iterations"])
    tables = [published.alpaca_eval, *filter(None, [published.open_llm_leaderboard])]
    assert [list(published.models), *[list(table.models) for table in tables]] == [names] * (1 + len(tables))


@pytest.mark.parametrize("recipe", EVALUATIONS, ids=lambda path: path.name)
def test_an_evaluation_has_the_pipeline_of_the_miniatures(recipe: Path) -> None:
    load = YAML(typ="safe").load
    assert load(recipe / "dvc.yaml") == load(EVALUATION / "dvc.yaml")
    prefix = f"{recipe.relative_to(ROOT).as_posix()}/dvc.yaml:"
    for name in params.read(recipe / "params.yaml")["models"]:
        for stage in ("assets-model", "answer", "evaluate-alpaca", "evaluate-lm"):
            assert f"{prefix}{stage}@{name}" in STAGES
    rankers = params.read(recipe / "params.yaml")["rankers"]
    for stage in ("assets-pairrm", "compare-answers"):
        assert {name for name in STAGES if name.startswith(f"{prefix}{stage}")} == {
            f"{prefix}{stage}@{name}" for name in rankers
        }


def test_stages_of_both_pipelines_differ_in_names_of_models_only() -> None:
    """An evaluation gives the figures of the training pipeline because it runs the same commands."""
    load = YAML(typ="safe").load
    ours, theirs = (load(folder / "dvc.yaml")["stages"] for folder in (EVALUATION, ROOT))
    same = ["code", "assets-alpaca-eval", "assets-harness", "answer-reference"]
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    for name in ("evaluate-alpaca", "evaluate-lm"):
        first, second = ours[name]["do"], theirs[name]["do"]
        assert {key: first[key] for key in first if key != "desc"} == {key: second[key] for key in second if key != "desc"}
    judged = json.loads(json.dumps(ours["evaluate-alpaca-answers"]).replace("evaluate-alpaca-answers@", "evaluate-alpaca@"))
    assert judged["do"] == ours["evaluate-alpaca"]["do"]
    options = "--hold-out data/split/hold-out.parquet ", " --out-hold-out 'data/hold_out/${key}.parquet'"
    command = theirs["answer"]["do"]["cmd"]
    assert all(option in command for option in options)
    for option in options:
        command = command.replace(option, "")
    assert ours["answer"]["do"]["cmd"] == command
    assert ours["answer"]["do"]["params"] == theirs["answer"]["do"]["params"]


def test_existing_answers_are_checked_and_judged(tmp_path: Path) -> None:
    """No recipe has `answers`, so their stages are not among STAGES."""
    (tmp_path / "dvc.yaml").write_bytes((EVALUATION / "dvc.yaml").read_bytes())
    document = params.read(EVALUATION / "params.yaml") | {"answers": {"gpt": "files/outputs.json"}}
    YAML().dump(document, tmp_path / "params.yaml")
    repository = Repo.init(str(tmp_path), no_scm=True)
    stages = {stage.name: stage for stage in repository.index.stages if getattr(stage, "cmd", None)}
    got, judged = stages["assets-answers@gpt"], stages["evaluate-alpaca-answers@gpt"]
    assert "assets-answers" in got.cmd
    assert " --answers 'files/outputs.json' --out 'data/answers/gpt.json'" in got.cmd
    expected = {"data/code/assets-answers.json", "data/alpaca_eval_set/instructions.json", "files/outputs.json"}
    assert data_deps(got) == expected
    assert {out.def_path for out in got.outs} == {"data/answers/gpt.json", "data/records/assets-answers@gpt.json"}
    assert command_of(judged) == "evaluate-alpaca"
    assert "data/answers/gpt.json" in data_deps(judged)
    outs = {out.def_path for out in judged.outs}
    assert outs == {"data/alpaca_eval/gpt", "data/records/evaluate-alpaca-answers@gpt.json"}
    assert "answer@gpt" not in stages
    assert "evaluate-lm@gpt" not in stages


def test_the_plots_of_an_evaluation_are_those_of_its_tables() -> None:
    plots = YAML(typ="safe").load(EVALUATION / "dvc.yaml")["plots"]
    outs = {Path(out.def_path).name for name, stage in STAGES.items() if name.endswith(":report-models") for out in stage.outs}
    expected = {name: plot for name, plot in load_plots().items() if name_source(plot) in outs}
    assert {name: plot for entry in plots for name, plot in entry.items()} == expected
    assert expected


def test_analytics_are_off() -> None:
    assert "analytics = false" in (ROOT / ".dvc/config").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_dry_run_lists_the_recipes_stages(recipe: Path, tmp_path: Path) -> None:
    """With a placeholder for every input: DVC requires them even when it only prints what it would run."""
    for name in ("stages", "requirements", ".dvc/config", ".dvc/plots", "params.yaml", "dvc.yaml"):
        (shutil.copytree if (ROOT / name).is_dir() else copy_file)(ROOT / name, tmp_path / name)
    copy = tmp_path / recipe.relative_to(ROOT)
    shutil.copytree(recipe, copy, ignore=shutil.ignore_patterns(".dvcignore"))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    prefix = f"{recipe.relative_to(ROOT).as_posix()}/dvc.yaml:"
    ours = {name.removeprefix(prefix): stage for name, stage in STAGES.items() if name.startswith(prefix)}
    for stage in ours.values():
        for out in stage.outs:
            (copy / out.def_path).parent.mkdir(parents=True, exist_ok=True)
            (copy / out.def_path).touch()
    parts = [f"{name}.parquet" for name in ("hold-out", *params.read(recipe / "params.yaml")["iterations"])]
    for folder, names in (("split", [*parts, "contamination.json"]), ("alpaca_eval_set", ["instructions.json"])):
        (copy / "data" / folder).unlink()
        (copy / "data" / folder).mkdir()
        for name in names:
            (copy / "data" / folder / name).touch()
    (copy / "data/local").unlink()
    (copy / "data/local").mkdir()
    for dep in {dep for stage in ours.values() for dep in data_deps(stage) if dep.startswith("data/local/")}:
        (copy / dep).touch()
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--dry"], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"Running stage '(\S+)'", done.stdout)) == set(ours)
    assert "exec env PYTHONPATH=../../ python -m stages train --model 'data/models/base'" in done.stdout


def copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_that_is_not_pinned_is_refused(recipe: Path) -> None:
    done = run_stage(recipe, "assets-ranker", "--out", "data/ranker")
    assert done.returncode == 1
    name = recipe.relative_to(ROOT).as_posix()
    assert_message(done.stderr, "params.yaml", "revision", f"python -m stages.tools hub --pin --recipe {name}")
    assert not (recipe / "data/ranker").exists()

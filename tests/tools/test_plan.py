"""The plan: which stages are stale, what is printed, and that the documents have its numbers."""

import json
import re
import shutil
from pathlib import Path

import pytest
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from dvc.rwlock import rwlock

from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.fingerprint import fingerprint
from stages.runtime.paths import ROOT
from stages.tools import plan, repository
from stages.tools.planning import sizes, work
from stages.tools.planning.comparison import RUNS
from stages.tools.planning.memory import Memory
from support.messages import assert_message
from support.recipes import change, read_recipe
from support.running import dvc, run_tool

RECIPES = sorted(
    path.parent for path in (ROOT / "recipes").glob("*/params.yaml") if not params.is_evaluation(params.read(path))
)
"""Recipes that train."""
LARGE, SMALL = ["gemma-2-9b", "llama-3-8b", "mistral-7b"], ["small", "smollm2-135m"]
README = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def plan_recipe(name: str, gpus: int) -> dict[str, plan.Cost]:
    """Return what each stage costs that takes longer than seconds, in all runs of a recipe that has not run."""
    folder = ROOT / "recipes" / name
    settings = read_recipe(name)
    (size, _), shape = sizes.measure_size(folder / "new", settings), sizes.find_shape(folder / "new", settings)
    return {stage: plan.estimate_cost(stage, runs, settings, size, shape, gpus) for stage, runs in RUNS.items()}


def total_hours(costs: dict[str, plan.Cost], gpu: str) -> float:
    return sum(cost.seconds[gpu] for cost in costs.values()) / 3600


def test_hours_need_memory() -> None:
    gpu = plan.GPUS["RTX 4090"]
    assert plan.fits(Memory(24e9, 100e9), gpu)
    assert not plan.fits(Memory(24.1e9), gpu)
    assert plan.fits(Memory(12e9, share=0.5), gpu)
    assert not plan.fits(Memory(12.1e9, share=0.5), gpu)
    assert plan.format_hours(7200, fitting=True) == "2.00"
    assert plan.format_hours(7200, fitting=False) == "too little memory"
    assert plan.format_hours(0, fitting=False) == "–", "it uses no GPU"


def test_a_row_of_several_stages_has_the_sum_of_their_work_and_the_most_of_their_memory() -> None:
    size = sizes.Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=8e9)
    hour = dict.fromkeys(plan.GPUS, 3600.0)
    first = plan.Cost(work.Work(passes=1, tokens=10, sampled=1000, disk=1e9), Memory(10e9, 5e9), hour)
    second = plan.Cost(
        work.Work(passes=2, tokens=20, sampled=2000, disk=2e9, dollars=4),
        Memory(7e9, 6e9),
        {name: 2 * seconds for name, seconds in hour.items()},
    )
    cells = plan.format_cells([first, second], size)
    assert cells == ["3", "3.0e01", "4.8e13", "3.0", "4", "10.0", "6.0", "3.00", "3.00", "3.00"]
    tight = second._replace(memory=Memory(7e9, 6e9, share=0.2))
    assert plan.format_cells([first, tight], size)[-3:] == ["3.00", "3.00", "too little memory"], "4.8 GB of 24"


def test_several_runs_cost_several_times_as_much() -> None:
    settings, size = read_recipe("small"), sizes.Size(100, 100, 200, 1.54e9)
    shape = sizes.find_shape(ROOT / "recipes/small/new", settings)
    one, three = (plan.estimate_cost("rank", runs, settings, size, shape, 1) for runs in (1, 3))
    assert three.work.passes == 3 * one.work.passes == 3 * 100 * 20
    assert three.memory == one.memory
    assert three.seconds == {name: pytest.approx(3 * seconds) for name, seconds in one.seconds.items()}


def test_a_stage_that_does_not_fit_names_the_parameter_to_change() -> None:
    settings = read_recipe("llama-3-8b")
    costs = {
        "rank": plan.Cost(work.Work(rank=1), Memory(26.3e9, 0), {}),
        "train": plan.Cost(work.Work(train=1), Memory(100e9, 0), {}),
        "generate": plan.Cost(work.Work(sampled=1), Memory(20e9, 0), {}),
    }
    found = plan.warn_of_memory(costs, settings).strip().splitlines()
    assert found[2] == "- rank needs 26.3 GB on a GPU, and RTX 4090 has 24 GB: lower rank.tokens_per_batch"
    assert [line.split()[1] for line in found[2:]] == ["rank", "train", "train", "train"]
    assert plan.warn_of_memory({"generate": costs["generate"]}, settings) == ""
    longer = {"generate": plan.Cost(work.Work(sampled=1), Memory(21.8e9, share=0.9), {})}
    assert plan.warn_of_memory(longer, settings).strip().splitlines()[2:] == [
        "- generate needs 21.8 GB on a GPU, and vLLM may take 21.6 of the 24 GB of RTX 4090: raise "
        "engine.gpu_memory_utilization or engine.tensor_parallel, or lower engine.max_model_length"
    ]


@pytest.mark.parametrize("gpus", [0, 1, 3])
def test_gpus_that_cannot_share_a_model_are_refused(gpus: int, tmp_path: Path) -> None:
    text = (ROOT / "recipes/llama-3-8b/params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("tensor_parallel: 1 ", "tensor_parallel: 2 "))
    with pytest.raises(StageError) as error:
        plan.format_plan(tmp_path, gpus)
    assert_message(str(error.value), f"--gpus {gpus}", "engine.tensor_parallel (2)", "multiple")


@pytest.mark.parametrize("name", SMALL)
def test_the_readme_of_a_small_recipe_has_its_plan(name: str) -> None:
    folder, costs = ROOT / "recipes" / name, plan_recipe(name, 1)
    size, _ = sizes.measure_size(folder / "new", read_recipe(name))
    lines = (folder / "README.md").read_text().splitlines()
    for stage, cost in costs.items():
        *_, gpu, host, _, _, hours = plan.format_cells([cost], size)
        assert f"| {stage} | {gpu} | {host} | {hours} |" in lines
    *_, gpu, host, _, _, hours = plan.format_cells(list(costs.values()), size)
    assert f"| all | {gpu} | {host} | {hours} |" in lines
    assert f"RTX 4090 is {float(hours):.1f} hours" in " ".join(lines)


@pytest.mark.parametrize("name", LARGE)
def test_the_readme_of_a_large_recipe_has_the_hours_of_its_plan(name: str) -> None:
    costs = plan_recipe(name, 8)
    hours = [total_hours(costs, gpu) for gpu in ("H100", "A100")]
    expected = f"estimates {hours[0]:.1f} hours on 8 × H100 and {hours[1]:.1f} hours on 8 × A100"
    assert expected in (ROOT / "recipes" / name / "README.md").read_text()


def test_the_readme_has_the_hours_of_the_plans() -> None:
    """And for the large recipes up to twice as many."""
    rows = {cells[1].partition("]")[0].strip(" ["): cells for line in README if len(cells := line.split("|")) == 6}
    large = [read_hours(name, "8 × H100") for name in LARGE]
    assert rows["llama-3-8b"][4].startswith(f" {min(large):.0f} to {2 * max(large):.0f} on 8 × H100")
    assert rows["llama-3-8b-published"][4].startswith(f" {read_hours('llama-3-8b-published', 'one H100'):.0f} on an H100")
    for name in SMALL:
        (hours,) = re.findall(r"RTX 4090 is ([\d.]+) hours", (ROOT / "recipes" / name / "README.md").read_text())
        assert rows[name][4].startswith(f" {float(hours):.0f} on an RTX 4090")


def read_hours(name: str, hardware: str) -> float:
    (hours,) = re.findall(rf"([\d.]+) hours on {hardware}", (ROOT / "recipes" / name / "README.md").read_text())
    return float(hours)


def test_the_checkpoints_of_full_training_are_counted() -> None:
    """Those of 8.03 billion parameters: docs/reproducing.md says 128 GB."""
    settings = read_recipe(ROOT / "recipes/llama-3-8b")
    size = sizes.Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=8.03e9)
    assert " 128 GB in scratch/" in plan.explain_plan(size, [], settings)
    for changed in ({"checkpoint_steps": 0}, {"lora": params.Lora(rank=4, alpha=4)}):
        assert "scratch/" not in plan.explain_plan(size, [], change(settings, "train", **changed))


@pytest.mark.slow
@pytest.mark.parametrize("folder", RECIPES, ids=lambda path: path.name)
def test_every_recipe_has_a_plan(folder: Path) -> None:
    done = run_tool(ROOT, "plan", "--recipe", folder.relative_to(ROOT))
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("|")) > 2}
    for stage in ("generate", "rank", "reference", "train", "evaluate-lm"):
        least = 0.01 if stage in ("rank", "evaluate-lm") else 0  # eight GPUs do the rest of a small recipe in seconds
        assert all(float(hours) >= least for hours in rows[stage][10:12])
        assert all(float(gigabytes) > 1 for gigabytes in rows[stage][8:10])
    each = [float(cells[10]) for stage, cells in rows.items() if stage != "all" and cells[10].strip()[0].isdigit()]
    assert float(rows["all"][10]) == pytest.approx(sum(each), abs=0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that ran: split -> generate, and compare by itself, each with the fingerprint of its code."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "params.yaml").write_text("x: 1\ny: 1\n")
    (folder / "dvc.yaml").write_text(
        "stages:\n"
        "  code: {cmd: cp -r prints data/code, deps: [prints, sources], outs: [data/code]}\n"
        "  split: {cmd: echo > a, deps: [data/code/split.json], params: [x], outs: [a]}\n"
        "  generate: {cmd: cp a b, deps: [data/code/generate.json, a], outs: [b]}\n"
        "  compare: {cmd: echo > c, deps: [data/code/compare.json], params: [y], outs: [c]}\n"
    )
    (folder / "sources").write_text("")
    (folder / "data").mkdir()
    for stage in ("split", "generate", "compare"):
        write_fingerprint(folder, stage, fingerprint(stage))
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    dvc(folder, "repro", "-q")
    return folder


@pytest.fixture
def pipeline(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished`, which a test may change."""
    return shutil.copytree(finished, tmp_path / "pipeline")


def write_fingerprint(folder: Path, stage: str, hashes: dict[str, str]) -> None:
    (folder / "prints").mkdir(exist_ok=True)
    (folder / "prints" / f"{stage}.json").write_text(json.dumps(hashes))


@pytest.mark.slow
def test_nothing_is_stale_after_a_run(pipeline: Path) -> None:
    assert plan.find_stale_stages(pipeline) == {}


@pytest.mark.slow
def test_stages_that_follow_a_changed_one_are_named(pipeline: Path) -> None:
    (pipeline / "params.yaml").write_text("x: 2\ny: 1\n")
    assert plan.find_stale_stages(pipeline) == {"split": "changed", "generate": "follows"}


@pytest.mark.slow
def test_a_source_that_changes_no_fingerprint_makes_only_code_stale(pipeline: Path) -> None:
    """As a comment does."""
    (pipeline / "sources").write_text("# a comment")
    assert plan.find_stale_stages(pipeline) == {"code": "changed"}


def test_a_stage_whose_code_differs_from_its_fingerprint_is_stale(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a change of its code, before the stage `code` has run."""
    changed = {"split": fingerprint("split") | {"stages/split.py": "0" * 64}}
    monkeypatch.setattr(repository, "fingerprint", lambda stage: changed.get(stage) or fingerprint(stage))
    (pipeline / "sources").write_text("other code")
    assert plan.find_stale_stages(pipeline) == {"code": "changed", "split": "changed", "generate": "follows"}


@pytest.mark.slow
def test_a_plan_neither_waits_for_a_running_dvc_nor_disturbs_it(pipeline: Path) -> None:
    (pipeline / "params.yaml").write_text("x: 2\ny: 1\n")
    with Repo(str(pipeline)) as repo, lock_repo(repo), rwlock(repo.tmp_dir, repo.fs, "dvc", [], [str(pipeline / "a")], False):
        before = (pipeline / ".dvc/tmp/rwlock").read_text()
        with pytest.raises(LockError):
            Repo(str(pipeline)).status()
        assert plan.find_stale_stages(pipeline) == {"split": "changed", "generate": "follows"}
        assert (pipeline / ".dvc/tmp/rwlock").read_text() == before

"""The plan: which stages are stale, and arithmetic that can be checked by hand."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime import params
from stages.runtime.fingerprint import fingerprint
from stages.runtime.paths import ROOT
from stages.tools import plan, repository
from support.running import TINY, run_tool, set_params

RECIPES = sorted(path.parent for path in (ROOT / "recipes").glob("*/params.yaml"))


def read_recipe(folder: Path) -> params.Params:
    return params.validate_unpinned(params.read(folder / "params.yaml"), folder / "params.yaml")


def test_the_work_of_an_iteration_can_be_counted_by_hand() -> None:
    settings = read_recipe(ROOT / "recipes/llama-3-8b")
    size = plan.Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=1e9)
    assert plan.estimate_work("generate", settings, size).sampled == 10 * 5 * 200
    assert plan.estimate_work("rank", settings, size).passes == 10 * 20, "every ordered pair of five responses"
    assert plan.estimate_work("rank", settings, size).tokens == 10 * 20 * 500
    assert plan.estimate_work("reference", settings, size).forward == 2 * 1e9 * 10 * (100 + 2 * 200), "the prompt once"
    assert plan.estimate_work("train", settings, size).train == 8 * 1e9 * 10 * 500, "forward twice, for gradient checkpointing"
    long = plan.Size(prompts=10, prompt_tokens=1000, response_tokens=2000, parameters=1e9)
    assert plan.estimate_work("train", settings, long).tokens == 10 * (512 + 2 * 512), "cut to lengths.prompt and lengths.total"
    assert plan.estimate_work("compare", settings, size).passes == 500 * 4 * 3
    assert plan.estimate_work("answer", settings, size).passes == 805 + 500
    assert plan.estimate_work("answer-reference", settings, size) == plan.Work(), "the reference outputs are the set's own"
    assert plan.estimate_work("evaluate-alpaca", settings, size).dollars == pytest.approx(805 * 1250 * 10 / 1e6)
    assert plan.estimate_work("split", settings, size) == plan.Work()


def test_the_miniature_samples_its_own_reference_outputs_and_has_no_judge_to_pay() -> None:
    size = plan.Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=1e9)
    assert plan.estimate_work("answer-reference", read_recipe(ROOT), size).sampled == 805 * 200
    for stage in ("evaluate-alpaca", "evaluate-lm"):
        assert plan.estimate_work(stage, read_recipe(ROOT), size) == plan.Work()


def test_hours_are_work_divided_by_speed() -> None:
    gpu = plan.Gpu(peak=100.0, sample=10.0, forward=0.5, rank=0.25, train=0.2)
    work = plan.Work(sampled=36_000, forward=180_000, rank=90_000, train=72_000)
    assert plan.estimate_hours(work, gpu, 8e9, 1) == pytest.approx(1 + 1 + 1 + 1)
    assert plan.estimate_hours(work, gpu, 8e9, 8) == pytest.approx(0.5)
    twice = plan.estimate_hours(plan.Work(sampled=36_000), gpu, 16e9, 1)
    assert twice == pytest.approx(2), "twice the weights to read per token"


@pytest.mark.slow
@pytest.mark.parametrize("folder", RECIPES, ids=lambda path: path.name)
def test_every_recipe_has_a_plan(folder: Path) -> None:
    done = run_tool(ROOT, "plan", "--recipe", folder.relative_to(ROOT))
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("|")) > 2}
    for stage in ("generate", "rank", "reference", "train", "evaluate-lm"):
        assert all(float(hours) > 0 for hours in rows[stage][-3:-1])
    each = [float(cells[-3]) for stage, cells in rows.items() if stage != "all" and cells[-3].strip()[0].isdigit()]
    assert float(rows["all"][-3]) == pytest.approx(sum(each), abs=0.05)


@pytest.mark.slow
def test_sizes_are_measured_after_a_run_and_assumed_before(tiny: Path, tmp_path: Path) -> None:
    set_params(tmp_path, TINY)
    settings = params.validate(tmp_path / "params.yaml")
    size, assumed = plan.measure_size(tmp_path, settings)
    assert size.response_tokens == plan.RESPONSE_TOKENS
    assert len(assumed) == 1
    (tmp_path / "data/responses").mkdir(parents=True)
    (tmp_path / "data/models").mkdir()
    shutil.copyfile(tiny / "responses.parquet", tmp_path / "data/responses/iter1.parquet")
    shutil.copytree(tiny / "base", tmp_path / "data/models/base")
    guess = size.parameters
    size, assumed = plan.measure_size(tmp_path, settings)
    assert not assumed
    assert 0 < size.response_tokens <= 24
    assert math.isclose(size.parameters, guess, rel_tol=0.5)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline that ran: split -> generate, and compare by itself, each with the fingerprint of its code."""
    (tmp_path / "params.yaml").write_text("x: 1\ny: 1\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  code: {cmd: cp -r prints data/code, deps: [prints, sources], outs: [data/code]}\n"
        "  split: {cmd: echo > a, deps: [data/code/split.json], params: [x], outs: [a]}\n"
        "  generate: {cmd: cp a b, deps: [data/code/generate.json, a], outs: [b]}\n"
        "  compare: {cmd: echo > c, deps: [data/code/compare.json], params: [y], outs: [c]}\n"
    )
    (tmp_path / "sources").write_text("")
    (tmp_path / "data").mkdir()
    for stage in ("split", "generate", "compare"):
        write_fingerprint(tmp_path, stage, fingerprint(stage))
    dvc = str(Path(sys.executable).parent / "dvc")
    for command in (["git", "init", "-q"], [dvc, "init", "-q"], [dvc, "repro", "-q"]):
        subprocess.run(command, cwd=tmp_path, env=os.environ | {"DVC_NO_ANALYTICS": "1"}, check=True)
    return tmp_path


def write_fingerprint(folder: Path, stage: str, hashes: dict[str, str]) -> None:
    (folder / "prints").mkdir(exist_ok=True)
    (folder / "prints" / f"{stage}.json").write_text(json.dumps(hashes))


@pytest.mark.slow
def test_nothing_is_stale_after_a_run(pipeline: Path) -> None:
    assert plan.find_stale_stages(pipeline) == {}


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

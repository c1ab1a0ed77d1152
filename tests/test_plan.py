"""The plan: DVC's own answer, and arithmetic that can be checked by hand."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import TINY, set_params

from stages import params, plan
from stages.cli import ROOT

RECIPES = sorted(path.parent for path in (ROOT / "recipes").glob("*/params.yaml"))


def recipe(folder: Path) -> params.Params:
    return params.validate_unpinned(params.read(folder / "params.yaml"), folder / "params.yaml")


def test_the_work_of_an_iteration_is_what_one_counts_by_hand() -> None:
    wanted = recipe(ROOT / "recipes/llama-3-8b")
    size = plan.Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=1e9)
    assert plan.work("generate", wanted, size).sampled == 10 * 5 * 200
    assert plan.work("rank", wanted, size).passes == 10 * 20, "every ordered pair of five responses"
    assert plan.work("rank", wanted, size).tokens == 10 * 20 * 500
    assert plan.work("reference", wanted, size).forward == 2 * 1e9 * 10 * (100 + 2 * 200), "the prompt once"
    assert plan.work("train", wanted, size).train == 8 * 1e9 * 10 * 500, "forward twice, for gradient checkpointing"
    long = plan.Size(prompts=10, prompt_tokens=1000, response_tokens=2000, parameters=1e9)
    assert plan.work("train", wanted, long).tokens == 10 * (512 + 2 * 512), "cut to lengths.prompt and lengths.total"
    assert plan.work("compare", wanted, size).passes == 500 * 4 * 3
    assert plan.work("evaluate-alpaca", wanted, size).dollars == pytest.approx(805 * 1250 * 10 / 1e6)
    assert plan.work("split", wanted, size) == plan.Work()


def test_hours_are_work_over_rate() -> None:
    gpu = plan.Gpu(peak=100.0, sample=10.0, forward=0.5, rank=0.25, train=0.2)
    done = plan.Work(sampled=36_000, forward=180_000, rank=90_000, train=72_000)
    assert plan.hours(done, gpu, 8e9, 1) == pytest.approx(1 + 1 + 1 + 1)
    assert plan.hours(done, gpu, 8e9, 8) == pytest.approx(0.5)
    assert plan.hours(plan.Work(sampled=36_000), gpu, 16e9, 1) == pytest.approx(2), "twice the weights to read for a token"


@pytest.mark.parametrize("folder", RECIPES, ids=lambda path: path.name)
def test_every_recipe_has_a_plan(folder: Path) -> None:
    command = [sys.executable, "-m", "stages.plan", folder.relative_to(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("|")) > 2}
    for stage in ("generate", "rank", "reference", "train", "evaluate-lm"):
        assert all(float(hours) > 0 for hours in rows[stage][-3:-1])
    each = [float(cells[-3]) for stage, cells in rows.items() if stage != "all" and cells[-3].strip()[0].isdigit()]
    assert float(rows["all"][-3]) == pytest.approx(sum(each), abs=0.05)


def test_an_experiment_that_ran_is_measured_and_one_that_did_not_is_assumed(tiny: Path, tmp_path: Path) -> None:
    set_params(tmp_path, TINY)
    wanted = params.validate(tmp_path / "params.yaml")
    size, assumed = plan.size_of(tmp_path, wanted)
    assert size.response_tokens == plan.RESPONSE_TOKENS
    assert len(assumed) == 1
    (tmp_path / "data/responses").mkdir(parents=True)
    (tmp_path / "data/models").mkdir()
    shutil.copyfile(tiny / "responses.parquet", tmp_path / "data/responses/iter1.parquet")
    shutil.copytree(tiny / "base", tmp_path / "data/models/base")
    guess = size.parameters
    size, assumed = plan.size_of(tmp_path, wanted)
    assert not assumed
    assert 0 < size.response_tokens <= 24
    assert math.isclose(size.parameters, guess, rel_tol=0.5)


def test_what_follows_a_changed_stage_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("x: 1\ny: 1\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  a: {cmd: echo > a, params: [x], outs: [a]}\n"
        "  b: {cmd: cp a b, deps: [a], outs: [b]}\n"
        "  c: {cmd: echo > c, params: [y], outs: [c]}\n"
    )
    dvc = str(Path(sys.executable).parent / "dvc")
    for command in (["git", "init", "-q"], [dvc, "init", "-q"], [dvc, "repro", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    assert plan.would_run(tmp_path) == {}
    (tmp_path / "params.yaml").write_text("x: 2\ny: 1\n")
    assert plan.would_run(tmp_path) == {"a": "changed", "b": "follows"}

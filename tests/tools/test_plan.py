"""The plan: which stages are stale, and arithmetic that can be checked by hand."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from dvc.rwlock import rwlock
from safetensors.torch import load_file, save_file

from stages.artifacts import files
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.fingerprint import fingerprint
from stages.runtime.paths import ROOT
from stages.tools import plan, repository
from stages.tools.memory import Memory, Shape, estimate_memory
from support.messages import assert_message
from support.models import make_model
from support.running import TINY, run_tool, set_params

RECIPES = sorted(
    path.parent for path in (ROOT / "recipes").glob("*/params.yaml") if not params.is_evaluation(params.read(path))
)
"""Recipes that train."""
LARGE, SMALL = ["gemma-2-9b", "llama-3-8b", "mistral-7b"], ["small", "smollm2-135m"]
README = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


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
    gpu = plan.Gpu(memory=1.0, peak=100.0, sample=10.0, forward=0.5, rank=0.25, train=0.2)
    work = plan.Work(sampled=36_000, forward=180_000, rank=90_000, train=72_000)
    assert plan.estimate_hours(work, gpu, 8e9, 1) == pytest.approx(1 + 1 + 1 + 1)
    assert plan.estimate_hours(work, gpu, 8e9, 8) == pytest.approx(0.5)
    twice = plan.estimate_hours(plan.Work(sampled=36_000), gpu, 16e9, 1)
    assert twice == pytest.approx(2), "twice the weights to read per token"
    task = plan.Work(forward=180_000, alone=90_000)
    assert plan.estimate_hours(task, gpu, 8e9, 1) == pytest.approx(1)
    assert plan.estimate_hours(task, gpu, 8e9, 2) == pytest.approx(0.5)
    assert plan.estimate_hours(task, gpu, 8e9, 8) == pytest.approx(0.5), "one GPU works on the longest task, the others wait"
    host = plan.Work(offloaded=plan.HOST_BANDWIDTH * 3600)
    assert plan.estimate_hours(host, gpu, 8e9, 8) == plan.estimate_hours(host, gpu, 8e9, 1) == 1, "the GPUs share a host"


def change(settings: params.Params, section: str, **values: object) -> params.Params:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def test_only_the_chosen_tasks_are_counted() -> None:
    settings = read_recipe(ROOT / "recipes/llama-3-8b")
    size = plan.Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=1e9)
    every = plan.estimate_work("evaluate-lm", settings, size)
    assert every.tokens == 82_500_000
    assert (every.forward, every.alone) == (2e9 * 82_500_000, 2e9 * 37_000_000)
    some = plan.estimate_work("evaluate-lm", change(settings, "evaluate_lm", tasks=["arc_challenge", "gsm8k"]), size)
    assert (some.tokens, some.alone) == (10_200_000, 2e9 * 9_000_000)
    assert set(plan.HARNESS_TOKENS) == set(params.HarnessAsset.model_fields)


def test_offloaded_steps_move_the_weights_in_the_hosts_memory() -> None:
    settings = read_recipe(ROOT / "recipes/llama-3-8b")
    size = plan.Size(prompts=1000, prompt_tokens=100, response_tokens=200, parameters=1e9)
    assert plan.estimate_work("train", settings, size).offloaded == 0
    offloaded = change(settings, "train", offload="optimizer")
    assert plan.estimate_work("train", offloaded, size).offloaded == 1000 // 64 * 80e9
    adapters = change(offloaded, "train", lora=params.Lora(rank=4, alpha=4))
    assert plan.estimate_work("train", adapters, size).offloaded == 0, "adapters are small"


def test_a_checkpoint_takes_disk_space_by_its_own_precision() -> None:
    settings = change(read_recipe(ROOT / "recipes/llama-3-8b"), "train", dtype="bfloat16", checkpoint_dtype="float32")
    size = plan.Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=1e9)
    assert plan.estimate_work("train", settings, size).disk == 4e9


def test_hours_need_memory() -> None:
    gpu = plan.Gpu(memory=24e9, peak=100.0, sample=10.0, forward=0.5, rank=0.25, train=0.2)
    work = [plan.Work(sampled=36_000), plan.Work(train=72_000)]
    assert plan.format_hours(work, Memory(24e9, 100e9), gpu, 8e9, 1) == "2.00"
    assert plan.format_hours(work, Memory(25e9, 0), gpu, 8e9, 1) == "too little memory"
    assert plan.format_hours([plan.Work()], Memory(25e9, 0), gpu, 8e9, 1) == "–", "it uses no GPU"


def test_a_row_of_several_stages_has_the_sum_of_their_work_and_the_most_of_their_memory() -> None:
    size = plan.Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=8e9)
    hour = plan.GPUS["H100"].sample * 3600
    first = (plan.Work(passes=1, tokens=10, sampled=hour, disk=1e9), Memory(10e9, 5e9))
    second = (plan.Work(passes=2, tokens=20, sampled=2 * hour, disk=2e9, dollars=4), Memory(7e9, 6e9))
    cells = plan.format_cells([first, second], size, 1)
    assert cells[:7] == ["3", "3.0e01", plan.format_count(16e9 * 3 * hour), "3.0", "4", "10.0", "6.0"]
    assert cells[7] == "3.00"


def test_the_shape_of_a_model_is_read_from_its_configuration(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 3, "intermediate_size": 100, "vocab_size": 500}
    path = tmp_path / "config.json"
    for more, key_width in (({}, 64), ({"num_key_value_heads": 2}, 16), ({"num_key_value_heads": 2, "head_dim": 32}, 64)):
        path.write_text(json.dumps(sizes | more))
        assert plan.read_shape(path, 1e6) == Shape(1e6, 3, 64, 100, key_width, 500)
    path.write_text(json.dumps({name: size for name, size in sizes.items() if name != "vocab_size"}))
    with pytest.raises(StageError) as error:
        plan.read_shape(path, 1e6)
    assert_message(str(error.value), "config.json", "'vocab_size'", "is missing")


@pytest.mark.parametrize("folder", ["llama-3-8b", "llama-3-8b-published"])
def test_a_policy_of_unknown_size_is_refused(folder: str, tmp_path: Path) -> None:
    path = ROOT / "recipes" / folder / "params.yaml"
    document = params.read(path)
    (document["assets"]["policy"] if folder == "llama-3-8b" else document["models"]["base"])["repo"] = "a/b"
    validate = params.validate_evaluation if params.is_evaluation(document) else params.validate_unpinned
    with pytest.raises(StageError) as error:
        plan.measure_size(tmp_path, validate(document, path))
    stage = "assets-policy" if folder == "llama-3-8b" else "assets-model@base"
    assert_message(str(error.value), "a/b", "unknown", f"dvc repro {stage}")


def test_a_local_policy_is_read_where_it_is_before_the_pipeline_has_copied_it(tmp_path: Path) -> None:
    settings = read_recipe(ROOT / "recipes/llama-3-8b")
    local = params.PolicyAsset(repo="../mine")
    settings = change(settings, "assets", policy=local)
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    with pytest.raises(StageError):
        plan.find_shape(recipe, settings)
    make_model(tmp_path / "mine")
    expected = json.loads((tmp_path / "mine/config.json").read_text())
    shape = plan.find_shape(recipe, settings)
    assert (shape.layers, shape.hidden, shape.vocabulary) == (1, 32, expected["vocab_size"])
    assert shape.parameters == plan.count_parameters(recipe, settings) == count_weights(tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", recipe / "data/models/base")
    save_file({"weight": torch.zeros(3, 5)}, recipe / "data/models/base/model.safetensors")
    assert plan.count_parameters(recipe, settings) == 15, "the copy counts"
    (recipe / "data/models/base/model.safetensors").write_bytes(b"12345678")
    with pytest.raises(StageError) as error:
        plan.count_parameters(recipe, settings)
    assert_message(str(error.value), "data/models/base/model.safetensors", "is corrupted")


def count_weights(folder: Path) -> int:
    """Count the weights of a model by reading them."""
    return sum(weight.numel() for file in folder.glob("*.safetensors") for weight in load_file(file).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_counted_in_any_precision_and_number_of_files(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_model(tmp_path / "data/models/base", shard="50KB")
    for file in base.glob("*.safetensors"):
        save_file({name: weight.to(dtype) for name, weight in load_file(file).items()}, file)
    assert len(list(base.glob("*.safetensors"))) > 1
    expected = count_weights(base)
    save_file({"copy": torch.zeros(1000)}, base / "consolidated.safetensors")  # as in Mistral's repositories: not in the index
    assert plan.count_parameters(tmp_path, read_recipe(ROOT / "recipes/llama-3-8b")) == expected


def test_a_snapshot_that_is_not_on_this_machine_is_counted_by_its_size(tmp_path: Path) -> None:
    sizes = {"model-1.safetensors": 6000, "model-2.safetensors": 4000, "config.json": 500}
    listed = {name: {"size": size, "sha256": "0" * 64} for name, size in sizes.items()}
    pointer = {"repo": "nobody/nothing", "revision": "0" * 40, "repo_type": "model", "files": listed}
    files.write_json(pointer, tmp_path / "data/models/base/pointer.json")
    assert plan.count_parameters(tmp_path, read_recipe(ROOT / "recipes/llama-3-8b")) == 5000, "bfloat16"


def write_rows(path: Path, column: str, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")


def test_local_prompts_are_counted_as_split_will_find_them(tmp_path: Path) -> None:
    settings, recipe = read_recipe(ROOT / "recipes/llama-3-8b"), tmp_path / "recipe"
    recipe.mkdir()
    assert plan.count_prompts(recipe, settings) is None, "a third of those on the Hub"
    write_rows(tmp_path / "mine/train.jsonl", "text", [*"abcdefgh", "a", " "])
    for split, texts in (("train", "abc"), ("test", "de"), ("validation", "fa")):
        write_rows(tmp_path / f"assigned/{split}.jsonl", "prompt", list(texts))
    splits = {"iter1": "train", "iter2": "test", "iter3": "validation"}
    assignment = params.Assignment(repo="../assigned", column="prompt", splits=splits)
    local = params.PromptsAsset(repo="../mine", split="train", column="text", assignment=assignment)
    settings = change(settings, "assets", prompts=local)
    assert plan.count_prompts(recipe, settings) == 2, "six distinct ones of three iterations"
    assert plan.measure_size(recipe, settings)[0].prompts == 2
    assert plan.count_prompts(recipe, change(settings, "split", prompts_per_iteration=1)) == 1


def test_a_local_evaluation_set_is_counted(tmp_path: Path) -> None:
    settings, recipe = read_recipe(ROOT / "recipes/llama-3-8b"), tmp_path / "recipe"
    assert plan.count_instructions(recipe, settings) == 805
    files.write_json([{"instruction": text} for text in "abcde"], recipe / "data/alpaca_eval_set/instructions.json")
    assert plan.count_instructions(recipe, settings) == 5, "those of an earlier run"
    local = change(settings, "assets", alpaca_eval=params.EvaluationAsset(repo="../mine"))
    assert plan.count_instructions(recipe, local) == 5, "the copy is left"
    files.write_json([{"instruction": text} for text in "abc"], tmp_path / "mine/alpaca_eval_gpt4_baseline.json")
    assert plan.count_instructions(recipe, local) == 3
    assert plan.count_instructions(recipe, read_recipe(ROOT)) == 805, "the miniature's"
    size, _ = plan.measure_size(recipe, local)
    assert plan.estimate_work("answer", local, size).passes == 3 + 500
    assert plan.estimate_work("evaluate-alpaca", local, size).dollars == pytest.approx(3 * 1250 * 10 / 1e6)


def test_a_recipe_that_trains_nothing_is_planned_by_its_base_model() -> None:
    path = ROOT / "recipes/llama-3-8b-published/params.yaml"
    settings = params.validate_evaluation(params.read(path), path)
    size, _ = plan.measure_size(path.parent, settings)
    assert (size.prompts, size.parameters) == (0, 8.03e9)
    assert plan.estimate_work("answer", settings, size).passes == 805, "there is no hold-out"
    assert plan.estimate_work("train", settings, size) == plan.Work()
    judged = plan.estimate_work("evaluate-alpaca", settings, size)
    assert plan.estimate_work("evaluate-alpaca-answers", settings, size) == judged != plan.Work()
    training = plan.estimate_work("evaluate-lm", read_recipe(ROOT / "recipes/llama-3-8b"), size)
    assert plan.estimate_work("evaluate-lm", settings, size) == training
    assert "per iteration" not in plan.explain_plan(size, [], settings)
    compared = plan.estimate_work("compare-answers", settings.model_copy(update={"answers": {"gpt": "x.json"}}), size)
    assert compared.passes == 805 * 5 * 4, "every ordered pair of five models"
    assert compared.rank > 0


@pytest.mark.parametrize("name", SMALL)
def test_the_readme_of_a_small_recipe_has_its_plan(name: str) -> None:
    folder = ROOT / "recipes" / name
    settings = read_recipe(folder)
    (size, _), shape = plan.measure_size(folder / "new", settings), plan.find_shape(folder / "new", settings)
    stages, costs = ["generate", "rank", "reference", "train", "answer", "evaluate-lm", "compare"], []
    lines = (folder / "README.md").read_text().splitlines()
    for stage in stages:
        runs = {"compare": 1, "answer": 4, "evaluate-lm": 4}.get(stage, 3)
        work = sum([plan.estimate_work(stage, settings, size)] * runs, plan.Work())
        costs.append((work, estimate_memory(stage, settings, shape, 1)))
        *_, gpu, host, _, _, hours = plan.format_cells(costs[-1:], size, 1)
        assert f"| {stage} | {gpu} | {host} | {hours} |" in lines
    *_, gpu, host, _, _, hours = plan.format_cells(costs, size, 1)
    assert f"| all | {gpu} | {host} | {hours} |" in lines
    assert f"RTX 4090 is {float(hours):.1f} hours" in " ".join(lines)


@pytest.mark.parametrize("name", LARGE)
def test_the_readme_of_a_large_recipe_has_the_hours_of_its_plan(name: str) -> None:
    folder = ROOT / "recipes" / name
    settings = read_recipe(folder)
    size, _ = plan.measure_size(folder / "new", settings)
    hours = []
    for gpu in (plan.GPUS["H100"], plan.GPUS["A100"]):
        runs = {"compare": 1, "answer": 4, "evaluate-lm": 4}
        stages = [*plan.TRAINING_ESTIMATES, "answer", "evaluate-lm"]
        works = [(plan.estimate_work(stage, settings, size), runs.get(stage, 3)) for stage in stages]
        hours.append(sum(count * plan.estimate_hours(work, gpu, size.parameters, 8) for work, count in works))
    expected = f"estimates {hours[0]:.1f} hours on 8 × H100 and {hours[1]:.1f} hours on 8 × A100"
    assert expected in (folder / "README.md").read_text()


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
    size = plan.Size(prompts=10, prompt_tokens=100, response_tokens=200, parameters=8.03e9)
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


@pytest.mark.slow
def test_a_plan_neither_waits_for_a_running_dvc_nor_disturbs_it(pipeline: Path) -> None:
    (pipeline / "params.yaml").write_text("x: 2\ny: 1\n")
    with Repo(str(pipeline)) as repo, lock_repo(repo), rwlock(repo.tmp_dir, repo.fs, "dvc", [], [str(pipeline / "a")], False):
        before = (pipeline / ".dvc/tmp/rwlock").read_text()
        with pytest.raises(LockError):
            Repo(str(pipeline)).status()
        assert plan.find_stale_stages(pipeline) == {"split": "changed", "generate": "follows"}
        assert (pipeline / ".dvc/tmp/rwlock").read_text() == before

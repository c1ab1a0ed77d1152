"""Sizes are counted where they can be, and assumed where not."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.artifacts import files
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools.planning import sizes, work
from stages.tools.planning.memory import Shape
from stages.tools.planning.methods import PLAIN
from support.messages import assert_message
from support.models import make_model
from support.recipes import change, read_recipe
from support.running import TINY, set_params


def test_the_shape_of_a_model_is_read_from_its_configuration(tmp_path: Path) -> None:
    widths = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 3, "intermediate_size": 100, "vocab_size": 500}
    path = tmp_path / "config.json"
    for more, key_width in (({}, 64), ({"num_key_value_heads": 2}, 16), ({"num_key_value_heads": 2, "head_dim": 32}, 64)):
        path.write_text(json.dumps(widths | more))
        assert sizes.read_shape(path, 1e6) == Shape(1e6, 3, 64, 100, key_width, 500)
    path.write_text(json.dumps({name: size for name, size in widths.items() if name != "vocab_size"}))
    with pytest.raises(StageError) as error:
        sizes.read_shape(path, 1e6)
    assert_message(str(error.value), "config.json", "'vocab_size'", "is missing")


@pytest.mark.parametrize("folder", ["llama-3-8b", "llama-3-8b-published"])
def test_a_policy_of_unknown_size_is_refused(folder: str, tmp_path: Path) -> None:
    path = ROOT / "recipes" / folder / "params.yaml"
    document = params.read(path)
    (document["assets"]["policy"] if folder == "llama-3-8b" else document["models"]["base"])["repo"] = "a/b"
    validate = params.validate_evaluation if params.is_evaluation(document) else params.validate_unpinned
    with pytest.raises(StageError) as error:
        sizes.measure_size(tmp_path, validate(document, path))
    stage = "assets-policy" if folder == "llama-3-8b" else "assets-model@base"
    assert_message(str(error.value), "a/b", "unknown", f"dvc repro {stage}")


def test_a_local_policy_is_read_where_it_is_before_the_pipeline_has_copied_it(tmp_path: Path) -> None:
    settings = read_recipe(ROOT / "recipes/llama-3-8b")
    local = params.PolicyAsset(repo="../mine")
    settings = change(settings, "assets", policy=local)
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    with pytest.raises(StageError):
        sizes.find_shape(recipe, settings)
    make_model(tmp_path / "mine")
    expected = json.loads((tmp_path / "mine/config.json").read_text())
    shape = sizes.find_shape(recipe, settings)
    assert (shape.layers, shape.hidden, shape.vocabulary) == (1, 32, expected["vocab_size"])
    assert shape.parameters == sizes.count_parameters(recipe, settings) == count_weights(tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", recipe / "data/models/base")
    save_file({"weight": torch.zeros(3, 5)}, recipe / "data/models/base/model.safetensors")
    assert sizes.count_parameters(recipe, settings) == 15, "the copy counts"
    (recipe / "data/models/base/model.safetensors").write_bytes(b"12345678")
    with pytest.raises(StageError) as error:
        sizes.count_parameters(recipe, settings)
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
    assert sizes.count_parameters(tmp_path, read_recipe(ROOT / "recipes/llama-3-8b")) == expected


def test_a_snapshot_that_is_not_on_this_machine_is_counted_by_its_size(tmp_path: Path) -> None:
    bytes_of = {"model-1.safetensors": 6000, "model-2.safetensors": 4000, "config.json": 500}
    listed = {name: {"size": size, "sha256": "0" * 64} for name, size in bytes_of.items()}
    pointer = {"repo": "nobody/nothing", "revision": "0" * 40, "repo_type": "model", "files": listed}
    files.write_json(pointer, tmp_path / "data/models/base/pointer.json")
    assert sizes.count_parameters(tmp_path, read_recipe(ROOT / "recipes/llama-3-8b")) == 5000, "bfloat16"


def write_rows(path: Path, column: str, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")


@pytest.mark.slow
def test_local_prompts_are_counted_as_split_will_find_them(tmp_path: Path) -> None:
    settings, recipe = read_recipe(ROOT / "recipes/llama-3-8b"), tmp_path / "recipe"
    recipe.mkdir()
    assert sizes.count_prompts(recipe, settings) is None, "a third of those on the Hub"
    write_rows(tmp_path / "mine/train.jsonl", "text", [*"abcdefgh", "a", " "])
    for split, texts in (("train", "abc"), ("test", "de"), ("validation", "fa")):
        write_rows(tmp_path / f"assigned/{split}.jsonl", "prompt", list(texts))
    splits = {"iter1": "train", "iter2": "test", "iter3": "validation"}
    assignment = params.Assignment(repo="../assigned", column="prompt", splits=splits)
    local = params.PromptsAsset(repo="../mine", split="train", column="text", assignment=assignment)
    settings = change(settings, "assets", prompts=local)
    assert sizes.count_prompts(recipe, settings) == 2, "six distinct ones of three iterations"
    assert sizes.measure_size(recipe, settings)[0].prompts == 2
    assert sizes.count_prompts(recipe, change(settings, "split", prompts_per_iteration=1)) == 1


def test_a_local_evaluation_set_is_counted(tmp_path: Path) -> None:
    settings, recipe = read_recipe(ROOT / "recipes/llama-3-8b"), tmp_path / "recipe"
    assert sizes.count_instructions(recipe, settings) == 805
    files.write_json([{"instruction": text} for text in "abcde"], recipe / "data/alpaca_eval_set/instructions.json")
    assert sizes.count_instructions(recipe, settings) == 5, "those of an earlier run"
    local = change(settings, "assets", alpaca_eval=params.EvaluationAsset(repo="../mine"))
    assert sizes.count_instructions(recipe, local) == 5, "the copy is left"
    files.write_json([{"instruction": text} for text in "abc"], tmp_path / "mine/alpaca_eval_gpt4_baseline.json")
    assert sizes.count_instructions(recipe, local) == 3
    assert sizes.count_instructions(recipe, read_recipe(ROOT)) == 805, "the miniature's"
    size, _ = sizes.measure_size(recipe, local)
    assert work.estimate_work("answer", local, size, PLAIN).passes == 3 + 500
    assert work.estimate_work("evaluate-alpaca", local, size, PLAIN).dollars == pytest.approx(3 * 1250 * 10 / 1e6)


@pytest.mark.slow
def test_sizes_are_measured_after_a_run_and_assumed_before(tiny: Path, tmp_path: Path) -> None:
    set_params(tmp_path, TINY)
    settings = params.validate(tmp_path / "params.yaml")
    size, assumed = sizes.measure_size(tmp_path, settings)
    assert size.response_tokens == sizes.RESPONSE_TOKENS
    assert len(assumed) == 1
    (tmp_path / "data/responses").mkdir(parents=True)
    (tmp_path / "data/models").mkdir()
    shutil.copyfile(tiny / "responses.parquet", tmp_path / "data/responses/iter1.parquet")
    shutil.copytree(tiny / "base", tmp_path / "data/models/base")
    guess = size.parameters
    size, assumed = sizes.measure_size(tmp_path, settings)
    assert not assumed
    assert 0 < size.response_tokens <= 24
    assert math.isclose(size.parameters, guess, rel_tol=0.5)

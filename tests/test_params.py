import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages import params
from stages.cli import ROOT, StageError

RECIPES = sorted(ROOT.glob("recipes/*/params.yaml"))


def _changed(path: Path, change: Callable[[dict[str, Any]], object], source: Path = ROOT / "params.yaml") -> Path:
    document = YAML(typ="safe").load(source)
    change(document)
    YAML().dump(document, path)
    return path


def test_the_miniature_is_valid() -> None:
    assert params.validate(ROOT / "params.yaml").iterations == {"iter1": "base", "iter2": "iter1", "iter3": "iter2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(etta=1), "etta: is not a parameter"),
        (lambda d: d.pop("eta"), "eta: is missing"),
        (lambda d: d["train"].pop("epochs"), "train.epochs: is missing"),
        (lambda d: d["train"].update(momentum=0), "train.momentum: is not a parameter"),
        (lambda d: d.update(seed="42"), "seed: Input should be a valid integer (found '42')"),
        (lambda d: d.update(seed=True), "seed: Input should be a valid integer (found True)"),
        (lambda d: d.update(eta="1e3"), "eta: Input should be a valid number (found '1e3')"),
        (lambda d: d.update(eta=0), "eta: Input should be greater than 0 (found 0)"),
        (lambda d: d.update(eta=float("inf")), "eta: Input should be a finite number (found inf)"),
        (lambda d: d["generate"].update(samples=1), "generate.samples: Input should be greater than or equal to 2 (found 1)"),
        (lambda d: d["generate"].update(top_p=1.5), "generate.top_p: Input should be less than or equal to 1 (found 1.5)"),
        (lambda d: d["split"].update(hold_out=0), "split.hold_out: Input should be greater than or equal to 2 (found 0)"),
        (
            lambda d: d["engine"].update(dtype="float16"),
            "engine.dtype: Input should be 'float32' or 'bfloat16' (found 'float16')",
        ),
        (lambda d: d["lengths"].update(prompt=256), "lengths: prompt (256) must be below total (256)"),
        (lambda d: d["train"].update(devices=3), "train: global_batch 16 is not a multiple of device_batch 16 x devices 3"),
        (lambda d: d["train"].update(loss="dpo"), "train: beta is missing: loss is dpo"),
        (lambda d: d["train"].update(beta=0.1), "train: beta goes with loss dpo or ipo, and it is sppo"),
        (
            lambda d: d["train"].update(loss="orpo"),
            "train.loss: Input should be 'sppo', 'sppo_hard', 'dpo' or 'ipo' (found 'orpo')",
        ),
        (
            lambda d: d["train"]["lora"].update(rank=-1),
            "train.lora.rank: Input should be greater than or equal to 0 (found -1)",
        ),
        (lambda d: d["train"].update(stop_epoch=7), "train: stop_epoch 7.0 is beyond the schedule's 6.0 epochs"),
        (lambda d: d.update(iterations={}), "iterations: "),
        (lambda d: d.update(iterations={"iter1": "iter2"}), "iterations: iter1 starts from 'iter2', which is not one of base"),
        (lambda d: d.update(iterations={"hold-out": "base"}), "iterations: 'hold-out' is no name for an iteration"),
        (lambda d: d["assets"]["policy"].update(revision="0" * 40), "assets.policy: miniature is not on the Hub"),
        (
            lambda d: d["assets"]["prompts"].update(repo="a/b"),
            "assets.prompts: revision None of a/b is not a full 40-digit commit",
        ),
        (
            lambda d: d["assets"]["prompts"].update(repo="a/b", revision="main"),
            "assets.prompts: revision 'main' of a/b is not a full 40-digit commit",
        ),
    ],
)
def test_a_wrong_value_is_named_in_one_line(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    path = _changed(tmp_path / "params.yaml", change)
    with pytest.raises(StageError) as error:
        params.validate(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = _changed(tmp_path / "params.yaml", lambda d: d.update(eta=-1, seed=-1))
    with pytest.raises(StageError, match=r"seed: .*; eta: "):
        params.validate(path)


@pytest.mark.parametrize("text", ["5e-7", "5.0e-7", "5E-07", "0.0000005"])
def test_numbers_are_read_as_yaml_1_2_reads_them(tmp_path: Path, text: str) -> None:
    root = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(root.replace("  learning_rate: 5.0e-5\n", f"  learning_rate: {text}\n"))
    assert params.validate(tmp_path / "params.yaml").train.learning_rate == 5e-7


def test_a_stage_reads_what_it_asks_for_and_nothing_else() -> None:
    wanted = params.load("seed", "train", "assets.prompts", path=ROOT / "params.yaml")
    assert (wanted.seed, wanted.train.devices, wanted.prompts.repo) == (42, 1, "miniature")
    assert not hasattr(wanted, "eta")


def test_a_stage_is_stopped_by_its_own_sections_only(tmp_path: Path) -> None:
    path = _changed(tmp_path / "params.yaml", lambda d: (d.update(eta=-1), d["assets"]["prompts"].pop("repo")))
    assert params.load("seed", path=path).seed == 42
    for key, message in (("eta", "eta: "), ("assets.prompts", "assets.prompts.repo: is missing"), ("nothing", None)):
        with pytest.raises(KeyError if message is None else StageError) as error:
            params.load(key, path=path)
        assert message is None or str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, " is missing: stages run in the folder"),
        ("a: [1", ": not YAML: "),
        ("a: &a [*a]", ": not YAML: an alias"),
        ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", ": not YAML: an alias"),
        (f"a: 0x{'f' * 5000}", ": not YAML: "),
        ("a: 2001-99-99", ": not YAML: "),
        ("- 1", ": a mapping of"),
    ],
)
def test_a_file_that_holds_no_parameters_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StageError) as error:
        params.validate(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipe_is_valid_but_for_revisions_to_look_up(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    if "revision: null" in text:
        with pytest.raises(StageError) as error:
            params.validate(path)
        *problems, remedy = str(error.value).removeprefix(f"{path}: ").split("; ")
        assert len(problems) == len(re.findall(r"revision: null", text))
        assert all(problem.endswith("is not a full 40-digit commit") for problem in problems)
        assert remedy.endswith(f"`python -m stages.assets --pin recipes/{path.parent.name}`")
    pinned = tmp_path / "params.yaml"
    pinned.write_text(text.replace("revision: null", f"revision: {'a' * 40}"))
    recipe = params.validate(pinned)
    assert (recipe.eta, recipe.generate.samples, recipe.train.learning_rate, recipe.train.global_batch) == (1000, 5, 5e-7, 64)
    assert recipe.assets.prompts.parts is not None
    assert list(recipe.assets.prompts.parts.splits) == list(recipe.iterations)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipes_published_figures_are_of_its_models(path: Path) -> None:
    published = params.published(path.parent / "published.yaml")
    assert published is not None
    names = params.models(params.read(path)["iterations"])
    tables = [published.alpaca_eval, *filter(None, [published.open_llm_leaderboard])]
    assert [list(published.models), *[list(table.models) for table in tables]] == [names] * (1 + len(tables))


def test_only_what_pinning_will_mend_is_overlooked() -> None:
    document = params.read(ROOT / "params.yaml")
    document["assets"]["prompts"] = {"repo": "a/b"}
    assert params.validate_unpinned(document, Path("params.yaml")).assets.prompts.repo == "a/b"
    document["assets"]["prompts"] = {"repo": "./a", "revision": None, "count": 1}
    with pytest.raises(StageError, match="count goes with repo: miniature only"):
        params.validate_unpinned(document, Path("params.yaml"))

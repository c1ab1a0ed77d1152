"""params.yaml: what is valid, how faults are reported, and that no value is changed."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages.artifacts import harness_sets
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.running import set_params

PATHS = sorted(ROOT.glob("recipes/*/params.yaml"))
RECIPES = [path for path in PATHS if not params.is_evaluation(params.read(path))]
EVALUATIONS = [path for path in PATHS if path not in RECIPES]


def change_params(path: Path, change: Callable[[dict[str, Any]], object], source: Path = ROOT / "params.yaml") -> Path:
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
        (lambda d: d.update(seed="42"), "seed: Input should be a valid integer (got '42')"),
        (lambda d: d.update(seed=True), "seed: Input should be a valid integer (got True)"),
        (lambda d: d.update(eta="1e3"), "eta: Input should be a valid number (got '1e3')"),
        (lambda d: d.update(eta=0), "eta: Input should be greater than 0 (got 0)"),
        (lambda d: d.update(eta=float("inf")), "eta: Input should be a finite number (got inf)"),
        (lambda d: d["generate"].update(samples=1), "generate.samples: Input should be greater than or equal to 2 (got 1)"),
        (lambda d: d["generate"].update(top_p=1.5), "generate.top_p: Input should be less than or equal to 1 (got 1.5)"),
        (lambda d: d["split"].update(hold_out=0), "split.hold_out: Input should be greater than or equal to 2 (got 0)"),
        (
            lambda d: d["engine"].update(dtype="float16"),
            "engine.dtype: Input should be 'float32' or 'bfloat16' (got 'float16')",
        ),
        (lambda d: d["lengths"].update(prompt=256), "lengths: prompt (256) must be below total (256)"),
        (lambda d: d["assets"]["policy"].update(license="mit"), "assets.policy: license does not apply to repo: miniature"),
        (lambda d: d["train"].update(devices=3), "train: global_batch 16 is not a multiple of device_batch 16 x devices 3"),
        (lambda d: d["train"].update(loss="dpo"), "train: beta is missing: loss is dpo"),
        (lambda d: d["train"].update(beta=0.1), "train: beta applies to dpo and ipo, not sppo"),
        (
            lambda d: d["train"].update(loss="orpo"),
            "train.loss: Input should be 'sppo', 'sppo_hard', 'dpo' or 'ipo' (got 'orpo')",
        ),
        (
            lambda d: d["train"]["lora"].update(rank=-1),
            "train.lora.rank: Input should be greater than or equal to 0 (got -1)",
        ),
        (
            lambda d: d["engine"].update(max_num_seqs=4097),
            "engine: max_num_seqs (4097) exceeds max_num_batched_tokens (4096), of which each response needs one: lower it",
        ),
        (lambda d: d["train"].update(stop_epoch=7), "train: stop_epoch 7.0 is beyond the schedule's 6.0 epochs"),
        (lambda d: d.update(iterations={}), "iterations: "),
        (lambda d: d.update(iterations={"iter1": "iter2"}), "iterations: iter1 starts from 'iter2', which is not one of base"),
        (lambda d: d.update(iterations={"hold-out": "base"}), "iterations: 'hold-out' is not a valid name for an iteration"),
        (lambda d: d["assets"]["policy"].update(revision="0" * 40), "assets.policy: miniature is not on the Hub"),
        (
            lambda d: d["assets"]["prompts"].update(repo="a/b"),
            "assets.prompts: revision None of a/b is not a full 40-digit commit",
        ),
        (
            lambda d: d["assets"]["prompts"].update(repo="a/b", revision="main"),
            "assets.prompts: revision 'main' of a/b is not a full 40-digit commit",
        ),
        *[
            (
                lambda d, repo=repo: d["assets"]["prompts"].update(repo=repo, revision="0" * 40),
                f"assets.prompts: {repo}: ~ does not stand for a home directory here: write an absolute path, or one from ./",
            )
            for repo in ("~", "~/x", "~user/x")
        ],
    ],
)
def test_a_wrong_value_is_named_in_one_line(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    path = change_params(tmp_path / "params.yaml", change)
    with pytest.raises(StageError) as error:
        params.validate(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


MINIATURE = params.read(ROOT / "params.yaml")
KEYS = {
    "seed": ([0, 42, 2**32 - 1], [-1, 2**32, 2**64, 10**30]),
    "eta": ([1e-3, 10, 1000, 1e18], [0, -1, 1e-320, 1e19, 1e308]),
    "generate.samples": ([2, 5, 1000], [1, 1001, 2**31, 10**30]),
    "generate.temperature": ([0.01, 1, 100], [0, 1e-5, 0.0099, 101, 1e308]),
    "generate.top_p": ([1e-3, 1], [0, 1e-320, 1.01]),
    "generate.shard_size": ([1, 2**31 - 1], [0, 2**31, 10**30]),
    "answer.temperature": ([0, 0.01, 0.9, 100], [-1, 1e-5, 0.0099, 101, 1e308]),
    "engine.max_model_length": ([1, 2**31 - 1], [0, 2**31, 10**30]),
    "engine.stop_token_ids": ([[], [0, 2**31 - 1]], [[-1], [2**31], [0, 10**30]]),
    "engine.kv_cache_gib": ([0.125, 100_000], [0, 1e-320, 1e6, 1e308]),
    "engine.max_num_seqs": ([1, 4096], [0, 2**31, 10**30]),
    "engine.max_num_batched_tokens": ([256, 2**31 - 1], [0, 2**31, 10**30]),
    "engine.gpu_memory_utilization": ([0.01, 1], [0, 1e-320, 1.01]),
    "engine.tensor_parallel": ([1, 64], [0, 65, 10**30]),
    "split.hold_out": ([2, 2**31 - 1], [1, 2**31, 10**30]),
    "rank.scale": ([0.5, 1], [0, 1e-320, 1e39]),
    "train.learning_rate": ([1e-30, 5e-7, 3e38], [0, 1e-39, 1e39]),
    "train.epochs": ([1, 18, 10_000], [0, 1e-320, 10_001, 1e308]),
    "train.max_grad_norm": ([0, 1, 1e38], [-1, 1e-320, 1e39]),
    "train.warmup_ratio": ([0, 0.1], [-0.1, 1, 1.5]),
    "train.lora.rank": ([0, 64], [-1, 2**31]),
    "assets.policy.miniature.hidden_size": ([32, 128, 4096], [0, 33, 48, 8192, 10**30]),
    "assets.policy.miniature.layers": ([1, 100], [0, 101, 10**30]),
    "assets.policy.miniature.vocabulary": ([262, 800], [0, 261, 10**9]),
    "assets.ranker.miniature.candidates": ([2, 100], [1, 101, 10**9]),
    "assets.ranker.miniature.noise": ([0, 0.5], [-1, 1e-320, 1e39]),
    "evaluate_alpaca": ([{"judge": "m", "workers": 8}], [{"judge": "m", "workers": workers} for workers in (0, 1001, 10**30)]),
}
"""Key -> values within its range, and beyond it."""
NO_NUMBERS = [float("nan"), float("inf"), -float("inf")]


def validate_with(key: str, value: Any) -> params.Params:
    """Validate the miniature's parameters with another value."""
    document = copy.deepcopy(MINIATURE)
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        section = section[parent]
    section[last] = value
    return params.validate_model(params.Params, document, Path("params.yaml"))


@pytest.mark.parametrize("key", KEYS)
def test_a_number_out_of_range_is_refused_with_its_key(key: str) -> None:
    within, beyond = KEYS[key]
    for value in within:
        validate_with(key, value)
    for value in [*beyond, *NO_NUMBERS]:
        with pytest.raises(StageError) as error:
            validate_with(key, value)
        assert str(error.value).startswith(f"params.yaml: {key}"), value
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eta", 2**53 + 1),
        ("eta", 10**17 + 1),
        ("rank.scale", 123456789012345678901),
        ("train.learning_rate", 10**25),
        ("assets.ranker.miniature.noise", 10**30 + 7),
    ],
)
def test_an_integer_that_would_be_rounded_is_refused(key: str, value: int, tmp_path: Path) -> None:
    set_params(tmp_path, {key: value})
    path = tmp_path / "params.yaml"
    section = ".".join(key.split(".")[: 2 if key.startswith("assets") else 1])
    with pytest.raises(StageError) as error:
        params.load(section, path=path)
    assert_message(str(error.value), "params.yaml", key, str(value), f"write {float(value)!r}")
    set_params(tmp_path, {key: 2**53})  # is exactly a float
    params.load(section, path=path)


@given(seed=st.integers())
def test_a_seed_is_one_that_every_library_takes(seed: int) -> None:
    """NumPy's generator, which transformers and vLLM seed, too, is the pickiest."""
    try:
        np.random.RandomState(seed)
    except ValueError:
        with pytest.raises(StageError, match=r"params\.yaml: seed: "):
            validate_with("seed", seed)
    else:
        assert validate_with("seed", seed).seed == seed


@pytest.mark.parametrize("path", [ROOT / "params.yaml", ROOT / "recipes/miniature-published/params.yaml"])
def test_no_number_of_a_file_may_be_infinite_or_none(path: Path) -> None:
    """Whatever the key: a number that is declared without a range is found here."""
    document = params.read(path)
    check = params.validate_evaluation if params.is_evaluation(document) else params.validate_unpinned
    numbers = list_numbers(document)
    assert len(numbers) > 15
    for node, key in numbers:
        before = node[key]
        for value in (*NO_NUMBERS, 10**400, -(10**400)):
            node[key] = value
            with pytest.raises(StageError) as error:
                check(document, path)
            assert str(key) in str(error.value)
            assert len(str(error.value).splitlines()) == 1
        node[key] = before


def list_numbers(node: Any) -> list[tuple[Any, Any]]:
    """List (mapping, key) of every number in a document, except within lists."""
    if not isinstance(node, dict):
        return []
    own = [(node, key) for key, value in node.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    return own + [pair for value in node.values() for pair in list_numbers(value)]


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    path = change_params(tmp_path / "params.yaml", lambda d: d.update(eta=-1, seed=-1))
    with pytest.raises(StageError, match=r"seed: .*; eta: "):
        params.validate(path)


@pytest.mark.parametrize("text", ["5e-7", "5.0e-7", "5E-07", "0.0000005"])
def test_numbers_are_read_as_yaml_1_2_reads_them(tmp_path: Path, text: str) -> None:
    root = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(root.replace("  learning_rate: 5.0e-5\n", f"  learning_rate: {text}\n"))
    assert params.validate(tmp_path / "params.yaml").train.learning_rate == 5e-7


def test_a_stage_gets_the_keys_it_names_and_no_other() -> None:
    loaded = params.load("seed", "train", "assets.prompts", path=ROOT / "params.yaml")
    assert (loaded.seed, loaded.train.devices, loaded.prompts.repo) == (42, 1, "miniature")
    assert not hasattr(loaded, "eta")


def test_a_stage_is_stopped_by_its_own_sections_only(tmp_path: Path) -> None:
    path = change_params(tmp_path / "params.yaml", lambda d: (d.update(eta=-1), d["assets"]["prompts"].pop("repo")))
    assert params.load("seed", path=path).seed == 42
    for key, message in (("eta", "eta: "), ("assets.prompts", "assets.prompts.repo: is missing"), ("nothing", None)):
        with pytest.raises(KeyError if message is None else StageError) as error:
            params.load(key, path=path)
        assert message is None or str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, " is missing: run stages in the folder"),
        ("a: [1", ": not valid YAML: "),
        ("a: &a [*a]", ": not valid YAML: "),
        ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", ": not valid YAML: "),
        (f"a: 0x{'f' * 5000}", ": not valid YAML: "),
        ("a: 2001-99-99", ": not valid YAML: "),
        ("- 1", ": expected a YAML mapping, got list"),
    ],
)
def test_a_file_without_parameters_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StageError) as error:
        params.validate(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipe_is_valid_except_for_revisions_to_look_up(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "revision: null" in text:
        with pytest.raises(StageError) as error:
            params.validate(path)
        *problems, remedy = str(error.value).removeprefix(f"{path}: ").split("; ")
        assert len(problems) == len(re.findall(r"revision: null", text))
        assert all(problem.endswith("is not a full 40-digit commit") for problem in problems)
        assert remedy.endswith(f"`python -m stages.tools hub --pin --recipe recipes/{path.parent.name}`")
    pinned = tmp_path / "params.yaml"
    pinned.write_text(text.replace("revision: null", f"revision: {'a' * 40}"))
    recipe = params.validate(pinned)
    guessed = {"small": 1e-5, "smollm2-135m": 2e-6}
    rate = guessed.get(path.parent.name, 5e-7)
    assert (recipe.eta, recipe.generate.samples, recipe.train.learning_rate, recipe.train.global_batch) == (1000, 5, rate, 64)
    if path.parent.name in guessed:
        return  # their prompts are split at random
    assert recipe.assets.prompts.assignment is not None
    assert list(recipe.assets.prompts.assignment.splits) == list(recipe.iterations)


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.parent.name)
def test_an_evaluation_has_the_settings_of_the_training_whose_models_it_evaluates(path: Path) -> None:
    """Only then are the figures of both comparable. `NAME-published` evaluates what NAME trains."""
    ours = params.validate_evaluation(params.read(path), path)
    name = path.parent.name.removesuffix("-published")
    training = ROOT / ("." if name == "miniature" else f"recipes/{name}") / "params.yaml"
    theirs = params.validate_unpinned(params.read(training), training)
    for key in ("seed", "numerics", "engine", "answer", "evaluate_alpaca", "evaluate_lm"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.assets.model_dump() == theirs.assets.model_dump(include=set(params.EvaluationAssets.model_fields))
    assert ours.rank.model_dump() == theirs.rank.model_dump(include=set(params.Compare.model_fields))
    assert list(ours.models) == ["base", *theirs.iterations]
    base = ours.models["base"]
    if base.on_hub:
        assert (base.repo, base.revision) == (theirs.assets.policy.repo, theirs.assets.policy.revision)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda d: d["models"].pop("base"), ("models", "'iter1'", "base")),
        (lambda d: d.update(models={}), ("models", "None", "base")),
        (lambda d: d["models"].update(Iter={"repo": "./x"}), ("models", "'Iter'", "a-z")),
        (lambda d: d["models"].update(iter4={"repo": "miniature"}), ("models.iter4", "miniature", "directory")),
        (lambda d: d["models"].update(iter4={"repo": "./x", "revision": "1" * 40}), ("models.iter4", "remove its revision")),
        (lambda d: d["models"].update(iter4={"revision": "1" * 40}), ("models.iter4.repo", "missing")),
        (lambda d: d.update(answers={"iter1": "x.json"}), ("answers", "iter1", "another name")),
        (lambda d: d.update(answers={"../x": "x.json"}), ("answers", "'../x'", "a-z")),
        (lambda d: d.update(answers={"gpt": ""}), ("answers.gpt",)),
        (lambda d: d.pop("answers"), ("answers", "missing")),
        (lambda d: d.update(rankers={"base": d["rankers"]["pairrm"]}), ("rankers", "base", "models", "another name")),
        (lambda d: d.update(rankers={"R": d["rankers"]["pairrm"]}), ("rankers", "'R'", "a-z")),
        (lambda d: d["rankers"]["pairrm"].pop("base"), ("rankers.pairrm.base", "missing")),
        (lambda d: d["rankers"]["pairrm"].update(repo="miniature"), ("rankers.pairrm", "miniature", "directory")),
        (lambda d: d["rankers"]["pairrm"].update(base={"repo": "miniature"}), ("rankers.pairrm", "miniature", "directory")),
        (lambda d: d.pop("rankers"), ("rankers", "missing")),
        (lambda d: d["rank"].update(input="instruction"), ("rank.input", "is not a parameter")),
        (lambda d: d.update(eta=1), ("eta", "is not a parameter")),
    ],
)
def test_a_wrong_evaluation_is_named_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], parts: tuple[str, ...]
) -> None:
    path = change_params(tmp_path / "params.yaml", change, ROOT / "recipes/miniature-published/params.yaml")
    with pytest.raises(StageError) as error:
        params.validate_evaluation(params.read(path), path)
    assert_message(str(error.value), str(path), *parts)


def test_a_stage_of_an_evaluation_gets_models_answers_and_shared_sections() -> None:
    path = ROOT / "recipes/miniature-published/params.yaml"
    loaded = params.load("seed", "models", "answers", "assets", "evaluate_lm.tasks", path=path)
    assert list(loaded.models) == ["base", "iter1", "iter2", "iter3"]
    assert (loaded.answers, loaded.assets.harness.gsm8k.count, loaded.tasks) == ({}, 16, None)
    assert params.load("assets.alpaca_eval", path=path).alpaca_eval.count == 805
    assert params.load("rankers", path=path).rankers["pairrm"].base.repo == "../../data/ranker/base"
    assert params.load("models", "rank", path=path).rank.model_dump() == {
        "scale": 0.5,
        "shard_size": 128,
        "tokens_per_batch": 2048,
        "attention": "plain",
    }
    with pytest.raises(StageError, match="models: is missing"):
        params.load("models", path=ROOT / "params.yaml")


@pytest.mark.parametrize("validate", [params.validate, lambda path: params.validate_unpinned(params.read(path), path)])
def test_a_tool_for_training_refuses_an_evaluation(validate: Callable[[Path], object]) -> None:
    path = ROOT / "recipes/miniature-published/params.yaml"
    with pytest.raises(StageError) as error:
        validate(path)
    assert_message(str(error.value), str(path), "evaluates existing models", "docs/reproducing.md")


@pytest.mark.parametrize(
    ("tasks", "valid"),
    [
        (None, True),
        (["gsm8k"], True),
        (["arc_challenge", "mmlu"], True),
        ([], False),
        (["mmlu", "arc_challenge"], False),
        (["gsm8k", "gsm8k"], False),
        (["gsm9k"], False),
        ("gsm8k", False),
    ],
)
def test_tasks_are_chosen_in_the_order_of_the_tables(tasks: Any, valid: bool, tmp_path: Path) -> None:
    path = change_params(tmp_path / "params.yaml", lambda d: d["evaluate_lm"].update(tasks=tasks))
    for key in ("evaluate_lm", "evaluate_lm.tasks"):
        if valid:
            loaded = params.load(key, path=path)
            chosen = harness_sets.select_tasks(loaded.tasks if "." in key else loaded.evaluate_lm.tasks)
            assert chosen == (tasks or list(params.HarnessAsset.model_fields))
        else:
            with pytest.raises(StageError) as error:
                params.load(key, path=path)
            assert_message(str(error.value), str(path), "evaluate_lm.tasks")


def test_the_tasks_have_data_sets() -> None:
    assert list(get_args(params.HarnessTask)) == list(params.HarnessAsset.model_fields)


def test_unpinned_validation_overlooks_revisions_only() -> None:
    document = params.read(ROOT / "params.yaml")
    document["assets"]["prompts"] = {"repo": "a/b", "split": "train", "column": "x"}
    assert params.validate_unpinned(document, Path("params.yaml")).assets.prompts.repo == "a/b"
    document["assets"]["prompts"] = {"repo": "./a", "revision": None, "count": 1}
    with pytest.raises(StageError, match="count applies to repo: miniature only"):
        params.validate_unpinned(document, Path("params.yaml"))


def test_validation_changes_no_value() -> None:
    """What a stage computes with is what the file says: no default, no conversion, nothing computed."""
    document = params.read(ROOT / "params.yaml")
    loaded = params.load(*document, path=ROOT / "params.yaml")
    assert loaded.model_dump(exclude_unset=True) == document
    for path in RECIPES:
        pinned = params._pretend_pinned(params.read(path))
        assert params.Params.model_validate(pinned).model_dump(exclude_unset=True) == pinned


def test_a_changed_value_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """load compares the validated values with the file's, so that a mistake in the declarations cannot change a result."""
    validate_model = params.validate_model

    def change(*arguments: Any) -> Any:
        return validate_model(*arguments).model_copy(update={"eta": 11.0})

    monkeypatch.setattr(params, "validate_model", change)
    with pytest.raises(AssertionError):
        params.load("eta", path=ROOT / "params.yaml")


def list_sections() -> list[type[params.Section]]:
    return [model for model in vars(params).values() if isinstance(model, type) and issubclass(model, params.Section)]


@pytest.mark.parametrize("section", list_sections(), ids=lambda section: section.__name__)
def test_nothing_has_a_default_but_none(section: type[params.Section]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.is_required() and field.default is not None] == []


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda d: d["assets"]["prompts"].update(repo="./a", count=None), ("assets.prompts", "split is missing")),
        (lambda d: d["assets"]["prompts"].update(split="train"), ("assets.prompts", "split does not apply")),
        (lambda d: d["evaluate_alpaca"].update(judge="gpt-4o"), ("evaluate_alpaca", "workers is missing", "8")),
        (lambda d: d["evaluate_alpaca"].update(workers=8), ("evaluate_alpaca", "remove workers")),
    ],
)
def test_keys_that_depend_on_another_are_required_or_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], parts: tuple[str, ...]
) -> None:
    path = change_params(tmp_path / "params.yaml", change)
    with pytest.raises(StageError) as error:
        params.validate(path)
    assert_message(str(error.value), str(path), *parts)


@pytest.mark.parametrize(
    "url",
    [
        *("https://a.b/v1?key=sk-secret", "https://user:sk-secret@a.b/v1", "https://a.b/v1#sk-secret", "sk-secret"),
        "https://a.b/ sk-secret",
    ],
)
def test_a_key_in_the_judges_address_is_refused_and_not_shown(url: str, tmp_path: Path) -> None:
    section = {"judge": "a", "workers": 8, "base_url": url}
    path = change_params(tmp_path / "params.yaml", lambda document: document.update(evaluate_alpaca=section))
    with pytest.raises(StageError) as error:
        params.load("evaluate_alpaca", path=path)
    assert_message(str(error.value), "params.yaml", "evaluate_alpaca.base_url", "OPENAI_API_KEY")
    assert "sk-secret" not in str(error.value)


def test_an_entry_is_found_by_its_name_or_the_names_are_listed() -> None:
    assert [params.find_named("models", {"a": 1, "b": 2}, name) for name in "ab"] == [1, 2]
    for entries, known in (({"a": 1, "b": 2}, "a, b"), ({}, "there are no models")):
        with pytest.raises(StageError) as error:
            params.find_named("models", entries, "c\nd")
        assert_message(str(error.value), "params.yaml", "models", r"'c\nd'", known, "--name")

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from stages.reporting.published import read_published
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import recipe
from support.messages import assert_message
from support.running import run_tool

SOURCES = [
    ROOT,
    *sorted(path.parent for path in ROOT.glob("recipes/*/params.yaml") if not params.is_evaluation(params.read(path))),
]
"""The experiments that train."""
VARIANTS = sorted(ROOT.glob("recipes/variants/*.yaml"))
MISTRAL = ROOT / "recipes" / "mistral-7b"
DPO = ROOT / "recipes" / "variants" / "dpo.yaml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a repository for new recipes."""
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    return tmp_path


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_variant_of_every_recipe_is_valid(root: Path, source: Path, variant: Path) -> None:
    target = recipe.create_recipe("new", source, variant, [], root)
    changes = params.validate_model(recipe.Variant, params.read(variant), variant)
    document = params.read(target / "params.yaml")
    params.validate_unpinned(document, target / "params.yaml")
    for key, value in changes.params.items():
        section, _, last = key.rpartition(".")
        assert document[section][last] == value
    published = read_published(target / "published.yaml")
    if changes.published is None:
        assert published == read_published(source / "published.yaml")
    else:
        assert published == changes.published.get(document["assets"]["policy"]["repo"])


def test_the_papers_baselines_have_their_published_results(root: Path) -> None:
    for variant, rate in (("dpo", 22.30), ("ipo", 20.06)):
        target = recipe.create_recipe(variant, MISTRAL, DPO.with_stem(variant), [], root)
        published = read_published(target / "published.yaml")
        assert published
        assert published.alpaca_eval.models["iter3"].length_controlled_winrate == rate
        assert list(published.models) == list(published.alpaca_eval.models) == ["base", "iter1", "iter2", "iter3"]


def test_lines_that_do_not_change_stay_as_they_are(root: Path) -> None:
    target = recipe.create_recipe("new", MISTRAL, DPO, ["generate.samples=8"], root)
    head, *new = read_lines(target / "params.yaml")
    assert head == "# recipes/new, created from mistral-7b: dpo.yaml, generate.samples=8."
    command = "hub --pin --recipe recipes/"
    assert f"{command}mistral-7b" in (MISTRAL / "params.yaml").read_text()
    kept = [line.replace(f"{command}mistral-7b", f"{command}new") for line in read_lines(MISTRAL / "params.yaml")]
    assert [line for line, old in zip(new, kept, strict=True) if line != old] == [
        "  samples: 8                  # changed by --set",
        "  loss: dpo                   # dpo.yaml",
        "  beta: 0.01                  # not stated; 0.01 is in the DPO configuration file in the released code",
    ]


@pytest.mark.parametrize(
    "name", ["../x", "/x", "/etc", "..", "", "a b", "a\nb", "$(touch x)", "a'b", "A", "-x", "a/b", "\x1b[2J"]
)
def test_a_name_that_is_no_folder_of_recipes_is_refused(root: Path, name: str) -> None:
    with pytest.raises(StageError) as error:
        recipe.create_recipe(name, MISTRAL, None, [], root)
    assert_message(str(error.value), "not a valid name", "lowercase letters")
    assert sorted(path.name for path in root.rglob("*")) == ["dvc.yaml"]


def test_the_name_of_a_source_is_one_comment(root: Path) -> None:
    source = root / "other\nseed: 7"
    shutil.copytree(MISTRAL, source)
    target = recipe.create_recipe("new", source, None, [], root)
    assert read_lines(target / "params.yaml")[0] == "# recipes/new, created from other seed: 7: nothing changed."


def test_the_pipeline_is_the_roots_with_another_root(root: Path) -> None:
    target = recipe.create_recipe("new", MISTRAL, None, [], root)
    ours, theirs = YAML(typ="safe").load(ROOT / "dvc.yaml"), YAML(typ="safe").load(target / "dvc.yaml")
    assert (ours.pop("vars"), theirs.pop("vars")) == ([{"root": ""}], [{"root": "../../"}])
    assert ours == theirs
    comments = [line for line in read_lines(target / "dvc.yaml") if line.startswith("#")]
    assert "python -m stages.tools sync" in " ".join(comments)


def test_a_comment_on_an_old_value_goes_and_what_heads_the_next_section_stays(root: Path) -> None:
    settings = ["iterations.iter4=iter3", "train.lora.rank=8", "seed=1", "eta=5e-2"]
    target = recipe.create_recipe("new", MISTRAL, None, settings, root)
    text = (target / "params.yaml").read_text()
    assert "  iter3: iter2\n  iter4: iter3  # changed by --set\n\n# A null revision is not known yet." in text
    assert "  lora: {rank: 8, alpha: 16}  # changed by --set\n" in text
    assert "eta: 5e-2                     # changed by --set\n\niterations:" in text
    loaded = params.validate_unpinned(params.read(target / "params.yaml"), target)
    assert (loaded.train.lora.rank, loaded.seed, loaded.eta, list(loaded.iterations)[-1]) == (8, 1, 0.05, "iter4")


def test_another_base_policy_has_no_published_results(root: Path) -> None:
    target = recipe.create_recipe("new", MISTRAL, None, ["assets.policy={repo: ../../mine}"], root)
    assert read_published(target / "published.yaml") is None


OTHER_POLICY = ["assets.policy.repo=../../mine", "assets.policy.license=mit"]
SUITABLE = [
    "eta=1000",
    "engine.max_model_length=2048",
    "engine.kv_cache_gib=8",
    "generate.max_new_tokens=1024",
    "lengths={prompt: 512, total: 1024, too_long: released}",
    "train.learning_rate=1e-6",
    "train.max_grad_norm=0",
    "answer.max_new_tokens=1024",
    "evaluate_alpaca={judge: gpt-4o, workers: 8}",
]
"""Values for everything that was chosen for the miniature's size; a whole section counts for its keys."""


def test_the_miniatures_policy_is_replaced_by_removing_what_describes_it(root: Path) -> None:
    removals = ["assets.policy.miniature"]
    target = recipe.create_recipe("new", ROOT, None, OTHER_POLICY + SUITABLE, root, removals)
    text = (target / "params.yaml").read_text()
    head = "assets.policy.miniature removed, assets.policy.repo=../../mine"
    assert text.startswith(f"# recipes/new, created from {ROOT.name}: {head}, ")
    assert (
        "    repo: ../../mine  # changed by --set\n    license: mit  # changed by --set\n  ranker:\n    repo: miniature\n"
        in text
    )
    loaded = params.validate(target / "params.yaml")
    assert (loaded.assets.policy.repo, loaded.assets.policy.miniature) == ("../../mine", None)
    assert (loaded.lengths.prompt, loaded.evaluate_alpaca.judge) == (512, "gpt-4o")


@pytest.mark.parametrize("left_out", range(len(SUITABLE)))
def test_another_policy_with_a_setting_of_the_miniature_is_refused(root: Path, left_out: int) -> None:
    settings = [*OTHER_POLICY, *(setting for index, setting in enumerate(SUITABLE) if index != left_out)]
    with pytest.raises(StageError) as error:
        recipe.create_recipe("new", ROOT, None, settings, root, ["assets.policy.miniature"])
    key = SUITABLE[left_out].partition("=")[0]
    named = [name for name in recipe.MINIATURE_SETTINGS if name == key or name.startswith(f"{key}.")]
    others = set(recipe.MINIATURE_SETTINGS) - set(named)
    assert named
    assert_message(str(error.value), "recipes/new/params.yaml", "../../mine", *named, "--set", "--recipe recipes/small")
    assert not any(other in str(error.value) for other in others), "only what is left to set"
    assert not (root / "recipes").exists()


@pytest.mark.slow
def test_the_licence_and_golden_ids_of_another_policy_are_refused(root: Path) -> None:
    source = root / "old"
    source.mkdir()
    shutil.copyfile(MISTRAL / "published.yaml", source / "published.yaml")
    golden = "    license: apache-2.0\n    golden: [{text: Hi, ids: [1]}]\n"
    text = (MISTRAL / "params.yaml").read_text(encoding="utf-8")
    (source / "params.yaml").write_text(re.sub("    license: apache-2.0.*\n", golden, text), encoding="utf-8")
    removals = ["assets.policy.revision"]
    for settings, removed, key in (
        (OTHER_POLICY[:1], [*removals, "assets.policy.golden"], "assets.policy.license"),
        (OTHER_POLICY, removals, "assets.policy.golden"),
    ):
        with pytest.raises(StageError) as error:
            recipe.create_recipe("new", source, None, settings, root, removed)
        assert_message(str(error.value), "recipes/new/params.yaml", "../../mine", key, "mistralai/", f"--unset {key}")
    target = recipe.create_recipe("new", source, None, OTHER_POLICY, root, [*removals, "assets.policy.golden"])
    policy = params.read(target / "params.yaml")["assets"]["policy"]
    assert policy == {"repo": "../../mine", "license": "mit"}
    recipe.create_recipe("same", source, None, ["eta=5"], root)


def test_what_was_chosen_for_the_miniature_exists_and_differs_in_the_other_recipes() -> None:
    """Else it would not be worth refusing; the judge differs, too."""

    def values(source: Path) -> dict[str, object]:
        document = params.read(source / "params.yaml")
        found = {}
        for key in recipe.MINIATURE_SETTINGS:
            section, _, last = key.rpartition(".")
            found[key] = (document[section] if section else document)[last]
        return found

    ours = values(ROOT)
    for source in SOURCES[1:]:
        assert all(value != ours[key] for key, value in values(source).items()), source.name


def test_the_documentation_says_what_to_set_for_another_policy() -> None:
    text = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    table = text.partition("`recipe` refuses until you have set all of these:")[2].partition("Also check")[0]
    assert set(re.findall(r"`([\w.]+)`", table)) >= set(recipe.MINIATURE_SETTINGS)


def test_the_miniatures_settings_suit_every_variant_of_it_and_other_recipes_any_policy(root: Path) -> None:
    recipe.create_recipe("small", ROOT, None, ["eta=5", "assets.policy.miniature.layers=2"], root)
    recipe.create_recipe("other", MISTRAL, None, OTHER_POLICY, root, ["assets.policy.revision"])
    policy = params.read(root / "recipes/other/params.yaml")["assets"]["policy"]
    assert policy["repo"] == "../../mine"
    assert "revision" not in policy


def test_a_local_directory_is_the_same_from_the_new_recipe(root: Path) -> None:
    (root / "old").mkdir()
    shutil.copyfile(ROOT / "published.yaml", root / "old" / "published.yaml")
    text = (ROOT / "params.yaml").read_text()
    prompts = "  prompts:\n    repo: miniature\n    count: 2400\n"
    local = "  prompts:\n    repo: ./mine\n    split: train\n    column: instruction\n"
    assert prompts in text
    (root / "old" / "params.yaml").write_text(text.replace(prompts, local))
    target = recipe.create_recipe("new", root / "old", None, [], root)
    assert params.read(target / "params.yaml")["assets"]["prompts"]["repo"] == "../../old/mine"


@pytest.mark.parametrize(
    ("name", "source", "settings", "parts"),
    [
        ("there", ".", [], ["recipes/there exists", "another name"]),
        ("../x", ".", [], ["'../x'", "lowercase letters"]),
        ("new", "recipes", [], ["params.yaml is missing"]),
        ("new", ".", ["train.loss=dpo"], ["recipes/new/params.yaml", "train: beta is missing", "dpo"]),
        ("new", ".", ["trian=1"], ["recipes/new/params.yaml", "trian: is not a parameter"]),
        ("new", ".", ["train.lora.rnak=1"], ["recipes/new/params.yaml", "train.lora.rnak: is not a parameter"]),
        ("new", ".", ["tarin.loss=dpo"], ["tarin.loss", "no section tarin"]),
        ("new", ".", ["seed.a=1"], ["seed.a", "no section seed"]),
        ("new", ".", ["eta"], ["--set eta", "KEY=VALUE"]),
        ("new", ".", ["eta=[1"], ["--set eta=[1", "YAML"]),
        ("new", "recipes/llama-3-8b-published", [], ["params.yaml", "evaluates existing models"]),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(
    root: Path, name: str, source: str, settings: list[str], parts: list[str]
) -> None:
    (root / "recipes" / "there").mkdir(parents=True)
    with pytest.raises(StageError) as error:
        recipe.create_recipe(name, ROOT / source, None, settings, root)
    assert_message(str(error.value), *parts)
    assert "\n" not in str(error.value)
    assert [path.name for path in (root / "recipes").iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("removals", "parts"),
    [
        (["train.beta"], ["recipes/new/params.yaml", "train.beta", "is missing"]),
        (["train.bta"], ["train.bta", "no such key", "correct it"]),
        (["assets.policy.miniature"], ["assets.policy", "miniature is missing"]),
    ],
)
def test_a_key_that_cannot_be_removed_is_one_line_and_nothing_is_written(
    root: Path, removals: list[str], parts: list[str]
) -> None:
    with pytest.raises(StageError) as error:
        recipe.create_recipe("new", ROOT, None, [], root, removals)
    assert_message(str(error.value), *parts)
    assert not (root / "recipes").exists()


def test_a_file_that_is_not_a_variant_is_refused(root: Path) -> None:
    with pytest.raises(StageError) as error:
        recipe.create_recipe("new", ROOT, ROOT / "params.yaml", [], root)
    assert_message(str(error.value), "params.yaml", "params: is missing")
    (root / "wrong.yaml").write_text("params: {train.loss: dop}\n")
    with pytest.raises(StageError) as error:
        recipe.create_recipe("new", ROOT, root / "wrong.yaml", [], root)
    assert_message(str(error.value), "recipes/new/params.yaml", "train.loss", "'dop'")


@pytest.mark.slow
def test_the_command_creates_recipes_that_dvc_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "stages",
        ".dvc/config",
        "params.yaml",
        "dvc.yaml",
        "published.yaml",
        "recipes/variants",
        "recipes/mistral-7b",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, tmp_path / name)
    path = {"PYTHONPATH": str(tmp_path)}
    dpo = ["--with", "recipes/variants/dpo.yaml"]
    small = run_tool(tmp_path, "recipe", "small", *dpo, **path)
    large = run_tool(tmp_path, "recipe", "large", "--recipe", "recipes/mistral-7b", *dpo, **path)
    assert small.stdout.splitlines()[1:] == ["dvc repro recipes/small/dvc.yaml"], small.stderr
    assert large.stdout.splitlines()[1:] == [
        "python -m stages.tools hub --pin --recipe recipes/large",
        "dvc repro recipes/large/dvc.yaml",
    ]
    assert read_lines(tmp_path / "recipes/small/params.yaml")[0].startswith("# recipes/small, created from the miniature: dpo.")
    own = ["--unset", "assets.policy.revision", *(part for setting in OTHER_POLICY for part in ("--set", setting))]
    local = run_tool(tmp_path, "recipe", "local", "--recipe", "recipes/mistral-7b", *own, **path)
    assert local.returncode == 0, local.stderr
    assert params.read(tmp_path / "recipes/local/params.yaml")["assets"]["policy"]["repo"] == "../../mine"
    again = run_tool(tmp_path, "recipe", "small", **path)
    assert again.returncode == 1
    assert_message(again.stderr, "recipe: error: ", "recipes/small exists")

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)  # DVC names stages relative to the working directory
    names = {stage.addressing for stage in Repo(tmp_path).index.stages}
    ours = {name for name in names if not name.startswith("recipes/")}
    assert {"report", "train@iter3"} <= ours
    for folder in ("small", "large"):
        assert {name for name in names if name.startswith(f"recipes/{folder}/")} == {
            f"recipes/{folder}/dvc.yaml:{name}" for name in ours
        }

"""Generated parts are replaced without touching the rest. That they are up to date is tested in tests/pipeline."""

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.artifacts import files
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import sync
from support.messages import assert_message

TEXT = "Head.\n<!-- t -->\nold\n<!-- /t -->\nTail.\n"


def test_readme_docs_and_every_pipeline_are_generated() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in sync.documents(ROOT)}
    recipes = {f"recipes/{path.parent.name}/dvc.yaml" for path in ROOT.glob("recipes/*/params.yaml")}
    assert recipes
    source = f"{sync.EVALUATION}/dvc.yaml"
    assert names == {"README.md", "docs/artifacts.md", "docs/performance.md", "docs/reproductions.md", "dvc.yaml"} | recipes - {
        source
    }


def test_a_recipe_gets_the_pipeline_of_its_kind(tmp_path: Path) -> None:
    """A recipe with `models` evaluates, any other trains, whatever its name is."""
    for name, text in (
        (sync.EVALUATION, "models: {}\n"),
        ("recipes/mine", "models: {}\n"),
        ("recipes/x-published", "iterations: {}\n"),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "params.yaml").write_text(text)
    (tmp_path / sync.EVALUATION / "dvc.yaml").write_text("# About it.\n\nvars:\n- root: ../../\nstages: {evaluate: x}\n")
    pipelines = sync.generate_pipelines(tmp_path, "# About.\nvars:\n- root: ''\nstages: {train: x}\n")
    texts = {path.parent.name: text for path, text in pipelines.items()}
    evaluation = f"{sync.EVALUATION_HEADER}\nvars:\n- root: ../../\nstages: {{evaluate: x}}\n"
    assert texts["mine"] == evaluation
    assert texts["x-published"].endswith("vars:\n- root: ../../\nstages: {train: x}\n")
    assert set(texts) == {"mine", "x-published"}


def test_a_block_is_replaced_between_its_comments() -> None:
    assert sync.replace_block(TEXT, "t", "\nnew\n\n", Path("x.md")) == TEXT.replace("old", "new")


@pytest.mark.parametrize("missing", ["<!-- t -->", "<!-- /t -->"])
def test_a_document_without_a_place_for_a_block_is_refused(missing: str) -> None:
    with pytest.raises(StageError) as error:
        sync.replace_block(TEXT.replace(missing, ""), "t", "new", Path("docs/x.md"))
    assert_message(str(error.value), "docs/x.md", "<!-- t -->", "add them")


def test_the_plots_are_the_end_of_the_pipeline() -> None:
    plots = "# A comment.\n- a:\n    x: step\n- b:\n    x: model\n"
    text = sync.replace_plots(f"stages: {{}}\n\n{sync.PLOTS}- old:\n    x: y\n", plots, Path("dvc.yaml"))
    assert text.startswith(f"stages: {{}}\n\n{sync.PLOTS}- a:\n")
    assert YAML(typ="safe").load(text) == {"stages": {}, "plots": [{"a": {"x": "step"}}, {"b": {"x": "model"}}]}
    assert sync.replace_plots(text, plots, Path("dvc.yaml")) == text
    with pytest.raises(StageError) as error:
        sync.replace_plots("stages: {}\n", plots, Path("dvc.yaml"))
    assert_message(str(error.value), "dvc.yaml", "plots:", "add it")


def test_a_new_reproduction_is_a_new_row(tmp_path: Path) -> None:
    for name in ("README.md", "params.yaml", "dvc.yaml", "stages/tools/plots.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in ("docs", "recipes", "reports", "reproductions"):
        shutil.copytree(ROOT / name, tmp_path / name)
    page = tmp_path / "docs/reproductions.md"
    before = sync.documents(tmp_path)[page].splitlines()
    run = files.read_json(tmp_path / "reproductions/intel-xeon-avx512-ae9c06c.json")
    files.write_json(run | {"note": "another run"}, tmp_path / "reproductions/another.json")
    after = sync.documents(tmp_path)[page].splitlines()
    (row,) = [line for line in after if line not in before]
    assert row.endswith("| another run |")
    assert len(after) == len(before) + 1


def test_the_schemas_are_listed_with_their_columns() -> None:
    table = sync.format_schemas()
    assert "data/rankings/\\*.parquet" in table
    assert "chosen: int32; rejected: int32; tie: bool" in table

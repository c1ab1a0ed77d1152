"""An output in the way of others' files is refused before the stage's work, not after it."""

import argparse
import importlib
from pathlib import Path

import pytest

from stages import __main__ as launcher
from stages import train
from stages.runtime import catalog
from stages.runtime.errors import StageError
from support.messages import assert_message

MODULES = catalog.stage_modules()


def describe_out(name: str) -> str:
    """Return the help of a stage's --out."""
    parser = argparse.ArgumentParser()
    importlib.import_module(MODULES[name]).add_arguments(parser)
    (out,) = [action for action in parser._actions if action.dest == "out"]
    return out.help or ""


@pytest.mark.parametrize("name", MODULES)
def test_the_launcher_knows_which_outputs_are_folders(name: str) -> None:
    assert describe_out(name).startswith("folder") == (name in launcher.CONTENTS)
    assert launcher.CONTENTS.keys() <= MODULES.keys()


def start(name: str, **outs: Path) -> None:
    """Start a stage that would fail as soon as it worked."""
    launcher.run_main(name, None, None, argparse.Namespace(**outs))


CHECKED = sorted(name for name, patterns in launcher.CONTENTS.items() if "*" not in patterns)


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("foreign", ["thesis.md", "notes/thesis.md", ".git/config"])
def test_a_foreign_file_in_an_output_s_folder_is_refused_before_the_work(name: str, foreign: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(StageError) as error:
        start(name, out=tmp_path / "out")
    first = tmp_path / "out" / foreign.partition("/")[0]
    assert_message(str(error.value), f"{first} is not part of the output", "move it elsewhere")
    first.rename(tmp_path / "elsewhere")
    with pytest.raises(AttributeError, match="main"):
        start(name, out=tmp_path / "out")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_an_output_of_another_kind_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if name in launcher.CONTENTS:
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "thesis.md").write_text("mine")
    with pytest.raises(StageError) as error:
        start(name, out=path)
    assert_message(str(error.value), f"{path} is a f", "name another path")


def test_a_folder_in_place_of_the_training_log_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "log" / "thesis.md").mkdir(parents=True)
    with pytest.raises(StageError) as error:
        start("train", out=tmp_path / "iter1", out_log=tmp_path / "log", out_update=tmp_path / "update.json")
    assert_message(str(error.value), f"{tmp_path / 'log'} is a folder", "name another path")


@pytest.mark.parametrize("foreign", ["notes.json", "vocab.txt", "model.safetensors.bak", "old-model.safetensors", "runs/"])
def test_training_into_a_folder_of_others_is_refused_before_the_first_step(foreign: str, tmp_path: Path) -> None:
    description = ["config.json", "tokenizer.json"]
    for name in (*description, "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
    train.refuse_foreign(tmp_path, description)
    (tmp_path / foreign).mkdir() if foreign.endswith("/") else (tmp_path / foreign).touch()
    with pytest.raises(StageError) as error:
        train.refuse_foreign(tmp_path, description)
    assert_message(str(error.value), f"{tmp_path / foreign} is not part of the output", "move it elsewhere")

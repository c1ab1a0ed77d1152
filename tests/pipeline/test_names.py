"""Text of params.yaml never becomes code: not in the shell that runs a stage's command, nor in a path that a stage writes."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages import __main__ as launcher
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.running import set_params

EVALUATION = ROOT / "recipes/miniature-published"
LAUNCHER = """#!/bin/sh
for word; do printf '%s\\n' "$word"; done >> calls
case $3 in --names) exit $REFUSES;; esac
"""
"""Takes the place of Python: it notes its arguments, one per line, and refuses the names or not."""
ATTACKS = [
    "x$(touch pwned)",
    "x`touch pwned`",
    "x'; touch pwned; '",
    "x' & touch pwned & '",
    "x' | touch pwned | '",
    "x' && touch pwned || touch pwned '",
    "x'$(touch pwned)'",
    "x' > pwned '",
    "x'\ntouch pwned\n'",
    "x\ntouch pwned",
    "x\u2028touch pwned",
    'x"; touch pwned; "',
    "x'; } ; touch pwned; { '",
    "x' <(touch pwned) '",
    "x' # ",
    "\\'; touch pwned; \\'",
]
OTHER_NAMES = [
    "",
    " ",
    "x y",
    "x*",
    "../x",
    "/x",
    "-x",
    "X",
    "1",
    "x\0",
    "x\x1b[2J",
    "\u00e9",
    "x" * 9 + "\n",
    "hold-out",
    "base",
]
WORDS = ["'", '"', "$(touch pwned)", "`touch pwned`", ";", "&", "|", "&&", "||", "\n", " ", "#", "\\", "(", ")", "{", "}", "<"]
TEXTS = st.lists(st.sampled_from([*WORDS, ">pwned", "touch pwned", "x", "!", "*", "~", "exit", "\r", "\u2028"])).map("".join)


def list_commands() -> dict[str, str]:
    """Return the commands of both pipelines that contain text of params.yaml."""
    commands = {}
    for folder in (ROOT, EVALUATION):
        for name, stage in YAML(typ="safe").load(folder / "dvc.yaml")["stages"].items():
            commands[f"{folder.name}: {name}"] = stage.get("do", stage)["cmd"]
    return {name: command for name, command in commands.items() if "${key}" in command or "${item}" in command}


COMMANDS = list_commands()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the stand-in for Python."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "bin").mkdir()
    (folder / "bin/python").write_text(LAUNCHER, encoding="utf-8")
    (folder / "bin/python").chmod(0o755)
    return folder


def run_command(command: str, key: str, item: str, folder: Path, *, refuses: bool) -> tuple[int, list[str], list[str]]:
    """Run a command of dvc.yaml as DVC does: a shell for each line, until one fails.

    Returns the exit code, the stand-in's arguments, and the names of other files that are in the folder afterwards.
    """
    text = command.replace("${root}", "").replace("${key}", key).replace("${item}", item)
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "REFUSES": str(int(refuses))}
    code = 0
    for line in text.splitlines():
        code = (
            code
            or subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, check=False).returncode
        )
    calls = (folder / "calls").read_text(encoding="utf-8").split("\n")[:-1] if (folder / "calls").exists() else []
    (folder / "calls").unlink(missing_ok=True)
    return code, calls, sorted({path.name for path in folder.iterdir()} - {"bin"})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_quotes_names_and_checks_them_first(name: str) -> None:
    first, _, rest = COMMANDS[name].partition(" || exit; ")
    assert first == "env PYTHONPATH=${root} python -m stages --names"
    assert rest.startswith("exec env PYTHONPATH=${root} python -m stages ")
    assert not [
        word for word in rest.split() if {"${key}", "${item}"} & {word, *word.split("/")} and word[0] + word[-1] != "''"
    ]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_of_a_command_runs_once_the_names_are_refused(attack: str, folder: Path) -> None:
    for key, item in ((attack, "base"), ("iter1", attack), (attack, attack)):
        for command in COMMANDS.values() if key == item else [COMMANDS[f"{ROOT.name}: train"]]:
            code, calls, others = run_command(command, key, item, folder, refuses=True)
            assert code
            assert calls in ([], ["-m", "stages", "--names"])
            assert not others


@given(TEXTS, TEXTS)
def test_no_text_in_a_command_is_run(folder: Path, key: str, item: str) -> None:
    code, calls, others = run_command(COMMANDS[f"{ROOT.name}: generate"], key, item, folder, refuses=True)
    assert code
    assert calls in ([], ["-m", "stages", "--names"])
    assert not others


def check(folder: Path, document: dict[str, Any]) -> str:
    """Return the message of the launcher's check of a params.yaml, empty if there is none."""
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(json.loads(json.dumps(document)), file)  # copies, or YAML would use aliases
    try:
        with contextlib.chdir(folder):
            launcher.check_names()
    except StageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [*ATTACKS, *OTHER_NAMES])
@pytest.mark.parametrize("section", ["iterations", "models", "answers", "rankers"])
def test_a_bad_name_is_refused(name: str, section: str, tmp_path: Path) -> None:
    if section != "iterations" and name in ("base", "hold-out"):
        return  # names of models
    model = {"repo": "./model"}
    value = {"iterations": "base", "models": model, "answers": "a.json", "rankers": {**model, "base": model}}[section]
    first = {"base": model} if section == "models" else {}
    assert_message(check(tmp_path, {section: {**first, name: value}}), "params.yaml: ", section)
    assert "\n" not in check(tmp_path, {section: {**first, name: value}})


@pytest.mark.parametrize(
    "section", [[], ["x$(touch pwned)"], "x", 5, None, {1: "base"}, {"x": {"a": "$(touch pwned)"}}, {"x": 1}]
)
def test_what_is_not_names_is_refused(section: object, tmp_path: Path) -> None:
    assert_message(check(tmp_path, {"iterations": section}), "params.yaml: ", "iterations")


@pytest.mark.parametrize("start", [*ATTACKS, "../x", "/etc", "iter2"])
def test_an_iteration_starts_from_a_known_model(start: str, tmp_path: Path) -> None:
    assert_message(check(tmp_path, {"iterations": {"iter1": start}}), "params.yaml: ", "iterations", "iter1 starts from")


def test_bad_iterations_are_refused_beside_good_models(tmp_path: Path) -> None:
    document = {"iterations": {"x$(touch pwned)": "base"}, "models": {"base": {"repo": "./model"}}}
    assert_message(check(tmp_path, document), "params.yaml: ", "iterations")


@given(st.text(st.characters(codec="utf-8")))
def test_a_file_of_answers_reaches_the_stage_or_is_refused(folder: Path, file: str) -> None:
    message = check(folder, {"answers": {"gpt": file}})
    (folder / "params.yaml").unlink()
    if message:
        assert_message(message, "params.yaml: ", "answers")
        assert not file or {"'", "\\"} & set(file) or not file.isprintable()
    else:
        code, calls, others = run_command(COMMANDS[f"{EVALUATION.name}: assets-answers"], "gpt", file, folder, refuses=False)
        assert not code
        assert not others
        assert calls[-7:] == ["assets-answers", *calls[-6:-4], "--answers", file, "--out", "data/answers/gpt.json"]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["x$(touch pwned)", "x'; touch pwned; '", "../../kept"])
def test_dvc_runs_a_single_stage_of_a_bad_name_in_vain(attack: str, tmp_path: Path) -> None:
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    set_params(tmp_path, {"iterations": {attack: "base"}})
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    done = None
    for command in ("dvc init --no-scm -q", "dvc repro --force --single-item rank"):
        done = subprocess.run(shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done
    assert done.returncode
    assert "params.yaml: iterations" in done.stderr
    assert not (tmp_path / "pwned").exists()

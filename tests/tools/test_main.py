"""The tools' launcher: it lists them, runs each in an interpreter that has what it imports, and reports errors in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime import catalog
from stages.runtime.paths import ROOT
from stages.tools import __main__ as launcher
from support.messages import assert_message
from support.running import run_module, run_tool

TOOLS = {"attest", "diff", "drift", "gate", "hub", "means", "plan", "publish", "recipe", "score", "seeds", "sync", "timings"}
TOOLS |= {"verify"}
RECIPE = TOOLS - {"gate", "score", "seeds", "sync", "timings"}


def test_help_lists_every_tool_with_its_first_line() -> None:
    done = run_module(ROOT, "stages.tools", "--help")
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0]: line for line in done.stdout.splitlines()[1:] if line.strip()}
    assert set(listed) == set(launcher.find_tools()) == TOOLS
    for name, line in listed.items():
        assert catalog.summary(ROOT / f"stages/tools/{name}.py") in line
        assert len(line) <= 128


def test_no_tool_is_imported_for_the_list() -> None:
    code = "import sys, stages.tools.__main__ as m; m.list_tools(); print(*(n for n in sys.modules if 'tools.' in n))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["stages.tools.__main__"]


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_every_tool_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        launcher.main([name, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m stages.tools {name} ")
    assert ("--recipe DIR" in text) == (name in RECIPE)


def test_without_a_name_the_list_is_an_error() -> None:
    done = run_module(ROOT, "stages.tools")
    assert done.returncode == 2
    assert "verify" in done.stdout


@pytest.mark.parametrize("name", ["nonesuch", "options", "__main__", "../stages/train"])
def test_what_is_not_a_tool_is_refused(name: str) -> None:
    done = run_tool(ROOT, name)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert_message(done.stderr, "tools: error: ", f"'{name}'", "--help")


def test_only_two_tools_may_use_the_network_and_the_light_tools_any_interpreter() -> None:
    assert {"hub", "publish"} == launcher.ONLINE
    assert {"diff", "gate", "means", "timings"} == launcher.DVC_ONLY


@pytest.mark.slow
def test_a_tool_switches_to_the_main_environment(tmp_path: Path) -> None:
    """Here from one without pydantic and pyarrow."""
    python = ROOT / ".venv/harness/bin/python"
    if not python.exists():
        pytest.skip("the environment harness is not installed")
    command = [str(python), "-m", "stages.tools", "plan", "--recipe", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert_message(done.stderr, "plan: error: ", str(tmp_path / "params.yaml"), "is missing")


def test_every_module_that_defines_main_is_a_tool_with_a_summary() -> None:
    for path in launcher.find_tools().values():
        assert catalog.summary(path).endswith("."), path

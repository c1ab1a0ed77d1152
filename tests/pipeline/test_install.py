"""requirements/install.sh on machines that differ in what is installed, with stand-ins for Python, uv and the compiler."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from stages.runtime.paths import ROOT
from support.messages import assert_message

pytestmark = pytest.mark.slow

COMMANDS = ["bash", "cat", "chmod", "cp", "cut", "dirname", "du", "env", "grep", "mkdir", "mv", "rm", "sha256sum", "touch"]
"""What every Linux has and the script uses."""
UV = """#!/usr/bin/env bash
echo "$@" >> calls
folder="${@: -1}"
case "$1" in
  venv)
    if [ -n "$NO_PYTHON" ]; then printf 'error: No interpreter found for Python 3.11\\n  in search path\\n' >&2; exit 2; fi
    [ ! -e "$folder" ] || exit 2
    mkdir -p "$folder/bin"
    cp python "$folder/bin/python" ;;
  pip) [ -z "$NO_PACKAGES" ] || exit 2 ;;
esac
"""
PYTHON = """#!/usr/bin/env bash
[ "$2" != venv ] || { mkdir -p "${@: -1}/bin"; cp python uv "${@: -1}/bin"; }
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout in which only the script is real. bin/ is the whole PATH."""
    for name in ("requirements", "stages/engines", "bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "requirements/install.sh", tmp_path / "requirements")
    for name in ("main-cpu", "rank-cpu", "harness-cpu", "dev", "coverage", "uv"):
        (tmp_path / f"requirements/{name}.txt").touch()
    (tmp_path / "stages/engines/mkl_shim.c").touch()
    for name in COMMANDS:
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    compiler = "#!/usr/bin/env bash\ntouch .venv/mkl_shim.so.partial\n"
    scripts = {"uv": UV, "python": PYTHON, "bin/python3": PYTHON, "bin/g++": compiler}
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    set_system(tmp_path, "Linux", "x86_64")
    return tmp_path


def set_system(machine: Path, system: str, processor: str) -> None:
    (machine / "bin/uname").write_text(f'#!/usr/bin/env bash\n[ "$1" = -s ] && echo {system} || echo {processor}\n')
    (machine / "bin/uname").chmod(0o755)


def install(machine: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    values = {"PATH": str(machine / "bin"), "BUILD": "cpu", "HOME": os.environ.get("HOME", "/")} | environment
    script = [str(machine / "requirements/install.sh")]
    return subprocess.run(script, cwd=machine, env=values, capture_output=True, text=True, check=False)


def fail_to_install(machine: Path, **environment: str) -> str:
    """Return the message, which is all that is on stderr."""
    done = install(machine, **environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert not list((machine / ".venv").glob("installed-*")), "the next run installs again"
    return line


def test_uv_gets_python_3_11_whatever_version_python3_has(machine: Path) -> None:
    done = install(machine)
    assert (done.returncode, done.stderr) == (0, "")
    calls = [line.split() for line in (machine / "calls").read_text().splitlines()]
    made = {words[-1]: words[words.index("--python") + 1] for words in calls if words[0] == "venv"}
    assert made == {".venv/main": "3.11", ".venv/rank": "3.11", ".venv/harness": "3.11"}
    assert [words[words.index("--python") + 1] for words in calls if words[0] == "pip"] == list(made)
    assert install(machine).stdout == "", "a second run has nothing to do"
    assert len((machine / "calls").read_text().splitlines()) == len(calls)


def test_an_environment_whose_python_is_gone_is_made_anew(machine: Path) -> None:
    """As after an upgrade of the system: `.venv/rank/bin/python` is a link to nowhere."""
    (machine / ".venv/rank/bin").mkdir(parents=True)
    (machine / ".venv/rank/bin/python").symlink_to("/nowhere/python3.11")
    assert install(machine).returncode == 0
    assert not (machine / ".venv/rank/bin/python").is_symlink()


def test_without_python_3_11_one_line_says_what_to_install(machine: Path) -> None:
    line = fail_to_install(machine, NO_PYTHON="1")
    reason = "No interpreter found for Python 3.11 in search path"
    assert_message(line, "Python 3.11 is not installed", reason, "install Python 3.11")


def test_without_python3_or_its_module_venv_one_line_says_what_to_install(machine: Path) -> None:
    (machine / "bin/python3").write_text("#!/usr/bin/env bash\necho 'No module named venv' >&2\nexit 1\n")
    assert_message(fail_to_install(machine), "python3", "venv", "apt-get install python3-venv")
    (machine / "bin/python3").unlink()
    assert_message(fail_to_install(machine), "python3", "is missing", "apt-get install python3-venv")


def test_without_a_compiler_one_line_says_what_to_install(machine: Path) -> None:
    (machine / "bin/g++").unlink()
    assert_message(fail_to_install(machine), "C++ compiler", "apt-get install g++")


def test_another_system_or_processor_is_named(machine: Path) -> None:
    set_system(machine, "Linux", "aarch64")
    assert install(machine, NO_PACKAGES="").returncode == 0, "if all packages have files for it"
    shutil.rmtree(machine / ".venv")
    assert_message(fail_to_install(machine, NO_PACKAGES="1"), ".venv/main", "pinned for x86_64", "aarch64")
    set_system(machine, "Darwin", "arm64")
    assert_message(fail_to_install(machine), "Darwin", "Linux", "container")

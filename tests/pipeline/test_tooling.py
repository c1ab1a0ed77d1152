"""What surrounds the code: the Makefile, requirement files, workflows, and what Git and DVC ignore."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.runtime.paths import ROOT

REQUIREMENTS = ROOT / "requirements"
COMPILED = sorted(path for path in REQUIREMENTS.glob("*.txt") if not path.name.endswith("-overrides.txt"))
SOURCES = sorted(REQUIREMENTS.glob("*.in"))


def run(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def list_pins(text: str) -> dict[str, str]:
    """Return package -> version of the lines `name==version` in a requirements file, .in or .txt."""
    pins = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([\w.+]+)", text, re.MULTILINE)
    return {re.sub(r"[._-]+", "-", name): version for name, version in pins}


def test_a_path_that_is_safe_hides_no_stages_from_make() -> None:
    """`python -m stages` finds them in the current folder, where PYTHONSAFEPATH forbids Python to look."""
    command = ["make", "--no-print-directory", "--eval", "probe: ; @env", "probe"]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "KEPT": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert {"KEPT", "PYTHONSAFEPATH"} & names == {"KEPT"}


def test_clean_removes_unfinished_work_only_whatever_the_names(tmp_path: Path) -> None:
    """The name `recipes/r copy`, unquoted, is also `recipes/r`."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["recipes/r/data/models/base", "recipes/r copy/params.yaml", "data/models/base", "copy/scratch", "reports/a.md"]
    removed = [
        "scratch/x",
        "recipes/r copy/scratch/x",
        "recipes/r copy/data/a b/.iter 1.parquet.partial",
        "data/.new\nline.partial",
    ]
    for name in kept + removed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    output = run(tmp_path, "make", "--no-print-directory", "clean")
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in removed)
    assert "recipes/r copy/scratch\n" in output
    assert run(tmp_path, "make", "--no-print-directory", "clean") == "Nothing to remove\n"


def test_clean_follows_data_on_another_disk_but_no_other_link(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("disk/models/.base.partial", "disk/models/base", "other/.kept.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "link").symlink_to(tmp_path / "other")
    run(tmp_path, "make", "--no-print-directory", "clean")
    assert not (tmp_path / "disk/models/.base.partial").exists()
    assert (tmp_path / "disk/models/base").exists()
    assert (tmp_path / "other/.kept.partial").exists()


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.name)
def test_every_installed_package_is_pinned_with_a_hash(path: Path) -> None:
    requirements = re.split(r"\n(?=\S)", path.read_text(encoding="utf-8").replace("\\\n", ""))
    for requirement in requirements:
        assert re.match(r"[\w.-]+==\S+(?: ; .*?)? +--hash=sha256:[0-9a-f]{64}", requirement), requirement
        assert "://" not in requirement


def compiled_files(source: Path) -> Iterator[Path]:
    """Yield the compiled files of an .in file; shared.in is part of every environment."""
    environments = ("main", "rank", "harness") if source.stem == "shared" else (source.stem,)
    for name in (f"{environment}{build}" for environment in environments for build in ("", "-cpu", "-gpu")):
        if (REQUIREMENTS / f"{name}.txt").exists():
            yield REQUIREMENTS / f"{name}.txt"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_pin_is_compiled(source: Path) -> None:
    pins, files = list_pins(source.read_text(encoding="utf-8")), list(compiled_files(source))
    assert files
    for file in files:
        versions = {name: version.partition("+")[0] for name, version in list_pins(file.read_text()).items()}
        assert pins.items() <= versions.items(), f"{file.name}: run requirements/compile.sh"


def test_tools_that_are_installed_twice_have_one_version() -> None:
    main, dev = (list_pins((REQUIREMENTS / name).read_text()) for name in ("main-cpu.txt", "dev.txt"))
    for name in ("dvc.txt", "lint.txt", "coverage.txt"):
        assert list_pins((REQUIREMENTS / name).read_text()).items() <= (main | dev).items()
    (ruff,) = re.findall(r"rev: v(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert ruff == dev["ruff"]


def test_actions_are_pinned_by_commit() -> None:
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for line in path.read_text().splitlines():
            if "uses:" in line:
                assert re.search(r"uses: [\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), f"{path.name}: {line}"


@pytest.mark.parametrize("folder", ["", "recipes/llama-3-8b/"])
def test_git_ignores_data_but_its_description(folder: str) -> None:
    def is_ignored(name: str) -> bool:
        return not subprocess.run(["git", "check-ignore", "--quiet", folder + name], cwd=ROOT, check=False).returncode

    assert is_ignored("data/models/base/config.json")
    assert is_ignored("data/code/train.json")
    assert is_ignored("scratch/train")
    assert not is_ignored("data/README.md")


def test_a_clone_that_converts_line_ends_keeps_lf(tmp_path: Path) -> None:
    """As Git for Windows does by default: with CR, Bash would not run a script, and DVC would find every stage changed."""
    origin = tmp_path / "origin"
    (origin / "requirements").mkdir(parents=True)
    for name in (".gitattributes", "requirements/install.sh", "params.yaml"):
        shutil.copy(ROOT / name, origin / name)
    run(origin, "git", "init", "--quiet")
    run(origin, "git", "add", "--all")
    run(origin, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "x")
    run(tmp_path, "git", "clone", "--quiet", "--config", "core.autocrlf=true", str(origin), "clone")
    for name in ("requirements/install.sh", "params.yaml"):
        assert (tmp_path / "clone" / name).read_bytes() == (ROOT / name).read_bytes()

"""`make clean` lists and removes what this repository's runs left unfinished, and nothing else, wherever links lead."""

import shutil
import subprocess
from pathlib import Path

import pytest

from stages.runtime.paths import ROOT

LINKS = [
    ("recipes/linked", "../other"),  # another repository
    ("recipes/r/scratch", "../../other/scratch"),
    ("recipes/r/data/models", "../../../other/data"),
    ("data/models", "../other/data"),
]


def clean(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    shutil.copy(ROOT / "Makefile", folder)
    command = ["make", "--no-print-directory", *options, "clean"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.mark.parametrize(("link", "target"), LINKS, ids=[link for link, _ in LINKS])
def test_what_a_link_leads_to_is_kept(link: str, target: str, tmp_path: Path) -> None:
    write(tmp_path, "other/scratch/x", "other/data/.base.partial", "other/data/base", "recipes/r/params.yaml")
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(target)
    before = sorted(path for path in tmp_path.rglob("*") if "other" in path.parts)
    assert clean(tmp_path).returncode == 0
    assert sorted(path for path in tmp_path.rglob("*") if "other" in path.parts) == before


@pytest.mark.parametrize(
    "name", ["a b", "a\nb", "$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"', "-rf", "*", "a;b"]
)
def test_every_name_is_listed_and_removed_alone(name: str, tmp_path: Path) -> None:
    removed = [
        f"recipes/{name}/scratch/x",
        f"recipes/{name}/data/.{name}.partial",
        f"data/{name}/.x.partial",
        f"scratch/{name}",
    ]
    kept = [f"recipes/{name}/params.yaml", f"recipes/{name}/data/{name}", f"data/{name}/x", "a", "b", "recipes/r/data/models"]
    write(tmp_path, *removed, *kept)
    done = clean(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Removing:\n")
    assert all(listed in done.stdout for listed in ("scratch\n", f"recipes/{name}/scratch\n", f"data/{name}/.x.partial\n"))
    assert not any((tmp_path / path).exists() for path in removed)
    assert all((tmp_path / path).exists() for path in kept)
    assert not (tmp_path / "pwned").exists()


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    """`make -f FILE clean` would run in the current folder."""
    write(tmp_path, "home/scratch/x", "home/data/.x.partial")
    shutil.copy(ROOT / "Makefile", tmp_path)
    command = ["make", "-f", "../Makefile", "clean"]
    done = subprocess.run(command, cwd=tmp_path / "home", capture_output=True, text=True, check=False)
    assert done.returncode
    assert "make -C FOLDER TARGET" in done.stderr
    assert (tmp_path / "home/scratch/x").exists()
    assert (tmp_path / "home/data/.x.partial").exists()
    assert clean(tmp_path / "home", "-C", ".").returncode == 0
    assert not (tmp_path / "home/scratch").exists()

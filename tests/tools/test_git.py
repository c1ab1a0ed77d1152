from pathlib import Path

import pytest

from stages.runtime.errors import StageError
from stages.tools import git
from support import revisions
from support.messages import assert_message


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("stages/a.py", "requirements/main.txt", "params.yaml", "README.md", "recipes/r/params.yaml", ".gitignore"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("ignored.py\n")
    revisions.git(tmp_path, "init", "-q")
    revisions.commit(tmp_path, "first")
    return tmp_path


def test_only_what_determines_results_counts_as_uncommitted(repository: Path) -> None:
    assert git.find_uncommitted(repository) == []
    for name in ("README.md", "reports.md", "stages/ignored.py", "recipes/r/params.yaml"):
        (repository / name).write_text("changed")
    assert git.find_uncommitted(repository) == []
    assert git.find_uncommitted(repository / "recipes/r") == ["recipes/r/params.yaml"]
    for name in ("stages/a.py", "stages/new/b.py", "params.yaml"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("changed")
    assert sorted(git.find_uncommitted(repository)) == ["params.yaml", "stages/a.py", "stages/new/b.py"]
    assert sorted(git.find_uncommitted(repository / "recipes/r")) == ["recipes/r/params.yaml", "stages/a.py", "stages/new/b.py"]


def test_commits_are_compared_by_what_determines_results(repository: Path) -> None:
    first = git.head(repository)
    (repository / "README.md").write_text("changed")
    revisions.commit(repository, "words")
    assert len(first) == 40
    assert first != git.head(repository)
    assert git.has_same_inputs(repository, first, "HEAD")
    (repository / "requirements/main.txt").write_text("changed")
    revisions.commit(repository, "packages")
    assert not git.has_same_inputs(repository, first, "HEAD")
    assert not git.has_same_inputs(repository / "recipes/r", first, "HEAD")


def test_the_root_is_found_from_below(repository: Path) -> None:
    assert git.root(repository / "recipes/r").samefile(repository)


def test_a_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(StageError) as error:
        git.head(tmp_path)
    assert_message(str(error.value), "git rev-parse", str(tmp_path), "not a git repository", "check the repository")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError) as error:
        git.head(tmp_path)
    assert_message(str(error.value), "git", "install")

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


@pytest.mark.parametrize("name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"])
def test_the_repository_is_that_of_the_folder_not_of_the_environment(
    name: str, repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Git hook has these variables. A checkout in a clone must not move the HEAD of the repository that they name."""
    clone = tmp_path_factory.mktemp("clones") / "clone"
    revisions.git(repository, "branch", "-q", "kept")
    expected = git.head(repository)
    values = {"GIT_DIR": repository / ".git", "GIT_WORK_TREE": repository, "GIT_INDEX_FILE": repository / "stages/a.py"}
    monkeypatch.setenv(name, str(values[name]))
    git.run_git(clone.parent, "clone", "-q", "--no-checkout", str(repository), clone.name)
    git.run_git(clone, "checkout", "-q", "--force", "--detach", "HEAD")
    assert git.root(clone).samefile(clone)
    assert (clone / "README.md").exists()
    assert git.find_uncommitted(clone) == []
    assert (repository / "stages/a.py").read_text() == "ignored.py\n"
    assert git.run_git(repository, "symbolic-ref", "HEAD").startswith("refs/heads/")
    assert git.head(repository) == expected


def test_a_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(StageError) as error:
        git.head(tmp_path)
    assert_message(str(error.value), "git rev-parse", str(tmp_path), "not a git repository", "check the repository")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError) as error:
        git.head(tmp_path)
    assert_message(str(error.value), "git", "install")

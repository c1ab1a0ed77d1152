"""A stage does no work whose result DVC could not record: in a Git repository, outputs are inside it, whatever links say."""

from pathlib import Path

import pytest

from stages import __main__ as launcher
from stages.runtime.errors import StageError
from support.messages import assert_message

OUT = Path("data/models/base")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in which DVC runs a stage, as the working directory, and another disk beside it."""
    for name in ("disk/models", "repository/.git", "repository/elsewhere/models"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("DVC_STAGE", "assets-policy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))
    return tmp_path / "repository"


@pytest.mark.parametrize(
    ("link", "target"), [("data", "../disk"), ("data/models", "../../disk/models"), ("data", "../missing")]
)
def test_a_link_out_of_the_repository_is_refused_before_the_work(link: str, target: str, repository: Path) -> None:
    Path(link).parent.mkdir(exist_ok=True)
    Path(link).symlink_to(target)
    with pytest.raises(StageError) as error:
        launcher.require_recordable([OUT])
    assert_message(
        str(error.value), str(OUT), str(repository.parent), "`dvc cache dir FOLDER`", "`dvc config cache.type symlink`"
    )


@pytest.mark.parametrize(
    ("link", "target"), [("data", "elsewhere"), ("data/models", "../elsewhere/models"), (".venv", "../disk")]
)
def test_other_links_are_followed(link: str, target: str, repository: Path) -> None:
    Path(link).parent.mkdir(exist_ok=True)
    Path(link).symlink_to(target)
    launcher.require_recordable([OUT])


@pytest.mark.parametrize("without", ["Git", "DVC"])
def test_without_git_or_dvc_any_link_is_followed(without: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data").symlink_to("../disk")
    if without == "Git":
        Path(".git").rmdir()
    else:
        monkeypatch.delenv("DVC_STAGE")
    launcher.require_recordable([OUT])

"""Links to local assets: DVC sees the contents of a directory, and of an asset from elsewhere that it is not local."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts import files, links
from stages.runtime import params
from stages.runtime.errors import StageError
from support.messages import assert_message

HUB = params.Asset(repo="a/b", revision="0" * 40)
MADE = params.Asset(repo="miniature")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.jsonl").write_text("{}")
    return tmp_path / "mine"


def test_a_link_has_the_hash_of_the_directory_whatever_happens_to_it(mine: Path) -> None:
    out = Path("data/local")
    local = {"prompts": params.Asset(repo="./mine"), "policy": params.Asset(repo=str(mine))}
    links.write_links(local | {"ranker": HUB, "ranker.base": None, "alpaca_eval": MADE}, out)
    assert {path.name for path in out.iterdir() if path.is_symlink()} == set(local)
    assert len({files.dvc_md5(out / name) for name in ("ranker", "ranker.base", "alpaca_eval")}) == 1
    hashes = set()
    for name, text in (("train.jsonl", "{}"), ("train.jsonl", "[]"), ("test.jsonl", "[]"), ("a/b.jsonl", "")):
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text(text)
        assert files.dvc_md5(out / "prompts") == files.dvc_md5(out / "policy") == files.dvc_md5(mine)
        hashes.add(files.dvc_md5(mine))
    assert len(hashes) == 4


def test_the_links_follow_data_to_another_disk(mine: Path) -> None:
    disk = mine.parent / "disk/deep/data"
    disk.mkdir(parents=True)
    Path("data").symlink_to(disk)
    links.write_links({"prompts": params.Asset(repo="./mine")}, Path("data/local"))
    assert Path("data/local/prompts/train.jsonl").read_text(encoding="utf-8") == "{}"


@given(st.lists(st.sampled_from(["local", "hub", "made", "absent"]), min_size=1, max_size=4))
def test_the_last_parameters_count_and_no_directory_is_harmed(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("links")
    (folder / "mine").mkdir()
    (folder / "mine/a").write_text("kept")
    assets = {"local": params.Asset(repo=str(folder / "mine")), "hub": HUB, "made": MADE, "absent": None}
    for kind in kinds:
        links.write_links({"prompts": assets[kind], "policy": assets["hub"]}, folder / "local")
    assert (folder / "local/prompts").is_symlink() == (kinds[-1] == "local")
    assert (folder / "local/prompts").exists()
    assert (folder / "mine/a").read_text() == "kept"


@pytest.mark.parametrize("foreign", ["thesis.md", "folder/thesis.md", "prompts"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_link_is_named_and_kept(mine: Path, foreign: str, linked: bool) -> None:
    out, assets = Path("local"), {"prompts": params.Asset(repo="./mine"), "policy": HUB}
    if linked:
        Path("elsewhere").mkdir()
        out.symlink_to("elsewhere")
    (out / foreign).parent.mkdir(parents=True, exist_ok=True)
    (out / foreign).write_text("mine")
    with pytest.raises(StageError) as error:
        links.write_links(assets, out)
    assert_message(str(error.value), f"{out.resolve()}/{foreign.partition('/')[0]} is not part", "move it elsewhere")
    assert (out / foreign).read_text() == "mine"
    files.remove(out / foreign.partition("/")[0])
    links.write_links(assets, out)
    links.write_links(assets, out)
    assert {path.name for path in out.iterdir()} == set(assets)


def test_a_missing_directory_is_named_before_anything_is_written(mine: Path) -> None:
    links.write_links({"prompts": params.Asset(repo="./mine")}, Path("local"))
    with pytest.raises(StageError) as error:
        links.write_links({"policy": params.Asset(repo="./mine"), "prompts": params.Asset(repo="./no where")}, Path("local"))
    assert_message(str(error.value), "./no where", "params.yaml", "git add './no where'", "absolute path")
    assert {path.name for path in Path("local").iterdir()} == {"prompts"}


UNSEEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("a folder linked to", lambda path: path.symlink_to(path.parents[2] / "other"), "copy of the files"),
    ("a link to nothing", lambda path: path.symlink_to("nothing"), "copy of the files"),
    ("a link to itself", lambda path: path.symlink_to(path.name), "copy of the files"),
    ("a link to a device", lambda path: path.symlink_to("/dev/zero"), "copy of the files"),
    ("a pipe", os.mkfifo, "remove it"),
    ("a socket", lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "remove it"),
    (".dvcignore", lambda path: path.write_text("*.jsonl"), "remove it"),
]


@pytest.mark.parametrize(("name", "make", "remedy"), UNSEEN, ids=[name for name, _, _ in UNSEEN])
def test_what_dvc_does_not_see_is_refused(
    mine: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], object], remedy: str
) -> None:
    (mine.parent / "other").mkdir()
    (mine / "deep").mkdir()
    monkeypatch.chdir(mine / "deep")
    make(Path.cwd() / name)
    monkeypatch.chdir(mine.parent)
    with pytest.raises(StageError) as error:
        links.write_links({"prompts": params.Asset(repo="./mine")}, Path("local"))
    assert_message(str(error.value), f"mine/deep/{name} ", remedy)
    assert not Path("local").exists()


def test_links_to_files_and_to_the_directory_itself_are_followed(mine: Path) -> None:
    (mine.parent / "blob").write_text("[]")
    (mine / "test.jsonl").symlink_to("../blob")
    Path("link").symlink_to("mine")
    links.write_links({"prompts": params.Asset(repo="./link")}, Path("local"))
    before = files.dvc_md5(Path("local/prompts"))
    (mine.parent / "blob").write_text("[1]")
    assert files.dvc_md5(Path("local/prompts")) != before

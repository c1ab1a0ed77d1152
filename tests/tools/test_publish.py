"""A trained model goes to the Hub with its card, whole or not at all, against a small Hub on this machine."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.cli import main as dvc
from huggingface_hub import ModelCard

from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import publish
from support.cards import make_cards
from support.hub import TOKEN, FakeHub, run_python
from support.messages import assert_message
from support.models import make_model
from support.running import set_params

DVC_YAML = """
stages:
  train: {cmd: mkdir -p data/models && cp -r model data/models/iter1, deps: [model], outs: [data/models/iter1]}
  report:
    cmd: mkdir -p reports && cp -r cards metrics.json reports
    deps: [cards, metrics.json, data/models/iter1]
    params: [eta]
    outs: [reports/cards: {cache: false}, reports/metrics.json: {cache: false}]
"""
TO = "org/Toy-SPPO-Iter1"
KEY = "assets.policy.license"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed experiment in a repository with a remote: a model of several files and its card."""
    base = tmp_path_factory.mktemp("publish")
    folder = base / "repository"
    folder.mkdir()
    set_params(folder, {"iterations": {"iter1": "base"}})
    make_model(folder / "model", "20KB")
    texts = {"dvc.yaml": DVC_YAML, "published.yaml": "published: null\n", "metrics.json": "{}", ".gitignore": "/hf/\n"}
    for name, text in (texts | {"cards/iter1.md": make_cards(base / "results")["iter1"]}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    run_git(folder, "init", "-q")
    run_git(folder, "remote", "add", "origin", "https://name:secret@example.org/org/sppo.git")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        for command in ("init", "config core.analytics false", "config cache.type copy", "repro"):
            assert dvc([*command.split(), "-q"]) == 0
    commit(folder)
    return folder


@pytest.fixture
def folder(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `origin` to change, as the working directory."""
    copy = tmp_path / "repository"
    shutil.copytree(origin, copy, symlinks=True)
    monkeypatch.chdir(copy)
    return copy


def run_git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path) -> None:
    run_git(folder, "add", "-A")
    run_git(folder, "commit", "-qm", "changed")


def run_publish(folder: Path, hub: FakeHub, *options: str, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
    """Run the tool in the repository, in which Git ignores the Hub cache."""
    arguments = ("iter1", "--to", TO, *options)
    return run_python(folder, "-m", "stages.tools", "publish", *arguments, endpoint=hub.endpoint, token=token)


@pytest.mark.slow
def test_the_checkpoint_its_card_and_its_licence_are_collected(folder: Path) -> None:
    contents = publish.collect("iter1", TO, Path())
    model = {path.name for path in (folder / "model").iterdir()}
    assert "model.safetensors.index.json" in model
    assert set(contents) == model | {"README.md", "LICENSE"}
    assert all(contents[name] == Path("data/models/iter1", name) for name in model)
    listing = publish.list_contents(contents).splitlines()
    assert f"{(folder / 'model/config.json').stat().st_size:>18,}  config.json" in listing
    total = sum(len(data) if isinstance(data, bytes) else data.stat().st_size for data in contents.values())
    assert listing[-1] == f"{total:>18,}  in total"


def test_the_card_names_the_model_the_commit_the_lock_and_the_checkpoint(folder: Path) -> None:
    content = publish.collect("iter1", TO, Path())["README.md"]
    assert isinstance(content, bytes)
    text, before = content.decode(), (folder / "reports/cards/iter1.md").read_text(encoding="utf-8")
    card, draft = ModelCard(text), ModelCard(before)
    assert card.data.model_name == "Toy-SPPO-Iter1"
    assert card.data.eval_results == draft.data.eval_results
    assert "\n# Toy-SPPO-Iter1\n" in text
    assert "| [Toy-SPPO-Iter1](https://huggingface.co/org/Toy-SPPO-Iter1) (this model) |" in text
    assert "iter1.md" not in text
    head = run_git(folder, "rev-parse", "HEAD")
    lock = (folder / "dvc.lock").read_bytes()
    [md5] = set(re.findall(r"path: data/models/iter1\n +hash: md5\n +md5: (\S+)\n", lock.decode()))
    section = text.partition("## How to reproduce it")[2].partition("| asset |")[0]
    for part in (head, "https://example.org/org/sppo", hashlib.sha256(lock).hexdigest(), md5, "`dvc.yaml`"):
        assert part in section
    assert f"git clone https://example.org/org/sppo sppo && cd sppo\ngit checkout {head}\n" in section
    assert "secret" not in text
    assert "Check out the commit that contains this card" not in text


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda folder: (folder / "notes").write_text("x"), ["1 files", "notes", "HEAD", "commit"]),
        (lambda folder: (folder / "published.yaml").write_text(""), ["published.yaml", "HEAD", "commit"]),
        (lambda folder: (folder / "metrics.json").write_text("[]"), ["metrics.json", "HEAD", "commit"]),
    ],
)
def test_what_differs_from_the_commit_is_refused(folder: Path, change: Callable[[Path], object], parts: list[str]) -> None:
    change(folder)
    with pytest.raises(StageError) as error:
        publish.collect("iter1", TO, Path())
    assert_message(str(error.value), *parts)


def test_a_stale_lock_is_refused(folder: Path) -> None:
    (folder / "metrics.json").write_text("[]")
    commit(folder)
    with pytest.raises(StageError) as error:
        publish.collect("iter1", TO, Path())
    assert_message(str(error.value), "dvc.lock", "report", "dvc repro")


def test_a_corrupted_checkpoint_is_refused(folder: Path) -> None:
    """DVC trusts a file's modification time; the tool reads the file."""
    assert dvc(["status", "-q"]) == 0
    path = next((folder / "data/models/iter1").glob("model-00001*"))
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(StageError) as error:
        publish.collect("iter1", TO, Path())
    assert_message(str(error.value), "data/models/iter1", "dvc.lock", "verify")


@pytest.mark.parametrize(
    ("iteration", "to", "parts"),
    [
        ("iter9", TO, ["'iter9'", "params.yaml", "iter1"]),
        ("base", TO, ["'base'", "params.yaml", "iter1"]),
        ("iter1", "name", ["--to name", "ORG/NAME"]),
        ("iter1", "org/", ["--to org/", "ORG/NAME"]),
        ("iter1", "org/a/b", ["--to org/a/b", "ORG/NAME"]),
        ("iter1", "../name", ["--to ../name", "ORG/NAME"]),
    ],
)
def test_unusable_names_are_refused(folder: Path, iteration: str, to: str, parts: list[str]) -> None:
    with pytest.raises(StageError) as error:
        publish.collect(iteration, to, Path())
    assert_message(str(error.value), *parts)


def policy(license: str | None) -> params.PolicyAsset:
    return params.PolicyAsset(repo="./policy", license=license)


@pytest.mark.parametrize(
    ("license", "name", "parts"),
    [
        (None, "Toy", [KEY, "missing"]),
        ("cc-by-nc-nd-4.0", "Toy", [KEY, "cc-by-nc-nd-4.0", "./policy", "does not allow"]),
        ("cc-by-nd-4.0", "Toy", [KEY, "cc-by-nd-4.0", "./policy", "does not allow"]),
        ("other", "Toy", [KEY, "other", "./policy", "does not say whether"]),
        ("unknown", "Toy", [KEY, "unknown", "./policy", "does not say whether"]),
        ("llama3", "Toy-Llama-3", [KEY, "llama3", "'Llama 3'", "'Toy-Llama-3'", "--to"]),
        ("llama3", "Llama-2-Toy", [KEY, "llama3", "'Llama 3'", "--to"]),
        ("llama3.1", "Toy", [KEY, "llama3.1", "'Llama'", "--to"]),
        ("llama4", "Toy", [KEY, "llama4", "'Llama'", "--to"]),
        ("gemma", "Toy", [KEY, "gemma", "./policy", "no file LICENSE", "https://ai.google.dev/gemma/terms", "LICENSE.gemma"]),
        ("llama2", "Toy", [KEY, "llama2", "./policy", "no file LICENSE", "https://www.llama.com/llama2", "LICENSE.llama2"]),
    ],
)
def test_a_licence_that_forbids_it_is_refused(tmp_path: Path, license: str | None, name: str, parts: list[str]) -> None:
    (tmp_path / "policy").mkdir()
    with pytest.raises(StageError) as error:
        publish.list_license_files(policy(license), name, tmp_path)
    assert_message(str(error.value), "params.yaml", *parts)


META = "Meta Platforms, Inc. All Rights Reserved."


@pytest.mark.parametrize(
    ("license", "name", "notice"),
    [
        ("mit", "Toy", None),
        ("llama2", "Toy", f"Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) {META}"),
        ("llama3", "Llama-3-Toy", f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © {META}"),
        ("llama3", "llama3.toy", f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © {META}"),
        ("llama3.1", "Llama-Toy", f"Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © {META}"),
        ("llama3.2", "Llama-Toy", f"Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © {META}"),
        ("llama3.3", "Llama-Toy", f"Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © {META}"),
        ("llama4", "Llama-Toy", f"Llama 4 is licensed under the Llama 4 Community License, Copyright © {META}"),
        (
            "gemma",
            "Toy",
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        ),
    ],
)
def test_the_base_models_licence_goes_with_the_model(tmp_path: Path, license: str, name: str, notice: str | None) -> None:
    """With the notice that the licence quotes, word for word."""
    (tmp_path / "policy").mkdir()
    for file in ("LICENSE.txt", "USE_POLICY.md", "README.md", "model.safetensors"):
        (tmp_path / "policy" / file).write_text(file)
    contents = publish.list_license_files(policy(license), name, tmp_path)
    assert contents.pop("NOTICE", None) == (f"{notice}\n".encode() if notice else None)
    assert contents == {file: tmp_path / "policy" / file for file in ("LICENSE.txt", "USE_POLICY.md")}


def test_a_licence_that_the_base_model_lacks_is_taken_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "LICENSE").write_text("that of something else")
    assert publish.list_license_files(policy("apache-2.0"), "Toy", tmp_path) == {"LICENSE": ROOT / "LICENSE"}
    assert publish.list_license_files(policy("mit"), "Toy", tmp_path) == {}
    (tmp_path / "LICENSE.gemma").write_text("the terms")
    contents = publish.list_license_files(policy("gemma"), "Toy", tmp_path)
    assert contents.pop("NOTICE")
    assert contents == {"LICENSE": tmp_path / "LICENSE.gemma"}


def test_the_miniatures_models_have_this_repositorys_licence(tmp_path: Path) -> None:
    settings = params.validate(ROOT / "params.yaml")
    assert publish.list_license_files(settings.assets.policy, "Toy", tmp_path) == {"LICENSE": ROOT / "LICENSE"}


@pytest.mark.parametrize(
    ("name", "iteration", "names"),
    [
        (
            "Llama-3-SPPO-Iter1",
            "iter1",
            {"iter1": "Llama-3-SPPO-Iter1", "iter2": "Llama-3-SPPO-Iter2", "long": "Llama-3-SPPO-Long"},
        ),
        ("iter2-x", "iter2", {"iter1": "iter1-x", "iter2": "iter2-x", "long": "long-x"}),
        ("sppo", "iter1", {"iter1": "sppo"}),
        ("sppo-iter10", "iter1", {"iter1": "sppo-iter10"}),
    ],
)
def test_the_names_of_the_other_models(name: str, iteration: str, names: dict[str, str]) -> None:
    assert publish.name_models(name, iteration, ["iter1", "iter2", "long"]) == names


def test_links_between_cards_become_links_on_the_hub_or_plain_names() -> None:
    draft = "---\nlicense: mit\n---\n# iter1\n\n[iter1](iter1.md) [iter2](iter2.md) [x](y.md)\n"
    draft += "<!-- commit -->\nold\n<!-- /commit -->\n"
    linked = publish.finish_card(draft, "iter1", "org", {"iter1": "a-iter1", "iter2": "a-iter2"}, "new")
    assert "# a-iter1\n" in linked
    assert "[a-iter1](https://huggingface.co/org/a-iter1) [a-iter2](https://huggingface.co/org/a-iter2) [x](y.md)" in linked
    assert "<!-- commit -->\nnew\n<!-- /commit -->" in linked
    assert "[a](https://huggingface.co/org/a) iter2 [x]" in publish.finish_card(draft, "iter1", "org", {"iter1": "a"}, "new")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://github.com/org/sppo.git", "https://github.com/org/sppo"),
        ("https://token@host:8443/org/sppo", "https://host:8443/org/sppo"),
        ("git@github.com:org/sppo.git", "https://github.com/org/sppo"),
        ("ssh://git@github.com/org/sppo.git", "https://github.com/org/sppo"),
        ("/srv/git/sppo", None),
        ("../sppo", None),
    ],
)
def test_the_address_of_the_repository(folder: Path, url: str, address: str | None) -> None:
    run_git(folder, "remote", "set-url", "origin", url)
    assert publish.find_address(folder) == address
    run_git(folder, "remote", "remove", "origin")
    assert publish.find_address(folder) is None


@pytest.mark.slow
def test_a_dry_run_shows_files_and_card_and_asks_the_hub_for_nothing(folder: Path, fake_hub: FakeHub) -> None:
    done = run_publish(folder, fake_hub)
    assert done.returncode == 0, done.stderr
    assert "config.json" in done.stdout
    assert "\n# Toy-SPPO-Iter1\n" in done.stdout
    assert_message(done.stdout, "Nothing was uploaded", "--yes", TO)
    assert fake_hub.requested == []


@pytest.mark.slow
def test_the_model_arrives_in_one_commit_without_other_weights(folder: Path, fake_hub: FakeHub) -> None:
    fake_hub.repos[f"models/{TO}"] = {"model.safetensors": b"an earlier upload", "notes.md": b"kept"}
    done = run_publish(folder, fake_hub, "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{fake_hub.endpoint}/{TO}/commit/{fake_hub.commit(f'models/{TO}')}"
    arrived = fake_hub.repos[f"models/{TO}"]
    model = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    assert {name: arrived[name] for name in model} == model
    assert set(arrived) == {*model, "README.md", "LICENSE", "notes.md"}
    assert arrived["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert ModelCard(arrived["README.md"].decode()).data.model_name == "Toy-SPPO-Iter1"
    assert len(fake_hub.commits) == 1


@pytest.mark.slow
def test_an_upload_that_fails_in_the_middle_leaves_nothing_and_is_resumed(folder: Path, fake_hub: FakeHub) -> None:
    fake_hub.refuse = lambda oid: len(fake_hub.objects) >= 1
    done = run_publish(folder, fake_hub, "--yes")
    assert done.returncode == 1
    assert_message(done.stderr, "publish: error: ", TO, "403", "again to resume")
    assert len(done.stderr.splitlines()) == 1
    assert TOKEN not in done.stderr
    assert not fake_hub.commits
    assert fake_hub.repos[f"models/{TO}"] == {}

    [arrived] = fake_hub.objects
    fake_hub.refuse = lambda oid: False
    fake_hub.requested.clear()
    done = run_publish(folder, fake_hub, "--yes")
    assert done.returncode == 0, done.stderr
    sent = [path.rpartition("/")[2] for path in fake_hub.requested if path.startswith("/lfs/")]
    assert arrived not in sent
    assert sorted([arrived, *sent]) == sorted(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "model").glob("*.safetensors")
    )
    assert len(fake_hub.commits) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "token", "parts"),
    [
        (lambda folder: None, "hf_wrong", ["401", "hf auth login"]),
        (
            lambda folder: edit_card(folder, "license: apache-2.0", "license: lama3"),
            TOKEN,
            ["card", "must be one of", "assets.policy.license"],
        ),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(
    folder: Path, fake_hub: FakeHub, prepare: Callable[[Path], None], token: str, parts: list[str]
) -> None:
    prepare(folder)
    done = run_publish(folder, fake_hub, "--yes", token=token)
    assert done.returncode == 1
    assert_message(done.stderr, "publish: error: ", TO, *parts)
    assert token not in done.stderr
    assert not fake_hub.commits
    assert not fake_hub.objects


def edit_card(folder: Path, old: str, new: str) -> None:
    """Change the card, and run and commit the experiment that copies it."""
    path = folder / "cards/iter1.md"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert dvc(["repro", "-q"]) == 0
    commit(folder)

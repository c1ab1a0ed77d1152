"""The gate: a lock passes as `dvc repro` left it, and fails with whatever else is committed, in a clone without data."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.artifacts import files
from stages.runtime.errors import StageError
from stages.runtime.fingerprint import fingerprint
from stages.runtime.paths import ROOT
from stages.tools import gate, repository, revisions
from support.messages import assert_message
from support.revisions import commit, git
from support.running import dvc, run_tool

pytestmark = pytest.mark.slow

PIPELINE = """
stages:
  code:
    cmd: mkdir -p data/code && cp prepared/split.json data/code
    deps: [stages]
    outs: [data/code/split.json]
  split:
    cmd: mkdir -p data/split && cp params.yaml data/split/iter1 && cp params.yaml data/split/hold-out
    deps: [data/code/split.json, prompts.txt, private.txt]
    params: [split]
    outs: [data/split]
  answer:
    cmd: mkdir -p data/answers && cp data/split/hold-out data/answers/base.json
    deps: [data/split/hold-out]
    outs: [data/answers/base.json]
  evaluate:
    foreach: ${iterations}
    do:
      cmd: >-
        mkdir -p data/alpaca_eval/${key} &&
        cat data/split/iter1 data/answers/base.json > data/alpaca_eval/${key}/metrics.json
      deps: [data/split/iter1, data/answers/base.json]
      params: [eta]
      outs: ["data/alpaca_eval/${key}"]
  report:
    cmd: >-
      cat published.yaml data/alpaca_eval/iter1/metrics.json > reports/a.md && env PYTHONPATH=ROOT python -c
      "from pathlib import Path; from stages.reporting.listings import *; write_listings(Path('data'), ('alpaca_eval',),
      Path('reports'))"
    deps: [data/alpaca_eval, data/answers, published.yaml]
    outs: [reports/a.md: {cache: false, persist: true}, reports/listings.json: {cache: false, persist: true}]
"""
"""Outputs and dependencies are related as in the root's dvc.yaml: a file of a folder, and a folder of folders."""


def write_stages(folder: Path, edit: Callable[[dict[str, Any]], None], name: str = "dvc.lock") -> None:
    """Edit the stages of a lock or of a pipeline."""
    yaml = YAML()
    document = yaml.load(folder / name)
    edit(document["stages"])
    yaml.dump(document, folder / name)


def copy_without_data(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("data", "cache", "private.txt")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose pipeline has run."""
    folder = tmp_path_factory.mktemp("gate") / "finished"
    for name in ("stages", "prepared", "reports"):
        (folder / name).mkdir(parents=True)
    (folder / "dvc.yaml").write_text(PIPELINE.replace("ROOT", str(ROOT)))
    (folder / "params.yaml").write_text("split: 1\neta: 10\niterations: {iter1: base, iter2: iter1}\n")
    (folder / ".gitignore").write_text("/data/*\n/private.txt\n")
    for name in ("stages/a.py", "prompts.txt", "private.txt", "published.yaml"):
        (folder / name).write_text(name)
    files.write_json(fingerprint("split"), folder / "prepared/split.json")
    git(folder, "init", "-q")
    for command in (["init", "-q"], ["repro", "-q"]):
        dvc(folder, *command)
    commit(folder, "run")
    return folder


@pytest.fixture
def clone(finished: Path, tmp_path: Path) -> Path:
    return copy_without_data(finished, tmp_path / "clone")


def test_a_lock_as_dvc_left_it_passes_with_and_without_data(finished: Path, clone: Path) -> None:
    assert gate.check_pipeline(finished) == []
    assert gate.check_pipeline(clone) == []
    (clone / "stages/a.py").write_text("# a comment, which no fingerprint contains")
    assert gate.check_pipeline(clone) == []


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("params.yaml", "split: 2\neta: 10\niterations: {iter1: base, iter2: iter1}\n", ["split", "params.yaml", "modified"]),
        ("params.yaml", "split: 1\niterations: {iter1: base, iter2: iter1}\n", ["evaluate@iter2", "eta", "deleted"]),
        ("params.yaml", "split: 1\neta: 10\niterations: {iter1: base}\n", ["evaluate@iter2", "no such stage", "remove"]),
        ("params.yaml", "split: 1\neta: 10\niterations: {iter1: b, iter2: b, iter9: b}\n", ["evaluate@iter9", "not run"]),
        ("params.yaml", "split: 1\neta: 10\n", ["dvc.yaml", "iterations"]),
        ("params.yaml", "split: 1\neta: 10\niterations: {'': base}\n", ["dvc.yaml", "params.yaml", "empty names"]),
        ("params.yaml", "[1", ["params.yaml"]),
        ("prompts.txt", "others", ["split", "prompts.txt", "changed"]),
        ("published.yaml", None, ["report", "published.yaml", "missing"]),
        ("reports/a.md", "by hand", ["report", "reports/a.md", "changed"]),
        ("reports/a.md", None, ["report", "reports/a.md", "missing"]),
        ("reports/listings.json", "{}", ["report", "reports/listings.json", "changed"]),
        ("reports/listings.json", "[]", ["reports/listings.json", "expected"]),
        ("dvc.lock", None, ["dvc.lock", "missing", "dvc repro"]),
        ("dvc.lock", "schema: '2.0'\nstages: []\n", ["dvc.lock", "stages", "dvc repro"]),
        ("dvc.lock", "schema: '2.0'\nstages: {split: null}\n", ["dvc.lock", "split", "dvc repro"]),
        ("dvc.lock", "schema: '2.0'\nstages: {split: {cmd: x, outs: [{path: 5}]}}\n", ["dvc.lock", "split", "dvc repro"]),
        ("dvc.lock", "schema: 3\nstages: {split: {cmd: x}}\n", ["dvc.lock"]),
        ("dvc.yaml", None, ["dvc.yaml"]),
        ("dvc.yaml", "stages: []\n", ["dvc.yaml"]),
    ],
)
def test_another_file_is_noticed(name: str, text: str | None, parts: list[str], clone: Path) -> None:
    (clone / name).unlink()
    if text:
        (clone / name).write_text(text)
    lines = gate.check_pipeline(clone)
    assert_message(next((line for line in lines if all(part in line for part in parts)), str(lines)), *parts)


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda stages: stages["split"].update(cmd="true"), ["split", "command"]),
        (lambda stages: stages["split"]["deps"].append("published.yaml"), ["split", "dependency published.yaml"]),
        (lambda stages: stages["split"]["deps"].remove("prompts.txt"), ["split", "prompts.txt", "remove"]),
        (lambda stages: stages["answer"]["outs"].append("data/more"), ["answer", "output data/more"]),
        (lambda stages: stages["report"]["outs"].pop(0), ["report", "reports/a.md", "remove"]),
        (lambda stages: stages["answer"].update(params=["split"]), ["answer", "split in params.yaml", "new"]),
        (lambda stages: stages.pop("report"), ["report", "no such stage"]),
        (lambda stages: stages.update(more={"cmd": "true"}), ["more", "not run"]),
    ],
)
def test_another_pipeline_is_noticed(edit: Callable[[dict[str, Any]], None], parts: list[str], clone: Path) -> None:
    write_stages(clone, edit, "dvc.yaml")
    (line,) = gate.check_pipeline(clone)
    assert_message(line, "dvc.lock", *parts)


def test_every_changed_hash_in_the_lock_is_noticed(clone: Path) -> None:
    """As if one stage had run again, and none that depends on it; or as if a stage had read something else."""
    text = (clone / "dvc.lock").read_text()
    stages = YAML(typ="safe").load(text)["stages"]
    hashes = {file["md5"] for entry in stages.values() for kind in ("deps", "outs") for file in entry.get(kind, [])}
    ignored = {file["md5"] for file in stages["code"]["deps"]}
    ignored |= {file["md5"] for file in stages["split"]["deps"] if file["path"] == "private.txt"}
    count = 0
    for md5 in sorted(hashes - ignored):
        for place in range(text.count(md5)):  # one of the places at a time
            parts = text.split(md5)
            changed = md5.join(parts[: place + 1]) + md5[::-1].replace("rid.", "") + ".dir" * md5.endswith(".dir")
            (clone / "dvc.lock").write_text(changed + md5.join(parts[place + 1 :]))
            assert gate.check_pipeline(clone), (md5, place)
            count += 1
    assert count > 15


@pytest.mark.parametrize("stage", ["split", "answer", "evaluate@iter2"])
def test_a_stage_that_ran_alone_is_noticed(stage: str, finished: Path, tmp_path: Path) -> None:
    """DVC's own check, `repro --dry --allow-missing`, passes such a lock: it does not look into folders."""
    folder = Path(shutil.copytree(finished, tmp_path / "again"))
    name = stage.partition("@")[0]
    commands = {
        "split": "mkdir -p data/split && cp params.yaml data/split/iter1 && cp prompts.txt data/split/hold-out",
        "answer": "echo new > data/answers/base.json",
        "evaluate": "mkdir -p data/alpaca_eval/${key} && echo new > data/alpaca_eval/${key}/metrics.json",
    }
    write_stages(folder, lambda stages: stages[name].get("do", stages[name]).update(cmd=commands[name]), "dvc.yaml")
    dvc(folder, "repro", "-q", "-s", stage)
    lines = gate.check_pipeline(copy_without_data(folder, tmp_path / "clone"))
    readers = {"split": "answer: ", "answer": "report: ", "evaluate": "report: "}
    assert any(readers[name] in line and "not run since" in line for line in lines), lines
    dvc(folder, "repro", "-q")
    assert gate.check_pipeline(copy_without_data(folder, tmp_path / "then")) == []


@pytest.mark.parametrize("key", ["prompts", "prompts.assignment", "models.mine"])
@pytest.mark.parametrize("place", ["mine", "ignored", "absent"])
def test_a_local_asset_in_git_is_compared(key: str, place: str, clone: Path) -> None:
    (clone / "mine").mkdir()
    (clone / "mine/a.jsonl").write_text("{}")
    shutil.copytree(clone / "mine", clone / "data/ignored")
    repo = {"mine": "./mine", "ignored": "./data/ignored", "absent": "./absent"}[place]
    node: dict[str, Any] = {"repo": repo}
    for part in reversed(key.split(".")):
        node = {part: node}
    YAML().dump(node if key.startswith("models.") else {"assets": node}, clone / "params.yaml")
    path = f"data/local/{key}"
    shutil.copy(ROOT / ".dvcignore", clone)
    with repository.open_repository(clone) as opened:
        find = partial(gate._find_changed_assets, {path: files.dvc_md5(clone / "mine")}, clone, opened)
        assert list(find()) == []
        for name in ("mine/__pycache__/a.txt", "mine/inner/__pycache__/a.pyc", "mine/inner/.a.partial"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_text(name)
        assert list(find()) == [], "DVC ignores them"
        for folder in ("mine", "data/ignored"):
            (clone / folder / "b.jsonl").write_text("{}")
        assert [line.count("./mine") for line in find()] == [1] * (place == "mine")


@pytest.mark.parametrize("md5", [None, "", "none", 32 * "g"])
def test_a_hash_that_is_none_is_noticed(md5: str | None, clone: Path) -> None:
    """Although what was written and what was read agree."""

    def edit(stages: dict[str, Any]) -> None:
        for file in (*stages["answer"]["outs"], stages["evaluate@iter1"]["deps"][0], stages["evaluate@iter2"]["deps"][0]):
            if md5 is None:
                file.pop("md5", None)
            else:
                file["md5"] = md5

    write_stages(clone, edit, "dvc.lock")
    lines = gate.check_pipeline(clone)
    assert any("answer: data/answers/base.json has no MD5" in line for line in lines), lines


@pytest.mark.parametrize("name", ["dvc.yaml", "params.yaml"])
@pytest.mark.parametrize("text", [5000 * "9", 1000 * "[", 10**5 * "["], ids=["digits", "deep", "deeper"])
def test_what_overwhelms_the_reader_of_yaml_is_one_line(name: str, text: str, clone: Path) -> None:
    (clone / name).write_text(text)
    (line,) = gate.check_pipeline(clone)
    assert_message(line, str(clone / "dvc.yaml"), "params.yaml", "restore both from Git")


@pytest.mark.parametrize("text", ["", "<<<<<<< HEAD\nschema: '2.0'\n", "\0", "- 1", "a: *b", "stages: 5"])
def test_the_remedy_for_an_unreadable_lock_helps(text: str, tmp_path: Path) -> None:
    """DVC reads such a lock no better, so `dvc repro` alone does not help."""
    with pytest.raises(StageError) as error:
        revisions.parse_lock(text.encode(), "dvc.lock")
    assert_message(str(error.value), "dvc.lock", "restore it with Git", "remove it", "dvc repro")


def test_changed_code_is_noticed(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_hash_fingerprint", lambda stage: "0" * 32)
    lines = gate.check_pipeline(clone)
    assert [line.split(": ")[1] for line in lines] == ["code", "split"]
    assert all("the code of split has changed" in line for line in lines)


def test_every_recipe_with_a_lock_is_checked(clone: Path) -> None:
    for name in ("with", "without"):
        (clone / "recipes" / name).mkdir(parents=True)
    (clone / "recipes/with/dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    (clone / "recipes/with/dvc.yaml").write_text("stages: {train: {cmd: 'true'}}\n")
    done = run_tool(clone, "gate")
    assert (done.returncode, done.stdout) == (1, "recipes/with/dvc.lock: train: it has not run\n")
    assert_message(done.stderr, "gate: ", "dvc repro", "commit")
    shutil.rmtree(clone / "recipes")
    assert run_tool(clone, "gate").stdout == "current: dvc.lock\n"


def test_the_gate_runs_where_only_dvc_is_installed() -> None:
    heavy = ("pyarrow", "torch", "transformers", "huggingface_hub", "alpaca_eval")
    code = f"import sys, stages.tools.gate; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

"""Two dvc.lock files are compared: the first difference in the order of dependence, counts, and what explains it."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree
from hypothesis import given
from hypothesis import strategies as st

from stages.runtime.errors import StageError
from stages.tools import locks
from support.messages import assert_message


def make_entry(deps: list[str], outs: list[str], **others: Any) -> dict[str, Any]:
    return {
        "cmd": "make",
        "deps": [{"path": path, "md5": f"dep of {path}"} for path in deps],
        "outs": [{"path": path, "md5": f"out of {path}"} for path in outs],
    } | others


LOCK = {
    "report": make_entry(["data/models", "data/code/report.json", "published.yaml"], ["reports/metrics.json", "reports/a.md"]),
    "train@iter1": make_entry(
        ["data/models/base", "data/code/train.json"],
        ["data/models/iter1", "data/logs/iter1.csv", "data/records/train@iter1.json"],
        params={"params.yaml": {"eta": 10, "train": {"lora": {"rank": 0, "alpha": 16}}}},
    ),
    "policy": make_entry(["data/code/policy.json"], ["data/models/base"]),
    "code": make_entry(["stages", "requirements"], [f"data/code/{name}.json" for name in ("policy", "train", "report")]),
}
"""In the order in which nobody could run it. 5 results: not the record, not the fingerprints."""


def change(path: str) -> dict[str, Any]:
    """Return LOCK with another hash of one output."""
    lock = copy.deepcopy(LOCK)
    for entry in lock.values():
        for out in entry["outs"]:
            if out["path"] == path:
                out["md5"] = "changed"
    assert lock != LOCK
    return lock


def test_the_same_lock_has_no_difference() -> None:
    comparison = locks.compare(LOCK, LOCK)
    assert comparison.first_difference is None
    assert (comparison.outputs, comparison.differing, comparison.changed_inputs) == (5, 0, [])
    assert comparison.stages == dict.fromkeys(LOCK, True)


@pytest.mark.parametrize(
    ("path", "stage"),
    [("data/models/base", "policy"), ("data/logs/iter1.csv", "train@iter1"), ("reports/a.md", "report")],
)
def test_one_changed_hash_is_counted_and_its_stage_named(path: str, stage: str) -> None:
    comparison = locks.compare(LOCK, change(path))
    assert comparison.first_difference == stage
    assert (comparison.outputs, comparison.differing, comparison.changed_inputs) == (5, 1, [])
    assert [name for name, same in comparison.stages.items() if not same] == [stage]


def test_the_first_difference_is_the_one_that_causes_the_others() -> None:
    both = change("data/models/base")
    both["report"] = change("reports/a.md")["report"]
    both["train@iter1"] = change("data/models/iter1")["train@iter1"]
    comparison = locks.compare(LOCK, both)
    assert (comparison.first_difference, comparison.differing) == ("policy", 3)
    assert list(comparison.stages) == ["code", "policy", "train@iter1", "report"]


def test_records_and_fingerprints_are_no_results() -> None:
    comparison = locks.compare(LOCK, change("data/records/train@iter1.json"))
    assert comparison.changed_records == ["data/records/train@iter1.json"]
    assert replace(comparison, changed_records=[]) == locks.compare(LOCK, LOCK)
    comparison = locks.compare(LOCK, change("data/code/train.json"))
    assert (comparison.first_difference, comparison.differing) == (None, 0)
    assert comparison.changed_inputs == ["code of train"]


def test_what_only_one_run_has_differs() -> None:
    less = {name: entry for name, entry in LOCK.items() if name != "report"}
    for committed, current in ((LOCK, less), (less, LOCK)):
        comparison = locks.compare(committed, current)
        assert (comparison.first_difference, comparison.outputs, comparison.differing) == ("report", 5, 2)
        assert "command of report" in comparison.changed_inputs


def test_changed_parameters_commands_and_files_are_named() -> None:
    current = copy.deepcopy(LOCK)
    current["train@iter1"]["params"]["params.yaml"]["train"]["lora"]["rank"] = 8
    current["policy"]["cmd"] = "make -j"
    current["report"]["deps"][2]["md5"] = "changed"
    current["report"]["deps"][0]["md5"] = "a result"
    current["code"]["deps"][0]["md5"] = "a comment"
    assert locks.find_changed_inputs(LOCK, current) == [
        "published.yaml",
        "train.lora.rank in params.yaml",
        "command of policy",
    ]


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ({"a": make_entry(["y"], ["x"]), "b": make_entry(["x"], ["y"])}, ["a", "b"]),
        ({"own": make_entry(["x"], ["x/y"])}, ["own"]),
    ],
)
def test_stages_that_depend_on_each_other_are_named(stages: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(StageError) as error:
        locks.compare(stages, stages)
    assert_message(str(error.value), "dvc.lock", *names, " -> ", "dvc repro")


def test_a_file_within_a_folder_of_results_is_a_result() -> None:
    lock = {"split": make_entry(["data/set/instructions.json"], ["data/split"]), "set": make_entry([], ["data/set"])}
    assert locks.sort_stages(lock) == ["set", "split"]
    current = copy.deepcopy(lock)
    current["split"]["deps"][0]["md5"] = current["set"]["outs"][0]["md5"] = "changed"
    comparison = locks.compare(lock, current)
    assert (comparison.first_difference, comparison.changed_inputs) == ("set", [])


@st.composite
def make_graphs(draw: st.DrawFn) -> tuple[dict[str, Any], set[str]]:
    """Draw the lock of a random pipeline, shuffled, and which of its outputs change."""
    count = draw(st.integers(1, 8))
    stages = {}
    for number in range(count):
        earlier = draw(st.lists(st.integers(0, number - 1), unique=True)) if number else []
        outs = [f"data/{number}/{index}" for index in range(draw(st.integers(1, 3)))]
        stages[f"s{number}"] = make_entry([f"data/{other}" for other in earlier], outs)
    paths = [out["path"] for entry in stages.values() for out in entry["outs"]]
    order = draw(st.permutations(list(stages)))
    return {name: stages[name] for name in order}, draw(st.sets(st.sampled_from(paths)))


@given(make_graphs())
def test_no_stage_that_the_first_difference_depends_on_differs(case: tuple[dict[str, Any], set[str]]) -> None:
    lock, changed = case
    current = copy.deepcopy(lock)
    for entry in current.values():
        for out in entry["outs"]:
            out["md5"] += "!" * (out["path"] in changed)
    comparison = locks.compare(lock, current)
    different = {f"s{path.split('/')[1]}" for path in changed}
    assert comparison.differing == len(changed)
    assert {stage for stage, same in comparison.stages.items() if not same} == different
    assert (comparison.first_difference is None) == (not changed)
    pending = [comparison.first_difference] if comparison.first_difference else []
    while pending:
        parents = ["s" + dep["path"].split("/")[1] for dep in lock[pending.pop()]["deps"]]
        assert not different & set(parents)
        pending += parents


FILES = ["data/a", "data/b/1", "data/b/2", "data/c/x/1", "data/c/x/2", "data/c/y/1", "data/d"]
FOLDERS = ["data/b", "data/c", "data/c/x", "data/c/y"]


def hash_path(md5s: dict[str, str], path: str) -> str:
    """Return the hash of a file or folder as DVC computes it, given its files: path -> MD5."""
    inside = {name: md5 for name, md5 in md5s.items() if name.startswith(f"{path}/")}
    if path in md5s:
        return md5s[path]
    tree = Tree()
    for name, md5 in inside.items():
        tree.add(tuple(name.removeprefix(f"{path}/").split("/")), None, HashInfo("md5", md5))
    tree.digest()
    return str(tree.hash_info.value)


def make_lock(written: dict[str, str], read: dict[str, str], outs: list[str], deps: list[str]) -> dict[str, Any]:
    """Return a lock: one stage for each output, and one for each dependency. written, read: path of each file -> MD5."""
    entries = {f"write {path}": {"outs": [{"path": path, "md5": hash_path(written, path)}]} for path in outs}
    return entries | {f"read {path}": {"deps": [{"path": path, "md5": hash_path(read, path)}]} for path in deps}


@given(st.data())
def test_a_stage_is_outdated_if_a_file_that_it_read_was_written_again(data: st.DataObject) -> None:
    """However what is read is related to what is written: the same file, a part of a folder, a folder of folders."""
    outs = data.draw(st.sampled_from([FILES, ["data/a", "data/b", "data/c", "data/d"], ["data/b", "data/c/x", "data/c/y"]]))
    deps = data.draw(st.lists(st.sampled_from([*FILES, *FOLDERS]), unique=True, min_size=1))
    deps = [path for path in deps if any(f"{path}/".startswith(f"{out}/") or out.startswith(f"{path}/") for out in outs)]
    changed = data.draw(st.sets(st.sampled_from(FILES)))
    before = {path: f"{number:032x}" for number, path in enumerate(FILES)}
    after = before | {path: f"{number + 16:032x}" for number, path in enumerate(sorted(changed))}
    expected = {f"read {dep}": [dep] for dep in deps if any(f"{path}/".startswith(f"{dep}/") for path in changed)}
    assert locks.find_outdated(make_lock(before, before, outs, deps), before) == {}
    assert locks.find_outdated(make_lock(after, before, outs, deps), after) == expected
    outdated = locks.find_outdated(make_lock(after, before, outs, deps), before)  # the listings are as old as what was read
    assert outdated.keys() >= expected.keys()


def test_the_files_that_stages_depend_on_one_by_one_replace_the_listing() -> None:
    md5s = {"data/split/iter1": "1" * 32, "data/split/hold-out": "2" * 32}
    lock = make_lock(md5s, md5s, ["data/split"], list(md5s))
    assert locks.find_outdated(lock, {}) == {}
    del lock["read data/split/hold-out"]
    assert locks.find_outdated(lock, {}) == {"read data/split/iter1": ["data/split/iter1"]}  # nothing shows that it is the same
    assert locks.find_outdated(lock, md5s) == {}


def test_two_stages_that_read_different_versions_of_a_file_are_noticed() -> None:
    md5s = {"data/set/1": "1" * 32, "data/set/2": "2" * 32}
    lock = make_lock(md5s, md5s, ["data/set"], ["data/set/1"])
    lock["late"] = {"deps": [{"path": "data/set/1", "md5": "3" * 32}]}
    assert locks.find_outdated(lock, md5s) == {"late": ["data/set/1"]}

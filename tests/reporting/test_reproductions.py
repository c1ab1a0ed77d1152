"""Reproductions: committed files are valid, the schema refuses contradictions, and the table says what the files say."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.artifacts import files
from stages.reporting import reproductions
from stages.reporting.reproductions import Reproduction
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.reports import read_rows

COMMITTED = sorted((ROOT / "reproductions").glob("*.json"))
RUN: dict[str, Any] = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "recipe": ".",
    "lock_sha256": "a" * 64,
    "machine": {
        "processor": "AMD EPYC 7B13",
        "instruction_set": "AVX2",
        "cores": 2,
        "memory_gib": 23.5,
        "gpus": None,
        "emulated": None,
    },
    "numerics": "portable",
    "versions": {"python": "3.11.7"},
    "stages": {"policy": True, "train@iter1": True},
    "first_difference": None,
    "outputs": 60,
    "differing_outputs": 0,
    "not_run_here": [],
    "figures": {
        "win_rates": {"base": 50.5, "iter1": 60.0, "iter2": 75.25},
        "last": "iter2",
        "gain": {"difference": 24.75, "standard_error": 1.25},
    },
    "note": None,
}


def change(key: str, value: Any) -> dict[str, Any]:
    """Return RUN with another value under a dotted key."""
    run = copy.deepcopy(RUN)
    *parents, last = key.split(".")
    section = run
    for parent in parents:
        section = section[parent]
    section[last] = value
    return run


def test_there_are_committed_reproductions() -> None:
    assert COMMITTED


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_reproduction_is_valid(path: Path) -> None:
    run = reproductions.read_reproduction(path)
    assert re.fullmatch("[a-z0-9-]+", path.stem)
    assert (ROOT / run.recipe / "dvc.yaml").exists()


def test_the_first_reproduction_by_hand() -> None:
    """The figures of a report from the time before this schema; what it did not say is null."""
    run = reproductions.read_reproduction(ROOT / "reproductions/intel-xeon-avx512-ae9c06c.json")
    assert run.commit.startswith("ae9c06c")
    assert run.figures.win_rates == {"base": 52.07, "iter1": 60.82, "iter2": 66.55, "iter3": 71.37}
    assert (run.first_difference, run.same, run.lock_sha256) == ("assets-policy", False, None)


@pytest.mark.parametrize(
    ("key", "value", "cells"),
    [
        ("note", None, []),
        ("machine.emulated", "qemu on a Xeon", ["AMD EPYC 7B13, AVX2, 2 cores, 24 GiB (emulated: qemu on a Xeon)"]),
        ("machine.gpus", {"H100": 8}, ["AMD EPYC 7B13, AVX2, 2 cores, 24 GiB, 8 x H100"]),
        ("machine.cores", 1, ["AMD EPYC 7B13, AVX2, 1 core, 24 GiB"]),
        ("dirty", True, ["0123456, with changes", "yes, with changes"]),
        ("dirty", None, ["yes, run by hand"]),
        ("lock_sha256", None, ["yes, run by hand"]),
        ("stages", None, ["yes, run by hand"]),
        ("outputs", None, ["yes, run by hand"]),
        ("not_run_here", None, ["yes, run by hand"]),
        ("recipe", "recipes/llama-3-8b", ["llama-3-8b"]),
        ("numerics", "fast", ["fast"]),
        ("not_run_here", ["policy"], ["in part: 1 stage not run on this machine"]),
        ("not_run_here", ["policy", "split"], ["in part: 2 stages not run on this machine"]),
        ("figures.gain.standard_error", None, ["+24.75"]),
        ("note", "by hand", ["by hand"]),
    ],
)
def test_a_row_shows_what_the_file_says(key: str, value: Any, cells: list[str]) -> None:
    row = reproductions.format_row(Reproduction.model_validate(RUN))
    assert row == [
        "AMD EPYC 7B13, AVX2, 2 cores, 24 GiB",
        "miniature",
        "0123456",
        "portable",
        "yes",
        "+24.75 ± 1.25",
        "iter2: 75.25",
        "–",
    ]
    changed = reproductions.format_row(Reproduction.model_validate(change(key, value)))
    assert [cell for before, cell in zip(row, changed, strict=True) if cell != before] == cells


@given(
    st.fixed_dictionaries(
        {
            "dirty": st.sampled_from([False, True, None]),
            "lock_sha256": st.sampled_from(["a" * 64, None]),
            "stages": st.sampled_from([{"policy": True}, {"policy": False}, None]),
            "first_difference": st.sampled_from([None, "policy"]),
            "outputs": st.sampled_from([3, None]),
            "differing_outputs": st.sampled_from([0, 1, None]),
            "not_run_here": st.sampled_from([[], ["policy"], None]),
        }
    )
)
def test_a_plain_yes_is_a_complete_run_on_this_machine(changes: dict[str, Any]) -> None:
    try:
        run = Reproduction.model_validate(RUN | changes)
    except ValidationError:
        return
    complete = {"dirty": False, "lock_sha256": "a" * 64, "stages": {"policy": True}, "outputs": 3, "differing_outputs": 0}
    text = reproductions.format_bytes(run)
    assert (text == "yes") == (changes == complete | {"first_difference": None, "not_run_here": []})
    assert text.startswith("no,") == (changes["first_difference"] == "policy")


@pytest.mark.parametrize(
    ("outputs", "differing", "text"),
    [(60, 13, "no, from train@iter1 on: 13 of 60 outputs"), (None, 13, "no, from train@iter1 on: 13 of ? outputs")],
)
def test_a_row_names_the_first_difference(outputs: int | None, differing: int, text: str) -> None:
    run = RUN | {"stages": {"policy": True, "train@iter1": False}, "first_difference": "train@iter1"}
    row = reproductions.format_row(Reproduction.model_validate(run | {"outputs": outputs, "differing_outputs": differing}))
    assert row[4] == text
    row = reproductions.format_row(
        Reproduction.model_validate(run | {"outputs": None, "differing_outputs": None, "stages": None})
    )
    assert row[4] == "no, from train@iter1 on"
    row = reproductions.format_row(
        Reproduction.model_validate(run | {"outputs": 60, "differing_outputs": 13, "not_run_here": ["policy"]})
    )
    assert row[4] == "no, from train@iter1 on: 13 of 60 outputs (1 stage not run on this machine)"


def test_the_table_has_a_row_per_file_by_name(tmp_path: Path) -> None:
    for name, note in (("b", "second"), ("a", "first | of two")):
        files.write_json(RUN | {"note": note}, tmp_path / f"{name}.json")
    rows = read_rows(reproductions.format_reproductions(tmp_path).replace("\\|", "/"))
    assert [row[-1] for row in rows[2:]] == ["first / of two", "second"]
    assert all(len(row) == len(rows[0]) for row in rows)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("commit", "0123456"),
        ("commit", None),
        ("lock_sha256", "a" * 32),
        ("numerics", "exact"),
        ("machine.cores", 0),
        ("machine.cores", 2.0),
        ("machine.processor", ""),
        ("machine.emulated", True),
        ("dirty", "no"),
        ("stages.policy", "yes"),
        ("stages", {}),
        ("outputs", 0),
        ("recipe", "/recipes/x"),
        ("recipe", "../x"),
        ("recipe", "recipes/../.."),
        ("figures.win_rates.iter1", 100.5),
        ("figures.win_rates.iter1", "60"),
        ("figures.gain.standard_error", -1),
        ("machine.gpu", "H100"),
        ("comment", "an unknown key"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: Any, tmp_path: Path) -> None:
    files.write_json(change(key, value), tmp_path / "run.json")
    with pytest.raises(StageError) as error:
        reproductions.read_reproduction(tmp_path / "run.json")
    assert_message(str(error.value), str(tmp_path / "run.json"), f"{key}: ", "make attest")


@pytest.mark.parametrize(
    "changes",
    [
        {"first_difference": "policy"},
        {"stages": {"policy": False}},
        {"stages": {"policy": True, "train@iter1": False}, "first_difference": "policy", "differing_outputs": 1},
        {"stages": {"policy": False}, "first_difference": "policy"},  # 0 outputs differ
        {"differing_outputs": 1},
        {"stages": {"policy": False}, "first_difference": "policy", "differing_outputs": 61},
    ],
)
def test_files_that_contradict_themselves_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Reproduction.model_validate(RUN | changes)


@pytest.mark.parametrize(("key", "value"), [("last", "iter3"), ("win_rates", {"iter2": 75.25}), ("gain.difference", 24.7)])
def test_figures_that_contradict_themselves_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        Reproduction.model_validate(change(f"figures.{key}", value))


OPTIONAL = ["dirty", "lock_sha256", "numerics", "versions", "stages", "outputs", "differing_outputs", "not_run_here", "note"]
OPTIONAL += [f"machine.{key}" for key in ("instruction_set", "cores", "memory_gib", "gpus", "emulated")]
REQUIRED = ["commit", "recipe", "machine", "figures", "machine.processor", "figures.last", "figures.gain", "figures.win_rates"]


@given(st.sets(st.sampled_from([*OPTIONAL, "figures.gain.standard_error"])))
def test_whatever_a_report_by_hand_does_not_know_may_be_null(unknown: set[str]) -> None:
    run = copy.deepcopy(RUN)
    for key in unknown:
        run = _set(run, key, None)
    row = reproductions.format_row(Reproduction.model_validate(run))
    assert "None" not in " ".join(row)
    assert all(row)


@pytest.mark.parametrize("key", [*REQUIRED, *OPTIONAL])
def test_no_key_may_be_missing(key: str) -> None:
    run = copy.deepcopy(RUN)
    *parents, last = key.split(".")
    section = run
    for parent in parents:
        section = section[parent]
    del section[last]
    with pytest.raises(ValidationError):
        Reproduction.model_validate(run)


def _set(run: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return run | {first: _set(run[first], rest, value) if rest else value}


@given(
    st.dictionaries(st.text("abc@1", min_size=1), st.booleans(), min_size=1),
    st.floats(0, 100),
    st.floats(0, 100),
    st.text(min_size=1).filter(str.strip),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, stages: dict[str, bool], base: float, last: float, name: str
) -> None:
    first = next((stage for stage, same in stages.items() if not same), None)
    run = RUN | {"stages": stages, "first_difference": first, "differing_outputs": list(stages.values()).count(False)}
    run = _set(run, "figures.win_rates", {"base": base, "iter2": last})
    run = _set(run, "figures.gain.difference", last - base)
    run = _set(run, "machine.processor", name)
    path = tmp_path_factory.mktemp("run") / "run.json"
    files.write_json(run, path)
    read = reproductions.read_reproduction(path)
    assert read.model_dump() == run
    assert read.same == all(stages.values())
    assert len(read_rows(reproductions.format_reproductions(path.parent).replace("\\|", "/"))) == 3

"""A run is written down with its machine, versions and figures, and compared with the committed one."""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import files, machine
from stages.reporting.reproductions import read_reproduction
from stages.runtime.errors import StageError
from stages.tools import attest
from support import revisions, runs
from support.messages import assert_message
from support.running import run_tool

MACHINE: dict[str, Any] = {
    "processor": "AMD EPYC 7B13 (Milan)",
    "instruction_set": "AVX2",
    "cores": 2,
    "memory_gib": 23.5,
    "gpus": ["NVIDIA H100", "NVIDIA H100", "NVIDIA T4"],
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    runs.make_experiment(folder)
    for stage in ("policy", "train@iter1"):
        files.write_json(MACHINE, folder / f"scratch/machines/{stage}.json")
    return folder


@pytest.fixture
def folder(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the experiment, which has run on MACHINE."""
    copy = tmp_path / "run"
    shutil.copytree(origin, copy, symlinks=True)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(attest, "describe_machine", lambda: MACHINE)
    return copy


def collect(emulated: str | None = None) -> dict[str, Any]:
    return attest.collect(Path(), emulated)


def rev_parse(folder: Path) -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_a_run_with_the_same_results(folder: Path) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    assert collect() == {
        "commit": rev_parse(folder),
        "dirty": False,
        "recipe": ".",
        "lock_sha256": hashlib.sha256((folder / "dvc.lock").read_bytes()).hexdigest(),
        "machine": MACHINE | {"gpus": {"NVIDIA H100": 2, "NVIDIA T4": 1}, "emulated": None},
        "numerics": "portable",
        "versions": {"python": version, "torch": "2.13.0"},
        "stages": {"code": True, "policy": True, "train@iter1": True, "report": True},
        "first_difference": None,
        "outputs": 4,  # not the fingerprint and the two records
        "differing_outputs": 0,
        "not_run_here": [],
        "figures": {
            "win_rates": {"base": 50.0, "iter1": 70.5},
            "last": "iter1",
            "gain": {"difference": 20.5, "standard_error": 0.5},
        },
        "note": None,
    }


@pytest.mark.slow
def test_a_run_with_other_results(folder: Path) -> None:
    """Its results differ from the base policy on, but one page is the same; training had other libraries and numerics."""
    (folder / "offset").write_text("offset: -3\n")
    record = runs.RECORD | {"numerics": "fast", "tools": {"torch": "2.14.0", "vllm": "0.32.0"}}
    (folder / "record.json").write_text(json.dumps(record))
    runs.repro(folder)
    (folder / "scratch/machines/train@iter1.json").unlink()
    files.write_json(MACHINE | {"processor": "another"}, folder / "scratch/machines/policy.json")
    found = collect("qemu on a Xeon")
    assert found["stages"] == {"code": True, "policy": False, "train@iter1": False, "report": False}
    assert (found["first_difference"], found["outputs"], found["differing_outputs"]) == ("policy", 4, 3)
    assert found["figures"]["win_rates"] == {"base": 50.0, "iter1": 67.5}
    assert found["figures"]["gain"] == {"difference": 17.5, "standard_error": 0.5}
    assert found["numerics"] == "fast"
    assert found["versions"].items() >= {"torch": "2.14.0", "vllm": "0.32.0"}.items()
    assert found["not_run_here"] == ["policy", "train@iter1"]
    assert found["machine"]["emulated"] == "qemu on a Xeon"
    assert not found["dirty"]  # `offset` is no input that this repository's experiments have


@pytest.mark.slow
def test_changed_parameters_make_it_dirty(folder: Path) -> None:
    (folder / "params.yaml").write_text((folder / "params.yaml").read_text().replace("42", "43"))
    runs.repro(folder)
    found = collect()
    assert found["dirty"]
    assert found["figures"]["win_rates"]["iter1"] == 70.75


def test_numerics_that_differ_are_mixed_and_those_of_no_arithmetic_not_counted() -> None:
    assert attest.summarize_numerics([{"numerics": "fast"}, {"numerics": "portable"}]) == "mixed"
    assert attest.summarize_numerics([{"numerics": None}, {}, {"numerics": "portable"}]) == "portable"
    assert attest.summarize_numerics([{"numerics": None}]) is None


def test_all_versions_of_a_library_are_listed() -> None:
    records = [{"tools": {"transformers": version}} for version in ("5.19.0", "4.57.6", "5.19.0")]
    assert attest.collect_versions(records)["transformers"] == "4.57.6, 5.19.0"


def test_the_file_is_named_after_processor_and_commit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attest.main(argparse.Namespace(recipe=Path(), name=None, emulated="qemu"))
    path = folder / f"reproductions/amd-epyc-7b13-milan-{rev_parse(folder)[:7]}.json"
    assert capsys.readouterr().out.startswith(f"reproductions/{path.name}: same results")
    assert read_reproduction(path).machine.emulated == "qemu"


@pytest.mark.slow
def test_the_command_describes_this_machine(folder: Path) -> None:
    done = run_tool(folder, "attest", "--name", "mine")
    assert done.returncode == 0, done.stderr
    run = read_reproduction(folder / "reproductions/mine.json")
    assert run.machine.processor == machine.describe_machine()["processor"]
    assert run.not_run_here == ["policy", "train@iter1"]


@pytest.mark.parametrize(
    ("text", "slug"),
    [("AMD EPYC 7B13 (Milan)", "amd-epyc-7b13-milan"), ("Intel(R) Xeon(R) CPU @ 2.80GHz", "intel-r-xeon-r-cpu-2-80ghz")],
)
def test_slugs(text: str, slug: str) -> None:
    assert attest.slugify(text) == slug


def test_a_name_is_no_path(folder: Path) -> None:
    with pytest.raises(StageError) as error:
        attest.main(argparse.Namespace(recipe=Path(), name="../x", emulated=None))
    assert_message(str(error.value), "--name", "'../x'", "'x'")
    assert not (folder / "reproductions").exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda: Path("dvc.lock").unlink(), ["dvc.lock is missing", "dvc repro"]),
        (lambda: Path("reports/metrics.json").unlink(), ["reports/metrics.json is missing", "dvc repro"]),
        (
            lambda: Path("offset").write_text("offset: 1\n", encoding="utf-8"),
            ["dvc.lock", "3 stages would run", "policy", "dvc repro"],
        ),
        (lambda: Path("data/model").unlink(), ["dvc.lock", "2 stages would run", "train@iter1", "dvc repro"]),
        (
            lambda: Path("params.yaml").write_text("seed: 1\neta: 10\niterations: {iter1: base}", encoding="utf-8"),
            ["3 stages would run"],
        ),
    ],
)
def test_an_incomplete_run_is_refused(change: Any, parts: list[str], folder: Path) -> None:
    change()
    with pytest.raises(StageError) as error:
        collect()
    assert_message(str(error.value), *parts)


@pytest.mark.parametrize(
    "record", [[], {}, {"tools": None}, {"tools": ["torch"]}, {"tools": {"torch": 2}}, {"tools": {}, "numerics": ["fast"]}]
)
def test_an_odd_record_is_named(record: Any, tmp_path: Path) -> None:
    files.write_json(record, tmp_path / "train.json")
    with pytest.raises(StageError) as error:
        attest.read_record(tmp_path / "train.json")
    assert_message(str(error.value), str(tmp_path / "train.json"), "'tools'")


@pytest.mark.parametrize("facts", [[], None, "text", {}])
def test_odd_facts_about_a_machine_mean_that_the_stage_ran_elsewhere(facts: Any, folder: Path) -> None:
    files.write_json(facts, folder / "scratch/machines/policy.json")
    assert attest.find_foreign_stages([Path("data/records/policy.json")], Path(), MACHINE) == ["policy"]


def test_impossible_results_are_refused(folder: Path) -> None:
    metrics = json.loads((folder / "reports/metrics.json").read_text())
    metrics["alpaca_eval"]["iter1"]["vs_base"]["standard_error"] = -1
    code = f"open('reports/metrics.json', 'w').write({json.dumps(metrics)!r}); open('reports/page.md', 'w').write('')"
    (folder / "report.py").write_text(code)
    runs.repro(folder)
    with pytest.raises(StageError) as error:
        attest.main(argparse.Namespace(recipe=Path(), name="x", emulated=None))
    assert_message(str(error.value), "figures.gain.standard_error", "dvc repro")
    assert not (folder / "reproductions").exists()


def test_a_changed_comment_leaves_a_run_complete(folder: Path) -> None:
    (folder / "code.txt").write_text("{} ")  # the stage `code` alone would run
    assert collect()["first_difference"] is None


def test_a_commit_without_results_is_refused(folder: Path) -> None:
    revisions.git(folder, "rm", "-q", "--cached", "dvc.lock")
    revisions.git(folder, "commit", "-qm", "no lock")
    with pytest.raises(StageError) as error:
        collect()
    assert_message(str(error.value), "HEAD", "dvc.lock", "commit the run")


def test_figures_need_both_models(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("iterations: {iter1: base, iter2: iter1}")
    metrics = {("alpaca_eval", name, "win_rate"): 50.0 for name in ("base", "iter1")}
    with pytest.raises(StageError) as error:
        attest.collect_figures(metrics, tmp_path / "params.yaml")
    assert_message(str(error.value), str(tmp_path / "reports/metrics.json"), "'alpaca_eval.iter2.win_rate'", "dvc repro")
    with pytest.raises(StageError) as error:
        attest.collect_figures(metrics | {("alpaca_eval", "iter2", "win_rate"): "61"}, tmp_path / "params.yaml")
    assert_message(str(error.value), "'alpaca_eval.iter2.win_rate'", "dvc repro")
    found = attest.collect_figures(metrics | {("alpaca_eval", "iter2", "win_rate"): 61.5}, tmp_path / "params.yaml")
    assert (found["last"], found["gain"]) == ("iter2", {"difference": 11.5, "standard_error": None})


@pytest.mark.parametrize("text", ["iterations: {}", "iterations: null", "iterations: [a]"])
def test_figures_need_iterations(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(StageError) as error:
        attest.collect_figures({}, tmp_path / "params.yaml")
    assert_message(str(error.value), str(tmp_path / "params.yaml"), "'iterations'")

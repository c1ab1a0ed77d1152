"""Portable numerics are in effect, and neither threads, cores nor the user's environment change a byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.artifacts import machine
from stages.engines import numerics
from stages.runtime import scratch
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support import running
from support.messages import assert_message

PRODUCTS = """
import hashlib, sys
from stages.engines import numerics
used = numerics.apply(sys.argv[1])
import torch
torch.manual_seed(0)
digest = hashlib.sha256()
for rows, inner, columns in [(64, 128, 128), (1108, 128, 800), (300, 512, 128), (1000, 1000, 1000)]:
    product = torch.randn(rows, inner) @ torch.randn(inner, columns)
    digest.update(product.numpy().tobytes() + product.sum().numpy().tobytes() + product.softmax(1).mean(0).numpy().tobytes())
numerics.verify(used)
print(used, torch.get_num_threads(), digest.hexdigest())
"""
OLD_PROCESSOR = "processor\t: 0\nmodel name\t: Intel(R) Core(TM) i7-3770\nflags\t\t: fpu sse4_2 avx\n\nprocessor\t: 1\n"


def run_python(program: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a program in this environment's interpreter, without the variables that this process may have inherited."""
    values = {name: value for name, value in os.environ.items() if name not in numerics.VARIABLES and name != "LD_PRELOAD"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=values | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_fast_numerics_set_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scratch.NUMERICS, "")
    before = dict(os.environ)
    assert numerics.apply("fast") == "fast"
    assert dict(os.environ) == before | {scratch.NUMERICS: "fast"}


@pytest.mark.slow
def test_portable_products_and_sums_do_not_depend_on_the_environment_or_the_cores() -> None:
    """A lower or higher number of threads asked for by the user, one core, and another choice of kernels change nothing."""
    one_core = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
    runs = [
        run_python(PRODUCTS, "portable"),
        run_python(PRODUCTS, "portable", OMP_NUM_THREADS="1", MKL_CBWR="COMPATIBLE", ATEN_CPU_CAPABILITY="default"),
        run_python(PRODUCTS, "portable", OMP_NUM_THREADS="7", MKL_NUM_THREADS="5", OMP_DYNAMIC="TRUE", OMP_THREAD_LIMIT="1"),
        run_python(one_core + PRODUCTS, "portable"),
    ]
    assert [run.stderr for run in runs] == [""] * 4
    assert {run.stdout for run in runs} == {runs[0].stdout}
    assert runs[0].stdout.startswith("portable 2 ")


@pytest.mark.slow
def test_portable_numerics_reach_the_processes_that_a_stage_starts() -> None:
    program = f"""
import subprocess, sys
from stages.engines import numerics
numerics.apply("portable")
child = {PRODUCTS.replace("used = numerics.apply(sys.argv[1])", "used = 'portable'")!r}
sys.exit(subprocess.run([sys.executable, "-c", child]).returncode)
"""
    child, alone = run_python(program), run_python(PRODUCTS, "portable")
    assert (child.returncode, child.stdout, child.stderr) == (0, alone.stdout, "")


@pytest.mark.slow
def test_numerics_that_are_not_in_effect_are_refused() -> None:
    done = run_python("import torch; from stages.engines import numerics; numerics.verify('fast'); numerics.verify('portable')")
    assert done.returncode == 1
    assert_message(done.stderr.splitlines()[-1], "numerics: portable", "MKL", "`make env`", "numerics: fast")


def test_a_missing_shim_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scratch.NUMERICS, "")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "main"))
    with pytest.raises(StageError) as caught:
        numerics.apply("portable")
    assert_message(str(caught.value), str(tmp_path / "mkl_shim.so"), "`make env`", "numerics: fast")


def test_a_damaged_shim_is_one_line(tmp_path: Path) -> None:
    shim = tmp_path / "mkl_shim.so"
    shim.write_bytes(b"\x7fELF")
    done = run_python(f"import sys\nsys.prefix = {str(tmp_path / 'main')!r}{PRODUCTS}", "portable")
    assert done.returncode == 1
    assert_message(done.stderr.splitlines()[-1], str(shim), "`make env`")


def test_the_libraries_get_a_fixed_number_of_threads_and_nothing_from_the_user() -> None:
    program = (
        "import json, os; from stages.engines import numerics; numerics.apply('portable'); print(json.dumps({**os.environ}))"
    )
    mine = {"KMP_BLOCKTIME": "0", "OMP_THREAD_LIMIT": "1", "MKL_DEBUG_CPU_TYPE": "5", "VLLM_CPU_KVCACHE_SPACE": "1"}
    found = json.loads(run_python(program, **mine, OMP_NUM_THREADS="7", OMPI_COMM_WORLD_SIZE="1").stdout)
    assert not mine.keys() & found.keys()
    assert "OMPI_COMM_WORLD_SIZE" in found
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    assert [found.get(name) for name in names] == ["2", "2", "1"]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("avx avx2 fma avx512f", "AVX-512"),
        ("fma avx2", "AVX2"),
        ("avx2", os.uname().machine),  # without fused multiply-add, other kernels would be chosen
        ("avx", os.uname().machine),
        ("", os.uname().machine),
    ],
)
def test_the_instruction_set_is_named_by_the_processors_flags(flags: str, name: str) -> None:
    assert machine.name_instruction_set(set(flags.split())) == name


def test_a_processor_without_avx2_continues_with_fast_and_a_run_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(OLD_PROCESSOR)
    monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
    monkeypatch.setattr(scratch, "FOLDER", tmp_path / "scratch")
    monkeypatch.setenv(scratch.NUMERICS, "")
    monkeypatch.setenv("DVC_STAGE", "generate@iter1")
    caplog.set_level("INFO", logger=numerics.log.name)
    monkeypatch.setattr(numerics.log, "propagate", True)
    said = []
    for parent in (5, 5, 6):  # two stages of one `dvc repro`, then another run
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        before = dict(os.environ)
        assert numerics.apply("portable") == "fast"
        assert dict(os.environ) == before | {scratch.NUMERICS: "fast"}
        said.append(len(caplog.messages))
    assert said == [1, 1, 2]
    assert_message(caplog.messages[0], "numerics: portable", "AVX2", "fast")


@pytest.mark.slow
def test_vllm_sees_no_avx_512_and_a_fixed_cache() -> None:
    program = """
import json, os, torch
from stages.engines import numerics
os.environ["SPPO_NUMERICS"] = "fast"
numerics.restrict_vllm()
assert torch.cpu._is_avx512_supported.__module__ == "torch.cpu"
os.environ["SPPO_NUMERICS"] = "portable"
numerics.restrict_vllm()
names = [name for name in dir(torch.cpu) if name.startswith(("_is_avx512", "_is_amx"))]
print(json.dumps([torch.cpu.get_capabilities()["l2_cache_size"], {name: getattr(torch.cpu, name)() for name in names}]))
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    cache, supported = json.loads(done.stdout)
    assert cache == 262144
    assert len(supported) == 4
    assert not any(supported.values())


def test_unfinished_work_belongs_to_its_numerics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "FOLDER", tmp_path)
    folders = set()
    for name in ("portable", "fast"):
        monkeypatch.setenv(scratch.NUMERICS, name)
        folders.add(scratch.folder("split", {}))
        scratch.finish()
    assert len(folders) == 2


@pytest.mark.slow
def test_a_policy_trained_on_one_core_has_the_same_bytes(tmp_path: Path) -> None:
    """Trained by the stage itself, once on one core, once on all, with another number of threads asked for."""
    running.set_params(tmp_path, running.TINY)
    cores = os.sched_getaffinity(0)
    weights = []
    for name, available, threads in (("all", cores, "5"), ("one", {min(cores)}, "1")):
        os.sched_setaffinity(0, available)
        try:
            done = running.run_stage(tmp_path, "assets-policy", "--out", name, OMP_NUM_THREADS=threads, **running.ALONE)
        finally:
            os.sched_setaffinity(0, cores)
        assert done.returncode == 0, done.stderr
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]

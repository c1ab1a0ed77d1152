"""The servers that run stages for the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime.paths import ROOT
from support import stage_client, stage_server
from support.messages import assert_message
from support.running import ENVIRONMENT, run_stage


def test_a_test_that_imports_a_library() -> None:
    """As scikit-learn, vLLM and DeepSpeed do when they are imported. stage_client does not know this variable."""
    os.environ["SOME_LIBRARY"] = "FALSE"


def test_leaves_nothing_in_the_environment_of_the_next() -> None:
    assert "SOME_LIBRARY" not in os.environ
    assert stage_client.is_served("stages", stage_server.ENVIRONMENT, os.environ | ENVIRONMENT)


def test_what_is_left_there_fails_the_next_test_that_starts_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stage would run in a process of its own, and so would all that follow, which takes minutes."""
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    with pytest.raises(AssertionError) as error:
        run_stage(ROOT, "split")
    assert_message(str(error.value), "restore", "MKL_CBWR")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--names",), ("split",), ("nothing",)])
def test_a_served_stage_ends_as_one_in_a_process_of_its_own(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("eta: 10", "eta: -1"))
    served = run_stage(tmp_path, *arguments)
    command = [sys.executable, "-m", "stages", *arguments]
    alone = subprocess.run(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (served.returncode, served.stdout, served.stderr) == (alone.returncode, alone.stdout, alone.stderr)


@pytest.mark.slow
def test_no_server_of_programs_with_a_hub_of_their_own_has_read_another_address(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys; print(*sys.modules)")
    done = stage_server.run("program", tmp_path, [], os.environ | ENVIRONMENT, route=stage_server.HUB)
    imported = set(done.stdout.split())
    assert not imported & {"huggingface_hub", "transformers", "datasets"}
    assert imported >= {"torch", "sklearn.base"}

"""The servers that run stages for the tests."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime.paths import ROOT
from support import stage_client, stage_server
from support.running import ENVIRONMENT, run_stage


@pytest.mark.slow
def test_a_process_that_has_imported_the_libraries_still_has_its_stages_served() -> None:
    """vLLM and scikit-learn set environment variables, and all tests of a run are imported before the first one."""
    for library in ("vllm", "sklearn"):
        importlib.import_module(library)
    assert stage_client.is_served("stages", stage_server.ENVIRONMENT, os.environ | ENVIRONMENT)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--names",), ("split",), ("nothing",)])
def test_a_served_stage_ends_as_one_in_a_process_of_its_own(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("eta: 10", "eta: -1"))
    served = run_stage(tmp_path, *arguments)
    command = [sys.executable, "-m", "stages", *arguments]
    alone = subprocess.run(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (served.returncode, served.stdout, served.stderr) == (alone.returncode, alone.stdout, alone.stderr)

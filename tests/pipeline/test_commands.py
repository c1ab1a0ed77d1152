"""Run every command of the documents as it stands, in a copy of the repository at the smallest sizes.

The copy has one iteration, which stands for the commands' third: three iterations would take three times as long.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.miniature import domain
from support.documents import COMMANDS, DOCUMENTS
from support.endpoint import chosen, serve
from support.running import SMALLEST, copy_repository, dvc

pytestmark = pytest.mark.slowest

NOT_RUN = {
    "make ": "the test suite and the run themselves, which lead here",
    "pytest": "the test suite itself",
    "source ": "DVC, Python and the stages are found without it",
    "pre-commit ": "installs a tool",
    "chromium ": "a browser, which not every machine has, for a picture",
    "hf auth login": "asks for a token",
    "python -m stages.tools hub --pin": "asks the Hub",
    "dvc repro recipes/": "needs eight GPUs",
    "PYTHON=.venv/uv/bin/python gpu_check/pack.sh": "downloads wheels",
    "bash part-1/run.sh": "needs what pack.sh packs, on a machine with a GPU",
    "python -m stages.tools publish": "needs a recipe's results, and uploads them; tests/tools/test_publish.py runs it",
    "ray ": "starts Ray for other machines to join, or needs it to be started",
    "sbatch ": "needs Slurm",
    "sky ": "rents machines",
    "python -m vllm.entrypoints.openai.api_server": "a judge of 72 billion parameters",
    "export ": "a judge's key",
    "python -m stages.tools score": "run on real annotations in tests/tools/test_score.py",
}
"""Beginnings of the commands that are not run here, and why."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository on branch `main`, run once and committed, with the files that the documents assume."""
    folder = tmp_path_factory.mktemp("commands") / "sppo"
    copy_repository(folder, SMALLEST | {"assets.prompts.count": 150})
    shell(folder, "git branch -qM main")
    dvc(folder, "repro")
    shell(folder, "git add -A && git commit -qm run")
    (folder / "my-prompts").mkdir()
    prompts = domain.distinct_prompts("mine", "training", 150)
    lines = [json.dumps({"instruction": prompt}) for prompt in prompts]
    (folder / "my-prompts" / "train.jsonl").write_text("\n".join(lines))
    shutil.copytree(folder / "data/ranker", folder / "my-ranker")
    (folder / ".git/info/exclude").write_text("/my-*\n")
    return folder


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    """The address of an endpoint that slightly prefers every first output."""
    with serve(lambda number, prompt: chosen(0.6)) as endpoint:
        yield endpoint.url


def shell(folder: Path, command: str) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OPENAI_API_KEY": "a-word"}
    done = subprocess.run(
        ["bash", "-e", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name + path.name)
def test_the_commands_of_a_document_run(document: Path, checkout: Path, judge: str, tmp_path: Path) -> None:
    shell(checkout, "git switch -q main && git restore . && dvc checkout -q --force dvc.yaml")
    for command in [command for there, command in COMMANDS if there == document]:
        if not command.startswith(tuple(NOT_RUN)):
            for original, replacement in (
                ("iter4=iter3", "iter2=iter1"),
                ("iter3", "iter1"),
                ("/srv/sppo", str(tmp_path)),
                ("http://127.0.0.1:8000/v1", judge),
            ):
                command = command.replace(original, replacement)
            shell(checkout, command)


def test_what_is_not_run_is_in_the_documents() -> None:
    commands = [command for _, command in COMMANDS]
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in commands)] == []

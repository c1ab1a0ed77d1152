import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages import pointers
from stages.cli import ROOT, StageError

REVISION = "0123456789" * 4
POINTER = {
    "repo": "some/model",
    "revision": REVISION,
    "repo_type": "model",
    "files": {"config.json": {"size": 2, "sha256": "-"}, "model.safetensors": {"size": 7, "sha256": "-"}},
}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A folder with a pointer, and the snapshot it stands for in a Hub cache of the test's own."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / pointers.NAME).write_text(json.dumps(POINTER))
    snapshot = _snapshot(tmp_path)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_text("weights")
    return tmp_path / "policy"


def _snapshot(folder: Path) -> Path:
    return folder / "hf" / "hub" / "models--some--model" / "snapshots" / REVISION


def _resolve(policy: Path, environment: str = "main") -> str:
    """What resolve returns, or its message, in an environment: their huggingface-hub differ."""
    return _printed(
        "from pathlib import Path; from stages import cli, pointers\n"
        f"try: print(pointers.resolve(Path({str(policy)!r})))\nexcept cli.StageError as error: print('error:', error)",
        policy,
        environment,
    )


def _printed(code: str, policy: Path, environment: str = "main") -> str:
    """What code prints in an environment, with the Hub's cache beside the policy."""
    python = Path(sys.prefix).parent / environment / "bin" / "python"
    settings = {"PYTHONPATH": str(ROOT), "HF_HOME": str(policy.parent / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run([python, "-c", code], env=others | settings, capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n")


def test_a_folder_without_a_pointer_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert pointers.resolve(tmp_path) == tmp_path
    with pytest.raises(StageError, match="is missing"):
        pointers.resolve(tmp_path / "none")


@pytest.mark.parametrize("environment", ["main", "rank", "harness"])
def test_a_pointer_leads_to_its_snapshot_in_every_environment(policy: Path, environment: str) -> None:
    assert _resolve(policy, environment) == str(_snapshot(policy.parent))


@pytest.mark.parametrize("environment", ["main", "rank"])
def test_an_absent_snapshot_is_said_with_the_way_to_it(policy: Path, environment: str) -> None:
    _snapshot(policy.parent).rename(policy.parent / "hf" / "elsewhere")
    message = _resolve(policy, environment)
    assert message.startswith(f"error: {policy}: some/model at {REVISION} is not in this machine's Hub cache, or not whole: ")
    assert "`python -m stages.assets --fetch RECIPE`" in message
    assert "`dvc repro --force --single-item STAGE`" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "model.safetensors is missing: fetch it with"),
        (lambda path: path.write_text("weigh"), "model.safetensors has 5 bytes, not 7: remove it: fetch it with"),
    ],
)
def test_a_snapshot_that_is_not_whole_is_refused(policy: Path, change: Callable[[Path], object], message: str) -> None:
    change(_snapshot(policy.parent) / "model.safetensors")
    assert _resolve(policy).startswith(f"error: {_snapshot(policy.parent)}/{message}")


@pytest.mark.parametrize(
    "pointer",
    [
        [],
        {},
        POINTER | {"files": {}},
        POINTER | {"more": 1},
        {key: value for key, value in POINTER.items() if key != "revision"},
        POINTER | {"files": {"config.json": {"size": 2}}},
    ],
)
def test_a_pointer_that_says_too_little_is_refused(policy: Path, pointer: object) -> None:
    (policy / pointers.NAME).write_text(json.dumps(pointer))
    with pytest.raises(StageError, match=r"pointer\.json: .*wanted: make it with `dvc repro`"):
        pointers.resolve(policy)


def test_verify_reads_what_a_pointer_stands_for(policy: Path) -> None:
    """A file of the right size may be another."""
    code = (
        f"from pathlib import Path; from stages import verify; print(*verify.pointer_faults(Path({str(policy)!r})), sep='\\n')"
    )
    weights = _snapshot(policy.parent) / "model.safetensors"
    pointer = json.loads(json.dumps(POINTER))
    for name, entry in pointer["files"].items():
        entry["sha256"] = hashlib.sha256((weights.parent / name).read_bytes()).hexdigest()
    (policy / pointers.NAME).write_text(json.dumps(pointer))
    assert _printed(code, policy) == ""
    weights.write_text("Weights")
    assert _printed(code, policy).startswith(
        f"{policy}: {weights} is changed: `rm {weights}`, then `python -m stages.assets --fetch"
    )
    weights.unlink()
    assert "is not in this machine's Hub cache" in _printed(code, policy) or "is missing" in _printed(code, policy)

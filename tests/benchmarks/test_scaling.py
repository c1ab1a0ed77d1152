"""The model on paper of docs/scaling.md, and the files there that start a cluster."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from benchmarks import scaling
from stages.runtime.paths import ROOT

FILES = ROOT / "docs/scaling"


def test_the_page_has_the_tables_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main()
    (tables,) = re.findall(r"<!-- scaling -->\n\n(.*)\n<!-- /scaling -->", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)
    assert tables == capsys.readouterr().out


@pytest.mark.parametrize(
    ("gigabytes", "nodes", "seconds"),
    [(16, 1, 8.0), (16, 5, 8.0), (16, 64, 102.4), (1.7, 1, 0.85)],
)
def test_nodes_share_the_file_system(gigabytes: float, nodes: int, seconds: float) -> None:
    """2 GB/s for one, 10 GB/s for all together."""
    assert scaling.read_seconds(gigabytes, nodes) == pytest.approx(seconds)


@pytest.mark.parametrize(("nodes", "rounds"), [(1, 10), (2, 5), (8, 2), (16, 1), (64, 1)])
def test_more_gpus_than_tasks_are_idle(nodes: int, rounds: int) -> None:
    """79 shards on 8 GPUs are ten rounds."""
    stage = scaling.Stage("generate", 3, 790.0, 79, 5.0, 16)
    spent = scaling.simulate_tasks(stage, nodes)
    assert spent["compute"] == pytest.approx(10.0 * rounds)
    assert spent["start"] == 5 + 10 * (nodes > 1)
    assert spent["read"] == pytest.approx(max(8, 1.6 * min(nodes, 10)))
    assert spent["driver"] == pytest.approx(max(0, 0.05 * 79 - 10 * rounds))


def test_a_slow_network_makes_training_on_several_nodes_slower() -> None:
    """A step moves 48 GB, the share of it that is on other nodes over 12.5 or 400 GB/s, while it computes."""
    fast, slow = (scaling.simulate_pairs("train", 2, speed) for speed in (400.0, 12.5))
    assert fast["network"] == 0
    assert slow["network"] == pytest.approx(312 * 48 / 2 / 12.5 - 5200 / 16)
    assert scaling.best_nodes("train", 64, 12.5) == 2
    assert scaling.best_nodes("train", 64, 400.0) == 8
    assert scaling.simulate_pairs("train", 64, 400.0) == scaling.simulate_pairs("train", 8, 400.0), "64 pairs"


STUBS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do echo "srun $1" >>"$LOG"; shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >>"$LOG"; printf "a1\\na2\\na3\\n"',
    "hostname": 'echo "10.0.0.1 fe80::1"',
    "ray": 'echo "ray $* at $RAY_ADDRESS" >>"$LOG"; [ "$1" != start ] || exec sleep 2',
    "dvc": 'sleep 1; echo "dvc $* at $RAY_ADDRESS" >>"$LOG"; exit 3',
}


@pytest.mark.slow
def test_the_slurm_file_starts_ray_on_every_node_and_runs_dvc(tmp_path: Path) -> None:
    commands = tmp_path / ".venv/main/bin"
    commands.mkdir(parents=True)
    for name, script in STUBS.items():
        (commands / name).write_text(f"#!/bin/bash\n{script}\n")
        (commands / name).chmod(0o755)
    (commands / "activate").write_text(f'PATH="{commands}:$PATH"\n')
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "a[1-3]", "SLURM_JOB_NUM_NODES": "3"}
    environment = os.environ | job | {"LOG": str(tmp_path / "log")}
    command = ["bash", str(FILES / "slurm.sbatch"), "recipes/llama-3-8b/dvc.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    lines = (tmp_path / "log").read_text().splitlines()
    assert done.returncode == 3, "that of dvc"
    head = "ray start --block --head --node-ip-address=10.0.0.1 --port=6379 --include-dashboard=false at 10.0.0.1:6379"
    assert {head, "ray start --block --address=10.0.0.1:6379 at 10.0.0.1:6379", "srun --nodes=2"} <= set(lines)
    assert {"srun --nodelist=a1", "srun --exclude=a1", "scontrol show hostnames a[1-3]"} <= set(lines)
    assert lines[-1] == "dvc repro recipes/llama-3-8b/dvc.yaml at 10.0.0.1:6379"


def test_the_skypilot_file_has_the_keys_of_a_task_and_valid_shell_code() -> None:
    """docs.skypilot.co, "SkyPilot YAML"."""
    task = YAML(typ="safe").load(FILES / "skypilot.yaml")
    assert set(task) == {"name", "num_nodes", "resources", "envs", "secrets", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "disk_size"}
    assert task["num_nodes"] > 1
    for code in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"]))
    assert used <= {*task["envs"], *task["secrets"], "RAY_ADDRESS", "SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK"}

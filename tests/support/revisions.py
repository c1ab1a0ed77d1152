"""A Git repository with revisions to compare."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.runtime.paths import ROOT

LOCK = {
    "split": {"deps": [{"path": "data/code/split.json", "md5": "a" * 32}], "outs": [{"path": "data/split", "md5": "b" * 32}]},
    "train@iter1": {
        "outs": [{"path": "data/models/iter1", "md5": "c" * 32}, {"path": "data/logs/iter1_1.csv", "md5": "d" * 32}],
    },
    "train@iter3": {"outs": [{"path": "data/models/iter3", "md5": "e" * 32}]},
}


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=folder, check=True)


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


def make_metrics(shift: float) -> dict[str, Any]:
    """Return the contents of metrics.json: `shift` raises iter1's win rate, length, mmlu and KL; all else stays."""
    return {
        "alpaca_eval": {
            "base": {"win_rate": 50.0, "standard_error": 1.0, "avg_length": 52},
            "iter1": {"win_rate": 60.0 + shift, "standard_error": 1.0, "avg_length": 45 + shift},
        },
        "open_llm_leaderboard": {"iter1": {"mmlu": 28.0 + shift, "gsm8k": 1.0, "standard_errors": {"mmlu": 4.0, "gsm8k": 1.0}}},
        "training": {"iter1": {"kl": 0.125 + shift}},
    }


def write_lock(folder: Path, stages: dict[str, Any]) -> None:
    with (folder / "dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": stages}, file)


def commit_history(folder: Path) -> None:
    """Make three commits: without results, with results, and with another eta, other results and another recipe."""
    (folder / "recipes/llama-3-8b").mkdir(parents=True)
    (folder / "reports").mkdir()
    for name in ("params.yaml", "dvc.yaml", "recipes/llama-3-8b/params.yaml", "recipes/llama-3-8b/dvc.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "no results")
    (folder / "reports/metrics.json").write_text(json.dumps(make_metrics(0)))
    write_lock(folder, LOCK)
    commit(folder, "run")
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(params.replace("eta: 10 ", "eta: 20 ").replace("judge: gold", "judge: <b>|x"))
    (folder / "reports/metrics.json").write_text(json.dumps(make_metrics(5)))
    stages = json.loads(json.dumps(LOCK))
    for out in stages["train@iter1"]["outs"]:
        out["md5"] = "f" * 32
    stages["split"]["deps"][0]["md5"] = "e" * 32
    stages["train@iter9"] = stages.pop("train@iter3")
    write_lock(folder, stages)
    recipe = folder / "recipes/llama-3-8b/params.yaml"
    recipe.write_text(recipe.read_text().replace("eta: 1000", "eta: 500"))
    commit(folder, "eta 20")

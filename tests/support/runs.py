"""A small experiment that DVC runs in a second: its results are arithmetic on its seed."""

import contextlib
import json
from pathlib import Path
from typing import Any

from dvc.cli import main as dvc

from support.revisions import commit, git

DVC_YAML = """
stages:
  code: {cmd: cp code.txt data/code/train.json, deps: [code.txt], outs: [data/code/train.json]}
  policy:
    cmd: mkdir -p data/records && cat offset params.yaml > data/policy && cp record.json data/records/policy.json
    deps: [offset, record.json]
    params: [seed]
    outs: [data/policy, data/records/policy.json]
  train:
    foreach: ${iterations}
    do:
      cmd: tr a-z A-Z < data/policy > data/model && cp record.json data/records/train@${key}.json
      deps: [data/policy, record.json]
      params: [eta]
      outs: [data/model, "data/records/train@${key}.json"]
  report:
    cmd: python3 report.py
    deps: [report.py, data/model, data/records]
    outs: [reports/metrics.json: {cache: false}, reports/page.md: {cache: false}]
"""
REPORT_PY = """
import json, os, pathlib, time
time.sleep(float(os.environ.get("SLEEP", 0)))
lines = pathlib.Path("data/model").read_text().splitlines()
values = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("SEED", "OFFSET"))}
if pathlib.Path("fail").read_text().split() == [str(values["SEED"])]:
    raise SystemExit("the disk is on fire")
if "RUNS" in os.environ:
    with open(os.environ["RUNS"], "a") as file:
        file.write(f"{values['SEED']} {pathlib.Path.cwd()}\\n")
rate = 60 + values["SEED"] / 4 + values["OFFSET"]
models = {
    "base": {"win_rate": 50.0, "standard_error": 1.0},
    "iter1": {"win_rate": rate, "standard_error": 0.75, "vs_base": {"difference": rate - 50, "standard_error": 0.5}},
}
pathlib.Path("reports/metrics.json").write_text(json.dumps({"alpaca_eval": models}))
pathlib.Path("reports/page.md").write_text("The same for all.")
"""
RECORD: dict[str, Any] = {"python": "3.11", "tools": {"torch": "2.13.0"}, "numerics": "portable", "device": {}}
FILES = {
    "dvc.yaml": DVC_YAML,
    "params.yaml": "seed: 42  # of everything\neta: 10\niterations: {iter1: base}\n",
    "published.yaml": "published: null\n",
    "code.txt": "{}",
    "offset": "offset: 0\n",
    "fail": "never\n",
    "record.json": json.dumps(RECORD),
    "report.py": REPORT_PY,
    "requirements/main.txt": "torch\n",
    ".dvc/config": "[core]\n    analytics = false\n    autostage = false\n",
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    ".gitignore": "/data/\n/scratch/\n/.venv\n",
}


def make_experiment(folder: Path) -> None:
    """Make a Git and DVC repository of FILES, run it and commit its results."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in ("data/code", "data/records", "reports"):
        (folder / name).mkdir(parents=True)
    (folder / "reports/kept").write_text("")  # Git keeps no empty folder
    git(folder, "init", "-q", "-b", "main")
    repro(folder)
    commit(folder, "run")


def repro(folder: Path) -> None:
    """Run `dvc repro` within this process, whose imports are the slowest part of it."""
    with contextlib.chdir(folder):
        assert dvc(["repro", "-q"]) == 0

"""Two revisions of an experiment to compare, without a repository."""

import dataclasses
from typing import Any

import numpy as np

from stages.reporting.paired import Preferences
from stages.tools import revisions
from stages.tools.changes import Items
from stages.tools.revisions import Revision

INSTRUCTIONS, REFERENCES, QUESTIONS = "data/alpaca_eval_set", "data/reference_outputs.json", "data/harness_sets"
STARTS = {"iter1": "base", "iter2": "iter1"}


def make_lock(seed: int = 42, eta: float = 10, **hashes: str) -> dict[str, Any]:
    """Return the stages of a dvc.lock like the miniature's: the sets and the reference outputs depend on the seed.

    hashes: stage -> that of its output, instead of one that depends on the seed.
    """

    def add(stage: str, path: str, deps: dict[str, str], params: dict[str, Any], value: str) -> dict[str, Any]:
        return {
            "cmd": f"python -m stages {stage}",
            "deps": [{"path": dep, "md5": md5} for dep, md5 in ({f"data/code/{stage}.json": "c" * 32} | deps).items()],
            "params": {"params.yaml": params},
            "outs": [{"path": path, "md5": hashes.get(stage.replace("-", "_"), f"{value}{seed}")}],
        }

    base, instructions = {"data/models/base": f"base{seed}"}, {INSTRUCTIONS: f"set{seed}"}
    entries = {
        "assets-alpaca-eval": add("assets-alpaca-eval", INSTRUCTIONS, {}, {"seed": seed, "count": 805}, "set"),
        "assets-harness": add("assets-harness", QUESTIONS, {}, {"seed": seed}, "harness"),
        "assets-model": add("assets-model", "data/models/base", {}, {"seed": seed}, "base"),
        "answer-reference": add("answer-reference", REFERENCES, base | instructions, {"seed": seed}, "references"),
        "train": add("train", "data/models/iter1", base, {"eta": eta}, f"iter1-{eta}-"),
    }
    code = {"cmd": "python -m stages code", "outs": [{"path": f"data/code/{stage}.json", "md5": "c" * 32} for stage in entries]}
    return {"code": code, **entries}


def make_revision(preferences: dict[str, Preferences], title: str = "run", **changed: Any) -> Revision:
    """Return a revision with these preferences and the win rates that numpy computes from them.

    changed: `lock` (arguments of `make_lock`), `params` and `metrics` (flat, in addition), `limits`, `starts`.
    """
    metrics: dict[str, Any] = {"alpaca_eval": {}}
    for name, values in preferences.items():
        known = 100 * np.array([value - 1 for value in values if value is not None])
        error = float(known.std(ddof=1) / np.sqrt(len(known)))
        metrics["alpaca_eval"][name] = {"win_rate": float(known.mean()), "standard_error": error}
    stages = make_lock(**changed.get("lock", {}))
    return Revision(
        title=title,
        params={("evaluate_alpaca", "judge"): "gold"} | changed.get("params", {}),
        metrics=revisions.flatten(metrics) | changed.get("metrics", {}),
        stages=stages,
        items=Items(
            preferences,
            {},
            revisions.find_hash(stages, INSTRUCTIONS),
            revisions.find_hash(stages, QUESTIONS),
            changed.get("starts", STARTS),
        ),
        limits=changed.get("limits"),
    )


def replace_items(revision: Revision, **changed: Any) -> Revision:
    """Return a revision with other `Items`."""
    return dataclasses.replace(revision, items=dataclasses.replace(revision.items, **changed))

"""A small evaluation, and a model that judges it at support.endpoint."""

import subprocess
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.miniature import domain
from stages.runtime import params
from support import endpoint
from support.running import run_stage, set_params

KEY = "sk-this-is-secret"
NO_ENDPOINT = "http://127.0.0.1:9/v1"
"""Nothing listens there."""
OURS, THEIRS = "Sure! I\x1e do not know.", "Ugh."
"""The two outputs; the first contains a character of the gold judge's separator."""


def write_evaluation(folder: Path) -> None:
    """Write params.yaml, reference_outputs.json with 60 outputs THEIRS, and answers.json: 40 times OURS, 20 times THEIRS."""
    set_params(folder, {})
    prompts = domain.distinct_prompts("tests", "evaluation", 60)
    references = [{"dataset": "x", "instruction": text, "output": THEIRS, "generator": "reference"} for text in prompts]
    answers = [row | {"output": OURS if index % 3 else THEIRS, "generator": "ours"} for index, row in enumerate(references)]
    files.write_json(references, folder / "reference_outputs.json")
    files.write_json(answers, folder / "answers.json")


def set_model_judge(folder: Path, url: str, **more: Any) -> params.EvaluateAlpaca:
    """Set a model as judge in the folder's params.yaml and return the section."""
    section = {"judge": "some/judge", "base_url": url, "workers": 4, **more}
    set_params(folder, {"evaluate_alpaca": section})
    return params.EvaluateAlpaca(**section)


def run_judge(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run evaluate-alpaca on the folder's answers.json, with `set` as the evaluation set and `out` as the output."""
    paths = ["--answers", "answers.json", "--reference-outputs", "reference_outputs.json", "--alpaca-eval-set", "set"]
    return run_stage(folder, "evaluate-alpaca", *paths, "--out", "out", **{"OPENAI_API_KEY": KEY, **environment})


def prefer_ours(_: int, prompt: str) -> tuple[int, Any]:
    """Prefer OURS with probability 0.8, in either position. alpaca-eval never sends pairs of identical outputs."""
    return endpoint.chosen(0.8 if prompt.index("Sure!") < prompt.index(THEIRS) else 0.2)


def files_containing(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]

"""The ranker's win rates on AlpacaEval's instructions, against llm-blender's own logits."""

import json
import math
import statistics
import subprocess
from pathlib import Path

import pytest

from stages import compare_answers
from stages.artifacts import files
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.ranker import PYTHON, write_responses
from support.running import run_stage, set_params

RECIPE = ROOT / "recipes/miniature-published/params.yaml"
SCALE = 0.8
ANSWERS = {
    "base": ["Ugh.", "Three metals are iron, tin, lead.", ""],
    "iter1": ["The answer is 3.", "Whatever. Three", "2 plus 2 is 4."],
    "gpt": ["The answer is 4. I hope that helps!", "Three metals are iron, tin, lead.", "The answer is 4."],
}
"""Model -> answers to INSTRUCTIONS; two are the same."""
INSTRUCTIONS = ["What is 1 plus 2?", "Name three metals.", "What is 2 plus 2?"]
OPTIONS = ("--answers", "answers", "--out", "alpaca_eval/pairrm/comparison.json")


def write_inputs(folder: Path) -> None:
    """Write params.yaml and the answers of ANSWERS, of which gpt's existed already, and those of a model that is not in it."""
    models = {name: {"repo": f"./{name}"} for name in ("base", "iter1")}
    rank = {"scale": SCALE, "shard_size": 2, "tokens_per_batch": 4096, "attention": "plain"}
    set_params(folder, {"models": models, "answers": {"gpt": "gpt.json"}, "rank": rank}, source=RECIPE)
    for name, texts in (ANSWERS | {"dropped": ["x", "y", "z"]}).items():
        rows = [{"instruction": prompt, "output": text} for prompt, text in zip(INSTRUCTIONS, texts, strict=True)]
        files.write_json(rows, folder / "answers" / f"{name}.json")


def score_with_llm_blender(ranker: Path, folder: Path) -> list[list[list[float]]]:
    """Return llm-blender's logits, one (K, K) per instruction: row i shows answer i first."""
    rows = list(zip(INSTRUCTIONS, map(list, zip(*ANSWERS.values(), strict=True)), strict=True))
    responses = write_responses(rows, folder / "responses.parquet")
    oracle = [PYTHON, ROOT / "tests/oracles/blender_scores.py", ranker, responses, folder / "oracle.json"]
    subprocess.run([*map(str, oracle)], check=True, capture_output=True)
    logits: list[list[list[float]]] = json.loads((folder / "oracle.json").read_text())["logits"]
    return logits


def test_answers_to_an_instruction_stand_side_by_side_in_the_order_of_the_models() -> None:
    outputs = {
        name: [{"instruction": prompt, "output": text} for prompt, text in zip(INSTRUCTIONS, texts, strict=True)]
        for name, texts in ANSWERS.items()
    }
    rows = compare_answers.join_answers(outputs).to_pylist()
    assert [row["prompt"] for row in rows] == INSTRUCTIONS
    assert [row["responses"] for row in rows] == [
        ["Ugh.", "The answer is 3.", "The answer is 4. I hope that helps!"],
        ["Three metals are iron, tin, lead.", "Whatever. Three", "Three metals are iron, tin, lead."],
        ["", "2 plus 2 is 4.", "The answer is 4."],
    ]
    assert len({row["prompt_id"] for row in rows}) == 3


@pytest.mark.slow
def test_every_model_is_compared_with_every_other_as_llm_blender_does(ranker: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    done = run_stage(tmp_path, "compare-answers", "--ranker", ranker, *OPTIONS)
    assert done.returncode == 0, done.stderr
    found = files.read_json(tmp_path / "alpaca_eval/pairrm/comparison.json")
    assert sorted(found) == ["models", "n", "standard_errors", "win_rates"]
    assert (found["models"], found["n"]) == (["base", "iter1", "gpt"], 3)
    logits = score_with_llm_blender(ranker, tmp_path)
    for i in range(3):
        for j in range(3):
            wins = [100 / (1 + math.exp(SCALE * (one[j][i] - one[i][j]))) for one in logits]
            error = statistics.stdev(wins) / math.sqrt(3)
            assert found["win_rates"][i][j] == pytest.approx(statistics.mean(wins), abs=1e-3)
            assert found["standard_errors"][i][j] == pytest.approx(error, abs=1e-3)


@pytest.mark.slow
def test_answers_to_other_instructions_stop_the_stage(tmp_path: Path, ranker: Path) -> None:
    write_inputs(tmp_path)
    rows = files.read_json(tmp_path / "answers/gpt.json")
    files.write_json(rows[::-1], tmp_path / "answers/gpt.json")
    done = run_stage(tmp_path, "compare-answers", "--ranker", ranker, *OPTIONS)
    assert done.returncode == 1
    assert_message(done.stderr, "compare-answers: error: ", "answers/gpt.json", "instructions", "base.json", "`dvc repro`")
    assert not (tmp_path / "alpaca_eval").exists()

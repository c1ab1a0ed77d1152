import json
import os
from pathlib import Path

import pytest
from running import run_stage, set_params

from stages import domain, evaluate_alpaca, files

REFERENCE = os.environ.get("SPPO_REFERENCE")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """An evaluation set of the domain, and answers to it that are right where the reference's are wrong, or alike."""
    set_params(tmp_path, {})
    prompts = domain.distinct_prompts("tests", "evaluation", 60)
    reference = [{"dataset": "x", "instruction": text, "output": "Ugh.", "generator": "reference"} for text in prompts]
    answers = [
        row | {"output": "Sure! I\x1e do not know." if k % 3 else "Ugh.", "generator": "ours"}
        for k, row in enumerate(reference)
    ]
    files.write_json(reference, tmp_path / "set" / "reference_outputs.json")
    files.write_json(answers, tmp_path / "answers.json")
    return tmp_path


def test_the_win_rate_is_the_mean_gold_preference(world: Path) -> None:
    done = run_stage(world, "evaluate_alpaca", "answers.json", "set", "out")
    assert done.returncode == 0, done.stderr
    metrics = files.read_json(world / "out" / "metrics.json")
    answers = files.read_json(world / "answers.json")
    gold = [domain.preference(row["instruction"], row["output"], "Ugh.") for row in answers]
    assert metrics["win_rate"] == pytest.approx(100 * sum(gold) / 60)
    assert (metrics["n_total"], metrics["n_wins"], metrics["n_draws"]) == (60, 40, 20)
    assert metrics["judge"] == "gold"
    assert "length_controlled_winrate" not in metrics
    first = (world / "out" / "annotations.json").read_bytes()
    run_stage(world, "evaluate_alpaca", "answers.json", "set", "out")
    assert (world / "out" / "annotations.json").read_bytes() == first


def test_answers_to_other_instructions_are_one_line(world: Path) -> None:
    answers = files.read_json(world / "answers.json")
    files.write_json(answers[::-1], world / "answers.json")
    done = run_stage(world, "evaluate_alpaca", "answers.json", "set", "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "evaluate_alpaca: error: answers.json: not the instructions of set in their order: answer them again"
    )
    assert not (world / "out").exists()


def test_a_paid_judge_without_a_key_is_one_line(world: Path) -> None:
    set_params(world, {"evaluate_alpaca.judge": "weighted_alpaca_eval_gpt4_turbo"})
    done = run_stage(world, "evaluate_alpaca", "answers.json", "set", "out")
    assert done.returncode == 1
    assert "set OPENAI_API_KEY" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not REFERENCE, reason="SPPO_REFERENCE names no folder of AlpacaEval reference data")
@pytest.mark.parametrize(("model", "length"), [("Meta-Llama-3-8B-Instruct", 1899), ("SPPO-Llama-3-Instruct-8B-PairRM", 2066)])
def test_lengths_of_the_published_outputs_by_alpaca_evals_own_measure(model: str, length: int, world: Path) -> None:
    folder = Path(str(REFERENCE)) / "alpaca_eval"
    outputs = json.loads((folder / "sppo_outputs" / model / "model_outputs.json").read_text())
    reference = json.loads((folder / "alpaca_eval_gpt4_baseline.json").read_text())
    metrics, _ = evaluate_alpaca.evaluate(outputs, reference, "gold", False, None)
    assert metrics["avg_length"] == length

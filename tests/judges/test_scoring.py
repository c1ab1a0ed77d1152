import os
from pathlib import Path

import pytest

from stages import evaluate_alpaca
from stages.artifacts import files
from stages.judges import scoring
from stages.runtime import params
from stages.runtime.errors import StageError
from support.messages import assert_message

REFERENCE = os.environ.get("SPPO_REFERENCE")
needs_reference = pytest.mark.skipif(not REFERENCE, reason="SPPO_REFERENCE names no folder of AlpacaEval reference data")


def test_length_control_requires_its_file(tmp_path: Path) -> None:
    rows = [{"dataset": "x", "instruction": "a", "output": "b", "generator": "c"}]
    with pytest.raises(StageError) as error:
        scoring.run_alpaca_eval(rows, rows, tmp_path)
    assert_message(str(error.value), str(tmp_path / "df_gamed.csv"), "tatsu-lab/alpaca_eval")


def test_cleaned_annotations_hold_nothing_that_varies_and_no_nan() -> None:
    row = {"preference": float("nan"), "output_1": "a", "gold_date": "today", "gold_version": "1", "gold_time_per_example": 1.5}
    assert scoring.clean_annotations([row]) == [{"preference": None, "output_1": "a"}]


@needs_reference
def test_only_the_805_instructions_in_their_order_are_canonical() -> None:
    rows = files.read_records(Path(str(REFERENCE)) / "alpaca_eval" / "alpaca_eval_gpt4_baseline.json", ["instruction"])
    instructions = [row["instruction"] for row in rows]
    assert scoring.is_canonical(instructions)
    assert not scoring.is_canonical(instructions[1:] + instructions[:1])
    assert not scoring.is_canonical(instructions[:-1])


@needs_reference
def test_length_control_leaves_alpaca_evals_cache_as_it_was() -> None:
    from alpaca_eval import constants

    folder = Path(str(REFERENCE)) / "alpaca_eval"
    model = folder / "models" / "claude-2.1"
    annotations, outputs = (files.read_json(model / f"{name}.json") for name in ("annotations", "model_outputs"))
    before = constants.DEFAULT_CACHE_DIR
    assert "length_controlled_winrate" in scoring.score_annotations(annotations, outputs, folder)
    assert before == constants.DEFAULT_CACHE_DIR


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize(("model", "length"), [("Meta-Llama-3-8B-Instruct", 1899), ("SPPO-Llama-3-Instruct-8B-PairRM", 2066)])
def test_lengths_of_the_published_outputs_are_the_papers(model: str, length: int) -> None:
    folder = Path(str(REFERENCE)) / "alpaca_eval"
    outputs = files.read_json(folder / "sppo_outputs" / model / "model_outputs.json")
    references = files.read_json(folder / "alpaca_eval_gpt4_baseline.json")
    metrics, _ = evaluate_alpaca.evaluate(outputs, references, params.EvaluateAlpaca(judge="gold"), None)
    assert metrics["avg_length"] == length

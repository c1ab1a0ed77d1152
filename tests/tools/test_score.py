import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import files
from stages.runtime.errors import StageError
from stages.tools import score
from support import judging
from support.messages import assert_message
from support.running import run_tool

REFERENCE = os.environ.get("SPPO_REFERENCE")
needs_reference = pytest.mark.skipif(not REFERENCE, reason="SPPO_REFERENCE names no folder of AlpacaEval reference data")


def run_score(folder: Path, annotations: Path, outputs: Path, *more: object) -> "subprocess.CompletedProcess[str]":
    return run_tool(folder, "score", "--annotations", annotations, "--outputs", outputs, *more)


def succeed(folder: Path, annotations: Path, outputs: Path, *more: object) -> dict[str, Any]:
    done = run_score(folder, annotations, outputs, *more)
    assert done.returncode == 0, done.stderr
    metrics: dict[str, Any] = json.loads(done.stdout)
    return metrics


def fail(folder: Path, annotations: Path, outputs: Path, *more: object) -> str:
    done = run_score(folder, annotations, outputs, *more)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize("model", ["claude-2.1", "FuseChat-Gemma-2-9B-Instruct"])
def test_published_annotations_have_the_leaderboards_scores(model: str, tmp_path: Path) -> None:
    source = Path(str(REFERENCE)) / "alpaca_eval"
    expected = files.read_json(source / "expected.json")[model]
    paths = source / "models" / model / "annotations.json", source / "models" / model / "model_outputs.json"
    metrics = succeed(tmp_path, *paths, "--alpaca-eval-set", source)
    assert list(metrics) == [*score.METRICS, "n_failed", "n_empty_references", "annotator", "baseline"]
    assert (metrics["n_failed"], metrics["n_empty_references"], metrics["n_total"]) == (0, 0, 805)
    assert (metrics["annotator"], metrics["baseline"]) == ("weighted_alpaca_eval_gpt4_turbo", "gpt4_1106_preview")
    for name in ("win_rate", "standard_error", "avg_length"):
        assert round(metrics[name], 2) == round(expected[name], 2)
    assert metrics["length_controlled_winrate"] == pytest.approx(expected["length_controlled_winrate"], abs=0.02)


@pytest.mark.slow
@needs_reference
def test_only_the_canonical_set_gets_a_length_controlled_score(tmp_path: Path) -> None:
    source = Path(str(REFERENCE)) / "alpaca_eval"
    model = source / "models" / "claude-2.1"
    outputs = model / "model_outputs.json"
    annotations = files.read_json(model / "annotations.json")
    rotated = tmp_path / "rotated.json"
    files.write_json(annotations[1:] + annotations[:1], rotated)
    text = fail(tmp_path, rotated, outputs, "--alpaca-eval-set", source)
    assert_message(text, "score", str(rotated), "805 instructions", "--no-length-control")
    assert list(succeed(tmp_path, rotated, outputs, "--no-length-control"))[:6] == score.METRICS[2:]
    text = fail(tmp_path, model / "annotations.json", outputs, "--alpaca-eval-set", tmp_path)
    assert_message(text, str(tmp_path / "df_gamed.csv"), "missing", "length control")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The outputs of evaluate-alpaca with the gold judge, in `out`, and what they were made from."""
    judging.write_evaluation(tmp_path)
    done = judging.run_judge(tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path


@pytest.mark.slow
def test_the_pipelines_own_annotations_have_its_metrics(folder: Path) -> None:
    annotations = folder / "out" / "annotations.json"
    metrics = files.read_json(folder / "out" / "metrics.json")
    printed = succeed(folder, annotations, folder / "answers.json", "--no-length-control")
    expected = {name: metrics[name] for name in [*score.METRICS, "n_failed"] if name in metrics}
    assert printed == expected | {"n_empty_references": 0, "annotator": "gold", "baseline": "reference"}
    text = fail(folder, annotations, folder / "reference_outputs.json", "--no-length-control")
    assert_message(text, "reference_outputs.json", str(annotations), "annotated")
    assert_message(fail(folder, annotations, folder / "answers.json"), str(annotations), "--no-length-control")


def write_pair(folder: Path, preference: object, **more: str) -> tuple[Path, Path]:
    """Write annotations and outputs of two instructions; more: keys of the second output, in both files."""
    rows = [{"instruction": "a", "output": "x", "generator": "ours"}, {"instruction": "b", "output": "y", "generator": "ours"}]
    rows[1] |= more
    annotations = [
        {
            "instruction": row["instruction"],
            "output_1": "z",
            "output_2": row["output"],
            "generator_1": "reference",
            "generator_2": row["generator"],
            "preference": value,
        }
        for row, value in zip(rows, (1.5, preference), strict=True)
    ]
    files.write_json(annotations, folder / "annotations.json")
    files.write_json(rows, folder / "outputs.json")
    return folder / "annotations.json", folder / "outputs.json"


def test_a_preference_that_is_not_a_number_is_an_error(tmp_path: Path) -> None:
    text = fail(tmp_path, *write_pair(tmp_path, "first"), "--no-length-control")
    assert_message(text, "score: error: ", "annotations.json", "record 1", "'preference'", "'first'", "annotate")


@pytest.mark.parametrize(("preference", "failed", "rate"), [(None, 1, 50), (0, 0, 50), (2, 0, 75)])
def test_null_and_a_tie_of_the_older_scale_are_counted(preference: object, failed: int, rate: float, tmp_path: Path) -> None:
    metrics = score.score(*write_pair(tmp_path, preference), None)
    assert (metrics["n_failed"], metrics["n_total"], metrics["win_rate"]) == (failed, 2 - failed, rate)
    assert metrics["annotator"] is None


def test_empty_reference_outputs_of_other_instructions_are_counted(tmp_path: Path) -> None:
    annotations, outputs = write_pair(tmp_path, 1.0)
    files.write_json([row | {"output_1": ""} for row in files.read_json(annotations)], annotations)
    assert score.score(annotations, outputs, None)["n_empty_references"] == 2


@needs_reference
@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("output_1", "", ["record 7", "'output_1'", "empty"]),
        ("output_1", "Another.", ["record 7", "'output_1'", "alpaca_eval_gpt4_baseline.json"]),
        ("generator_1", "text_davinci_003", ["record 7", "'generator_1'", "'text_davinci_003'"]),
        ("preference", 1e308, ["record 7", "'preference'", "1e+308"]),
        ("preference", True, ["record 7", "'preference'", "True"]),
    ],
)
def test_one_odd_annotation_among_805_is_refused(key: str, value: object, parts: list[str], tmp_path: Path) -> None:
    source = Path(str(REFERENCE)) / "alpaca_eval"
    model = source / "models" / "FuseChat-Gemma-2-9B-Instruct"
    annotations = files.read_json(model / "annotations.json")
    annotations[7][key] = value
    files.write_json(annotations, tmp_path / "annotations.json")
    with pytest.raises(StageError) as error:
        score.score(tmp_path / "annotations.json", model / "model_outputs.json", source)
    assert_message(str(error.value), str(tmp_path / "annotations.json"), *parts)


@pytest.mark.slow
@needs_reference
def test_nulls_are_left_out_of_the_win_rate_and_length_control_predicts_them(tmp_path: Path) -> None:
    source = Path(str(REFERENCE)) / "alpaca_eval"
    model = source / "models" / "claude-2.1"
    annotations = files.read_json(model / "annotations.json")
    for row in annotations[::8]:
        row["preference"] = None
    files.write_json(annotations, tmp_path / "annotations.json")
    metrics = score.score(tmp_path / "annotations.json", model / "model_outputs.json", source)
    kept = [row["preference"] for row in annotations if row["preference"] is not None]
    assert (metrics["n_failed"], metrics["n_total"]) == (805 - len(kept), len(kept)) == (101, 704)
    assert metrics["win_rate"] == pytest.approx(100 * (sum(kept) / len(kept) - 1))
    whole = files.read_json(source / "expected.json")["claude-2.1"]["length_controlled_winrate"]
    assert metrics["length_controlled_winrate"] == pytest.approx(whole, abs=3)


def test_outputs_of_several_models_are_an_error(tmp_path: Path) -> None:
    text = fail(tmp_path, *write_pair(tmp_path, 2.0, generator="theirs"), "--no-length-control")
    assert_message(text, "outputs.json", "record 1", "'generator'", "'theirs'", "one model")

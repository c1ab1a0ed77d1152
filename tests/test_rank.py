"""The stage as a whole: what must not change a ranking, what the parameters change, and what is rejected."""

import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from stages.artifacts import schemas, tables
from stages.method import sppo
from support.messages import assert_message
from support.ranker import OVERRIDES, PYTHON, ROWS, Rows, write_responses
from support.running import run_stage, set_params

Rank = Callable[..., Path]


@pytest.fixture
def rank(ranker: Path, tmp_path: Path) -> Rank:
    """Rank rows in tmp_path with overrides of params and the environment. Returns the path of the rankings."""

    def run(rows: Rows, name: str = "rankings", environment: dict[str, str] | None = None, **overrides: Any) -> Path:
        set_params(tmp_path, OVERRIDES | {f"rank.{key}": value for key, value in overrides.items()})
        responses = write_responses(rows, tmp_path / "responses.parquet")
        options = ("--ranker", ranker, "--responses", responses, "--out", f"{name}.parquet")
        done = run_stage(tmp_path, "rank", *options, **{"SPPO_WORKERS": "1"} | (environment or {}))
        assert done.returncode == 0, done.stderr
        return tmp_path / f"{name}.parquet"

    return run


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tables.read(path, schemas.RANKINGS).to_pylist()
    return rows


@pytest.mark.slow
def test_nothing_depends_on_shards_batches_or_workers(rank: Rank) -> None:
    first = rank(ROWS, "first", {"SPPO_WORKERS": "1"}, shard_size=5)
    assert rank(ROWS, "workers", {"SPPO_WORKERS": "2"}).read_bytes() == first.read_bytes()
    for row, other in zip(read(first), read(rank(ROWS, "batches", tokens_per_batch=1)), strict=True):
        torch.testing.assert_close(torch.tensor(row["logits"]), torch.tensor(other["logits"]), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_identical_responses_are_scored_once_and_are_a_tie(rank: Rank) -> None:
    prompt, (first, second, _) = ROWS[0]
    twice, alike = read(rank([(prompt, [first, second, first]), ("Another?", [first] * 3)]))
    (distinct,) = read(rank([(prompt, [first, second, "x"])], "distinct"))
    assert alike["logits"] == [[0.0] * 3] * 3
    assert alike["probabilities"] == [0.5] * 3
    assert alike["tie"]
    assert alike["chosen"] == alike["rejected"]
    assert twice["logits"][0][2] == twice["logits"][2][0] == 0
    assert twice["logits"][0] == twice["logits"][2]
    assert twice["logits"][0][1] == pytest.approx(distinct["logits"][0][1], abs=1e-5)
    assert {twice["chosen"], twice["rejected"]} == {0, 1}
    assert not twice["tie"]


@pytest.mark.slow
def test_the_templated_prompt_and_aggregate_probabilities_are_parameters(rank: Rank) -> None:
    plain, templated = (read(rank(ROWS[:1], kind, input=kind))[0] for kind in ("instruction", "templated"))
    assert templated["logits"] != plain["logits"]
    prompt, responses = ROWS[0]
    assert templated["logits"] == read(rank([(f"<s>user: {prompt}", responses)], "by hand"))[0]["logits"]
    (aggregate,) = read(rank(ROWS[:1], "aggregate", probability="aggregate"))
    assert aggregate["logits"] == plain["logits"]
    assert (aggregate["chosen"], aggregate["rejected"]) == (plain["chosen"], plain["rejected"])
    logits = torch.tensor(plain["logits"], dtype=torch.float64)
    assert aggregate["probabilities"] == pytest.approx(sppo.win_probabilities(sppo.aggregate_scores(logits)).tolist())
    assert aggregate["probabilities"] != pytest.approx(plain["probabilities"])


@pytest.mark.slow
def test_the_scale_of_the_scores_is_a_parameter(rank: Rank) -> None:
    half, whole = (read(rank(ROWS[:1], f"scale {scale}", scale=scale))[0] for scale in (0.5, 1.0))
    differences = [
        [one - other for one, other in zip(*both, strict=True)]
        for both in zip(half["logits"], zip(*half["logits"], strict=True), strict=True)
    ]
    for row, scale in ((half, 0.5), (whole, 1.0)):
        wins = [[1 / (1 + math.exp(-scale * value)) for value in values] for values in differences]
        assert row["probabilities"] == pytest.approx([sum(values) / 3 for values in wins])
    probabilities = half.pop("probabilities"), whole.pop("probabilities")
    assert probabilities[0] != pytest.approx(probabilities[1])
    assert half == whole


@pytest.mark.slow
def test_truncated_prompts_and_responses_are_counted(rank: Rank) -> None:
    """PairRM reads 1224 tokens of the prompt, and of each response 412 and half of what the prompt leaves."""
    word = "tin "
    rows = [("A", [word * 1100, "x", word * 1100 + "y"]), (word * 1300, ["x", "y", word * 450]), ("B", ["x", word * 900, "y"])]
    truncated = [(row["prompt_truncated"], row["responses_truncated"]) for row in read(rank(rows))]
    assert truncated == [(False, 2), (True, 1), (False, 0)]


MARKERS = ["<|source|>", "a <|candidate|> b", "<|candidate1|><|candidate2|>", "[SEP] [CLS] [PAD] [MASK]", "\x00", "\u0301x"]
LOOKALIKES = ["＜|source|＞", "a ＜|candidate|＞ b", "［SEP］", "\u0338x"]
"""What the tokenizer's normalisation (NFKC) turns into a marker, or what changes the marker in front of it."""


@pytest.mark.slow
def test_texts_with_markers_of_pairrm_are_ranked(rank: Rank) -> None:
    texts = MARKERS + LOOKALIKES
    rows = [(prompt, ["Fine.", text, ""]) for prompt, text in zip(texts, reversed(texts), strict=True)]
    assert all(torch.tensor(row["logits"]).isfinite().all() for row in read(rank(rows)))


def run_rejected(folder: Path, ranker: Path, responses: Path) -> str:
    """Run rank on input that it must reject, without an output, and return its one line on stderr."""
    set_params(folder, OVERRIDES)
    done = run_stage(folder, "rank", "--ranker", ranker, "--responses", responses, "--out", "rankings.parquet")
    assert done.returncode == 1, done.stderr
    assert not (folder / "rankings.parquet").exists()
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.slow
def test_a_single_response_is_rejected(tmp_path: Path) -> None:
    path = write_responses([("a", ["b"])], tmp_path / "responses.parquet")
    assert_message(run_rejected(tmp_path, tmp_path, path), str(path), "at least 2", "generate.samples")


@pytest.mark.slow
def test_a_missing_column_is_rejected(tmp_path: Path) -> None:
    path = write_responses(ROWS, tmp_path / "responses.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["prompt"]), path)
    assert_message(run_rejected(tmp_path, tmp_path, path), "responses.parquet", "missing column 'prompt'")


@pytest.mark.slow
def test_missing_files_are_rejected(tmp_path: Path) -> None:
    assert_message(run_rejected(tmp_path, tmp_path, tmp_path / "nothing.parquet"), "nothing.parquet is missing")
    path = write_responses(ROWS, tmp_path / "responses.parquet")
    assert_message(run_rejected(tmp_path, tmp_path / "no-ranker", path), "no-ranker is missing")


@pytest.mark.slow
def test_logits_that_are_not_finite_are_rejected(ranker: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ranker, broken)
    program = (
        "import sys; from safetensors.torch import load_file, save_file; path = sys.argv[1]; weights = load_file(path);"
        "weights['head_layer.4.weight'].fill_(3e38); save_file(weights, path)"  # finite, but their sums are not
    )
    subprocess.run([str(PYTHON), "-c", program, str(broken / "PairRM" / "model.safetensors")], check=True)
    set_params(tmp_path, OVERRIDES | {"rank.shard_size": 100})
    responses = write_responses(ROWS, tmp_path / "responses.parquet")
    options = ("--ranker", broken, "--responses", responses, "--out", "rankings.parquet")
    done = run_stage(tmp_path, "rank", *options, SPPO_WORKERS="1")
    assert done.returncode == 1
    assert_message(done.stderr, schemas.prompt_id(ROWS[0][0]), "not finite", "weights")
    assert not (tmp_path / "rankings.parquet").exists()

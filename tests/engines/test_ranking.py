import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from stages.artifacts import schemas
from stages.engines import pairrm, ranking
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message

LOGITS = torch.tensor([[0.0, -1.0, -2.0], [3.0, 0.0, -1.0], [2.0, 1.0, 0.0]])


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_a_row_holds_the_pair_and_the_probabilities() -> None:
    """Scores are (L_ij - L_ji) / 2: s_01 = -2, s_02 = -2, s_12 = -1."""
    row = ranking.rank_row("an id", LOGITS, ["a", "b", "c"], "pairwise", 0.5)
    assert row["prompt_id"] == "an id"
    assert row["logits"] == LOGITS.tolist()
    assert (row["chosen"], row["rejected"], row["tie"]) == (2, 0, False)
    expected = [(0.5 + 2 * sigmoid(-2)) / 3, (sigmoid(2) + 0.5 + sigmoid(-1)) / 3, (sigmoid(2) + sigmoid(1) + 0.5) / 3]
    assert row["probabilities"] == pytest.approx(expected)


def test_aggregate_probabilities_change_nothing_else() -> None:
    pairwise, aggregate = (ranking.rank_row("x", LOGITS, ["a", "b", "c"], kind, 0.5) for kind in ("pairwise", "aggregate"))
    # Aggregates a_i = (1/K) sum_k (L_ik - L_ki): -8/3, 2/3 and 6/3.
    expected = [sum(sigmoid((a - b) / 3) for b in (-8, 2, 6)) / 3 for a in (-8, 2, 6)]
    assert aggregate.pop("probabilities") == pytest.approx(expected)
    assert pairwise.pop("probabilities") != pytest.approx(expected)
    assert aggregate == pairwise


def test_the_scale_changes_pairwise_probabilities_only() -> None:
    rows = {
        kind: [ranking.rank_row("x", LOGITS, ["a", "b", "c"], kind, scale) for scale in (0.5, 1)]
        for kind in ("pairwise", "aggregate")
    }
    half, whole = rows["pairwise"]
    # L_ij - L_ji: s_01 = -4, s_02 = -4, s_12 = -2.
    expected = [(0.5 + 2 * sigmoid(-4)) / 3, (sigmoid(4) + 0.5 + sigmoid(-2)) / 3, (sigmoid(4) + sigmoid(2) + 0.5) / 3]
    assert whole.pop("probabilities") == pytest.approx(expected)
    assert half.pop("probabilities") != pytest.approx(expected)
    assert half == whole
    assert rows["aggregate"][0] == rows["aggregate"][1]


@pytest.mark.parametrize("responses", [["a", "a", "a"], ["a", "b", "a"]])
def test_identical_texts_are_a_tie(responses: list[str]) -> None:
    """Both when all logits are equal and when the chosen and the rejected text are identical in spite of their logits."""
    logits = torch.zeros(3, 3) if len(set(responses)) == 1 else LOGITS
    row = ranking.rank_row("x", logits, responses, "pairwise", 0.5)
    assert row["tie"]
    assert row["rejected"] == row["chosen"]


def test_a_logit_that_is_not_finite_is_rejected() -> None:
    with pytest.raises(StageError) as error:
        ranking.rank_row("an id", LOGITS.log(), ["a", "b", "c"], "pairwise", 0.5)
    assert_message(str(error.value), "prompt an id", "not finite", "weights")


@pytest.fixture
def settings() -> params.Rank:
    rank: params.Rank = params.load("rank", path=ROOT / "params.yaml").rank
    return rank


@pytest.mark.parametrize(("source", "column"), [("instruction", "prompt"), ("templated", "templated_prompt")])
def test_a_shard_is_ranked_by_the_column_that_the_parameter_selects(
    settings: params.Rank, monkeypatch: pytest.MonkeyPatch, source: str, column: str
) -> None:
    encoded: list[Any] = []

    def encode(_: Any, prompt: str, responses: list[str]) -> pairrm.EncodedTexts:
        encoded.append((prompt, responses))
        return pairrm.EncodedTexts(torch.tensor([1]), [], [0, 1, 2], True, 2)

    monkeypatch.setattr(pairrm, "encode", encode)
    monkeypatch.setattr(pairrm, "pair_logits", lambda *_: [LOGITS])
    row = {"prompt_id": "an id", "prompt": "p", "templated_prompt": "<p>", "responses": ["a", "b", "c"]}
    chosen = settings.model_copy(update={"input": source, "scale": 2})
    table = ranking.rank_shard(None, lambda _: LOGITS, chosen, pa.Table.from_pylist([row]))
    assert encoded == [(row[column], row["responses"])]
    assert table.schema == schemas.RANKINGS
    (result,) = table.to_pylist()
    expected = ranking.rank_row("an id", LOGITS, ["a", "b", "c"], settings.probability, 2)
    assert result == expected | {"prompt_truncated": True, "responses_truncated": 2}


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory ...")


def test_out_of_gpu_memory_names_its_parameter(settings: params.Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairrm, "load_blender", lambda _: None)
    monkeypatch.setattr(pairrm, "select_forward", lambda *_: None)
    monkeypatch.setattr(pairrm, "encode", lambda *_: None)
    monkeypatch.setattr(pairrm, "pair_logits", out_of_memory)
    threads = torch.get_num_threads()
    compute = ranking.load_ranker(Path("x"), settings)
    torch.set_num_threads(threads)
    with pytest.raises(StageError) as error:
        compute(pa.table({"prompt_id": ["a"], "prompt": ["b"], "responses": [["c", "d"]]}))
    assert_message(str(error.value), "out of GPU memory", f"lower rank.tokens_per_batch (now {settings.tokens_per_batch})")


@pytest.mark.parametrize("name", ["load_blender", "select_forward"])
def test_a_gpu_without_room_for_the_ranker_is_reported(
    settings: params.Rank, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(pairrm, "load_blender", lambda _: None)
    monkeypatch.setattr(pairrm, name, out_of_memory)
    threads = torch.get_num_threads()
    with pytest.raises(StageError) as error:
        ranking.load_ranker(Path("x"), settings)
    torch.set_num_threads(threads)
    assert_message(str(error.value), "out of GPU memory", "PairRM", "other processes", "nvidia-smi")

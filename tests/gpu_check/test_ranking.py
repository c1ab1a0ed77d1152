import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_check import plain_ranker, ranking, rows, sizes
from stages.engines import deberta, pairrm


def test_traffic_counts_what_operations_read_and_write_but_not_views() -> None:
    left, right = torch.ones(3, 5, device="meta"), torch.ones(5, 7, device="meta")
    with ranking.Traffic() as traffic:
        left @ right
    assert traffic.bytes == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    with ranking.Traffic() as traffic:
        left.view(15)
        left.t()
    assert traffic.bytes == 0


def test_the_stand_in_pads_and_marks_as_its_definition_says() -> None:
    """A batch of triples of different lengths, against each triple alone as one sequence without any padding."""
    blender = plain_ranker.make_blender(sizes.CPU.ranking, "cpu")
    texts = ranking.make_texts(blender, sizes.CPU.ranking)
    triples = [(each.source, each.candidates[0], each.candidates[1]) for each in texts]
    triples[0][0][2] = plain_ranker.TOKENIZER.pad_token_id  # within a text, it is a word like any other
    batched = pairrm.run_llm_blender(blender, triples)
    markers = plain_ranker.TOKENIZER
    for triple, logit in zip(triples, batched, strict=True):
        ids = torch.cat(triple).tolist()
        places = [index for index, token in enumerate(ids) if token in (markers.source_prefix_id, markers.cand_prefix_id)]
        ids[places[1]], ids[places[2]] = markers.cand1_prefix_id, markers.cand2_prefix_id
        with torch.no_grad():
            hidden = blender.ranker.pretrained_model(torch.tensor([ids])).last_hidden_state[0]
            source, left, right = (hidden[place] for place in places)
            scores = [blender.ranker.head_layer(torch.cat([source, each])) for each in (left, right)]
        assert logit.item() == pytest.approx((scores[0] - scores[1]).item(), abs=1e-4)


def test_the_chosen_and_rejected_have_the_highest_and_lowest_mean_score() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0], [-2.0, 0.0, -3.0], [1.0, 3.0, 0.0]])
    assert ranking.choose([logits]) == [(2, 1)]


def check_fused(blender: Any) -> list[rows.Row]:
    size = sizes.CPU.ranking
    texts = ranking.make_texts(blender, size)
    expected = ranking.expected_logits(blender, texts)
    return ranking.check_fused(blender, texts, size, expected, "the oracle", plain_seconds=1e9, flops=1e12)


@pytest.mark.slow
def test_the_fused_attention_passes_the_stages_check_and_the_tools() -> None:
    """The kernel in its uncompiled form on a CPU, which the stage treats as a GPU by this name."""
    found = check_fused(plain_ranker.make_blender(sizes.CPU.ranking, "cpu:0"))
    assert [row.verdict for row in found] == ["pass"] * 5, found
    assert all(row.what.startswith("rank, rank.attention: fused") for row in found)
    assert re.fullmatch(r"\d+\.\d\d \(\d+ pairs/s; .*: \d+% of 1 TFLOP/s\)", found[-1].value)


def test_a_fused_attention_that_is_wrong_fails_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deberta, "attention_scale", lambda _: 1.0)
    (row,) = check_fused(plain_ranker.make_blender(sizes.CPU.ranking, "cpu:0"))
    assert row.verdict == "fail"
    assert "the fused attention gives other logits than llm-blender" in row.reason


@pytest.mark.parametrize(("plain_seconds", "verdict"), [(1e9, "pass"), (0.0, "fail")])
def test_a_fused_attention_that_is_slower_fails(monkeypatch: pytest.MonkeyPatch, plain_seconds: float, verdict: str) -> None:
    expected = [torch.tensor([[0.0, 1.0], [-2.0, 0.0]])]
    monkeypatch.setattr(pairrm, "select_forward", lambda *_: None)
    monkeypatch.setattr(pairrm, "pair_logits", lambda *_: expected)
    blender = plain_ranker.make_blender(sizes.CPU.ranking, "cpu")
    *_, speed = ranking.check_fused(blender, [], sizes.CPU.ranking, expected, "the oracle", plain_seconds, flops=1e12)
    assert speed.verdict == verdict


def test_pairs_and_tokens_are_those_of_both_orders() -> None:
    texts = [
        pairrm.EncodedTexts(torch.arange(10), [torch.arange(count) for count in counts], [], False, 0)
        for counts in ((1, 2, 3), (7, 8))
    ]
    assert ranking.count_work(texts) == (6 + 2, 6 * 10 + (3 + 4 + 5) * 2 + 2 * 10 + 15 * 2)


def test_weights_are_those_that_multiply_each_token() -> None:
    size = sizes.CPU.ranking
    model = plain_ranker.make_blender(size, "cpu").ranker.pretrained_model
    layer = 4 * size.width**2 + 2 * size.width * model.config.intermediate_size
    assert ranking.count_weights(model) == size.layers * layer


def test_the_oracle_is_float32_and_leaves_the_ranker_as_it_was() -> None:
    size = sizes.CPU.ranking
    blender = plain_ranker.make_blender(size, "cpu")
    texts = ranking.make_texts(blender, size)[:1]
    blender.ranker.bfloat16()
    before = [weight.clone() for weight in blender.ranker.parameters()]
    (logits,) = ranking.expected_logits(blender, texts)
    assert all(torch.equal(old, new) for old, new in zip(before, blender.ranker.parameters(), strict=True))
    blender.ranker.float()
    again = pairrm.pair_logits(pairrm.select_forward(blender, "plain"), texts, size.tokens_per_batch)[0]
    torch.testing.assert_close(logits, again, atol=1e-4, rtol=0)


def test_in_a_rehearsal_the_fused_attention_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    blender = plain_ranker.make_blender(sizes.CPU.ranking, "cpu")
    monkeypatch.setattr(ranking, "make_blender", lambda *_: (blender, "the oracle"))
    ranking.run(sizes.CPU, tmp_path, {"bandwidth": 1e9}, rehearsal=True)
    found = [row for line in capsys.readouterr().out.splitlines() if (row := rows.parse(line))]
    assert [row.verdict for row in found] == ["pass", "pass", "pass", "skipped", "skipped"]
    assert found[-1].what == "rank, rank.attention: fused"
    assert "no effect on a CPU" in found[-1].reason

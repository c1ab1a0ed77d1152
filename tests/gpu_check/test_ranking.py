import pytest
import torch

from gpu_check import plain_ranker, ranking, sizes
from stages.engines import pairrm


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

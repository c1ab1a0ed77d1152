"""DeBERTa on a CPU against the model's own forward pass in transformers and in llm-blender."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.engines import deberta
from stages.runtime.paths import ROOT
from support.ranker import PYTHON


def make_model(**changes: Any) -> Any:
    """Make a small DebertaV2Model with random weights, with the positions of the published models."""
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 32}
    positions = {"relative_attention": True, "position_buckets": 8, "share_att_key": True, "pos_att_type": "p2c|c2p"}
    config = DebertaV2Config(**sizes, **positions | {"norm_rel_ebd": "layer_norm", "position_biased_input": False} | changes)
    config.max_position_embeddings = 64
    model = DebertaV2Model(config).eval()
    for weights in model.parameters():  # DeBERTa's own initial weights are too small to tell errors from rounding
        torch.nn.init.normal_(weights, std=0.3)
    return model


@pytest.mark.parametrize("block", [1, 100, 2**18])
def test_hidden_states_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Whatever the size of a block, with and without padding."""
    monkeypatch.setattr(deberta, "BLOCK", block)
    model = make_model()
    ids = torch.randint(1, 50, (3, 20))
    positions = torch.tensor([[0, 4, 9], [1, 1, 2], [5, 0, 3]])
    for lengths in ([20, 20, 20], [20, 11, 15]):
        mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).long()
        with torch.inference_mode():
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        states = deberta.hidden_states(model, deberta.project_distances(model), ids, mask, positions)
        torch.testing.assert_close(states, expected[torch.arange(3)[:, None], positions], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"position_buckets": -1},
        {"share_att_key": False},
        {"pos_att_type": "c2p"},
        {"relative_attention": False, "position_biased_input": True},
        {"conv_kernel_size": 3},
    ],
)
def test_other_positions_and_convolutions_are_not_supported(changes: dict[str, Any]) -> None:
    assert deberta.is_supported(make_model())
    assert not deberta.is_supported(make_model(**changes))


@pytest.mark.slow
def test_pair_logits_are_those_of_llm_blenders_forward_pass(ranker: Path) -> None:
    """A GPU runs the latter. Texts of different lengths share the batch, one in several blocks; every weight matters."""
    program = (
        "import sys, torch; from pathlib import Path; from stages.engines import deberta, pairrm; deberta.BLOCK = 5000;"
        "blender = pairrm.load_blender(Path(sys.argv[1])); torch.manual_seed(0);"
        "[weights.data.normal_() for weights in blender.ranker.parameters()];"
        "lengths = [(3, 9, 4), (70, 50, 60), (20, 3, 30)];"
        "text = lambda marker, n: torch.tensor([1, marker, *range(40, 37 + n), 2]); k = blender.ranker_tokenizer;"
        "batch = [(text(k.source_prefix_id, a), text(k.cand_prefix_id, b), text(k.cand_prefix_id, c)) for a, b, c in lengths];"
        "forward = pairrm.select_forward(blender); assert forward.func is pairrm.run_on_cpu;"
        "torch.testing.assert_close(forward(batch), pairrm.run_llm_blender(blender, batch), atol=2e-5, rtol=0)"
    )
    subprocess.run([str(PYTHON), "-c", program, str(ranker)], cwd=ROOT, check=True)

"""DeBERTa, in blocks as on a CPU and fused as on a GPU, against its own forward pass in transformers and in llm-blender."""

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
    config = DebertaV2Config(**sizes | positions | {"norm_rel_ebd": "layer_norm", "position_biased_input": False} | changes)
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


FUSED: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [20, 20, 20]),
    ({}, [20, 1, 15]),
    ({"hidden_size": 32, "num_attention_heads": 2}, [7]),
    ({"position_buckets": 16}, [90, 100]),
    ({"position_buckets": 7}, [70, 50]),
    ({"position_buckets": 256, "max_relative_positions": 512}, [640, 600]),
]
"""Changes of the model, and lengths of the texts: below and above the 64 positions, or 512, within which buckets differ."""


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "lengths"), FUSED)
def test_fused_hidden_states_are_those_of_transformers(changes: dict[str, Any], lengths: list[int]) -> None:
    model, longest = make_model(**changes), max(lengths)
    ids = torch.randint(1, 50, (len(lengths), longest))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    positions = torch.stack([torch.zeros(len(lengths), dtype=torch.long), torch.tensor(lengths) - 1], 1)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    states = deberta.hidden_states(model, deberta.project_distances(model), ids, mask, positions, fused=True)
    torch.testing.assert_close(states, expected[torch.arange(len(lengths))[:, None], positions], atol=1e-4, rtol=1e-4)


def test_tables_of_the_fused_kernel_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are processed in groups whose tables, of 3 heads, 20 tokens and 16 buckets each, are at most so large."""
    model, sizes = make_model(), []

    def record(query: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        assert all(len(each) == len(query) for each in (*inputs[:4], inputs[-1]))
        sizes.append([inputs[2].numel(), inputs[3].numel()])
        return query + len(sizes)

    monkeypatch.setattr(deberta, "select_kernel", lambda _: record)
    module, (keys, queries) = model.encoder.layer[0].attention.self, deberta.project_distances(model)[0]
    hidden, line, lengths = torch.randn(5, 20, 24), torch.zeros(39, dtype=torch.long), torch.full((5,), 20)
    each = 3 * 20 * 16
    monkeypatch.setattr(deberta, "TABLE", 2 * each + 1)
    with torch.inference_mode():
        context = deberta.attend_fused(module, keys, queries, hidden, line, lengths)
        expected = module.query_proj(hidden) / (3 * 8) ** 0.5 + torch.tensor([1.0, 1, 2, 2, 3])[:, None, None]
    assert sizes == [[2 * each] * 2, [2 * each] * 2, [each] * 2]
    torch.testing.assert_close(context, expected)
    monkeypatch.setattr(deberta, "TABLE", 1)
    with torch.inference_mode():
        deberta.attend_fused(module, keys, queries, hidden, line, lengths)
    assert sizes[3:] == [[each] * 2] * 5


def test_kernels_are_compiled_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: (function, options))
    compiled = deberta.select_kernel.__wrapped__("cuda")
    assert compiled == (deberta.attend_with_tables, {"dynamic": True, "fullgraph": True})
    assert deberta.select_kernel("cpu") is deberta.attend_with_tables


def test_small_heads_and_other_positions_are_not_fused() -> None:
    """Triton's product of matrices needs 16 columns."""
    assert deberta.is_fusable(make_model(hidden_size=32, num_attention_heads=2))
    assert not deberta.is_fusable(make_model(hidden_size=30, num_attention_heads=2))
    assert not deberta.is_fusable(make_model(hidden_size=32, num_attention_heads=2, share_att_key=False))


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
    """Texts of different lengths share the batch, one in several blocks; every weight matters. A GPU's check accepts the fused
    attention, and refuses it with distances that are off by one."""
    program = """
import functools, sys, torch
from pathlib import Path
from stages.engines import deberta, pairrm
from stages.runtime.errors import StageError
deberta.BLOCK = 5000
blender = pairrm.load_blender(Path(sys.argv[1]))
torch.manual_seed(0)
[weights.data.normal_() for weights in blender.ranker.parameters()]
lengths = [(3, 9, 4), (70, 50, 60), (20, 3, 30)]
text = lambda marker, n: torch.tensor([1, marker, *range(40, 37 + n), 2])
k = blender.ranker_tokenizer
batch = [(text(k.source_prefix_id, a), text(k.cand_prefix_id, b), text(k.cand_prefix_id, c)) for a, b, c in lengths]
forward = pairrm.select_forward(blender, "plain")
assert forward.func is pairrm.run_deberta and not forward.keywords
expected = pairrm.run_llm_blender(blender, batch)
torch.testing.assert_close(forward(batch), expected, atol=2e-5, rtol=0)
fused = functools.partial(forward, fused=True)
torch.testing.assert_close(fused(batch), expected, atol=2e-5, rtol=0)
pairrm.check_parity(blender, fused)
bucket_distances = deberta.bucket_distances
deberta.bucket_distances = lambda module, distances: bucket_distances(module, distances + 1)
blender.ranker_collator.source_maxlength = blender.ranker_collator.candidate_maxlength = 60  # enough to notice
try:
    pairrm.check_parity(blender, fused)
except StageError:
    sys.exit()
raise AssertionError
"""
    subprocess.run([str(PYTHON), "-c", program, str(ranker)], cwd=ROOT, check=True)

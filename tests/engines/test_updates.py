"""How much of an update a checkpoint keeps, compared with rounding by the bits of a float."""

import math
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.utils
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stages.artifacts import schemas
from stages.engines import training, updates
from stages.runtime import params

weight = st.floats(-4, 4, width=32)


def round_to_bfloat16(value: float) -> float:
    """Round a float32 to its upper 16 bits, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + (bits >> 16 & 1)
    rounded: float = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
    return rounded


def sums_by_hand(before: list[float], after: list[float]) -> list[float]:
    pairs = list(zip(before, after, strict=True))
    left = [round_to_bfloat16(w1) - round_to_bfloat16(w0) for w0, w1 in pairs]
    changed = sum(change != 0 for change in left)
    projection = math.fsum(change * (w1 - w0) for change, (w0, w1) in zip(left, pairs, strict=True))
    return [len(pairs), changed, projection, math.fsum((w1 - w0) ** 2 for w0, w1 in pairs)]


@given(st.lists(st.tuples(weight, weight), min_size=1, max_size=9))
def test_a_checkpoint_keeps_what_rounding_leaves(weights: list[tuple[float, float]]) -> None:
    before, after = ([pair[index] for pair in weights] for index in (0, 1))
    sums = updates.compare_weights(torch.tensor(before), torch.tensor(after), "bfloat16")
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx(sums_by_hand(before, after), rel=1e-12, abs=1e-30)


def test_an_update_below_half_a_unit_in_the_last_place_is_lost() -> None:
    """bfloat16 has steps of 4/512 above 1: of two updates 3/512 and 1/512 it makes 4/512 and 0."""
    sums = updates.compare_weights(torch.ones(2), torch.tensor([1 + 3 / 512, 1 + 1 / 512]), "bfloat16")
    assert updates.summarize(sums) == {"weights": 2, "changed": 0.5, "survived": 1.2}


def test_nothing_is_lost_without_rounding() -> None:
    before = torch.tensor([1.0, 2.0, 3.0])
    sums = updates.compare_weights(before, before + torch.tensor([1e-6, 0, -1e-6]), "float32")
    assert updates.summarize(sums) == {"weights": 3, "changed": 0.666667, "survived": 1.0}
    assert updates.summarize(updates.compare_weights(before, before, "float32"))["survived"] == 0


def test_starting_weights_in_bfloat16_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several chunks."""
    torch.manual_seed(0)
    before = torch.randn(50).bfloat16()
    after = before.float() + 1e-3 * torch.randn(50)
    sums = updates.compare_weights(before, after, "bfloat16").tolist()
    assert sums == pytest.approx(sums_by_hand(before.tolist(), after.tolist()), rel=1e-12)
    monkeypatch.setattr(updates, "CHUNK", 7)
    assert updates.compare_weights(before, after, "bfloat16").tolist() == pytest.approx(sums, rel=1e-12)


def shard(tensor: Tensor, rank: int) -> Tensor:
    """Return a process's half of a flattened tensor, the last one padded with a value that must not count."""
    flat, size = tensor.flatten(), -(-tensor.numel() // 2)
    padded = torch.cat([flat, torch.full((2 * size - flat.numel(),), math.nan)])
    return padded[rank * size : (rank + 1) * size]


def test_the_shards_of_all_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    before = [torch.randn(3, 3), torch.randn(4), torch.randn(1)]
    after = [weights + 0.01 * torch.randn_like(weights) for weights in before]
    total = torch.zeros(4, dtype=torch.float64)
    for rank in (0, 1):
        parameters = [SimpleNamespace(ds_numel=new.numel(), master=shard(new, rank)) for new in after]
        model = SimpleNamespace(parameters=lambda parameters=parameters: parameters)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(deepspeed.utils, "safe_get_local_fp32_param", lambda parameter: parameter.master)
        total += updates.measure_shards(model, [shard(old, rank) for old in before], "bfloat16")
    flat = [torch.cat([weights.flatten() for weights in side]).tolist() for side in (before, after)]
    assert total.tolist() == pytest.approx(sums_by_hand(*flat), rel=1e-12)


def test_adapters_are_measured_as_they_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of the merged model counts, those without adapters as unchanged."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 40}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    monkeypatch.setattr(training.pointers, "check_model", lambda path: path)  # this one has no tokenizer
    lora = params.Lora(rank=2, alpha=16)
    adapted = training.add_adapters(training.load_policy(tmp_path, "float32"), lora)
    weights = {name: 0.01 * torch.randn_like(tensor) for name, tensor in adapted.state_dict().items() if "lora_" in name}
    loaded = training.load_adapters(tmp_path, lora, weights)
    found = updates.measure_adapters(loaded, "bfloat16").tolist()
    base, merged = training.load_policy(tmp_path, "float32"), loaded.merge_and_unload()
    sides: list[Any] = [torch.cat([tensor.flatten() for tensor in model.parameters()]).tolist() for model in (base, merged)]
    assert found == pytest.approx(sums_by_hand(*sides), rel=1e-9)
    assert 0 < found[1] < found[0] == sum(tensor.numel() for tensor in base.parameters())


def test_the_summary_has_the_keys_that_the_report_reads() -> None:
    summary = updates.summarize(torch.tensor([3.0, 1, 1 / 3, 2 / 3], dtype=torch.float64))
    assert {"steps", "effective_steps", *summary} == set(schemas.UPDATE_KEYS)
    assert summary == {"weights": 3, "changed": 0.333333, "survived": 0.5}

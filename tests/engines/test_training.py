from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from stages.artifacts import pointers
from stages.engines import training
from stages.runtime.errors import StageError
from support.messages import assert_message


def test_attention_logits_are_capped_if_the_model_caps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads, attn_logit_softcapping=0.5))
    for weights in gemma.parameters():
        weights.data.normal_(0, 0.5)
    gemma.save_pretrained(tmp_path)
    monkeypatch.setattr(pointers, "check_model", lambda path: path)  # this one has no tokenizer
    loaded = training.load_policy(tmp_path, "float32")
    tokens = torch.arange(9)[None]
    capped = loaded(tokens).logits
    loaded.config.attn_logit_softcapping = None
    for layer in loaded.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (capped - loaded(tokens).logits).abs().max() > 0.1


def test_a_tracker_that_is_not_installed_is_one_line() -> None:
    training.check_tracker("none")
    with pytest.raises(StageError) as raised:
        training.check_tracker("a_tracker")
    assert_message(str(raised.value), "train.report_to", "a_tracker", "not installed", "pip install")


@pytest.mark.parametrize(("device_batch", "devices", "steps"), [(8, 8, 1), (4, 8, 2), (1, 1, 64)])
def test_accumulation_keeps_the_global_batch(device_batch: int, devices: int, steps: int) -> None:
    assert training.accumulation_steps(64, device_batch, devices) == steps

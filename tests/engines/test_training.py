from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, Gemma2Config, GPT2Config, LlamaConfig, PretrainedConfig

from stages.artifacts import pointers
from stages.engines import training
from stages.runtime import params
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


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.mark.parametrize(
    ("config", "without"),
    [
        (LlamaConfig(**SMALL, intermediate_size=64, attention_dropout=0.1), LlamaConfig(**SMALL, intermediate_size=64)),
        (
            GPT2Config(**GPT2, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1),
            GPT2Config(**GPT2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
        ),
        (FalconConfig(**SMALL, attention_dropout=0.1, hidden_dropout=0.1), FalconConfig(**SMALL)),
    ],
    ids=["Llama", "GPT-2", "Falcon"],
)
def test_dropout_in_the_configuration_has_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: PretrainedConfig, without: PretrainedConfig
) -> None:
    """Neither in training mode, which train uses, nor in evaluation mode, which reference uses."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    copy = AutoModelForCausalLM.from_config(without)
    copy.load_state_dict(model.state_dict())
    monkeypatch.setattr(pointers, "check_model", lambda path: path)  # this one has no tokenizer
    loaded, tokens = training.load_policy(tmp_path, "float32"), torch.arange(40)[None]
    expected = copy.eval()(tokens).logits.log_softmax(-1)
    assert (model.train()(tokens).logits.log_softmax(-1) - expected).abs().max() > 1e-3  # dropout would show
    assert torch.equal(loaded.train()(tokens).logits.log_softmax(-1), expected)
    assert torch.equal(loaded.eval()(tokens).logits.log_softmax(-1), expected)


def test_adapters_are_scaled_by_alpha_over_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, intermediate_size=64)).save_pretrained(tmp_path)
    monkeypatch.setattr(pointers, "check_model", lambda path: path)  # this one has no tokenizer
    lora = params.Lora(rank=4, alpha=6)
    adapted = training.add_adapters(training.load_policy(tmp_path, "float32"), lora)
    weights = {name: torch.randn_like(tensor) for name, tensor in adapted.state_dict().items() if "lora_" in name}
    merged = training.load_adapters(tmp_path, lora, weights).merge_and_unload().state_dict()
    for name, before in training.load_policy(tmp_path, "float32").state_dict().items():
        expected, layer = before, f"base_model.model.{name.removesuffix('.weight')}"
        if name.endswith("_proj.weight"):
            expected = before + 6 / 4 * weights[f"{layer}.lora_B.default.weight"] @ weights[f"{layer}.lora_A.default.weight"]
        torch.testing.assert_close(merged[name], expected)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_precision_of_a_checkpoint_is_read_from_its_weights(tmp_path: Path, dtype: torch.dtype, expected: bool) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, intermediate_size=64)).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert training.has_float32_weights(tmp_path) is expected


def test_converted_weights_stay_tied() -> None:
    tied = torch.tensor([1.001, 2.0])
    converted = training.convert_weights({"a": tied, "b": tied, "steps": torch.tensor(3)}, "bfloat16")
    assert converted["a"] is converted["b"]
    assert converted["a"].tolist() == [1.0, 2.0]
    assert converted["a"].dtype == torch.bfloat16
    assert converted["steps"].dtype == torch.int64

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.engines import training
from stages.runtime import params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepspeed_gets_batches_clipping_and_precision(dtype: params.Precision) -> None:
    config = training.zero3_config(4, dtype, 8, 0.7)
    assert config["gradient_clipping"] == 0.7
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 8
    assert config["bf16"] == {"enabled": dtype == "bfloat16"}
    assert config["zero_optimization"]["stage"] == 3
    assert "offload_optimizer" not in config["zero_optimization"]


def test_offloading_moves_the_optimizer_to_the_host_and_keeps_its_kind(tmp_path: Path) -> None:
    """DeepSpeed replaces or refuses any other optimizer than its own unless zero_force_ds_cpu_optimizer is false."""
    config = training.training_arguments(tmp_path, 4, "bfloat16", 1, offload="optimizer").deepspeed
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert "offload_param" not in config["zero_optimization"], "the weights in use stay on the GPU"


def test_adapters_add_alpha_over_rank_times_their_product() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = training.add_adapters(model, params.Lora(rank=2, alpha=12))
    trained = {name for name, weights in adapted.named_parameters() if weights.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    products = {}
    for name, layer in adapted.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            layer.lora_B["default"].weight.data.normal_()
            products[f"{name}.weight"] = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    assert len(products) == 7, "the linear layers of one block"
    after = adapted.merge_and_unload().state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor + 12 / 2 * products[name] if name in products else tensor)

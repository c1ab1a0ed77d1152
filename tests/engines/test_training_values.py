import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.engines import training
from stages.runtime import params
from support.running import ENVIRONMENT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepspeed_gets_batches_clipping_and_precision(dtype: params.Precision) -> None:
    config = training.zero3_config(4, dtype, 8, 0.7)
    assert config["gradient_clipping"] == 0.7
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 8
    assert config["bf16"] == {"enabled": dtype == "bfloat16"}
    assert config["zero_optimization"]["stage"] == 3
    assert "offload_optimizer" not in config["zero_optimization"]


@pytest.mark.parametrize(("accumulation", "dtype"), [(8, "fp32"), (1, None)])
def test_gradients_are_accumulated_in_float32(accumulation: int, dtype: str | None) -> None:
    assert training.zero3_config(4, "bfloat16", accumulation, 0)["data_types"] == {"grad_accum_dtype": dtype}


ACCUMULATE = """
import sys, torch, deepspeed
from stages.engines import distributed, training
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, init_method=f"file://{sys.argv[1]}/group", rank=0,
                           world_size=1)
steps, offload = 8, sys.argv[2]
torch.manual_seed(0)
inputs = torch.randn(steps, 4, 64).bfloat16()
def make(): torch.manual_seed(1); return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
plain = make().bfloat16()
oracle = [torch.zeros_like(weights, dtype=torch.float64) for weights in plain.parameters()]
for batch in inputs:
    for total, gradient in zip(oracle, torch.autograd.grad(plain(batch).float().mean() / steps, tuple(plain.parameters()))):
        total += gradient.double()
def accumulate(config):
    model = make()
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.RMSprop(model.parameters(), lr=1e-3))
    for batch in inputs:
        engine.backward(engine(batch).float().mean())
        if not engine.is_gradient_accumulation_boundary(): engine.step()
    found = [deepspeed.utils.safe_get_full_grad(weights) for weights in model.parameters()]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, oracle))
config = training.zero3_config(4, "bfloat16", steps, 0, offload)
print("errors", accumulate(config), accumulate(config | {"data_types": {}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_accumulated_gradients_are_nearly_the_sum_of_exact_numbers(tmp_path: Path, offload: str) -> None:
    """Of the same bfloat16 gradients of eight batches, summed in float64. In bfloat16 the sum would lose digits."""
    command = [sys.executable, "-c", ACCUMULATE, str(tmp_path), offload]
    done = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, bfloat16 = map(float, done.stdout.split("errors")[1].split()[:2])
    assert ours < 1e-5
    assert bfloat16 > 1e-3


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

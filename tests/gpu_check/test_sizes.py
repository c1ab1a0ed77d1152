import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_check import sizes

MODELS = {size.parity.model for size in (sizes.GPU, sizes.CPU)} | {size.speed.model for size in (sizes.GPU, sizes.CPU)}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.width}x{model.layers}")
def test_the_weights_are_counted_as_transformers_has_them(model: sizes.Model) -> None:
    with torch.device("meta"):
        built = LlamaForCausalLM(LlamaConfig(vocab_size=model.vocabulary, **model.shape()))
    assert model.parameters() == built.num_parameters()


def test_the_large_model_has_a_billion_weights() -> None:
    assert 1.0e9 <= sizes.GPU.speed.model.parameters() < 1.2e9

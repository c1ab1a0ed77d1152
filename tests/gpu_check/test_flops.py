import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_check import flops


def test_a_pass_takes_two_flops_per_weight_and_token_besides_attention() -> None:
    shape = {
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))
    weights = sum(module.weight.numel() for module in model.model.modules() if isinstance(module, torch.nn.Linear))
    pair = {"prompt_token_ids": range(3), "chosen_token_ids": range(5), "rejected_token_ids": range(2)}
    attention = 4 * 8 * 2 * (9 / 2 + 3 * 5 + 25 / 2 + 3 * 2 + 4 / 2)
    assert flops.count_flops([pair], shape, 50) == 2 * 10 * weights + 2 * 7 * model.lm_head.weight.numel() + attention

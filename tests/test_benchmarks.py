import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import __main__ as bench
from benchmarks import gpu, measure


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    seconds = measure.in_turn({name: lambda name=name: calls.append(name) for name in ("a", "b")}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_a_figure_is_the_median_of_the_rounds_own_ratios() -> None:
    found = measure.figure("x", "y", 12, [1.0, 2.0, 4.0], [3.0, 4.0, 20.0])
    assert (found.ratio, found.low, found.high) == (3.0, 2.0, 5.0)
    assert (found.ours, found.baseline) == (12 / 2, 12 / 4)


def test_the_page_has_a_table_a_benchmark_and_says_what_did_not_run() -> None:
    figure = {
        "subject": "s",
        "size": "z",
        "ours": 2.0,
        "baseline": 1.0,
        "ratio": 2.0,
        "low": 1.5,
        "high": 2.5,
        "wanted": ">= 2",
    }
    text = bench.page({"rank": [figure], "gpu": []})
    assert "| s | z | 2 | 1 | 2.00 | 1.50 to 2.50 | >= 2 |" in text
    assert "## gpu\n\nWhat a GPU reaches of its limit" in text
    assert text.endswith("\n\nNot run: there is no GPU here.\n")


@pytest.mark.parametrize("name", bench.ENVIRONMENTS)
def test_every_benchmark_is_a_module_and_every_module_one(name: str) -> None:
    assert importlib.util.find_spec(f"benchmarks.{name}")
    helpers = {"__init__", "__main__", "measure", "texts"}
    assert {path.stem for path in Path(bench.__file__).parent.glob("*.py")} == helpers | set(bench.ENVIRONMENTS)


def test_the_flops_of_a_pass_are_two_a_weight_and_token_besides_attention() -> None:
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
    assert gpu.forward_flops([pair], shape, 50) == 2 * 10 * weights + 2 * 7 * model.lm_head.weight.numel() + attention

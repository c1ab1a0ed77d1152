"""The fused attention, uncompiled as on a CPU, against the models' own attention, and its checks against wrong kernels."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM, FalconConfig, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from stages.engines import training
from stages.method import attention, packing
from stages.runtime import params
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.packed import GEMMA, compute_logps, make_model, make_rows, make_sharp

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ROWS = make_rows([(5, 12, 11), (30, 60, 80), (1, 1, 1)])
"""In two blocks: the second pair is in both."""


@pytest.fixture(autouse=True)
def _forget_shapes() -> None:
    """Let the kernel be traced for this test's model: one process has one model, and traces other lengths only."""
    torch._dynamo.reset()


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FlexAttention compute gradients on a CPU: its uncompiled form can, but torch refuses to on this device."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


def make_fused(config: Any, **changes: Any) -> Any:
    return packing.enable_scoring(make_model(config, **HEADS | changes), fused=True)


def test_a_token_attends_to_its_own_segment_and_its_prompts() -> None:
    """A pair of a prompt of two tokens and two responses of one, another pair of one token each, one of padding."""
    segments = torch.tensor([[0, 0, 1, 2, 3, 4, 5, -1]])
    mask = attention.dense_mask(segments, torch.float32)
    assert mask.shape == (1, 1, 8, 8)
    visible = [[key for key in range(8) if mask[0, 0, query, key] == 0] for query in range(8)]
    assert visible == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [4], [4, 5], [4, 6], [7]]
    assert set(mask.flatten().tolist()) == {0, -math.inf}
    padded = torch.nn.functional.pad(segments, (0, 120), value=-1)
    blocks = attention.block_mask(padded)
    assert torch.equal(flex_attention.create_mask(blocks.mask_mod, 1, 1, 8, 8, "cpu"), mask == 0)


def test_only_blocks_in_which_nothing_is_visible_are_skipped() -> None:
    """By blocks of 128: the first pair's prompt fills two, its responses end in the fourth, the next pair has the rest."""
    sizes = [256, 100, 100, 20, 30, 120, 14]
    segments = torch.repeat_interleave(torch.tensor([0, 1, 2, 3, 4, 5, -1]), torch.tensor(sizes))
    segments = torch.stack([segments, torch.zeros_like(segments)])
    blocks = attention.block_mask(segments)
    assert blocks.BLOCK_SIZE == (128, 128)
    assert blocks.to_dense()[0, 0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    counted = [blocks.kv_num_blocks[0, 0].tolist(), blocks.full_kv_num_blocks[0, 0].tolist()]
    assert counted == [[1, 1, 1, 4, 2], [0, 1, 2, 0, 0]], "in part, and as a whole"
    expected = flex_attention.create_block_mask(blocks.mask_mod, 2, 1, 640, 640, "cpu")
    assert blocks.seq_lengths == expected.seq_lengths
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices", "full_q_indices"):
        assert torch.equal(getattr(blocks, name), getattr(expected, name)), name


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize(
    ("config", "changes"),
    [(LlamaConfig, {}), (Qwen2Config, {}), (Gemma2Config, GEMMA), (MistralConfig, {"sliding_window": 120})],
    ids=["Llama", "Qwen2", "Gemma 2", "Mistral"],
)
def test_log_probabilities_and_gradients_are_those_of_each_response_alone(config: Any, changes: dict[str, Any]) -> None:
    """And those of padded rows with a dense mask."""
    results = []
    for way in ("alone", "plain", "fused"):
        model = make_model(config, **HEADS | changes)
        if way == "alone":
            logps = compute_logps(model, ROWS)
        else:
            packing.enable_scoring(model, fused=way == "fused")
            logps = packing.batch_logps(model, packing.collate(ROWS, one_row=way == "fused"))
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        results.append([logps.detach(), *(weights.grad for weights in model.parameters())])
    *others, fused = results
    for other in others:
        for one, expected in zip(fused, other, strict=True):
            assert (one - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.usefixtures("gradients")
def test_adapters_and_gradient_checkpointing_change_nothing() -> None:
    """Checkpointing attends a second time in the backward pass."""
    gradients = []
    for fused in (False, True):
        model = packing.enable_scoring(make_model(LlamaConfig, **HEADS), fused=fused)
        model = training.add_adapters(model, params.Lora(rank=2, alpha=4))
        torch.manual_seed(1)
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.data.normal_(0, 0.1)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert attention.is_fused(model) is fused
        packing.batch_logps(model.train(), packing.collate(ROWS, one_row=fused)).sum().backward()
        gradients.append([weights.grad for weights in model.parameters() if weights.grad is not None])
    for one, expected in zip(*gradients, strict=True):
        assert (one - expected).norm() <= 1e-5 * expected.norm()


def compute_densely(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, softcap: float | None) -> Tensor:
    """A kernel for a mask of blocks that is quicker than FlexAttention without compiling."""
    length = query.shape[2]
    visible = flex_attention.create_mask(mask.mask_mod, 1, 1, length, length, "cpu")
    dense = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, -math.inf)
    return attention.attend_densely(query, key, value, dense, scaling, softcap)


def replace_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(attention, "select_kernel", lambda _: kernel)


def test_the_original_forward_attends_by_the_models_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def kernel(*inputs: Any) -> Tensor:
        called.append("fused")
        return compute_densely(*inputs)

    replace_kernel(monkeypatch, kernel)
    for config, changes, own in ((LlamaConfig, {}, "sdpa"), (Gemma2Config, GEMMA, "eager")):
        model, ids = make_fused(config, **changes), torch.arange(9)[None]
        with torch.no_grad():
            expected = make_model(config, **HEADS | changes)(ids).logits
            called.clear()
            torch.testing.assert_close(model(ids, original_forward=True).logits, expected, rtol=0, atol=0)
            assert not called, own
            packing.check_packing(model, ROWS[0], "float32")
        assert called == ["fused"] * 2, "in two layers, of the packed forward only"
        assert attention.is_fused(model)


def scale_scores(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, softcap: float | None) -> Tensor:
    return compute_densely(query, key, value, mask, 1.1 * scaling, softcap)


def ignore_the_cap(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, softcap: float | None) -> Tensor:
    return compute_densely(query, key, value, mask, scaling, None)


def mix_up_heads(query: Tensor, key: Tensor, *others: Any) -> Tensor:
    return compute_densely(query, key.flip(1), *others)


def return_nan(*inputs: Any) -> Tensor:
    return compute_densely(*inputs) * math.nan


def see_the_other_response(query: Tensor, key: Tensor) -> Tensor:
    return query // 3 == key // 3


WRONG_KERNELS = [scale_scores, ignore_the_cap, mix_up_heads, return_nan]


@pytest.mark.parametrize("wrong", [*WRONG_KERNELS, see_the_other_response])
def test_a_wrong_kernel_or_mask_is_refused_before_pairs_are_scored(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    model = make_fused(Gemma2Config, **GEMMA)
    replace_kernel(monkeypatch, compute_densely)
    with torch.no_grad():
        packing.check_packing(model, ROWS[1], "float32")
        if wrong is see_the_other_response:
            monkeypatch.setattr(attention, "is_visible", wrong)
        else:
            replace_kernel(monkeypatch, wrong)
        with pytest.raises(StageError) as raised:
            packing.check_packing(model, ROWS[1], "float32")
    assert_message(str(raised.value), "prompt 1", "packed", "use another model, or set train.attention to plain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_attention_of_a_confident_model_is_refused_in_either_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    model = make_sharp(dtype, fused=True)
    replace_kernel(monkeypatch, compute_densely)
    with torch.no_grad():
        packing.check_packing(model, ROWS[1], name)
        monkeypatch.setattr(attention, "is_visible", see_the_other_response)
        with pytest.raises(StageError):
            packing.check_packing(model, ROWS[1], name)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize(
    ("config", "changes", "dtype"),
    [
        (LlamaConfig, {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}, torch.float32),
        (Gemma2Config, GEMMA, torch.bfloat16),
    ],
)
def test_the_right_kernel_passes_its_check(config: Any, changes: dict[str, Any], dtype: torch.dtype) -> None:
    attention.check_kernel(make_fused(config, **changes).to(dtype), torch.device("cpu"))


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that is a tenth too large."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 1.1 * gradient


def wrong_gradient(place: int) -> Callable[..., Tensor]:
    def kernel(*inputs: Any) -> Tensor:
        changed = list(inputs)
        changed[place] = WrongGradient.apply(changed[place])
        return compute_densely(*changed)

    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        *((kernel, "outputs") for kernel in WRONG_KERNELS),
        *((wrong_gradient(place), f"gradients of the {name}") for place, name in enumerate(("query", "key", "value"))),
    ],
)
def test_a_wrong_kernel_is_refused_in_its_output_and_in_each_gradient(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernel: Callable[..., Tensor], named: str
) -> None:
    model = make_fused(Gemma2Config, **GEMMA).to(dtype)
    replace_kernel(monkeypatch, kernel)
    with pytest.raises(StageError) as raised:
        attention.check_kernel(model, torch.device("cpu"))
    assert_message(str(raised.value), "fused attention", f"other {named}", "set train.attention to plain")


@pytest.mark.parametrize("problem", [RuntimeError("no compiler\nwas found"), torch.OutOfMemoryError("no memory")])
def test_a_kernel_that_fails_is_one_line_unless_memory_is_out(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def fail(*_: Any) -> Tensor:
        raise problem

    model = make_fused(LlamaConfig)
    replace_kernel(monkeypatch, fail)
    if isinstance(problem, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            attention.check_kernel(model, torch.device("cpu"))
    else:
        with pytest.raises(StageError) as raised:
            attention.check_kernel(model, torch.device("cpu"))
        assert_message(str(raised.value), "cannot be computed", "no compiler was found", "set train.attention to plain")


def test_models_with_another_attention_are_refused() -> None:
    """Falcon has attention of its own; sinks and biases change the scores."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    falcon = AutoModelForCausalLM.from_config(FalconConfig(**sizes))
    with pytest.raises(StageError) as raised:
        packing.enable_scoring(falcon, fused=True)
    assert_message(str(raised.value), "falcon", "fused does not support", "set train.attention to plain")
    states = [torch.zeros(1, 2, 128, 8)] * 3
    for name in ("s_aux", "position_bias"):
        with pytest.raises(StageError) as raised:
            attention.attend(None, *states, None, 1.0, **{name: torch.zeros(2)})
        assert_message(str(raised.value), "fused does not support", "sinks", "set train.attention to plain")


def test_kernels_are_compiled_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: (function, options))
    assert attention.select_kernel.__wrapped__("cuda") == (attention.attend_in_blocks, {"fullgraph": True})
    assert attention.select_kernel("cpu") is attention.attend_in_blocks


@pytest.mark.slow
def test_the_kernel_is_traced_whole_and_seldom() -> None:
    """What torch.compile sees on a GPU, without its code generation: no new graph for the third length and its mask."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention.attend_in_blocks, backend=counter, fullgraph=True)
    for length in (256, 512, 384, 640):
        segments = torch.arange(length)[None] // 50
        states = [torch.randn(1, heads, length, 16) for heads in (4, 2, 2)]
        with torch.no_grad():
            found = compiled(*states, attention.block_mask(segments), 0.25, 2.0)
            expected = attention.attend_densely(*states, attention.dense_mask(segments, torch.float32), 0.25, 2.0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2, "the first length, and all others"


@pytest.mark.parametrize(
    ("setting", "gpu", "expected"), [("fused", True, True), ("fused", False, False), ("plain", True, False)]
)
def test_only_gpus_attend_by_the_fused_kernel(monkeypatch: pytest.MonkeyPatch, setting: str, gpu: bool, expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert training.select_fused(setting) is expected


def test_a_wrapped_model_is_known_as_fused() -> None:
    model = make_fused(LlamaConfig)
    assert attention.is_fused(SimpleNamespace(module=model))
    assert not attention.is_fused(packing.enable_scoring(make_model(LlamaConfig)))

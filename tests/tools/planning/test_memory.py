"""The memory of the stages, recomputed by hand for a model of round numbers."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory as counts
from stages.runtime import params
from stages.runtime.paths import ROOT
from stages.tools.planning import memory
from stages.tools.planning.memory import Memory, Shape

SHAPE = Shape(parameters=4e9, layers=10, hidden=1000, intermediate=3000, key_width=200, vocabulary=50_000)
GPUS = 4
RECIPES = sorted(ROOT.glob("recipes/*/params.yaml"))


def read_settings(**changes: dict[str, Any]) -> params.Params:
    """The settings of recipes/llama-3-8b with values of some sections changed."""
    path = ROOT / "recipes/llama-3-8b/params.yaml"
    settings = params.validate_unpinned(params.read(path), path)
    return settings.model_copy(
        update={name: getattr(settings, name).model_copy(update=values) for name, values in changes.items()}
    )


def estimate(stage: str, **changes: dict[str, Any]) -> Memory:
    return memory.estimate_memory(stage, read_settings(**changes), SHAPE, GPUS)


def estimate_training(**train: Any) -> Memory:
    ours = {
        "devices": 2,
        "device_batch": 3,
        "dtype": "bfloat16",
        "checkpoint_dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
    return estimate("train", train=ours | train, lengths={"prompt": 100, "total": 500})


make_deberta = functools.cache(counts.make_deberta)


TOKENS = 3 * 1000
"""Three pairs of two responses of 500 tokens."""
SAVED, INNER = TOKENS * 10 * 1000 * 2, TOKENS * (10 * 1000 + 4 * 3000) * 2
LOGITS = 1024 * 50_000 * 10
SHARE = 2 * (4e9 / 2 + 1e9)
"""Half of the weights in bfloat16, and a billion gathered ones."""
TRAINED_SHARE = SHARE + 2 * 5e8
"""With a bucket of gradients."""


@pytest.mark.parametrize("stage", ["generate", "answer", "answer-reference"])
def test_sampling_needs_the_weights_and_the_cache_on_every_gpu(stage: str) -> None:
    engine = {"dtype": "bfloat16", "kv_cache_gib": 2.0, "max_model_length": 1000}
    assert estimate(stage, engine=engine) == Memory(8e9 + 2 * 2**30 + memory.ENGINE, GPUS * memory.PROCESS)
    assert estimate(stage, engine=engine | {"dtype": "float32"}).gpu == 16e9 + 2 * 2**30 + memory.ENGINE


def test_without_a_given_cache_vllm_needs_room_for_the_longest_request_in_its_part_of_a_gpu() -> None:
    engine = {"dtype": "bfloat16", "kv_cache_gib": None, "max_model_length": 1000, "gpu_memory_utilization": 0.7}
    keys_and_values = 2 * 10 * 200 * 2 * 1000
    host = GPUS * memory.PROCESS
    assert estimate("generate", engine=engine) == Memory(8e9 + keys_and_values + memory.ENGINE, host, 0.7)


def test_gpus_that_share_a_model_hold_a_part_of_it_each() -> None:
    engine = {"dtype": "bfloat16", "kv_cache_gib": None, "max_model_length": 1000, "tensor_parallel": 2}
    keys_and_values = 2 * 10 * 200 * 2 * 1000
    assert estimate("answer", engine=engine).gpu == (8e9 + keys_and_values) / 2 + memory.ENGINE
    given = estimate("answer", engine=engine | {"kv_cache_gib": 2.0})
    assert given.gpu == 8e9 / 2 + 2 * 2**30 + memory.ENGINE, "engine.kv_cache_gib is for each GPU"


@pytest.mark.parametrize("stage", ["rank", "compare"])
def test_ranking_needs_memory_for_its_batches(stage: str) -> None:
    assert estimate(stage, rank={"tokens_per_batch": 65_536}).gpu == pytest.approx(27.2e9, rel=0.01)
    smaller = estimate(stage, rank={"tokens_per_batch": 16_384})
    assert (smaller.gpu - 0.87e9) * 4 == pytest.approx(27.2e9 - 0.87e9, rel=0.01)
    assert smaller.host == GPUS * memory.PROCESS


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 350, 2048])
def test_a_token_of_the_ranker_needs_what_is_alive_at_the_peak(length: int) -> None:
    """Of a forward pass on torch's meta device, where tensors have sizes only."""
    model, count = make_deberta(), 16_384 // length
    counted = counts.count_batch(model, count, length)
    assert memory.ranker_bytes_per_token(length) * count * length == pytest.approx(counted, rel=0.1)


def test_the_rankers_weights_are_those_of_its_size() -> None:
    assert 2 * make_deberta().num_parameters() == pytest.approx(memory.RANKER_WEIGHTS, rel=0.01)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_ranking_fits_on_a_gpu_with_24_gb(path: Path) -> None:
    """With what CUDA and the allocator take beside it, in every recipe."""
    content = params.read(path)
    settings: Any = params.validate_unpinned(content, path) if "train" in content else params.validate_evaluation(content, path)
    assert memory.estimate_memory("compare-answers", settings, SHAPE, 1).gpu < 18e9


def test_ranking_existing_answers_needs_as_much() -> None:
    path = ROOT / "recipes/llama-3-8b-published/params.yaml"
    settings = params.validate_evaluation(params.read(path), path)
    assert memory.estimate_memory("compare-answers", settings, SHAPE, GPUS) == estimate("compare")


def test_the_miniatures_ranker_needs_no_gpu() -> None:
    settings = params.validate(ROOT / "params.yaml")
    assert memory.estimate_memory("rank", settings, SHAPE, GPUS).gpu == 0


def test_reference_holds_shards_and_activations() -> None:
    settings = read_settings(train={"devices": 2, "device_batch": 3}, lengths={"prompt": 100, "total": 500})
    expected = Memory(SHARE + INNER + LOGITS, 2 * memory.PROCESS)
    assert memory.estimate_memory("reference", settings, SHAPE, GPUS) == expected
    alone = read_settings(train={"devices": 1, "device_batch": 3}, lengths={"prompt": 100, "total": 500})
    whole = memory.estimate_memory("reference", alone, SHAPE, GPUS)
    assert whole == Memory(8e9 + INNER + LOGITS, memory.PROCESS), "nothing to gather"


def test_training_holds_12_bytes_per_parameter_in_bfloat16() -> None:
    """2 of the weights, 2 of the gradients, 4 of the master weights, 4 of RMSProp's mean squares; in float32: 4, 4 and 4.
    Gradients of several batches are summed in float32."""
    state = (2 + 4 + 4) * 4e9 / 2
    converted = 4 * 1e9
    assert converted > SAVED + INNER + LOGITS, "a step needs more than a backward pass"
    one_batch = {"global_batch": 6}
    assert estimate_training(**one_batch) == Memory(TRAINED_SHARE + converted + state, 2 * memory.PROCESS + 4e9 * (2 + 2))
    assert estimate_training().gpu - estimate_training(**one_batch).gpu == (4 - 2) * 4e9 / 2
    wide = estimate_training(dtype="float32", checkpoint_dtype="float32")
    assert wide.gpu == 2 * TRAINED_SHARE + converted + (4 + 4) * 4e9 / 2
    assert wide.host == 2 * memory.PROCESS + 4e9 * (4 + 4)


def test_activations_count_where_they_exceed_the_gradients_of_a_step() -> None:
    """All layers' or, with gradient checkpointing, all inputs of layers, and one layer's while it is recomputed."""
    more = {"device_batch": 90}
    state = TRAINED_SHARE + (2 + 4 + 4) * 4e9 / 2
    assert estimate_training(**more).gpu == state + 30 * (SAVED + INNER) + LOGITS
    assert estimate_training(**more, gradient_checkpointing=False).gpu == state + 30 * (SAVED + 10 * INNER) + LOGITS


def test_offloading_moves_the_state_to_the_host() -> None:
    usual, offloaded = estimate_training(), estimate_training(offload="optimizer")
    assert usual.gpu - offloaded.gpu == (4 + 4 + 4) * 4e9 / 2
    assert offloaded.host - usual.host == (4 + 4 + 4 + 4) * 4e9


def test_a_float32_checkpoint_holds_more_on_the_host() -> None:
    """The float32 weights that training starts from, and those it ends with."""
    assert estimate_training(checkpoint_dtype="float32").host - estimate_training().host == 4e9 * (4 + 4 - 2 - 2)
    rounded = estimate_training(dtype="float32").host
    assert rounded == 2 * memory.PROCESS + 4e9 * (4 + 4 + 2), "and a rounded copy of them"


def test_adapters_have_the_state_and_the_weights_have_none() -> None:
    """On the seven linear layers of each block: from their inputs to 8 values, and from these to their outputs."""
    widths = [(1000, 1000), (1000, 200), (1000, 200), (1000, 1000), (1000, 3000), (1000, 3000), (3000, 1000)]
    adapters = 10 * 8 * sum(map(sum, widths))
    found = estimate_training(lora=params.Lora(rank=8, alpha=16))
    assert found.gpu == TRAINED_SHARE + max(SAVED + INNER + LOGITS, 4 * adapters / 2) + adapters * (4 + 4 + 4) / 2
    assert found.host == 2 * memory.PROCESS + 4e9 * (2 + 4), "gathered weights, and a float32 model to merge adapters into"


def test_the_adapters_of_qwen_are_as_many_as_peft_makes() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config

    qwen = memory.SHAPES["Qwen/Qwen2.5-1.5B-Instruct"]
    config = Qwen2Config(
        vocab_size=qwen.vocabulary,
        hidden_size=qwen.hidden,
        intermediate_size=qwen.intermediate,
        num_hidden_layers=qwen.layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() == pytest.approx(qwen.parameters, rel=0.01)
        adapted = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    settings = read_settings(train={"lora": params.Lora(rank=32, alpha=64)})
    assert memory.count_adapters(settings, qwen) == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("repo", "shape"), memory.SHAPES.items(), ids=str)
def test_every_shape_has_about_its_number_of_parameters(repo: str, shape: Shape) -> None:
    """Embeddings, two of attention's matrices of the hidden width and two of the keys' width, and three of the feed-forward."""
    attention = 2 * shape.hidden * max(shape.hidden, 2 * shape.key_width) + 2 * shape.hidden * shape.key_width
    blocks = shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    embeddings = shape.vocabulary * shape.hidden
    sizes = [blocks + embeddings, blocks + 2 * embeddings]  # tied or not
    assert any(size == pytest.approx(shape.parameters, rel=0.02) for size in sizes), repo


def test_the_harness_holds_the_logits_of_a_batch() -> None:
    found = estimate("evaluate-lm", evaluate_lm={"dtype": "bfloat16", "batch_size": 3})
    assert found == Memory(8e9 + 3 * memory.HARNESS_LENGTH * 50_000 * 12, GPUS * memory.PROCESS)
    wide = estimate("evaluate-lm", evaluate_lm={"dtype": "float32", "batch_size": 3})
    assert wide.gpu == 16e9 + 3 * memory.HARNESS_LENGTH * 50_000 * 12


def test_other_stages_need_no_gpu() -> None:
    assert estimate("split") == estimate("assets-policy") == estimate("report") == Memory()


@pytest.mark.parametrize(("devices", "gigabytes"), [(1, 102), (2, 54), (4, 30), (8, 18)])
def test_llama_8b_needs_what_others_have_counted(devices: int, gigabytes: int) -> None:
    """12 bytes per parameter, divided among the GPUs, and 6 GB on each, without the buffer for gradients."""
    one_batch = {"devices": devices, "device_batch": 4, "global_batch": 4 * devices}
    settings = read_settings(train=one_batch, lengths={"prompt": 512, "total": 1024})
    shape = memory.SHAPES["meta-llama/Meta-Llama-3-8B-Instruct"]
    needed = memory.estimate_memory("train", settings, shape, devices).gpu - 2 * memory.BUCKET
    assert needed / 1e9 == pytest.approx(gigabytes, abs=1.5)


def test_the_table_of_docs_performance_is_the_estimate() -> None:
    shape = memory.SHAPES["meta-llama/Meta-Llama-3-8B-Instruct"]
    changes: dict[str, dict[str, Any]] = {
        "all weights": {},
        "all weights, `train.offload=optimizer`": {"offload": "optimizer"},
        "LoRA of rank 32": {"lora": params.Lora(rank=32, alpha=64)},
    }
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    for name, change in changes.items():
        cells = []
        for devices in (1, 2, 4, 8):
            settings = read_settings(train={"devices": devices} | change)
            found = memory.estimate_memory("train", settings, shape, devices)
            cells.append(f"{found.gpu / 1e9:.0f}, {found.host / 1e9:.0f}")
        assert re.search(rf"(?m)^\| {re.escape(name)} \| {re.escape(' | '.join(cells))} \|$", text), name


def test_the_remedy_names_a_parameter_that_exists() -> None:
    for stage, section, expected in (
        (
            "generate",
            {},
            "raise engine.gpu_memory_utilization or engine.tensor_parallel, or lower engine.max_model_length",
        ),
        ("answer", {"engine": {"kv_cache_gib": 8.0}}, "lower engine.kv_cache_gib, or raise engine.tensor_parallel"),
        ("compare", {}, "lower rank.tokens_per_batch"),
        ("evaluate-lm", {}, "lower evaluate_lm.batch_size"),
        ("reference", {}, "lower train.device_batch, or raise train.devices"),
        ("train", {"train": {"device_batch": 1}}, "raise train.devices, or set train.offload=optimizer or train.lora"),
    ):
        settings = read_settings(**section)
        assert memory.name_remedy(stage, settings) == expected
        for section_name, key in re.findall(r"(\w+)\.(\w+)", expected):
            assert hasattr(getattr(settings, section_name), key)


@pytest.mark.parametrize(("batch", "fits"), [(4, True), (8, False)])
def test_gemma_fits_a_gpu_in_the_batches_of_its_recipes(batch: int, fits: bool) -> None:
    """Three tensors of 3,000 tokens x 256,000 logits in float32 for each request, and 9.2 billion parameters in bfloat16."""
    gemma = memory.SHAPES["google/gemma-2-9b-it"]
    settings = read_settings(evaluate_lm={"dtype": "bfloat16", "batch_size": batch})
    estimate = memory.estimate_memory("evaluate-lm", settings, gemma, 8).gpu
    assert estimate == pytest.approx(batch * 3000 * 256_000 * 12 + 2 * 9.24e9, rel=0.01)
    assert (estimate < 80e9) is fits
    for recipe in ("gemma-2-9b", "gemma-2-9b-published"):
        assert params.read(ROOT / "recipes" / recipe / "params.yaml")["evaluate_lm"]["batch_size"] == 4

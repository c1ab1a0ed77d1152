import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stages.artifacts import schemas, tables
from stages.engines import sampling
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.models import make_model
from support.running import TINY, run_stage, set_params

VARIABLES = [
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_RAISE_ON_LOGIT_NANS",
    "VLLM_LOGGING_LEVEL",
    "VLLM_HOST_IP",
    "VLLM_BATCH_INVARIANT",
    "VLLM_WORKER_MULTIPROC_METHOD",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
]
"""Environment variables that `start_engine` sets."""
DRAW = sampling.Sampling(samples=2, temperature=1, top_p=1, max_new_tokens=9, seed=0, name="x")


@pytest.fixture
def engine() -> params.Engine:
    settings: params.Engine = params.load("engine", path=ROOT / "params.yaml").engine
    return settings


def test_seeds_depend_on_seed_name_and_prompt() -> None:
    seeds = {sampling.sample_seed(seed, name, prompt) for seed in (1, 2) for name in ("iter1", "iter2") for prompt in "ab"}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**56 for seed in seeds)


def test_a_model_is_checked_before_it_is_loaded(engine: params.Engine, tmp_path: Path) -> None:
    prompts = pa.table({"prompt_id": ["a"], "prompt": ["b"]}, schema=schemas.SPLIT)
    with pytest.raises(StageError) as error:
        sampling.sample_responses("generate", prompts, tmp_path, engine, DRAW, 8, skip_too_long=True)
    assert_message(str(error.value), str(tmp_path), "config.json")


def test_a_stop_token_that_the_model_does_not_have_is_rejected(engine: params.Engine) -> None:
    stops = engine.model_copy(update={"stop_token_ids": [4, 300]})
    sampling.check_stop_tokens(stops, 301, Path("model"))
    with pytest.raises(StageError) as error:
        sampling.check_stop_tokens(stops, 300, Path("model"))
    assert_message(str(error.value), "engine.stop_token_ids", "300", "model", "params.yaml")


@pytest.mark.parametrize(("samples", "temperature"), [(5, 0), (2, 0.0), (5, 1e-9), (1, 0.0099), (2, 0.005)])
def test_a_temperature_that_vllm_would_not_keep_to_is_rejected(samples: int, temperature: float) -> None:
    with pytest.raises(StageError) as error:
        sampling.check_temperature(dataclasses.replace(DRAW, samples=samples, temperature=temperature))
    assert_message(str(error.value), "temperature", "params.yaml")


@pytest.mark.parametrize(("samples", "temperature"), [(1, 0), (1, 0.01), (5, 0.01), (5, 2.0)])
def test_greedy_decoding_gives_one_response_and_sampling_any_number(samples: int, temperature: float) -> None:
    sampling.check_temperature(dataclasses.replace(DRAW, samples=samples, temperature=temperature))


@given(st.sampled_from(["prompt_id", "templated_prompt", "prompt_token_ids"]))
def test_the_key_covers_all_that_the_model_reads(column: str) -> None:
    row: dict[str, Any] = {"prompt_id": "a", "prompt": "b", "templated_prompt": "<b>", "prompt_token_ids": [1, 4]}
    changed = row | {column: row[column] * 2}
    first, second = (sampling.hash_prompts(pa.Table.from_pylist([each])) for each in (row, changed))
    assert first != second


def tokenized(lengths: list[int]) -> pa.Table:
    """Prompts of so many tokens."""
    rows = [{"prompt_id": f"prompt {index}", "prompt_token_ids": [1] * length} for index, length in enumerate(lengths)]
    return pa.Table.from_pylist(rows)


@given(st.lists(st.integers(1, 12), min_size=1), st.integers(1, 12), st.integers(1, 12))
def test_prompts_that_leave_room_for_a_whole_response_are_kept(lengths: list[int], limit: int, new: int) -> None:
    expected = [length for length in lengths if length + new <= limit]
    if expected:
        kept = sampling.select_fitting(tokenized(lengths), limit, new, skip_too_long=True)
        assert [len(ids) for ids in kept["prompt_token_ids"].to_pylist()] == expected
    else:
        with pytest.raises(StageError) as error:
            sampling.select_fitting(tokenized(lengths), limit, new, skip_too_long=True)
        assert_message(str(error.value), f"{new} tokens", f"engine.max_model_length {limit}", "raise it")


def test_without_skipping_every_prompt_must_leave_room_for_one_token() -> None:
    assert sampling.select_fitting(tokenized([3, 7]), 8, 5, skip_too_long=False).num_rows == 2
    with pytest.raises(StageError) as error:
        sampling.select_fitting(tokenized([3, 8]), 8, 5, skip_too_long=False)
    assert_message(str(error.value), "prompt 1", "8 tokens", "engine.max_model_length 8", "raise it")


FREE = (
    "Free memory on device cuda:0 (20.1/79.2 GiB) on startup is less than desired GPU memory utilization (0.92, 72.9 GiB). "
    "Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
NEEDED = (
    "To serve at least one request with the model's max seq len (8192), (4.0 GiB KV cache is needed, which is larger than the "
    "available KV cache memory (1.5 GiB). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`."
)
WARM_UP = (
    "CUDA out of memory occurred when warming up sampler with 512 dummy requests. Please try lowering `max_num_seqs` or "
    "`gpu_memory_utilization` when initializing the engine."
)
BATCHED = "max_num_batched_tokens (64) is smaller than max_model_len (512). This effectively limits the maximum sequence length"


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        (
            "No available memory for the cache blocks",
            ["raise engine.kv_cache_gib (now 0.125)", "engine.max_model_length (now "],
        ),
        (NEEDED, ["raise engine.kv_cache_gib (now 0.125)", "lower engine.max_model_length (now 512)"]),
        (FREE, ["engine.gpu_memory_utilization (now 0.92)", "20.1/79.2 GiB", "lower it", "CUDA_VISIBLE_DEVICES"]),
        (
            FREE.replace("Free memory on device cuda:0", "Available memory on node 0"),
            ["engine.gpu_memory_utilization", "lower it"],
        ),
        (WARM_UP, ["lower engine.max_num_seqs (now 256) or engine.gpu_memory_utilization (now 0.92)"]),
        (BATCHED, ["engine.max_num_batched_tokens 4096 is too small", "below engine.max_model_length (now 512)"]),
        ("User-specified max_model_len (4096) is greater", ["engine.max_model_length 512 exceeds", "lower it"]),
        ("Something\nelse", ["ValueError: Something else", "params.yaml"]),
    ],
)
def test_a_failed_start_names_the_parameter(engine: params.Engine, message: str, parts: list[str]) -> None:
    text = sampling.explain_failed_start(ValueError(message), engine)
    assert_message(text, *parts)
    assert "\n" not in text


def test_without_a_fixed_cache_its_size_is_a_part_of_the_memory(engine: params.Engine) -> None:
    text = sampling.explain_failed_start(ValueError(NEEDED), engine.model_copy(update={"kv_cache_gib": None}))
    assert_message(text, "raise engine.gpu_memory_utilization (now 0.92)", "lower engine.max_model_length (now 512)")


@pytest.mark.parametrize(("capability", "device"), [(None, "a CPU"), ((7, 5), "NVIDIA T4")])
def test_batch_invariance_needs_a_gpu_that_has_it(
    capability: tuple[int, int] | None, device: str, engine: params.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    with pytest.raises(StageError) as error:
        sampling.start_engine(Path("x"), engine.model_copy(update={"batch_invariant": True}), 0)
    assert_message(str(error.value), "engine.batch_invariant is true", "8.0", device, "set it to false")


def test_a_prefix_cache_that_is_not_emptied_ends_the_stage(engine: params.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))
    with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
        sampling.sample_shard(SimpleNamespace(reset_prefix_cache=lambda: False), engine, DRAW, pa.table({"a": []}))


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory ...")


@pytest.mark.parametrize("starting", [True, False])
def test_out_of_gpu_memory_names_its_parameters(engine: params.Engine, monkeypatch: pytest.MonkeyPatch, starting: bool) -> None:
    running = SimpleNamespace(generate=out_of_memory, reset_prefix_cache=lambda: True)
    vllm = SimpleNamespace(LLM=out_of_memory if starting else lambda **_: running, SamplingParams=lambda **_: None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    with pytest.raises(StageError) as error:
        sampling.load_sampler(Path("x"), engine, DRAW)(pa.table({"a": []}))
    assert_message(str(error.value), "out of GPU memory", "lower engine.kv_cache_gib", "engine.max_model_length")


@pytest.mark.parametrize("message", ["NaNs detected in logits: {'0_0': 128}", "something else"])
def test_logits_that_are_nan_end_the_stage_with_the_models_name(
    engine: params.Engine, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def generate(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))
    config = SimpleNamespace(model="some/model")
    llm = SimpleNamespace(generate=generate, reset_prefix_cache=lambda: True, model_config=config)
    with pytest.raises((StageError, RuntimeError)) as error:
        sampling.sample_shard(llm, engine, DRAW, pa.table({"a": []}))
    if message == "something else":
        assert error.type is RuntimeError
    else:
        assert_message(str(error.value), "some/model", "logits are NaN", "config.json", "`make verify`")


@pytest.mark.slow
def test_vllm_notices_logits_that_are_nan(tmp_path: Path) -> None:
    """Of weights that are finite, but not their products."""
    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor.fill_(1e30)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    set_params(tmp_path, TINY)
    prompts = [{"prompt_id": schemas.prompt_id(text), "prompt": text} for text in ("What is 2 plus 2?", "What?")]
    tables.write(prompts, schemas.SPLIT, tmp_path / "prompts.parquet")
    options = ("--iteration", "iter1", "--model", model, "--prompts", "prompts.parquet", "--out", "responses.parquet")
    done = run_stage(tmp_path, "generate", *options)
    assert done.returncode == 1
    assert_message(done.stderr, "generate: error: ", str(model), "logits are NaN", "config.json", "another model")
    assert not (tmp_path / "responses.parquet").exists()


def test_samples_are_ordered_by_index_and_carry_their_seeds(engine: params.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM may return a request's samples in any order."""
    samples = [
        SimpleNamespace(index=1, text="second", token_ids=(7, 8, 2), finish_reason="stop"),
        SimpleNamespace(index=0, text="first", token_ids=(5,), finish_reason="length"),
    ]
    requested: list[Any] = []

    def generate(prompts: list[Any], requests: list[Any], use_tqdm: bool) -> list[Any]:
        requested.extend(zip(prompts, requests, strict=True))
        return [SimpleNamespace(outputs=samples)]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **values: values))
    row = {"prompt_id": "a", "prompt": "b", "templated_prompt": "<b>", "prompt_token_ids": [1, 4]}
    shard = pa.Table.from_pylist([row])
    emptied: list[int] = []
    llm = SimpleNamespace(generate=generate, reset_prefix_cache=lambda: emptied.append(len(requested)) or True)
    (result,) = sampling.sample_shard(llm, engine, DRAW, shard).to_pylist()
    assert emptied == [0], "the prefix cache of earlier shards is emptied before the requests"
    seed = sampling.sample_seed(0, "x", "a")
    assert result == row | {
        "responses": ["first", "second"],
        "token_ids": [[5], [7, 8, 2]],
        "token_counts": [1, 3],
        "finish_reasons": ["length", "stop"],
        "seeds": [seed, seed + 1],
    }
    ((prompt, request),) = requested
    assert prompt == {"prompt_token_ids": [1, 4]}
    assert request == {
        "n": 2,
        "temperature": 1,
        "top_p": 1,
        "max_tokens": 9,
        "stop_token_ids": engine.stop_token_ids,
        "seed": seed,
    }


Generate = Callable[..., str]


@pytest.fixture
def generate(tiny: Path, tmp_path: Path) -> Generate:
    """Run generate with `tiny`'s model and overrides of params, in tmp_path, which must succeed. Returns the log."""

    def run(overrides: dict[str, Any], prompts: Path, **environment: str) -> str:
        set_params(tmp_path, TINY | overrides)
        options = ("--iteration", "iter1", "--model", tiny / "base", "--prompts", prompts, "--out", "responses.parquet")
        done = run_stage(tmp_path, "generate", *options, **environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


@pytest.mark.slow
def test_neither_workers_nor_order_nor_shards_change_a_response(tiny: Path, tmp_path: Path, generate: Generate) -> None:
    """Two workers, the prompts in reverse and another shard size give the same responses to each prompt."""
    prompts = tables.read(tiny / "prompts.parquet", schemas.SPLIT)
    tables.write(prompts.take(list(range(19, -1, -1))), schemas.SPLIT, tmp_path / "reversed.parquet")
    generate({"generate.shard_size": 7}, tmp_path / "reversed.parquet", SPPO_WORKERS="2")
    rows = tables.read(tmp_path / "responses.parquet", schemas.RESPONSES).to_pylist()
    assert rows[::-1] == tables.read(tiny / "responses.parquet", schemas.RESPONSES).to_pylist()


@pytest.mark.slow
def test_a_stop_token_ends_a_response_and_belongs_to_it(tiny: Path, tmp_path: Path, generate: Generate) -> None:
    rows = tables.read(tiny / "responses.parquet", schemas.RESPONSES).to_pylist()
    stop = max(token for row in rows for ids in row["token_ids"] for token in ids[:-1])
    generate({"engine.stop_token_ids": [stop]}, tiny / "prompts.parquet")
    stopped = tables.read(tmp_path / "responses.parquet", schemas.RESPONSES).to_pylist()
    for row, other in zip(rows, stopped, strict=True):
        for ids, shortened, reason in zip(row["token_ids"], other["token_ids"], other["finish_reasons"], strict=True):
            assert shortened == (ids[: ids.index(stop) + 1] if stop in ids else ids)
            assert reason == "stop" or stop not in ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameter", "value", "parts"),
    [
        ("engine.kv_cache_gib", 1e-5, ["raise engine.kv_cache_gib (now 1e-05)", "lower engine.max_model_length (now 256)"]),
        ("engine.max_model_length", 4096, ["engine.max_model_length 4096", "lower it"]),
    ],
)
def test_what_vllm_rejects_is_one_line(tiny: Path, tmp_path: Path, parameter: str, value: float, parts: list[str]) -> None:
    set_params(tmp_path, TINY | {parameter: value})
    (tmp_path / "responses.parquet").write_text("an earlier run's")
    options = ("--iteration", "iter1", "--model", tiny / "base", "--prompts", tiny / "prompts.parquet")
    done = run_stage(tmp_path, "generate", *options, "--out", "responses.parquet")
    assert done.returncode == 1
    start, line = done.stderr.splitlines()
    assert start.startswith("20 prompts, 0 left out")
    assert_message(line, "generate: error: ", *parts)
    assert (tmp_path / "responses.parquet").read_text() == "an earlier run's"

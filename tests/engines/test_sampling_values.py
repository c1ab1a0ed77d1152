"""What vLLM is asked for, and what determines a sample's seed."""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from stages.engines import numerics, sampling
from stages.runtime import params
from stages.runtime.paths import ROOT
from support.running import TINY, run_sampling, run_stage, set_params

DRAW = sampling.Sampling(samples=2, temperature=0.3, top_p=0.8, max_new_tokens=9, seed=5, name="iter1")


@pytest.fixture
def engine() -> params.Engine:
    loaded: params.Engine = params.load("engine", path=ROOT / "params.yaml").engine
    return loaded.model_copy(update={"stop_token_ids": [7], "dtype": "float32", "max_model_length": 300, "kv_cache_gib": 0.5})


def test_vllm_gets_every_setting_of_a_request(engine: params.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[Any] = []

    def generate(prompts: list[Any], requests: list[Any], use_tqdm: bool) -> list[Any]:
        requested.extend(zip(prompts, requests, strict=True))
        sample = SimpleNamespace(index=0, text="x", token_ids=(1,), finish_reason="stop")
        return [SimpleNamespace(outputs=[sample]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **values: values))
    rows = [{"prompt_id": name, "prompt": name, "templated_prompt": name, "prompt_token_ids": [1, len(name)]} for name in "ab"]
    shard = sampling.sample_shard(
        SimpleNamespace(generate=generate, reset_prefix_cache=lambda: True), engine, DRAW, pa.Table.from_pylist(rows)
    )
    assert [prompt for prompt, _ in requested] == [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    for row, written, (_, request) in zip(rows, shard.to_pylist(), requested, strict=True):
        # The seed that vLLM gets is the one that the file records, and the one that the rule gives.
        expected = int(hashlib.sha256(f"5/iter1/{row['prompt_id']}".encode()).hexdigest()[:14], 16)
        assert request == {"n": 2, "temperature": 0.3, "top_p": 0.8, "max_tokens": 9, "stop_token_ids": [7], "seed": expected}
        assert written["seeds"] == [expected]


VARIABLES = (
    *("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    *("VLLM_RAISE_ON_LOGIT_NANS", "VLLM_BATCH_INVARIANT", "VLLM_WORKER_MULTIPROC_METHOD"),
)


def start(engine: params.Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what vLLM is started with."""
    started: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **settings: started.append(settings)))
    monkeypatch.setattr(numerics, "restrict_vllm", lambda: None)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    sampling.start_engine(Path("model"), engine, 5)
    return started[0]


def test_vllm_gets_every_setting_of_the_engine(engine: params.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 500, "gpu_memory_utilization": 0.7}
    settings = start(engine.model_copy(update=sizes), monkeypatch)
    assert os.environ["VLLM_RAISE_ON_LOGIT_NANS"] == "1"
    assert os.environ["VLLM_BATCH_INVARIANT"] == "0"
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    expected = {"model": "model", "dtype": "float32", "max_model_len": 300, "seed": 5, "kv_cache_memory_bytes": 2**29}
    expected |= sizes | {"tensor_parallel_size": 1, "trust_remote_code": False, "load_format": "safetensors"}
    assert {name: settings[name] for name in expected} == expected


def test_on_gpus_the_mode_and_the_number_are_those_of_the_parameters(
    engine: params.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    changes = {"batch_invariant": True, "tensor_parallel": 2, "kv_cache_gib": None}
    settings = start(engine.model_copy(update=changes), monkeypatch)
    assert settings["tensor_parallel_size"] == 2
    assert os.environ["VLLM_BATCH_INVARIANT"] == "1"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo", "no port is open to other machines"
    assert not multiprocessing.current_process().daemon, "vLLM may start processes"
    assert not {"kv_cache_memory_bytes", "enforce_eager", "enable_chunked_prefill", "block_size"} & settings.keys()


TWICE = """
import json, sys
from pathlib import Path
from stages.artifacts import schemas
from stages.engines import numerics, sampling
from stages.runtime import params
import pyarrow as pa
numerics.apply("portable")
engine = params.load("engine").engine
draw = sampling.Sampling(samples=1, temperature=1.0, top_p=1.0, max_new_tokens=12, seed=5, name="x")
sampler = sampling.load_sampler(Path(sys.argv[1]), engine, draw)
llm, generate, cached = sampler.args[0], sampler.args[0].generate, []

def spy(*arguments, **options):
    outputs = generate(*arguments, **options)
    cached.append([output.num_cached_tokens for output in outputs])
    return outputs

llm.generate = spy
rows = [
    {"prompt_id": str(n), "prompt": "", "templated_prompt": "", "prompt_token_ids": [*range(300, 370), 300 + n]}
    for n in range(6)
]
first, second = (pa.Table.from_pylist(part) for part in (rows[:3], rows[3:]))
alone = sampler(second)
sampler(first)
assert sampler(second) == alone
llm.reset_prefix_cache = lambda: True
sampler(first)
print(json.dumps(cached))
"""
"""Sample two shards of prompts that begin with the same 70 tokens, two blocks of the cache and more: the second alone, the
first, the second after it, and the first once more, with a cache that is not emptied."""


@pytest.mark.slow
def test_a_shard_does_not_depend_on_the_shards_before(tiny: Path, tmp_path: Path) -> None:
    set_params(tmp_path, TINY)
    done = run_sampling(tmp_path, TWICE, tiny / "base")
    assert done.returncode == 0, done.stderr
    second, first, again, kept = json.loads(done.stdout.splitlines()[-1])
    assert second[0] == first[0] == again[0] == 0, "nothing of another shard is in the cache"
    assert again == second
    assert kept[0] >= 64, "which would be there, had it not been emptied"


@pytest.mark.slow
def test_temperature_and_seed_reach_the_samples(tiny: Path, tmp_path: Path) -> None:
    """Near temperature 0 all tokens are the likeliest ones, according to transformers; another seed gives other samples."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from stages.artifacts import schemas, tables

    def generate(overrides: dict[str, Any]) -> list[dict[str, Any]]:
        set_params(tmp_path, TINY | overrides)
        options = ("--iteration", "iter1", "--model", tiny / "base", "--prompts", tiny / "prompts.parquet")
        done = run_stage(tmp_path, "generate", *options, "--out", "responses.parquet")
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, Any]] = tables.read(tmp_path / "responses.parquet", schemas.RESPONSES).to_pylist()
        return rows

    model = AutoModelForCausalLM.from_pretrained(tiny / "base")
    ends = GenerationConfig.from_pretrained(tiny / "base").eos_token_id
    for row in generate({"generate.temperature": 0.02}):
        for ids, reason in zip(row["token_ids"], row["finish_reasons"], strict=True):
            with torch.no_grad():
                scores = model(torch.tensor([row["prompt_token_ids"] + ids])).logits[0, len(row["prompt_token_ids"]) - 1 : -1]
            chosen = scores.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert (chosen >= scores.max(1).values - 0.4).all(), "a gap of 0.4 has odds of exp(-20)"
            assert ids[-1] in ends or reason == "length"
    before = tables.read(tiny / "responses.parquet", schemas.RESPONSES).to_pylist()
    assert all(len({tuple(ids) for ids in row["token_ids"]}) > 1 for row in before), "samples of a prompt differ"
    after = generate({"seed": 43})
    assert sum(old["responses"] == new["responses"] for old, new in zip(before, after, strict=True)) <= 2

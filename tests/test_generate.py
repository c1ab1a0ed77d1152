import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer, GenerationConfig

from stages.artifacts import schemas, tables
from stages.engines import sampling
from support.messages import assert_message
from support.models import edit_json
from support.running import TINY, run_stage, set_params


@pytest.mark.slow
def test_responses_are_the_sampled_tokens(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    rows = tables.read(tiny / "responses.parquet", schemas.RESPONSES).to_pylist()
    assert [row["prompt_id"] for row in rows] == [schemas.prompt_id(row["prompt"]) for row in rows]
    ends = set(GenerationConfig.from_pretrained(tiny / "base").eos_token_id)
    reasons = set()
    for row in rows:
        assert len(row["responses"]) == len(row["token_ids"]) == 3
        assert row["seeds"] == [sampling.sample_seed(42, "iter1", row["prompt_id"]) + k for k in range(3)]
        for text, ids, count, reason in zip(
            row["responses"], row["token_ids"], row["token_counts"], row["finish_reasons"], strict=True
        ):
            assert len(ids) == count <= 24
            assert (ids[-1] in ends) == (reason == "stop")
            incomplete = "\ufffd"  # the limit may fall within a character, whose bytes vLLM then leaves out of the text
            assert tokenizer.decode(ids, skip_special_tokens=True).rstrip(incomplete) == text.rstrip(incomplete)
            reasons.add(reason)
    assert reasons == {"stop", "length"}


@pytest.mark.slow
def test_prompts_too_long_for_the_engine_are_left_out(tiny: Path) -> None:
    prompts = ["What is 1 plus 1?", "word " * 500]
    table = pa.table({"prompt_id": [schemas.prompt_id(prompt) for prompt in prompts], "prompt": prompts}, schema=schemas.SPLIT)
    tables.write(table, schemas.SPLIT, tiny / "long.parquet")
    options = ("--iteration", "iter1", "--model", "base", "--prompts", "long.parquet", "--out", "short.parquet")
    done = run_stage(tiny, "generate", *options)
    assert done.returncode == 0, done.stderr
    assert "1 prompts, 1 left out" in done.stderr
    assert tables.read(tiny / "short.parquet", schemas.RESPONSES)["prompt"].to_pylist() == prompts[:1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "overrides", "parts"),
    [
        ({"num_hidden_layers": 3}, {}, ["model.layers.2.", "config.json"]),
        ({"num_hidden_layers": 1}, {}, ["model.layers.1.", "config.json"]),
        ({"quantization_config": {"quant_method": "awq"}}, {}, ["quantization_config", "not supported"]),
        ({}, {"generate.temperature": 0.001}, ["temperature", "params.yaml"]),
    ],
)
def test_a_model_that_is_not_what_it_says_is_one_line(
    tiny: Path, tmp_path: Path, change: dict[str, Any], overrides: dict[str, Any], parts: list[str]
) -> None:
    shutil.copytree(tiny / "base", tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", **change)
    set_params(tmp_path, TINY | overrides)
    prompts = ("--prompts", tiny / "prompts.parquet")
    done = run_stage(tmp_path, "generate", "--iteration", "iter1", "--model", "base", *prompts, "--out", "responses.parquet")
    assert done.returncode == 1
    assert_message(done.stderr, "generate: error: ", *parts)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "responses.parquet").exists()


def test_a_missing_input_is_one_line(tmp_path: Path) -> None:
    set_params(tmp_path, {})
    prompts, out = "data/split/iter1.parquet", "data/out.parquet"
    done = run_stage(tmp_path, "generate", "--iteration", "iter1", "--model", "base", "--prompts", prompts, "--out", out)
    assert done.returncode == 1
    assert_message(done.stderr, "generate: error: ", f"{prompts} is missing", "dvc repro")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()

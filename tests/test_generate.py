from pathlib import Path

import pytest
from running import TINY, run_stage, set_params
from transformers import AutoTokenizer, GenerationConfig

from stages import files, sampling, schemas


@pytest.mark.slow
def test_responses_are_the_tokens_that_were_sampled(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    rows = files.read_table(tiny / "responses.parquet", schemas.RESPONSES).to_pylist()
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
            cut_character = "\ufffd"  # the cut may fall within a character: vLLM then leaves its bytes out of the text
            assert tokenizer.decode(ids, skip_special_tokens=True).rstrip(cut_character) == text.rstrip(cut_character)
            reasons.add(reason)
    assert reasons == {"stop", "length"}


@pytest.mark.slow
def test_neither_workers_nor_order_nor_shards_change_a_response(tiny: Path) -> None:
    """Two workers, the prompts in reverse and another shard size: the same responses to each prompt."""
    part = files.read_table(tiny / "part.parquet", schemas.PART)
    files.write_table(part.take(list(range(19, -1, -1))), schemas.PART, tiny / "reversed.parquet")
    (tiny / "other").mkdir()
    set_params(tiny / "other", TINY | {"generate.shard_size": 7})
    done = run_stage(tiny / "other", "generate", "iter1", "../base", "../reversed.parquet", "two.parquet", SPPO_WORKERS="2")
    assert done.returncode == 0, done.stderr
    two = files.read_table(tiny / "other" / "two.parquet", schemas.RESPONSES).to_pylist()
    assert two[::-1] == files.read_table(tiny / "responses.parquet", schemas.RESPONSES).to_pylist()


@pytest.mark.slow
def test_a_stop_token_ends_a_response_and_belongs_to_it(tiny: Path) -> None:
    rows = files.read_table(tiny / "responses.parquet", schemas.RESPONSES).to_pylist()
    stop = max(token for row in rows for ids in row["token_ids"] for token in ids[:-1])
    (tiny / "stop").mkdir()
    set_params(tiny / "stop", TINY | {"engine.stop_token_ids": [stop]})
    done = run_stage(tiny / "stop", "generate", "iter1", "../base", "../part.parquet", "responses.parquet")
    assert done.returncode == 0, done.stderr
    stopped = files.read_table(tiny / "stop" / "responses.parquet", schemas.RESPONSES).to_pylist()
    for row, other in zip(rows, stopped, strict=True):
        for ids, cut, reason in zip(row["token_ids"], other["token_ids"], other["finish_reasons"], strict=True):
            assert cut == (ids[: ids.index(stop) + 1] if stop in ids else ids)
            assert reason == "stop" or stop not in ids


@pytest.mark.slow
def test_prompts_too_long_for_the_engine_are_left_out_by_generate_only(tiny: Path) -> None:
    import pyarrow as pa

    prompts = ["What is 1 plus 1?", "word " * 500]
    long = pa.table({"prompt_id": [schemas.prompt_id(prompt) for prompt in prompts], "prompt": prompts}, schema=schemas.PART)
    files.write_table(long, schemas.PART, tiny / "long.parquet")
    done = run_stage(tiny, "generate", "iter1", "base", "long.parquet", "short.parquet")
    assert done.returncode == 0, done.stderr
    assert "1 prompts, 1 left out" in done.stderr
    assert files.read_table(tiny / "short.parquet", schemas.RESPONSES).column("prompt").to_pylist() == prompts[:1]
    (tiny / "set").mkdir(exist_ok=True)
    files.write_json([{"dataset": "x", "instruction": "word " * 500}], tiny / "set" / "reference_outputs.json")
    done = run_stage(tiny, "answer", "base", "base", "set", "part.parquet", "answers.json", "hold-out.parquet")
    assert done.returncode == 1
    assert "leaves no room to answer" in done.stderr.splitlines()[-1]
    assert not (tiny / "answers.json").exists()
    assert not (tiny / "hold-out.parquet").exists()


def test_seeds_belong_to_seed_name_and_prompt() -> None:
    seeds = {sampling.sample_seed(seed, name, prompt) for seed in (1, 2) for name in ("iter1", "iter2") for prompt in "ab"}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**56 for seed in seeds)


def test_a_missing_input_is_one_line(tmp_path: Path) -> None:
    set_params(tmp_path, {})
    done = run_stage(tmp_path, "generate", "iter1", "base", "data/split/iter1.parquet", "data/out.parquet")
    assert done.returncode == 1
    assert done.stderr == "generate: error: data/split/iter1.parquet is missing: make it with `dvc repro`\n"
    assert not (tmp_path / "data").exists()

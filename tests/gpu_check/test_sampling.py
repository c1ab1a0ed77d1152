from pathlib import Path

import pytest

from gpu_check import sampling, sizes
from stages.runtime import params


def test_shards_share_the_beginnings_of_their_prompts_and_nothing_else() -> None:
    size = sizes.CPU.sampling
    one, again, other = (sampling.make_shard(name, size).to_pylist() for name in ("one", "one", "other"))
    assert one == again
    assert len({row["prompt_id"] for row in one + other}) == 2 * size.prompts
    half = size.prompt_tokens // 2
    assert len({tuple(row["prompt_token_ids"][:half]) for row in one + other}) == 1
    assert len({tuple(row["prompt_token_ids"][half:]) for row in one + other}) == 2 * size.prompts


@pytest.mark.parametrize("size", [sizes.GPU.sampling, sizes.CPU.sampling], ids=["gpu", "cpu"])
def test_the_engine_is_not_the_one_of_params_yaml(
    size: sizes.Sampling, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("params.yaml was read")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(params, "load", refuse)
    monkeypatch.setattr(params, "validate", refuse)
    engine = size.engine(batch_invariant=True)
    assert (engine.tensor_parallel, engine.kv_cache_gib, engine.batch_invariant) == (1, size.kv_cache_gib, True)
    assert size.engine() == engine.model_copy(update={"batch_invariant": False})
    assert engine.max_model_length > size.prompt_tokens + size.new_tokens
    assert engine.max_num_batched_tokens >= engine.max_model_length

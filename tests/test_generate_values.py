import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages import generate
from stages.artifacts import schemas, tables
from stages.engines import sampling
from support import tables as examples
from support.models import make_model
from support.running import set_params


def test_responses_are_drawn_with_every_setting_of_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def sample(stage: str, prompts: pa.Table, *arguments: Any, skip_too_long: bool) -> pa.Table:
        calls.append((stage, prompts["prompt_id"].to_pylist(), *arguments, skip_too_long))
        return pa.Table.from_pylist(examples.responses(), schema=schemas.RESPONSES)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "sample_responses", sample)
    draw = {"samples": 4, "temperature": 0.3, "top_p": 0.8, "max_new_tokens": 11, "shard_size": 3}
    set_params(tmp_path, {"seed": 9, "generate": draw})
    tables.write(examples.split(), schemas.SPLIT, tmp_path / "prompts.parquet")
    make_model(tmp_path / "m")
    paths = {"model": Path("m"), "prompts": Path("prompts.parquet"), "out": Path("out.parquet")}
    generate.main(argparse.Namespace(iteration="iter2", **paths))
    ((stage, prompts, model, _, requested, shard_size, skip_too_long),) = calls
    assert (stage, model, shard_size, skip_too_long) == ("generate", Path("m"), 3, True)
    assert prompts == [row["prompt_id"] for row in examples.split()]
    assert requested == sampling.Sampling(samples=4, temperature=0.3, top_p=0.8, max_new_tokens=11, seed=9, name="iter2")
    assert tables.read(tmp_path / "out.parquet", schemas.RESPONSES).to_pylist() == examples.responses()

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages.artifacts import schemas
from stages.engines import answering, sampling
from stages.runtime import params
from stages.runtime.paths import ROOT


def test_each_distinct_text_is_answered_once_and_the_order_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def sample_responses(stage: str, prompts: pa.Table, *arguments: Any, skip_too_long: bool) -> pa.Table:
        calls.append((stage, prompts, *arguments, skip_too_long))
        return pa.table({"responses": [[text.upper()] for text in prompts["prompt"].to_pylist()]})

    monkeypatch.setattr(sampling, "sample_responses", sample_responses)
    settings = params.load("engine", "answer", path=ROOT / "params.yaml")
    texts = ["b", "a", "b", "c"]
    responses = answering.draw_answers("answer", Path("m"), "iter1", texts, 7, settings.engine, settings.answer)
    assert responses["responses"].to_pylist() == [["B"], ["A"], ["B"], ["C"]]
    ((stage, prompts, model, engine, draw, shard_size, skip_too_long),) = calls
    assert (stage, model, engine, shard_size) == ("answer", Path("m"), settings.engine, settings.answer.shard_size)
    assert prompts.schema == schemas.SPLIT
    assert prompts.to_pylist() == [{"prompt_id": schemas.prompt_id(text), "prompt": text} for text in "bac"]
    assert (draw.samples, draw.seed, draw.name) == (1, 7, "answer/iter1")
    assert not skip_too_long


def test_outputs_have_the_format_of_alpaca_eval() -> None:
    instructions = [{"dataset": "d", "instruction": "i", "extra": "dropped"}, {"dataset": "e", "instruction": "j"}]
    outputs = answering.format_outputs("iter1", instructions, pa.table({"responses": [["x"], ["y"]]}))
    assert outputs == [
        {"dataset": "d", "instruction": "i", "output": "x", "generator": "iter1"},
        {"dataset": "e", "instruction": "j", "output": "y", "generator": "iter1"},
    ]


def test_outputs_need_one_answer_per_instruction() -> None:
    with pytest.raises(ValueError, match="shorter"):
        answering.format_outputs("x", [{"dataset": "d", "instruction": "i"}] * 2, pa.table({"responses": [["x"]]}))

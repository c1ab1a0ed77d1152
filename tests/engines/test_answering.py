from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts import pointers, schemas
from stages.engines import answering, sampling
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message


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


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 20))
def test_prompts_of_the_hold_out_that_leave_no_room_are_left_out(lengths: list[int], room: int) -> None:
    """A prompt of n tokens, which the stand-in for a tokenizer sees in its text, leaves 40 - n."""

    def tokenize_prompts(tokenizer: Any, prompts: pa.Table) -> pa.Table:
        ids = [[0] * int(text.split()[0]) for text in prompts["prompt"].to_pylist()]
        return prompts.append_column("prompt_token_ids", pa.array(ids, pa.list_(pa.int32())))

    rows = [{"prompt_id": str(index), "prompt": f"{length} {index}"} for index, length in enumerate(lengths)]
    prompts = pa.Table.from_pylist(rows, schema=schemas.SPLIT)
    answer = params.Answer(temperature=1.0, top_p=1.0, max_new_tokens=room, shard_size=1)
    expected = [row for row, length in zip(rows, lengths, strict=True) if length + room <= 40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "tokenize_prompts", tokenize_prompts)
        patch.setattr(pointers, "check_model", Path)
        patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
        if len(expected) < 2:
            with pytest.raises(StageError) as error:
                answering.select_fitting(Path("m"), prompts, 40, answer)
            assert_message(str(error.value), "leaves room", f"{room} tokens", "engine.max_model_length 40", "raise it")
        else:
            fitting = answering.select_fitting(Path("m"), prompts, 40, answer)
            assert fitting.schema == schemas.SPLIT
            assert fitting.to_pylist() == expected


def test_prompts_that_are_left_out_are_counted_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tokenize_prompts(tokenizer: Any, prompts: pa.Table) -> pa.Table:
        return prompts.append_column("prompt_token_ids", pa.array([[0], [0] * 9, [0]], pa.list_(pa.int32())))

    monkeypatch.setattr(sampling, "tokenize_prompts", tokenize_prompts)
    monkeypatch.setattr(pointers, "check_model", Path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    prompts = pa.table({"prompt_id": list("abc"), "prompt": list("xyz")}, schema=schemas.SPLIT)
    answer = params.Answer(temperature=1.0, top_p=1.0, max_new_tokens=4, shard_size=1)
    assert answering.select_fitting(Path("m"), prompts, 8, answer)["prompt_id"].to_pylist() == ["a", "c"]
    assert_message(caplog.text, "1 of 3 prompts of the hold-out", "too long")


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

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages import answer
from stages.artifacts import files, schemas, tables
from support import tables as examples
from support.models import make_model
from support.running import set_params


def test_instructions_and_hold_out_get_their_own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(stage: str, model: Path, name: str, texts: list[str], *_: Any) -> pa.Table:
        rows = [{"prompt_id": schemas.prompt_id(text), "prompt": text} for text in texts]
        answered = examples.add_responses(rows, lambda prompt: [f"{name} on {prompt}"])
        return pa.Table.from_pylist(answered, schema=schemas.RESPONSES)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answer, "draw_answers", draw)
    set_params(tmp_path, {})
    make_model(tmp_path / "m")
    instructions = [{"dataset": "d", "instruction": text} for text in ("one", "two", "three")]
    files.write_json(instructions, tmp_path / "instructions.json")
    tables.write(examples.split(), schemas.SPLIT, tmp_path / "hold-out.parquet")
    options = {"model": "m", "instructions": "instructions.json", "hold_out": "hold-out.parquet"}
    options |= {"out": "answers.json", "out_hold_out": "answers.parquet"}
    answer.main(argparse.Namespace(name="iter1", **{name: Path(value) for name, value in options.items()}))
    outputs = files.read_json(tmp_path / "answers.json")
    assert [row["output"] for row in outputs] == ["iter1 on one", "iter1 on two", "iter1 on three"]
    held_out = tables.read(tmp_path / "answers.parquet", schemas.RESPONSES).to_pylist()
    assert [row["responses"] for row in held_out] == [[f"iter1 on {prompt}"] for prompt in examples.PROMPTS]

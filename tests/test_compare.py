from pathlib import Path

import pyarrow as pa
import pytest

from stages import compare
from stages.artifacts import files, schemas
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.ranker import OVERRIDES, write_responses
from support.running import run_stage, set_params


def answers(texts: list[str], prompts: str = "abc") -> pa.Table:
    """Single responses to prompts, as schemas.RESPONSES."""
    rows = [
        {
            "prompt_id": prompt,
            "prompt": prompt,
            "templated_prompt": f"<{prompt}>",
            "prompt_token_ids": [1],
            "responses": [text],
            "token_ids": [[2, index]],
            "token_counts": [2],
            "finish_reasons": ["stop"],
            "seeds": [index],
        }
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=schemas.RESPONSES)


def test_the_models_responses_stand_side_by_side() -> None:
    tables = [(Path(name), answers([f"{name}{index}" for index in range(3)])) for name in ("base", "iter1")]
    joined = compare.join_responses(tables)
    assert joined.schema == schemas.RESPONSES
    rows = joined.to_pylist()
    assert [row["responses"] for row in rows] == [["base0", "iter10"], ["base1", "iter11"], ["base2", "iter12"]]
    assert rows[1]["token_ids"] == [[2, 1], [2, 1]]
    assert rows[2]["templated_prompt"] == "<c>"


def test_models_that_answered_other_prompts_are_rejected() -> None:
    tables = [(Path("base.parquet"), answers(["x"] * 3)), (Path("iter1.parquet"), answers(["x"] * 3, "acb"))]
    with pytest.raises(StageError) as error:
        compare.join_responses(tables)
    assert_message(str(error.value), "iter1.parquet", "'prompt_id'", "base.parquet", "re-run")


@pytest.mark.slow
def test_every_model_is_compared_with_every_other(ranker: Path, tmp_path: Path) -> None:
    set_params(tmp_path, OVERRIDES | {"iterations": {"iter1": "base"}})
    (tmp_path / "hold_out").mkdir()
    options = ("--ranker", ranker, "--hold-out", "hold_out", "--out", "comparison.json")
    done = run_stage(tmp_path, "compare", *options)
    assert done.returncode == 1
    assert_message(done.stderr, "compare: error: ", "hold_out/base.parquet is missing")
    prompts = ["What is 1 plus 2?", "Name three metals.", "What is 2 plus 2?"]
    for name, answer in (("base", "Ugh."), ("iter1", "The answer is 3.")):
        write_responses([(prompt, [answer]) for prompt in prompts], tmp_path / "hold_out" / f"{name}.parquet")
    done = run_stage(tmp_path, "compare", *options)
    assert done.returncode == 0, done.stderr
    result = files.read_json(tmp_path / "comparison.json")
    assert sorted(result) == ["models", "n", "standard_errors", "win_rates"]
    assert (result["models"], result["n"]) == (["base", "iter1"], 3)
    (half, lower), (higher, other_half) = result["win_rates"]
    assert half == other_half == 50
    assert lower + higher == pytest.approx(100)

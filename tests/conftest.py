"""A tiny base policy, its responses and its pairs, made once a session."""

from pathlib import Path

import pytest
from running import TINY, run_stage, set_params


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml, a tiny base policy, 20 prompts and the responses to them."""
    import pyarrow as pa

    from stages import domain, files, schemas

    folder = tmp_path_factory.mktemp("tiny")
    set_params(folder, TINY)
    done = run_stage(folder, "assets.policy", "base")
    assert done.returncode == 0, done.stderr
    prompts = domain.distinct_prompts("tests", "training", 20)
    part = pa.table({"prompt_id": [schemas.prompt_id(prompt) for prompt in prompts], "prompt": prompts}, schema=schemas.PART)
    files.write_table(part, schemas.PART, folder / "part.parquet")
    done = run_stage(folder, "generate", "iter1", "base", "part.parquet", "responses.parquet")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def pairs(tiny: Path) -> Path:
    """`tiny` with rankings of the responses by chance and the pairs with their reference log-probabilities."""
    import torch

    from stages import files, rank, schemas

    torch.manual_seed(0)
    responses = files.read_table(tiny / "responses.parquet", schemas.RESPONSES).to_pylist()
    rows = [
        rank.ranking(row["prompt_id"], torch.randn(3, 3).fill_diagonal_(0), row["responses"], "pairwise") for row in responses
    ]
    rows = [row | {"prompt_cut": False, "responses_cut": 0} for row in rows]
    files.write_table(rows, schemas.RANKINGS, tiny / "rankings.parquet")
    done = run_stage(tiny, "reference", "base", "responses.parquet", "rankings.parquet", "pairs.parquet")
    assert done.returncode == 0, done.stderr
    return tiny

"""Real text through the miniature's models: code, tables, many scripts and long inputs. The answers are poor, the text is real.

SPPO_REFERENCE names a folder with alpaca_eval/alpaca_eval_gpt4_baseline.json (AlpacaEval's 805 instructions) and
alpaca_eval/sppo_outputs/*/model_outputs.json (published responses to them).
"""

import json
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.artifacts import files, schemas, tables
from support.running import TINY, run_stage, set_params

REFERENCE = os.environ.get("SPPO_REFERENCE")
pytestmark = [
    pytest.mark.slowest,
    pytest.mark.skipif(not REFERENCE, reason="SPPO_REFERENCE is not set to a folder of AlpacaEval reference data"),
]


def read_published(name: str) -> list[dict[str, str]]:
    records: list[dict[str, str]] = json.loads((Path(str(REFERENCE)) / "alpaca_eval" / name).read_text())
    return records


def run(folder: Path, command: str) -> None:
    done = run_stage(folder, *command.split())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def world(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """params.yaml with the 805 instructions as a local data set in UltraFeedback's form, a tiny policy and ranker."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "prompts").mkdir()
    instructions = [row["instruction"] for row in read_published("alpaca_eval_gpt4_baseline.json")]
    files.write_json([{"dataset": "x", "instruction": text} for text in instructions[:700]], folder / "instructions.json")
    pq.write_table(pa.table({"instruction": instructions}), folder / "prompts" / "train.parquet")
    overrides = {
        "assets.prompts": {"repo": "./prompts", "split": "train", "column": "instruction"},
        "assets.ranker.miniature": {
            "hidden_size": 32,
            "layers": 1,
            "prompts": 60,
            "candidates": 3,
            "noise": 0.5,
            "learning_rate": 2.0e-3,
        },
        "iterations": {"iter1": "base"},
        "split.prompts_per_iteration": 780,
        "split.hold_out": 10,
        "engine.max_model_length": 1024,
        "generate.shard_size": 256,
        "lengths.too_long": "truncate",
    }
    set_params(folder, TINY | overrides)
    (folder / "base").symlink_to(tiny / "base")
    run(folder, "assets-ranker --out ranker")
    return folder


def test_real_instructions_pass_every_stage_to_a_trained_policy(world: Path) -> None:
    for command in (
        "assets-prompts --out prompts.parquet",
        "split --prompts prompts.parquet --instructions instructions.json --out split",
        "generate --iteration iter1 --model base --prompts split/iter1.parquet --out responses.parquet",
        "rank --ranker ranker --responses responses.parquet --out rankings.parquet",
        "reference --model base --responses responses.parquet --rankings rankings.parquet --out pairs.parquet",
        "train --model base --pairs pairs.parquet --out iter1 --out-log iter1.csv --out-update iter1.json",
    ):
        run(world, command)
    prompts = tables.read(world / "split" / "iter1.parquet", schemas.SPLIT).to_pandas()
    responses = tables.read(world / "responses.parquet", schemas.RESPONSES).to_pandas()
    pairs = tables.read(world / "pairs.parquet", schemas.PAIRS).to_pandas()
    real = {row["instruction"] for row in read_published("alpaca_eval_gpt4_baseline.json")}
    assert set(prompts["prompt"]) <= real
    assert files.read_json(world / "split" / "contamination.json")["contaminated"]["iter1"] >= 780 - 105
    assert 700 < len(responses) < len(prompts) == 780  # a few leave no room in the tiny policy's context
    assert len(pairs) > 700
    tokens = {text: pairs[f"{text}_token_ids"].map(len) for text in ("prompt", "chosen", "rejected")}
    whole = pairs["prompt_tokens_cut"] == 0
    assert (tokens["prompt"] + tokens["chosen"].combine(tokens["rejected"], max)).max() == 256
    assert (tokens["prompt"][~whole] >= 128).all()
    assert (pairs[["chosen_reference_logps", "rejected_reference_logps"]] < 0).all(axis=None)
    assert len(pd.read_csv(world / "iter1.csv")) == len(pairs) // 8


def test_published_responses_are_ranked_against_each_other(world: Path) -> None:
    """Twenty prompts with responses of thousands of characters, far beyond what PairRM reads without truncation."""
    names = ("Meta-Llama-3-8B-Instruct", "SPPO-Llama-3-Instruct-8B-PairRM")
    outputs = [read_published(f"sppo_outputs/{name}/model_outputs.json")[::40][:20] for name in names]
    rows = [
        {
            "prompt_id": schemas.prompt_id(base["instruction"]),
            "prompt": base["instruction"],
            "templated_prompt": base["instruction"],
            "prompt_token_ids": [1],
            "responses": [base["output"], sppo["output"]],
            "token_ids": [[1], [1]],
            "token_counts": [1, 1],
            "finish_reasons": ["stop", "stop"],
            "seeds": [2 * index, 2 * index + 1],
        }
        for index, (base, sppo) in enumerate(zip(*outputs, strict=True))
    ]
    tables.write(rows, schemas.RESPONSES, world / "published.parquet")
    run(world, "rank --ranker ranker --responses published.parquet --out published-rankings.parquet")
    rankings = tables.read(world / "published-rankings.parquet", schemas.RANKINGS).to_pylist()
    assert len(rankings) == 20
    for ranking in rankings:
        assert sum(ranking["probabilities"]) == pytest.approx(1)
        assert {ranking["chosen"], ranking["rejected"]} == {0, 1}

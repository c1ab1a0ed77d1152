"""Which pairs are trained on, which of their tokens, and their log-probabilities."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from stages import reference
from stages.artifacts import schemas, tables
from stages.method import packing
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support import tables as valid
from support.messages import assert_message
from support.running import TINY, run_stage, set_params

K = 3
ids = st.lists(st.integers(0, 9), min_size=1, max_size=30)
prompts = st.tuples(ids, st.lists(ids, min_size=K, max_size=K), st.integers(0, K - 1), st.integers(0, K - 1))


def build_pair(row: dict[str, Any], ranking: dict[str, Any], lengths: params.Lengths) -> dict[str, Any] | None:
    """Build the pair of one prompt with Python lists; None if it is dropped."""
    responses = [row["token_ids"][ranking[side]] for side in ("chosen", "rejected")]
    prompt, kept, longest = row["prompt_token_ids"], responses, max(map(len, responses))
    if ranking["tie"] or (lengths.too_long == "drop" and len(prompt) + longest > lengths.total):
        return None
    if len(prompt) + longest > lengths.total:
        part = lengths.prompt if lengths.too_long == "released" else max(lengths.prompt, lengths.total - longest)
        prompt = prompt[-part:]
    if len(prompt) + longest > lengths.total:
        room = lengths.total - (lengths.prompt if lengths.too_long == "released" else len(prompt))
        kept = [response[:room] for response in responses]
    return {
        "prompt_id": row["prompt_id"],
        "prompt_token_ids": prompt,
        "chosen_token_ids": kept[0],
        "rejected_token_ids": kept[1],
        "chosen_probability": ranking["probabilities"][ranking["chosen"]],
        "rejected_probability": ranking["probabilities"][ranking["rejected"]],
        "prompt_tokens_cut": len(row["prompt_token_ids"]) - len(prompt),
        "chosen_tokens_cut": len(responses[0]) - len(kept[0]),
        "rejected_tokens_cut": len(responses[1]) - len(kept[1]),
    }


@settings(deadline=None)
@given(
    st.lists(prompts, min_size=2, max_size=9),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(["drop", "truncate", "released"]),
    st.data(),
)
def test_pairs_match_a_row_by_row_construction(
    drawn: list[Any], longest: int, more: int, too_long: Any, data: st.DataObject
) -> None:
    """The tables consist of several chunks and are slices of others, as tables read from files and shards are."""
    (response, *_), (_, ranking) = valid.responses(K), valid.rankings()
    rows, ranked = [], []
    for index, (prompt, responses, chosen, rejected) in enumerate(drawn):
        rows.append(response | {"prompt_id": f"{index}", "prompt_token_ids": prompt, "token_ids": responses})
        probabilities = [index + sample / 10 for sample in range(K)]
        changes = {"chosen": chosen, "rejected": rejected, "tie": chosen == rejected}
        ranked.append(ranking | {"prompt_id": f"{index}", "probabilities": probabilities} | changes)
    cut = data.draw(st.integers(0, len(rows)))
    whole = pa.Table.from_pylist(rows, schema=schemas.RESPONSES)
    chunks = pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])
    rankings = pa.Table.from_pylist(ranked[:1] + ranked, schema=schemas.RANKINGS).slice(1)
    lengths = params.Lengths(prompt=longest, total=longest + more, too_long=too_long)
    expected = [pair for row, one in zip(rows, ranked, strict=True) if (pair := build_pair(row, one, lengths))]
    if expected:
        pairs = reference.build_pairs(chunks, rankings, lengths)
        assert pairs.schema == schemas.UNSCORED_PAIRS
        assert pairs.to_pylist() == expected


def build_valid_pairs(responses: list[valid.Row], rankings: list[valid.Row], total: int) -> pa.Table:
    return reference.build_pairs(
        pa.Table.from_pylist(responses, schema=schemas.RESPONSES),
        pa.Table.from_pylist(rankings, schema=schemas.RANKINGS),
        params.Lengths(prompt=2, total=total, too_long="drop"),
    )


def test_rankings_of_other_prompts_are_one_line() -> None:
    with pytest.raises(StageError) as raised:
        build_valid_pairs(valid.responses(), valid.rankings()[::-1], total=9)
    assert_message(str(raised.value), "'prompt_id'", "re-run rank")


def test_no_pair_left_is_one_line_with_the_parameters_to_change() -> None:
    with pytest.raises(StageError) as raised:
        build_valid_pairs(valid.responses()[:1], valid.rankings()[:1], total=9)
    assert_message(str(raised.value), "1 prompts", "1 ties, 0 too long", "generate.temperature or generate.samples")
    with pytest.raises(StageError) as raised:
        build_valid_pairs(valid.responses(), valid.rankings(), total=3)
    assert_message(str(raised.value), "2 prompts", "1 ties, 1 too long", "raise lengths.total", "lengths.too_long to truncate")


@pytest.mark.parametrize("too_long", ["drop", "truncate", "released"])
def test_a_pair_that_fits_is_kept_whole_however_long_its_prompt(too_long: Any) -> None:
    """The prompt has 2 tokens, more than lengths.prompt, and the longer response 3; one token less of room is too little."""
    tables = [
        pa.Table.from_pylist(rows[1:], schema=schema)
        for rows, schema in ((valid.responses(), schemas.RESPONSES), (valid.rankings(), schemas.RANKINGS))
    ]
    prompt, responses = (tables[0][column][0].as_py() for column in ("prompt_token_ids", "token_ids"))
    ranking = valid.rankings()[1]
    whole = [prompt, responses[ranking["chosen"]], responses[ranking["rejected"]]]
    total = len(prompt) + max(map(len, whole[1:]))
    (pair,) = reference.build_pairs(*tables, params.Lengths(prompt=1, total=total, too_long=too_long)).to_pylist()
    assert [pair[f"{text}_token_ids"] for text in packing.TEXTS] == whole
    assert [pair[f"{text}_tokens_cut"] for text in packing.TEXTS] == [0, 0, 0]
    shorter = params.Lengths(prompt=1, total=total - 1, too_long=too_long)
    if too_long == "drop":
        with pytest.raises(StageError):
            reference.build_pairs(*tables, shorter)
    else:
        (pair,) = reference.build_pairs(*tables, shorter).to_pylist()
        assert pair["prompt_tokens_cut"] == 1
        assert pair["prompt_token_ids"] == prompt[1:]


def test_the_longest_pair_has_the_longest_text() -> None:
    rows = [
        row | {"chosen_token_ids": [1] * chosen, "rejected_token_ids": [1] * rejected}
        for row, chosen, rejected in zip(valid.pairs(), (3, 2), (3, 5), strict=True)
    ]
    longest = reference.longest_pair(pa.Table.from_pylist(rows, schema=schemas.PAIRS))
    assert longest["prompt_id"] == rows[1]["prompt_id"]


@pytest.mark.slow
def test_scores_are_the_naive_log_probabilities(pairs: Path) -> None:
    """Computed from float64 logits of each sequence alone, without padding, batches or DeepSpeed."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(pairs / "base", dtype=torch.float64)
    for row in tables.read(pairs / "pairs.parquet", schemas.PAIRS).to_pylist():
        for side in ("chosen", "rejected"):
            prompt, response = row["prompt_token_ids"], row[f"{side}_token_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            naive = sum(logps[len(prompt) + k - 1, token].item() for k, token in enumerate(response))
            assert row[f"{side}_reference_logps"] == pytest.approx(naive, abs=1e-3)


@pytest.mark.slow
def test_the_tokens_sampled_are_the_tokens_trained_on(pairs: Path) -> None:
    responses = tables.read(pairs / "responses.parquet", schemas.RESPONSES).to_pylist()
    rankings = tables.read(pairs / "rankings.parquet", schemas.RANKINGS).to_pylist()
    rows = tables.read(pairs / "pairs.parquet", schemas.PAIRS).to_pylist()
    for response, ranking, row in zip(responses, rankings, rows, strict=True):
        assert row["prompt_token_ids"] == response["prompt_token_ids"]
        assert row["chosen_token_ids"] == response["token_ids"][ranking["chosen"]]
        assert row["rejected_token_ids"] == response["token_ids"][ranking["rejected"]]
        assert packing.collate([row])["targets"].tolist() == row["chosen_token_ids"] + row["rejected_token_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [pytest.param("ours", marks=pytest.mark.slowest), "torchrun"])
def test_two_processes_score_the_same_pairs(pairs: Path, launcher: str) -> None:
    """Whether the stage starts its processes itself or another launcher does, they share one scratch folder and its pairs.

    What it starts itself runs in test_cluster.py too, whose two nodes give the same bytes.
    """
    folder = pairs / f"two-{launcher}"
    folder.mkdir()
    set_params(folder, TINY | {"train.devices": 2})
    options = ["--model", "../base", "--responses", "../responses.parquet", "--rankings", "../rankings.parquet"]
    options += ["--out", "pairs.parquet"]
    if launcher == "ours":
        done = run_stage(folder, "reference", *options)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command += ["stages", "reference", *options]
        done = subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone, two = (tables.read(path, schemas.PAIRS) for path in (pairs / "pairs.parquet", folder / "pairs.parquet"))
    assert two.select(schemas.UNSCORED_PAIRS.names) == alone.select(schemas.UNSCORED_PAIRS.names)
    for name in schemas.REFERENCE_LOGPS:
        assert two[name].to_pylist() == pytest.approx(alone[name].to_pylist(), rel=1e-4)

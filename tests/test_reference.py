"""Which pairs are trained on, and which of their tokens."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tables
from hypothesis import given, settings
from hypothesis import strategies as st
from running import TINY, run_stage, set_params

from stages import files, params, reference, schemas
from stages.cli import ROOT

K = 3
ids = st.lists(st.integers(0, 9), min_size=1, max_size=30)
prompts = st.tuples(ids, st.lists(ids, min_size=K, max_size=K), st.integers(0, K - 1), st.integers(0, K - 1))


def naive(row: dict[str, Any], ranking: dict[str, Any], lengths: params.Lengths) -> dict[str, Any] | None:
    """The pair of one prompt, by Python's lists; None where there is none."""
    drawn = [row["token_ids"][ranking[side]] for side in ("winner", "loser")]
    prompt = row["prompt_token_ids"][-lengths.prompt :]
    cut = [response[: lengths.total - len(prompt)] for response in drawn]
    if ranking["tie"] or (lengths.too_long == "drop" and ([prompt, *cut] != [row["prompt_token_ids"], *drawn])):
        return None
    return {
        "prompt_id": row["prompt_id"],
        "prompt_token_ids": prompt,
        "chosen_token_ids": cut[0],
        "rejected_token_ids": cut[1],
        "chosen_probability": ranking["probabilities"][ranking["winner"]],
        "rejected_probability": ranking["probabilities"][ranking["loser"]],
        "prompt_cut": len(row["prompt_token_ids"]) - len(prompt),
        "chosen_cut": len(drawn[0]) - len(cut[0]),
        "rejected_cut": len(drawn[1]) - len(cut[1]),
    }


@settings(deadline=None)
@given(
    st.lists(prompts, min_size=2, max_size=9),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(["drop", "truncate"]),
    st.data(),
)
def test_pairs_are_those_that_lists_give_row_by_row(
    drawn: list[Any], longest: int, more: int, too_long: Any, data: st.DataObject
) -> None:
    """Tables in several parts, and slices of others, as files and shards give them."""
    (response, *_), (_, ranking) = tables.responses(K), tables.rankings()
    rows, ranked = [], []
    for index, (prompt, answers, winner, loser) in enumerate(drawn):
        rows.append(response | {"prompt_id": f"{index}", "prompt_token_ids": prompt, "token_ids": answers})
        probabilities = [index + sample / 10 for sample in range(K)]
        ranked.append(
            ranking
            | {
                "prompt_id": f"{index}",
                "probabilities": probabilities,
                "winner": winner,
                "loser": loser,
                "tie": winner == loser,
            }
        )
    cut = data.draw(st.integers(0, len(rows)))
    whole = pa.Table.from_pylist(rows, schema=schemas.RESPONSES)
    responses = pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])
    rankings = pa.Table.from_pylist(ranked[:1] + ranked, schema=schemas.RANKINGS).slice(1)
    lengths = params.Lengths(prompt=longest, total=longest + more, too_long=too_long)
    wanted = [pair for row, one in zip(rows, ranked, strict=True) if (pair := naive(row, one, lengths))]
    if wanted:
        found = reference.pairs(responses, rankings, lengths)
        assert found.schema == schemas.CHOSEN
        assert found.to_pylist() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_two_processes_score_the_same_pairs(pairs: Path, launcher: str) -> None:
    """Started by the stage, or by a launcher that knows nothing of it: the same folder of work, chosen in one of them."""
    folder = pairs / f"two-{launcher}"
    folder.mkdir()
    set_params(folder, TINY | {"train.devices": 2})
    arguments = ["../base", "../responses.parquet", "../rankings.parquet", "pairs.parquet"]
    if launcher == "ours":
        done = run_stage(folder, "reference", *arguments)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command += ["stages.reference", *arguments]
        done = subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone, two = (files.read_table(path, schemas.PAIRS) for path in (pairs / "pairs.parquet", folder / "pairs.parquet"))
    assert two.select(schemas.CHOSEN.names) == alone.select(schemas.CHOSEN.names)
    for name in ("chosen_reference_logps", "rejected_reference_logps"):
        assert two[name].to_pylist() == pytest.approx(alone[name].to_pylist(), rel=1e-4)


LAUNCHED = """
import os
from pathlib import Path
from stages import cli, files, policy

def main():
    if "LOCAL_RANK" in os.environ:
        files.digest = None
    policy.launch(2, {"input": Path("input")}, lambda found: Path(os.environ["RANK"]).write_text(found["input"]))

cli.run(main)
"""


def test_launched_processes_do_not_hash_the_inputs_again(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("weights")
    (tmp_path / "launched.py").write_text(LAUNCHED)
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "launched.py"], cwd=tmp_path, env=values, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == [files.digest(tmp_path / "input")] * 2

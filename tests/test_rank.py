"""Ranking against llm-blender's own functions, and what must not change it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from running import run_stage, set_params

from stages import files, schemas, sppo
from stages.cli import ROOT

pytestmark = pytest.mark.slow

RANK = Path(sys.prefix).parent / "rank" / "bin" / "python"
SIZE = {"hidden_size": 32, "layers": 2, "prompts": 40, "candidates": 2, "noise": 0.5, "learning_rate": 3.0e-3}
OVERRIDES = {"assets.ranker.miniature": SIZE, "rank.shard_size": 2, "rank.tokens_per_batch": 4096}
LONG = "A response of many words, longer than the others by far. " * 60

Rows = Sequence[tuple[str, list[str]]]
ROWS: Rows = [
    ("What is 1 plus 2?", ["The answer is 3.", "The answer is 4. I hope that helps!", "Ugh."]),
    ("Name three metals.", ["Three metals are iron, tin, lead.", "", "Whatever. Three"]),
    ("Schreib etwas: 日本語 😀 … ² “x”", ["def f(x):\n    return {x: 'é'}", "noch\u00a0ein Versuch", "\U0001f600" * 5]),
    ("A long prompt. " * 200, [LONG, LONG + LONG, "Short."]),
]


def write(rows: Rows, path: Path) -> Path:
    """Write prompts and responses as schemas.RESPONSES."""
    table = [
        {
            "prompt_id": schemas.prompt_id(prompt),
            "prompt": prompt,
            "templated_prompt": f"<s>user: {prompt}",
            "prompt_token_ids": [1],
            "responses": responses,
            "token_ids": [[2]] * len(responses),
            "token_counts": [1] * len(responses),
            "finish_reasons": ["stop"] * len(responses),
            "seeds": [10 * index + sample for sample in range(len(responses))],
        }
        for index, (prompt, responses) in enumerate(rows)
    ]
    files.write_table(table, schemas.RESPONSES, path)
    return path


@pytest.fixture(scope="session")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranker")
    set_params(folder, OVERRIDES)
    done = run_stage(folder, "assets.ranker", "ranker")
    assert done.returncode == 0, done.stderr
    return folder / "ranker"


Rank = Callable[..., Path]


@pytest.fixture
def rank(ranker: Path, tmp_path: Path) -> Rank:
    """Rank rows in tmp_path with overrides of params and the environment. Returns the rankings' path."""

    def rank(rows: Rows, name: str = "rankings", environment: dict[str, str] | None = None, **overrides: Any) -> Path:
        set_params(tmp_path, OVERRIDES | {f"rank.{key}": value for key, value in overrides.items()})
        done = run_stage(
            tmp_path,
            "rank",
            ranker,
            write(rows, tmp_path / "responses.parquet"),
            f"{name}.parquet",
            **{"SPPO_WORKERS": "1"} | (environment or {}),
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / f"{name}.parquet"

    return rank


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = files.read_table(path, schemas.RANKINGS).to_pylist()
    return rows


def test_logits_and_scores_are_llm_blenders_own(ranker: Path, rank: Rank, tmp_path: Path) -> None:
    rows = read(rank(ROWS))
    oracle = [RANK, ROOT / "tests/oracles/blender_scores.py", ranker, tmp_path / "responses.parquet", tmp_path / "oracle.json"]
    subprocess.run([*map(str, oracle)], check=True, capture_output=True)
    expected = json.loads((tmp_path / "oracle.json").read_text())
    for row, scores, logits in zip(rows, expected["scores"], expected["logits"], strict=True):
        found = torch.tensor(row["logits"])
        torch.testing.assert_close((found - found.T).mean(-1), torch.tensor(scores), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, torch.tensor(logits), atol=1e-5, rtol=1e-5)
        pairwise = sppo.pairwise_scores(found.double())
        assert row["probabilities"] == pytest.approx(sppo.win_probabilities(pairwise).tolist())
        assert (row["winner"], row["loser"]) == tuple(int(index) for index in sppo.choose_pair(pairwise))
        assert not row["tie"]
        assert found.diagonal().tolist() == [0.0] * 3


def test_nothing_depends_on_shards_batches_or_workers(rank: Rank) -> None:
    first = rank(ROWS, "first", {"SPPO_WORKERS": "1"}, shard_size=5)
    assert rank(ROWS, "workers", {"SPPO_WORKERS": "2"}).read_bytes() == first.read_bytes()
    for row, other in zip(read(first), read(rank(ROWS, "batches", tokens_per_batch=1)), strict=True):
        torch.testing.assert_close(torch.tensor(row["logits"]), torch.tensor(other["logits"]), atol=1e-5, rtol=1e-5)


def test_a_processor_computes_what_llm_blenders_forward_pass_does(ranker: Path) -> None:
    """Which a GPU runs; texts of other lengths share the batch, one in several blocks of scores; each weight matters."""
    program = (
        "import sys, torch; from pathlib import Path; from stages import deberta, rank; deberta.BLOCK = 5000;"
        "blender = rank.load_blender(Path(sys.argv[1])); torch.manual_seed(0);"
        "[weights.data.normal_() for weights in blender.ranker.parameters()];"
        "lengths = [(3, 9, 4), (70, 50, 60), (20, 3, 30)];"
        "text = lambda marker, n: torch.tensor([1, marker, *range(40, 37 + n), 2]); k = blender.ranker_tokenizer;"
        "batch = [(text(k.source_prefix_id, a), text(k.cand_prefix_id, b), text(k.cand_prefix_id, c)) for a, b, c in lengths];"
        "assert rank.comparing(blender).__qualname__.startswith('quick');"
        "torch.testing.assert_close(rank.quick(blender)(batch), rank.llm_blenders_own(blender)(batch), atol=2e-5, rtol=0)"
    )
    subprocess.run([str(RANK), "-c", program, str(ranker)], cwd=ROOT, check=True)


def test_identical_responses_are_scored_once_and_are_a_tie(rank: Rank) -> None:
    prompt, (first, second, _) = ROWS[0]
    twice, alike = read(rank([(prompt, [first, second, first]), ("Another?", [first] * 3)]))
    (plain,) = read(rank([(prompt, [first, second, "x"])], "plain"))
    assert alike["logits"] == [[0.0] * 3] * 3
    assert alike["probabilities"] == [0.5] * 3
    assert alike["tie"]
    assert alike["winner"] == alike["loser"]
    assert twice["logits"][0][2] == twice["logits"][2][0] == 0
    assert twice["logits"][0] == twice["logits"][2]
    assert twice["logits"][0][1] == pytest.approx(plain["logits"][0][1], abs=1e-5)
    assert {twice["winner"], twice["loser"]} == {0, 1}
    assert not twice["tie"]


def test_the_templated_prompt_and_aggregate_probabilities_are_parameters(rank: Rank) -> None:
    plain, templated = (read(rank(ROWS[:1], kind, input=kind))[0] for kind in ("instruction", "templated"))
    assert templated["logits"] != plain["logits"]
    prompt, responses = ROWS[0]
    assert templated["logits"] == read(rank([(f"<s>user: {prompt}", responses)], "by hand"))[0]["logits"]
    (aggregate,) = read(rank(ROWS[:1], "aggregate", probability="aggregate"))
    assert aggregate["logits"] == plain["logits"]
    assert (aggregate["winner"], aggregate["loser"]) == (plain["winner"], plain["loser"])
    scores = sppo.pairwise_scores(torch.tensor(plain["logits"], dtype=torch.float64))
    assert aggregate["probabilities"] == pytest.approx(sppo.win_probabilities(sppo.aggregate_scores(scores)).tolist())
    assert aggregate["probabilities"] != pytest.approx(plain["probabilities"])


def test_what_the_ranker_cuts_is_counted(rank: Rank) -> None:
    """PairRM holds 1224 tokens of the prompt, and of each response 412 and half of what the prompt leaves."""
    word = "tin "
    rows = [("A", [word * 1100, "x", word * 1100 + "y"]), (word * 1300, ["x", "y", word * 450]), ("B", ["x", word * 900, "y"])]
    assert [(row["prompt_cut"], row["responses_cut"]) for row in read(rank(rows))] == [(False, 2), (True, 1), (False, 0)]


STRANGE = ["<|source|>", "a <|candidate|> b", "<|candidate1|><|candidate2|>", "[SEP] [CLS] [PAD] [MASK]", "\x00", "\u0301x"]
LOOKALIKE = ["＜|source|＞", "a ＜|candidate|＞ b", "［SEP］", "\u0338x"]
"""What the tokenizer's normalisation (NFKC) turns into a marker, or, after one, out of a marker."""


def test_texts_with_markers_of_pairrm_are_ranked(rank: Rank) -> None:
    texts = STRANGE + LOOKALIKE
    rows = [(prompt, ["Fine.", text, ""]) for prompt, text in zip(texts, reversed(texts), strict=True)]
    assert all(torch.tensor(row["logits"]).isfinite().all() for row in read(rank(rows)))


def refused(folder: Path, ranker: Path, responses: Path) -> str:
    """The one line that `stages.rank` refuses its input with; there must be no output then."""
    set_params(folder, OVERRIDES)
    done = run_stage(folder, "rank", ranker, responses, "rankings.parquet")
    assert done.returncode == 1, done.stderr
    assert not (folder / "rankings.parquet").exists()
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_single_response_is_refused(ranker: Path, tmp_path: Path) -> None:
    path = write([("a", ["b"])], tmp_path / "responses.parquet")
    assert f"{path}: a single response to each prompt: generate at least 2" in refused(tmp_path, ranker, path)


def test_a_missing_column_is_refused(ranker: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = write(ROWS, tmp_path / "responses.parquet")
    table: pa.Table = pq.read_table(path).drop_columns(["prompt"])
    pq.write_table(table, path)
    assert "responses.parquet: lacks column 'prompt'" in refused(tmp_path, ranker, path)


def test_missing_files_are_refused(ranker: Path, tmp_path: Path) -> None:
    assert "nothing.parquet is missing" in refused(tmp_path, ranker, tmp_path / "nothing.parquet")
    path = write(ROWS, tmp_path / "responses.parquet")
    assert "no-ranker is missing" in refused(tmp_path, tmp_path / "no-ranker", path)


def test_logits_that_are_not_finite_are_refused(ranker: Path, tmp_path: Path) -> None:

    broken = tmp_path / "broken"
    shutil.copytree(ranker, broken)
    program = (
        "import sys; from safetensors.torch import load_file, save_file; path = sys.argv[1]; weights = load_file(path);"
        "weights['head_layer.4.bias'].fill_(float('nan')); save_file(weights, path)"
    )
    subprocess.run([str(RANK), "-c", program, str(broken / "PairRM" / "model.safetensors")], check=True)
    set_params(tmp_path, OVERRIDES | {"rank.shard_size": 100})
    done = run_stage(
        tmp_path, "rank", broken, write(ROWS, tmp_path / "responses.parquet"), "rankings.parquet", SPPO_WORKERS="1"
    )
    assert done.returncode == 1
    assert "not finite" in done.stderr
    assert schemas.prompt_id(ROWS[0][0]) in done.stderr
    assert not (tmp_path / "rankings.parquet").exists()

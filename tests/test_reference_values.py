"""Scores of pairs: in the order of the pairs, in shards, the chosen response's before the rejected one's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stages import reference
from stages.artifacts import schemas, tables
from stages.engines import trainer, training
from stages.method import packing
from support import tables as examples


class Scorer:
    """Scores a response by the number that is its only token."""

    def __init__(self, *_: Any) -> None:
        pass

    def predict(self, rows: list[dict[str, Any]]) -> Any:
        scores = [[-row["chosen_token_ids"][0], -row["rejected_token_ids"][0]] for row in rows]
        return SimpleNamespace(predictions=np.array(scores, np.float32))


def test_every_pair_gets_its_own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "load_policy", lambda *_: None)
    monkeypatch.setattr(packing, "enable_scoring", lambda model, fused: model)
    monkeypatch.setattr(trainer, "LogpsScorer", Scorer)
    monkeypatch.setattr(reference, "SHARD_STEPS", 2)
    rows = [
        {name: value for name, value in examples.pairs()[0].items() if name in schemas.UNSCORED_PAIRS.names}
        | {"prompt_id": f"{index}", "chosen_token_ids": [index + 1], "rejected_token_ids": [100 + index]}
        for index in range(7)
    ]
    pairs = pa.Table.from_pylist(rows, schema=schemas.UNSCORED_PAIRS)
    arguments = SimpleNamespace(world_size=1, per_device_eval_batch_size=1)
    paths = reference.score_pairs(
        pairs, Path("model"), SimpleNamespace(dtype="float32", attention="plain"), arguments, tmp_path
    )
    assert len(paths) == 4
    scores = pa.concat_tables([tables.read(path, schemas.LOGPS) for path in paths]).to_pylist()
    assert scores == [
        {"prompt_id": f"{index}", "chosen_reference_logps": -index - 1, "rejected_reference_logps": -100 - index}
        for index in range(7)
    ]


def test_the_longest_pair_counts_prompt_and_longer_response() -> None:
    lengths = [(1, 9, 2), (5, 1, 7), (9, 1, 1)]
    rows = [
        examples.pairs()[0] | dict(zip(("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"), texts, strict=True))
        for texts in ([[1] * length for length in triple] for triple in lengths)
    ]
    longest = reference.longest_pair(pa.Table.from_pylist(rows, schema=schemas.PAIRS))
    assert len(longest["prompt_token_ids"]) == 5

"""Compare models by the ranker's preferences between their responses to the same prompts: for compare and compare-answers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from stages.artifacts import files
from stages.engines import ranking
from stages.method import sppo
from stages.runtime import params
from stages.runtime.logs import log


def compare_responses(
    stage: str, models: Sequence[str], responses: pa.Table, paths: Sequence[Path], ranker: Path, settings: params.Rank
) -> dict[str, Any]:
    """Rank the models' responses and return the content of comparison.json (Fig. 3).

    stage: the stage's name, for its scratch folder. responses: a row per prompt, with the columns that `ranking.rank_shard`
    reads, and one response of each of the K models. paths: the files that these were read from. ranker: a folder with `PairRM`
    and `base`. Returns `models`; `win_rates` and `standard_errors`, see `compute_win_rates`; and `n`, the number of prompts.
    Raises StageError if the ranker cannot be loaded or a worker fails.
    """
    digests = {"answers": [files.digest(path) for path in paths]}
    rankings = ranking.rank_responses(stage, responses, ranker, settings, digests)
    rates, errors = compute_win_rates(rankings.to_pylist(), settings.scale)
    for name, row in zip(models, rates, strict=True):
        log.info("%s against %s: %s", name, ", ".join(models), ", ".join(f"{rate:.1f}" for rate in row))
    return {"models": list(models), "win_rates": rates, "standard_errors": errors, "n": rankings.num_rows}


def compute_win_rates(rankings: list[dict[str, Any]], scale: float) -> tuple[list[list[float]], list[list[float]]]:
    """Compute win rates of the row's model against the column's, in percent, and their standard errors, (K, K) each.

    A win rate is the mean over prompts of P(y_i > y_j) by position-debiased scores. rankings: rows of schemas.RANKINGS.
    scale: rank.scale.
    """
    logits = torch.tensor([row["logits"] for row in rankings], dtype=torch.float64)
    wins = 100 * torch.sigmoid(sppo.pairwise_scores(logits, scale))
    errors = wins.std(0) / math.sqrt(len(wins))
    return wins.mean(0).tolist(), errors.tolist()

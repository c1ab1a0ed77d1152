"""Rank responses by PairRM's logits, for both rank and compare: P^, the chosen and the rejected response, and ties."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from stages.artifacts import files, schemas, shards
from stages.engines import pairrm
from stages.method import sppo
from stages.runtime import params
from stages.runtime.devices import explain_out_of_memory
from stages.runtime.errors import StageError


def rank_responses(
    stage: str, responses: pa.Table, ranker: Path, settings: params.Rank, digests: Mapping[str, Any]
) -> pa.Table:
    """Rank the K responses to each prompt and return a table of schemas.RANKINGS, in the same order.

    stage: the stage's name, for its scratch folder. responses: the columns that `rank_shard` reads. ranker: a folder with
    `PairRM` and `base`. digests: JSON values that determine the responses. Raises StageError if the ranker cannot be loaded or
    a worker fails.
    """
    pairrm.check_ranker(ranker)  # before the workers, each of which would report the same error
    pairrm.import_libraries()  # once: workers on CPUs start as copies of this process
    key = {**digests, "ranker": files.digest(ranker), "rank": settings.model_dump()}
    return shards.map_shards(
        stage, responses, settings.shard_size, load_ranker, (ranker, settings), schemas.RANKINGS, key, cores=True
    )


def load_ranker(ranker: Path, settings: params.Rank) -> Callable[[pa.Table], pa.Table]:
    """Load PairRM on this process's device. Returns a function that ranks one shard; see `rank_shard`.

    ranker: a folder with `PairRM` and `base`. Raises StageError if it cannot be loaded or the GPU has no room for it, or if the
    GPU's fused attention gives other logits than llm-blender.
    """
    torch.set_num_threads(1)  # there may be a worker per core, and the number of threads changes the last digits of sums
    with explain_out_of_memory("PairRM does not fit beside what other processes keep on the GPU: stop them (see `nvidia-smi`)"):
        blender = pairrm.load_blender(ranker)
        forward = pairrm.select_forward(blender, settings.attention)
    return functools.partial(rank_shard, blender, forward, settings)


def rank_shard(blender: Any, forward: pairrm.Forward, settings: params.Rank, shard: pa.Table) -> pa.Table:
    """Rank one shard of schemas.RESPONSES and return a table of schemas.RANKINGS.

    Raises StageError if the GPU runs out of memory or if a logit is not finite.
    """
    rows = shard.to_pylist()
    column = "prompt" if settings.input == "instruction" else "templated_prompt"
    prompts = [pairrm.encode(blender, row[column], row["responses"]) for row in rows]
    with explain_out_of_memory(f"lower rank.tokens_per_batch (now {settings.tokens_per_batch})"):
        logits = pairrm.pair_logits(forward, prompts, settings.tokens_per_batch)
    ranked = [
        rank_row(row["prompt_id"], matrix, row["responses"], settings.probability, settings.scale)
        | {"prompt_truncated": texts.prompt_truncated, "responses_truncated": texts.responses_truncated}
        for row, matrix, texts in zip(rows, logits, prompts, strict=True)
    ]
    return pa.Table.from_pylist(ranked, schema=schemas.RANKINGS)


def rank_row(prompt_id: str, logits: Tensor, responses: list[str], probability: str, scale: float) -> dict[str, Any]:
    """Derive a prompt's row of schemas.RANKINGS, except the truncation columns, from its logits (K, K) (Alg. 1, section 5.1).

    probability: rank.probability, `pairwise` or `aggregate`. scale: rank.scale, which applies to `pairwise` only. The row is a
    tie if the chosen and the rejected text are identical; `rejected` then equals `chosen`. Raises StageError if a logit is not
    finite.
    """
    if not logits.isfinite().all():
        raise StageError(f"prompt {prompt_id}: PairRM's logits are not finite: check the ranker's weights (`make verify`)")
    scores = sppo.pairwise_scores(logits.double(), scale)
    chosen, rejected = (int(index) for index in sppo.choose_pair(scores))
    tie = responses[chosen] == responses[rejected]
    compared = sppo.aggregate_scores(logits.double()) if probability == "aggregate" else scores
    return {
        "prompt_id": prompt_id,
        "logits": logits.tolist(),
        "probabilities": sppo.win_probabilities(compared).tolist(),
        "chosen": chosen,
        "rejected": chosen if tie else rejected,
        "tie": tie,
    }

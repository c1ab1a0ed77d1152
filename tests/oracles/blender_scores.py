"""Compute scores with llm-blender alone: python blender_scores.py RANKER RESPONSES OUT (rank environment).

Writes the scores of `rank` with one prompt per batch, and the logits of `compare` for every ordered pair of responses.
"""

import json
import sys

import pyarrow.parquet as pq
import transformers.utils.hub

transformers.utils.hub.TRANSFORMERS_CACHE = "unused"

import llm_blender  # noqa: E402
import torch  # noqa: E402

ranker, responses, out = sys.argv[1:]
torch.set_num_threads(1)
blender = llm_blender.Blender()
blender.loadranker(f"{ranker}/PairRM", device="cpu", model_name=f"{ranker}/base")
rows = pq.read_table(responses).to_pylist()
prompts, candidates = [row["prompt"] for row in rows], [row["responses"] for row in rows]
size = len(candidates[0])
scores = blender.rank(prompts, candidates, return_scores=True, batch_size=1)
pairs = [(n, i, j) for n in range(len(rows)) for i in range(size) for j in range(size) if i != j]
values = blender.compare(
    [prompts[n] for n, _, _ in pairs],
    [candidates[n][i] for n, i, _ in pairs],
    [candidates[n][j] for n, _, j in pairs],
    mode="[A,B]",
    return_logits=True,
    batch_size=1,
)
logits = [[[0.0] * size for _ in range(size)] for _ in rows]
for (n, i, j), logit in zip(pairs, values, strict=True):
    logits[n][i][j] = float(logit)
with open(out, "w", encoding="utf-8") as file:  # noqa: PTH123
    json.dump({"scores": scores.tolist(), "logits": logits}, file)

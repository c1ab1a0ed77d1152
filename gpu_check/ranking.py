"""PairRM: parity of the stage's batched forward pass with one pair at a time in float32, repeatability, and speed."""

import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_check import device, rows
from gpu_check.sizes import Ranking, Sizes
from stages.engines import pairrm, ranking
from stages.runtime import params

TOLERANCE = {"cuda": 0.05, "cpu": 1e-3}
"""The largest difference of a logit, in standard deviations of the logits: in half precision on a GPU, else in float32."""
ALIKE = 0.9
"""The least share of prompts whose chosen and rejected responses are those of float32."""
FLOOR = 0.3
"""The least speed, as a share of that of a DeBERTa without fused attention that only waits for its memory."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operations read and write, if each reads its inputs from memory and writes its outputs there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def count_bytes_per_token(model: Any, length: int, count: int) -> float:
    """Count the bytes that transformers' DeBERTa in half precision moves for a token, in a batch of `count` texts.

    model: whose configuration is used. length: of each text, in tokens. Nothing is computed: tensors on torch's meta device
    have shapes only.
    """
    with torch.device("meta"):
        copy = type(model)(model.config).half().eval()
        ids, mask = (torch.ones(count, length, dtype=torch.long) for _ in range(2))
    traffic = Traffic()
    with torch.no_grad(), traffic:
        copy(ids, attention_mask=mask)
    return traffic.bytes / (count * length)


def make_texts(blender: Any, size: Ranking) -> list[pairrm.EncodedTexts]:
    """Make prompts with distinct responses, as PairRM's token IDs: [CLS], the marker, random words and [SEP]."""
    rng, tokenizer = random.Random(0), blender.ranker_tokenizer
    vocabulary = blender.ranker.pretrained_model.config.vocab_size - 10  # llm-blender's markers are the last tokens

    def draw(marker: int, mean: int) -> Tensor:
        count = max(2, round(mean * rng.lognormvariate(-0.12, 0.5)))
        words = [rng.randrange(20, vocabulary) for _ in range(min(count, 2 * mean))]
        return torch.tensor([tokenizer.cls_token_id, marker, *words, tokenizer.sep_token_id])

    return [
        pairrm.EncodedTexts(
            draw(tokenizer.source_prefix_id, size.prompt_tokens),
            [draw(tokenizer.cand_prefix_id, size.response_tokens) for _ in range(size.samples)],
            list(range(size.samples)),
            False,
            0,
        )
        for _ in range(size.prompts)
    ]


def make_blender(size: Ranking, folder: Path) -> tuple[Any, str]:
    """Make a ranker with random weights. Returns it, and whose code computes the logits it is compared with."""
    if importlib.util.find_spec("llm_blender") is None:
        from gpu_check import plain_ranker

        return plain_ranker.make_blender(size, device.name()), "transformers' DeBERTa"
    from benchmarks import rank

    miniature = params.MiniatureRanker(
        hidden_size=size.width, layers=size.layers, prompts=1, candidates=2, noise=0.0, learning_rate=1.0
    )
    rank.make_ranker(miniature, folder)
    return pairrm.load_blender(folder), "llm-blender"


def expected_logits(blender: Any, texts: list[pairrm.EncodedTexts]) -> list[Tensor]:
    """Compute the logits (K, K) of each prompt, one pair at a time, 0 on the diagonal. Leaves the ranker in float32."""
    blender.ranker.float()
    matrices = []
    for prompt in texts:
        matrix = torch.zeros(len(prompt.candidates), len(prompt.candidates))
        for i, left in enumerate(prompt.candidates):
            for j, right in enumerate(prompt.candidates):
                if i != j:
                    inputs = [
                        tensor for ids in (prompt.source, left, right) for tensor in (ids[None], torch.ones_like(ids[None]))
                    ]
                    with torch.no_grad():
                        matrix[i, j] = blender.ranker._forward(*(each.to(device.name()) for each in inputs))["logits"].item()
        matrices.append(matrix)
    return matrices


def choose(matrices: list[Tensor]) -> list[tuple[int, int]]:
    """Return the chosen and the rejected response of each prompt."""
    ranked = [ranking.rank_row("", matrix, [*map(str, range(len(matrix)))], "pairwise", 0.5) for matrix in matrices]
    return [(row["chosen"], row["rejected"]) for row in ranked]


def run(sizes: Sizes, folder: Path, limits: dict[str, float], rehearsal: bool) -> None:
    """Run this part. limits: from gpu_check/__main__.py."""
    size = sizes.ranking
    blender, oracle = make_blender(size, folder)
    texts = make_texts(blender, size)
    forward = pairrm.select_forward(blender, "plain")
    found, seconds = [], []
    for _ in range(3):
        device.synchronize()
        start = time.perf_counter()
        found.append(pairrm.pair_logits(forward, texts, size.tokens_per_batch))  # its results are on the host
        seconds.append(time.perf_counter() - start)
    expected = expected_logits(blender, texts)
    ours, theirs = torch.stack(found[0]), torch.stack(expected)
    off_diagonal = ~torch.eye(size.samples, dtype=torch.bool).expand_as(theirs)
    difference = (ours - theirs).abs().max() / theirs[off_diagonal].std()
    alike = sum(map(tuple.__eq__, choose(found[0]), choose(expected))) / len(texts)
    pairs = len(texts) * size.samples * (size.samples - 1)
    tokens = sum(
        size.samples * (size.samples - 1) * len(each.source) + 2 * (size.samples - 1) * sum(map(len, each.candidates))
        for each in texts
    )
    mean = round(tokens / pairs)
    per_token = count_bytes_per_token(blender.ranker.pretrained_model, mean, max(1, size.tokens_per_batch // mean))
    share = tokens * per_token / limits["bandwidth"] / min(seconds[1:])
    rows.report(
        rows.at_most(
            f"rank, {pairs} pairs in batches, against {oracle} in float32, one pair at a time: largest difference of a logit, "
            "in standard deviations",
            float(difference),
            TOLERANCE[device.name()],
        ),
        rows.judge("rank, prompts whose pair is the one that float32 chooses", f"{alike:.3f}", f">= {ALIKE:g}", alike >= ALIKE),
        rows.same_bytes("rank: three runs in one process", [repr([each.tolist() for each in matrices]) for matrices in found]),
        rows.judge_on_gpu(
            rows.judge(
                f"rank: speed, as a share of a DeBERTa's that moves {per_token / 1e6:.3g} MB a token at "
                f"{limits['bandwidth'] / 1e9:.4g} GB/s ({mean} tokens a pair)",
                f"{share:.2f} ({pairs / min(seconds[1:]):.0f} pairs/s)",
                f">= {FLOOR:g}",
                share >= FLOOR,
            ),
            rehearsal,
        ),
    )

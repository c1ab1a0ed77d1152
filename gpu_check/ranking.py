"""PairRM: parity of the stage's forward passes, in batches, with one pair at a time in float32, repeatability, and speed."""

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
from stages.runtime.errors import StageError

TOLERANCE = {"cuda": 0.05, "cpu": 1e-3}
"""The largest difference of a logit, in standard deviations of the logits: in half precision on a GPU, else in float32."""
ALIKE = 0.9
"""The least share of prompts whose chosen and rejected responses are those of float32."""
FLOOR = 0.3
"""The least speed, as a share of that of a DeBERTa without fused attention that only waits for its memory."""
FUSED = "rank, rank.attention: fused"


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


def count_weights(model: Any) -> int:
    """Count the weights of DeBERTa's layers that multiply each token; those of the embeddings are looked up."""
    return sum(weight.numel() for weight in model.encoder.layer.parameters() if weight.dim() == 2)


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
    """Compute the logits (K, K) of each prompt in float32, one pair at a time, 0 on the diagonal."""
    dtype = next(blender.ranker.parameters()).dtype
    blender.ranker.float()  # and back: no weight changes
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
    blender.ranker.to(dtype)
    return matrices


def choose(matrices: list[Tensor]) -> list[tuple[int, int]]:
    """Return the chosen and the rejected response of each prompt."""
    ranked = [ranking.rank_row("", matrix, [*map(str, range(len(matrix)))], "pairwise", 0.5) for matrix in matrices]
    return [(row["chosen"], row["rejected"]) for row in ranked]


def measure(forward: pairrm.Forward, texts: list[pairrm.EncodedTexts], size: Ranking) -> tuple[list[list[Tensor]], float]:
    """Compute the logits three times. Returns each time's, and the seconds of the faster of the last two."""
    found, seconds = [], []
    for _ in range(3):
        device.synchronize()
        start = time.perf_counter()
        found.append(pairrm.pair_logits(forward, texts, size.tokens_per_batch))  # its results are on the host
        seconds.append(time.perf_counter() - start)
    return found, min(seconds[1:])


def compare(label: str, found: list[list[Tensor]], expected: list[Tensor], oracle: str) -> list[rows.Row]:
    """Compare three runs' logits with those of one pair at a time in float32, and with each other."""
    ours, theirs = torch.stack(found[0]), torch.stack(expected)
    off_diagonal = ~torch.eye(theirs.shape[-1], dtype=torch.bool).expand_as(theirs)
    difference = (ours - theirs).abs().max() / theirs[off_diagonal].std()
    alike = sum(map(tuple.__eq__, choose(found[0]), choose(expected))) / len(expected)
    return [
        rows.at_most(
            f"{label}, {off_diagonal.sum()} pairs in batches, against {oracle} in float32, one pair at a time: largest "
            "difference of a logit, in standard deviations",
            float(difference),
            TOLERANCE[device.name()],
        ),
        rows.judge(
            f"{label}, prompts whose pair is the one that float32 chooses", f"{alike:.3f}", f">= {ALIKE:g}", alike >= ALIKE
        ),
        rows.same_bytes(
            f"{label}: three runs in one process", [repr([each.tolist() for each in matrices]) for matrices in found]
        ),
    ]


def count_work(texts: list[pairrm.EncodedTexts]) -> tuple[int, int]:
    """Return the number of ordered pairs of all prompts, and that of their tokens: prompt, left and right response."""
    pairs = tokens = 0
    for each in texts:
        count = len(each.candidates)
        pairs += count * (count - 1)
        tokens += count * (count - 1) * len(each.source) + 2 * (count - 1) * sum(map(len, each.candidates))
    return pairs, tokens


def judge_speed(blender: Any, texts: list[pairrm.EncodedTexts], size: Ranking, seconds: float, bandwidth: float) -> rows.Row:
    """Judge the plain forward pass's speed. bandwidth: of the GPU's memory, in bytes per second."""
    pairs, tokens = count_work(texts)
    mean = round(tokens / pairs)
    per_token = count_bytes_per_token(blender.ranker.pretrained_model, mean, max(1, size.tokens_per_batch // mean))
    share = tokens * per_token / bandwidth / seconds
    return rows.judge(
        f"rank: speed, as a share of a DeBERTa's that moves {per_token / 1e6:.3g} MB a token at {bandwidth / 1e9:.4g} GB/s "
        f"({mean} tokens a pair)",
        f"{share:.2f} ({pairs / seconds:.0f} pairs/s)",
        f">= {FLOOR:g}",
        share >= FLOOR,
    )


def check_fused(
    blender: Any,
    texts: list[pairrm.EncodedTexts],
    size: Ranking,
    expected: list[Tensor],
    oracle: str,
    plain_seconds: float,
    flops: float,
) -> list[rows.Row]:
    """Check `rank.attention: fused`: by the stage's own gate, then as the plain forward pass is, and its speed.

    plain_seconds: of the plain forward pass, which `measure` returns. flops: per second, of the GPU's matrix products.
    """
    gate, condition = f"{FUSED}: the stage's own check of its logits", "to pass"
    try:
        forward = pairrm.select_forward(blender, "fused")
    except StageError as error:
        return [rows.Row(gate, "", condition, rows.FAIL, str(error))]
    found, seconds = measure(forward, texts, size)
    ratio = plain_seconds / seconds
    pairs, tokens = count_work(texts)
    share = 2 * count_weights(blender.ranker.pretrained_model) * tokens / seconds / flops
    return [
        rows.judge(gate, "passed", condition, True),
        *compare(FUSED, found, expected, oracle),
        rows.judge(
            f"{FUSED}: speed, relative to plain",
            f"{ratio:.2f} ({pairs / seconds:.0f} pairs/s; products with weights: {share:.0%} of {flops / 1e12:.3g} TFLOP/s)",
            ">= 1",
            ratio >= 1,
        ),
    ]


def run(sizes: Sizes, folder: Path, limits: dict[str, float], rehearsal: bool) -> None:
    """Run this part. limits: from gpu_check/__main__.py."""
    size = sizes.ranking
    blender, oracle = make_blender(size, folder)
    texts = make_texts(blender, size)
    found, seconds = measure(pairrm.select_forward(blender, "plain"), texts, size)
    expected = expected_logits(blender, texts)
    speed = judge_speed(blender, texts, size, seconds, limits["bandwidth"])
    rows.report(*compare("rank", found, expected, oracle), rows.judge_on_gpu(speed, rehearsal))
    if rehearsal:
        rows.report(rows.skip(FUSED, "rehearsal: the setting has no effect on a CPU, which has its own forward pass"))
    else:
        rows.report(*check_fused(blender, texts, size, expected, oracle, seconds, limits["flops"]))

"""rank against what the released code calls, llm-blender's Blender.rank(batch_size=1), in pairs of responses per second.

Both sides have the same random weights of PairRM's architecture in the miniature's shape, float32, one thread, one process, and
start from the same texts. Ours tokenizes, scores all ordered pairs and ranks; the baseline tokenizes and scores all ordered
pairs. Every fourth short prompt has two identical responses, as happens in practice. Long texts are near PairRM's limits, 1224
tokens for a prompt and 412 for a response, and never identical. The cost is linear in the number of prompts and grows with
K (K - 1) for K responses, hence two sizes each. Before anything is timed, the scores of both sides must agree to 1e-5.
"""

import functools
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks import texts
from benchmarks.measure import Comparison, compare_rates, report, time_in_turn
from stages.engines import pairrm, ranking
from stages.miniature import ranker as miniature
from stages.runtime import params
from stages.runtime.paths import ROOT

SHORT, LONG = (10, 12), (900, 330)
"""Average words of a prompt and of a response."""


def make_ranker(size: params.MiniatureRanker, out: Path) -> None:
    """Write a ranker with random weights, as the miniature's own functions build it."""
    from safetensors.torch import save_model

    torch.manual_seed(0)
    rng = random.Random(0)
    miniature.write_base([(texts.make_text(rng, 60), [texts.make_text(rng, 60)]) for _ in range(500)], size, out / "base")
    model, _ = miniature.build_ranker(out)
    save_model(model, str(out / "PairRM" / "model.safetensors"))


def make_responses(prompts: int, samples: int, words: tuple[int, int]) -> pa.Table:
    """Make a table with the columns of schemas.RESPONSES that rank reads. words: SHORT or LONG."""
    rng = random.Random(prompts)
    rows: list[dict[str, Any]] = []
    for index in range(prompts):
        responses = [texts.make_text(rng, texts.draw_length(rng, words[1])) for _ in range(samples)]
        if index % 4 == 3:
            responses[-1] = responses[0]
        prompt = texts.make_text(rng, texts.draw_length(rng, words[0]))
        rows.append({"prompt_id": f"{index}", "prompt": prompt, "responses": responses})
    return pa.Table.from_pylist(rows)


def compare(subject: str, ranker: Path, prompts: int, samples: int, words: tuple[int, int], target: str) -> Comparison:
    """Compare both sides at one size, with the ranker in a folder. Raises AssertionError if their scores differ."""
    table = make_responses(prompts, samples, words)
    settings = params.load("rank", path=ROOT / "params.yaml").rank
    ours = functools.partial(ranking.load_ranker(ranker, settings), table)  # also sets one thread
    blender = pairrm.load_blender(ranker)
    columns = [table[name].to_pylist() for name in ("prompt", "responses")]
    baseline = functools.partial(blender.rank, *columns, return_scores=True, batch_size=1, disable_tqdm=True)

    logits = torch.tensor(ours()["logits"].to_pylist())
    torch.testing.assert_close((logits - logits.mT).mean(-1), torch.from_numpy(baseline()), atol=1e-5, rtol=0)
    seconds = time_in_turn({"ours": ours, "baseline": baseline})
    size = f"{prompts} prompts, {samples} responses"
    return compare_rates(subject, size, prompts * samples * (samples - 1), seconds["ours"], seconds["baseline"], target)


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    size = params.load("assets.ranker", path=ROOT / "params.yaml").ranker.miniature
    assert size
    with tempfile.TemporaryDirectory() as name:
        make_ranker(size, Path(name))
        for kind, words, sizes, target in (
            ("short texts", SHORT, ((128, 5), (256, 5), (128, 3)), ">= 6"),
            ("long texts", LONG, ((2, 3), (4, 3), (1, 5)), ">= 2"),
        ):
            subject = f"pairs per second, {kind}, against Blender.rank(batch_size=1)"
            for prompts, samples in sizes:
                report([compare(subject, Path(name), prompts, samples, words, target)])


if __name__ == "__main__":
    main()

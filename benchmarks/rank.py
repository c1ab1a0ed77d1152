"""rank against what the released code calls, llm-blender's Blender.rank(batch_size=1), in pairs of responses a second.

Both sides have the same random weights of PairRM's architecture, float32, one thread, one process, and start from the same
texts; here that is tokenizing, all ordered pairs and the rankings, there tokenizing, all ordered pairs and the scores. The
shape is the miniature's. Of every fourth short prompt two responses are alike, as happens; the long texts are near PairRM's
limits, 1224 tokens of a prompt and 412 of a response, and none alike. Cost is linear in prompts and grows with K (K - 1) of
K responses: hence two sizes each. Before anything is timed, the scores of both sides must agree to 1e-5.
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
from benchmarks.measure import Figure, figure, in_turn, report
from stages import params, rank
from stages.assets import ranker as miniature
from stages.cli import ROOT

SHORT, LONG = (10, 12), (900, 330)
"""Words of a prompt and of a response, about."""


def make(out: Path, size: params.MiniatureRanker) -> None:
    """A ranker with random weights, by the miniature's own builders."""
    from safetensors.torch import save_model

    torch.manual_seed(0)
    draw = random.Random(0)
    miniature.write_base([(texts.text(draw, 60), [texts.text(draw, 60)]) for _ in range(500)], size, out / "base")
    model, _ = miniature.untrained(out)
    save_model(model, str(out / "PairRM" / "model.safetensors"))


def responses(prompts: int, samples: int, words: tuple[int, int]) -> pa.Table:
    """Columns of schemas.RESPONSES that rank reads."""
    draw = random.Random(prompts)
    rows: list[dict[str, Any]] = []
    for index in range(prompts):
        drawn = [texts.text(draw, texts.around(draw, words[1])) for _ in range(samples)]
        if index % 4 == 3:
            drawn[-1] = drawn[0]
        rows.append({"prompt_id": f"{index}", "prompt": texts.text(draw, texts.around(draw, words[0])), "responses": drawn})
    return pa.Table.from_pylist(rows)


def compared(subject: str, folder: Path, prompts: int, samples: int, words: tuple[int, int], wanted: str) -> Figure:
    table = responses(prompts, samples, words)
    settings = params.load("rank", path=ROOT / "params.yaml").rank
    ours = functools.partial(rank.load(folder, settings), table)  # sets one thread
    blender = rank.load_blender(folder)
    columns = [table.column(name).to_pylist() for name in ("prompt", "responses")]
    theirs = functools.partial(blender.rank, *columns, return_scores=True, batch_size=1, disable_tqdm=True)

    logits = torch.tensor(ours().column("logits").to_pylist())
    torch.testing.assert_close((logits - logits.mT).mean(-1), torch.from_numpy(theirs()), atol=1e-5, rtol=0)
    seconds = in_turn({"ours": ours, "theirs": theirs})
    size = f"{prompts} prompts, {samples} responses"
    return figure(subject, size, prompts * samples * (samples - 1), seconds["ours"], seconds["theirs"], wanted)


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = params.load("assets.ranker", path=ROOT / "params.yaml").ranker.miniature
        assert size
        make(folder, size)
        for kind, words, sizes, wanted in (
            ("short texts", SHORT, ((128, 5), (256, 5), (128, 3)), ">= 6"),
            ("long texts", LONG, ((2, 3), (4, 3), (1, 5)), ">= 2"),
        ):
            subject = f"pairs a second, {kind}, against Blender.rank(batch_size=1)"
            for prompts, samples in sizes:
                report([compared(subject, folder, prompts, samples, words, wanted)])


if __name__ == "__main__":
    main()

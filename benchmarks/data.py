"""Full-size tables through the stages that do not compute: seconds, and memory beyond what the imports take.

split: prompts to parts, with the look for AlpacaEval's instructions in them. gate: a file of responses read and checked.
pairs: responses and rankings to the tokens that are trained on. rows: those read for training, and an epoch's rows in random
order. report: what health.md says of an iteration. Ours checks every file that it reads. The baseline is the plain way, by
rows: `to_pylist()` or pandas of all there is, n-grams as strings, no checks but in gate. Each run is a process of its own,
with responses of 380 tokens in the mean and prompts of 190, K = 5. Both sides run with SMALL prompts; at the sizes of FULL
ours alone, and what is given are the larger one's prompts a second, and MB, against the smaller one's.
"""

import hashlib
import importlib
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ruamel.yaml import YAML
from torch.utils.data import DataLoader

from benchmarks.measure import Figure, figure, in_turn, memory, of_rounds, report
from stages import files, health, params, reference, schemas, split, sppo, train
from stages.cli import ROOT

SMALL, FULL = 6_000, (20_000, 60_000)
LINEAR = ">= 0.7: linear, or less"
K = 5
LENGTHS = params.Lengths(prompt=512, total=1024, too_long="drop")
BATCH = 8
NAME = "iter1"


def texts(lengths: Any, rng: np.random.Generator) -> list[str]:
    """Texts of so many characters, (N,), cut from a hundred long ones, each with a number before it."""
    vocabulary = [f"word{index}" for index in range(5_000)]
    bank = [" ".join(rng.choice(vocabulary, 500)) for _ in range(100)]
    return [
        f"{index} {bank[one][start : start + length]}"
        for index, (one, start, length) in enumerate(
            zip(rng.integers(0, len(bank), len(lengths)), rng.integers(0, 1_000, len(lengths)), lengths, strict=True)
        )
    ]


def tokens(lengths: Any, rng: np.random.Generator) -> pa.ListArray:
    """A list of token ids of each length, (N,)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, (rng.gamma(0.5, 8_000, offsets[-1]) % 128_000).astype(np.int32))


def each(values: Any) -> pa.ListArray:
    """Lists of K values."""
    return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, K, dtype=np.int32), values)


def make(folder: Path, sizes: list[int]) -> None:
    """A folder for each size: the largest one's tables, and the others' that are its first rows."""
    rng, count = np.random.default_rng(0), max(sizes)
    lengths = rng.integers(120, 641, count * K)
    prompts = texts(np.full(count, 760), rng)
    ids = [schemas.prompt_id(prompt) for prompt in prompts]
    responses = pa.table(
        {
            "prompt_id": ids,
            "prompt": prompts,
            "templated_prompt": [f"<s>user: {prompt}" for prompt in prompts],
            "prompt_token_ids": tokens(rng.integers(100, 281, count), rng),
            "responses": each(texts(lengths * 4, rng)),
            "token_ids": each(tokens(lengths, rng)),
            "token_counts": each(lengths.astype(np.int32)),
            "finish_reasons": each(["stop"] * (count * K)),
            "seeds": each(np.arange(count * K)),
        }
    )
    logits = torch.tensor(rng.normal(size=(count, K, K)).astype(np.float32)) * (1 - torch.eye(K))
    scores = sppo.pairwise_scores(logits.double())
    winner, loser = sppo.choose_pair(scores)
    rankings = pa.table(
        {
            "prompt_id": ids,
            "logits": logits.tolist(),
            "probabilities": sppo.win_probabilities(scores).tolist(),
            "winner": winner.numpy(),
            "loser": loser.numpy(),
            "tie": (winner == loser).numpy(),
            "prompt_cut": np.zeros(count, bool),
            "responses_cut": np.zeros(count, int),
        }
    ).cast(schemas.RANKINGS)
    chosen = reference.pairs(responses, rankings, LENGTHS)
    logps = pa.array(np.full(len(chosen), -99, np.float32))
    pairs = pa.table({name: chosen[name] if name in chosen.column_names else logps for name in schemas.PAIRS.names})
    parts = pa.table({"prompt_id": ids, "prompt": prompts, "part": pa.nulls(count, pa.string())})
    instructions = [{"instruction": text} for text in texts(np.full(805, 160), rng)]
    document = YAML(typ="safe").load(ROOT / "params.yaml")
    for size in sizes:
        data = folder / f"{size}"
        files.write_table(parts.slice(0, size), schemas.PROMPTS, data / "prompts.parquet")
        files.write_table(responses.slice(0, size), schemas.RESPONSES, data / "responses" / f"{NAME}.parquet")
        files.write_table(rankings.slice(0, size), schemas.RANKINGS, data / "rankings" / f"{NAME}.parquet")
        files.write_table(pairs.slice(0, size), schemas.PAIRS, data / "pairs" / f"{NAME}.parquet")
        files.write_json(instructions, data / "instructions.json")
        files.write_json({"contaminated": {NAME: 0}}, data / "split" / "contamination.json")
        with files.replacing(data / "logs" / f"{NAME}.csv") as partial_log:
            steps = [dict.fromkeys(schemas.LOG_COLUMNS, 1.0) | {"step": step} for step in range(1, 301)]
            pd.DataFrame(steps).to_csv(partial_log, index=False)
        document["split"] |= {"prompts_per_iteration": (size - 500) // 3, "hold_out": 500}
        with (data / "params.yaml").open("w") as file:
            YAML().dump(document, file)


def our_split(data: Path) -> None:
    os.chdir(data)
    sys.argv = ["split", "prompts.parquet", "instructions.json", "out"]
    split.main()


def plain_split(data: Path) -> None:
    def grams(text: str) -> set[str]:
        words = re.sub(r"[^\w\s]", " ", text.lower()).split()
        return {" ".join(words[start : start + split.RUN]) for start in range(len(words) - split.RUN + 1)}

    asked = set().union(*(grams(row["instruction"]) for row in files.read_json(data / "instructions.json")))
    prompts = pd.read_parquet(data / "prompts.parquet")
    assert (prompts["prompt_id"] == [hashlib.sha256(text.encode()).hexdigest() for text in prompts["prompt"]]).all()
    prompts["contaminated"] = [not asked.isdisjoint(grams(text)) for text in prompts["prompt"]]
    shuffled = prompts.sample(frac=1, random_state=0)
    (data / "plain").mkdir(exist_ok=True)
    for part, start in enumerate(range(0, len(shuffled), len(shuffled) // 3)):
        shuffled.iloc[start : start + len(shuffled) // 3].to_parquet(data / "plain" / f"{part}.parquet")


def our_gate(data: Path) -> None:
    files.read_table(data / "responses" / f"{NAME}.parquet", schemas.RESPONSES)


def plain_gate(data: Path) -> None:
    ids, seeds = set[str](), set[int]()
    for row in pq.read_table(data / "responses" / f"{NAME}.parquet").to_pylist():
        assert row["prompt_id"] == schemas.prompt_id(row["prompt"])
        assert row["prompt_id"] not in ids
        ids.add(row["prompt_id"])
        lists = [row[name] for name in ("responses", "token_ids", "token_counts", "finish_reasons", "seeds")]
        assert [len(values) for values in lists] == [K] * 5
        for drawn in [row["prompt_token_ids"], *row["token_ids"]]:
            assert drawn
            assert min(drawn) >= 0
        assert row["token_counts"] == [len(drawn) for drawn in row["token_ids"]]
        assert {"stop", "length"}.issuperset(row["finish_reasons"])
        assert seeds.isdisjoint(row["seeds"])
        seeds |= set(row["seeds"])


def our_pairs(data: Path) -> None:
    responses = files.read_table(data / "responses" / f"{NAME}.parquet", schemas.RESPONSES)
    reference.pairs(responses, files.read_table(data / "rankings" / f"{NAME}.parquet", schemas.RANKINGS), LENGTHS)


def plain_pairs(data: Path) -> None:
    responses = pq.read_table(data / "responses" / f"{NAME}.parquet").to_pylist()
    rankings = pq.read_table(data / "rankings" / f"{NAME}.parquet").to_pylist()
    rows = []
    for response, ranking in zip(responses, rankings, strict=True):
        prompt = response["prompt_token_ids"][-LENGTHS.prompt :]
        drawn = [response["token_ids"][ranking[side]] for side in ("winner", "loser")]
        chosen, rejected = (one[: LENGTHS.total - len(prompt)] for one in drawn)
        if not ranking["tie"] and [prompt, chosen, rejected] == [response["prompt_token_ids"], *drawn]:
            row = {"prompt_id": response["prompt_id"], "prompt_token_ids": prompt}
            row |= {"chosen_token_ids": chosen, "rejected_token_ids": rejected}
            for side, name in (("winner", "chosen"), ("loser", "rejected")):
                row[f"{name}_probability"] = ranking["probabilities"][ranking[side]]
            rows.append(row | {"prompt_cut": 0, "chosen_cut": 0, "rejected_cut": 0})
    pa.Table.from_pylist(rows, schema=schemas.CHOSEN)


def epoch(rows: Any) -> None:
    for _ in DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=list):
        pass


def our_rows(data: Path) -> None:
    epoch(train.rows(files.read_table(data / "pairs" / f"{NAME}.parquet", schemas.PAIRS)))


def plain_rows(data: Path) -> None:
    epoch(files.read_table(data / "pairs" / f"{NAME}.parquet", schemas.PAIRS).to_pylist())


def our_report(data: Path) -> None:
    wanted = params.load("eta", "train", path=data / "params.yaml")
    health.health(NAME, data, wanted.eta, wanted.train)


def plain_report(data: Path) -> None:
    responses = pd.read_parquet(data / "responses" / f"{NAME}.parquet")
    rankings = pd.read_parquet(data / "rankings" / f"{NAME}.parquet")
    pairs = pd.read_parquet(data / "pairs" / f"{NAME}.parquet")
    log = pd.read_csv(data / "logs" / f"{NAME}.csv")
    counts, reasons = responses["token_counts"].explode(), responses["finish_reasons"].explode()
    drawn = responses["responses"]
    found = [len(counts), counts.sum(), reasons.eq("length").sum(), *counts.astype(int).quantile([0.05, 0.5, 0.95])]
    found += [drawn.map(lambda row: len(row) - len(set(row))).sum(), drawn.explode().str.strip().eq("").sum()]
    found += [rankings[name].sum() for name in ("tie", "prompt_cut", "responses_cut")]
    found += [pairs[f"{side}_cut"].gt(0).sum() for side in ("prompt", "chosen", "rejected")]
    found += [value for side in ("chosen", "rejected") for value in pairs[f"{side}_probability"].quantile([0.05, 0.95])]
    log.tail(len(log) // 5).mean(numeric_only=True)
    health.histogram(pairs)


TASKS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "split": (our_split, plain_split),
    "gate": (our_gate, plain_gate),
    "pairs": (our_pairs, plain_pairs),
    "rows": (our_rows, plain_rows),
    "report": (our_report, plain_report),
}


def alone(run: Callable[[], None]) -> float:
    """Run in a process of its own, a fork of this one. Returns by how many MB it grew at most."""

    def child() -> None:
        start = memory("VmRSS")
        run()
        grown.value = (memory("VmHWM") - start) / 2**20

    context = multiprocessing.get_context("fork")
    grown = context.Value("d", -1)
    process = context.Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("a side failed: its message stands above")
    return float(grown.value)


def measured(sides: Mapping[str, Callable[[], None]]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and MB of each side in each round that counts."""
    grown: dict[str, list[float]] = {name: [] for name in sides}

    def run(name: str) -> None:
        grown[name].append(alone(sides[name]))

    seconds = in_turn({name: partial(run, name) for name in sides})
    return seconds, {name: values[-len(seconds[name]) :] for name, values in grown.items()}


def space(subject: str, size: str, ours: list[float], baseline: list[float], wanted: str = "", scale: float = 1) -> Figure:
    """The figure of each round's MB; scale: how many times ours may be the baseline's."""
    ratios = [scale * theirs / mine for mine, theirs in zip(ours, baseline, strict=True)]
    return of_rounds(subject, size, ours, baseline, ratios, wanted)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(partial(make, folder, [SMALL, *FULL]))
        importlib.import_module("datasets")  # of train.rows, before the forks
        for task, (ours, plain) in TASKS.items():
            data = folder / f"{SMALL}"
            seconds, grown = measured({"ours": partial(ours, data), "plain": partial(plain, data)})
            figures = [
                figure(f"{task}, prompts a second", f"{SMALL:,} prompts", SMALL, seconds["ours"], seconds["plain"]),
                space(f"{task}, MB", f"{SMALL:,} prompts", grown["ours"], grown["plain"]),
            ]
            seconds, grown = measured({f"{size}": partial(ours, folder / f"{size}") for size in FULL})
            small, full = FULL
            label, times = f"{full:,} to {small:,} prompts", full / small
            rate = [times * taken for taken in seconds[f"{small}"]]
            figures += [
                figure(f"{task}, prompts a second", label, full, seconds[f"{full}"], rate, LINEAR),
                space(f"{task}, MB", label, grown[f"{full}"], grown[f"{small}"], LINEAR, times),
            ]
            report(figures)


if __name__ == "__main__":
    main()

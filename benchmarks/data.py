"""Full-size tables in the parts of the pipeline that do no computing: seconds, and memory on top of what imports take.

split: distribute prompts, and search them for AlpacaEval's instructions. check: read and validate a file of responses.
pairs: turn responses and rankings into the tokens to train on. rows: read them for training, and iterate over an epoch in
random order. report: compute health.md of one iteration. Ours validates every file it reads. The baseline is the plain way,
row by row: `to_pylist()` or pandas on the whole table, n-grams as strings, no validation except in check. Each run is a
process of its own, with prompts of 190 tokens and 5 responses of 380 tokens on average. Both sides run with 6,000 prompts. With
20,000 and 60,000 prompts only ours runs: there, the larger size is compared with the smaller one, in prompts per second and MB.
"""

import argparse
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

from benchmarks.measure import Comparison, compare_rates, read_memory, report, summarize, time_in_turn
from stages import reference, split, train
from stages.artifacts import files, schemas, tables
from stages.method import sppo
from stages.reporting import health
from stages.runtime import params
from stages.runtime.paths import ROOT

SMALL, FULL = 6_000, (20_000, 60_000)
LINEAR = ">= 0.7: linear or better"
K = 5
LENGTHS = params.Lengths(prompt=512, total=1024, too_long="drop")
BATCH = 8
NAME = "iter1"


def make_texts(lengths: Any, rng: np.random.Generator) -> list[str]:
    """Make texts of so many characters each, cut from a hundred long ones after a number of their own. lengths: (N,)."""
    vocabulary = [f"word{index}" for index in range(5_000)]
    bank = [" ".join(rng.choice(vocabulary, 500)) for _ in range(100)]
    return [
        f"{index} {bank[source][start : start + length]}"
        for index, (source, start, length) in enumerate(
            zip(rng.integers(0, len(bank), len(lengths)), rng.integers(0, 1_000, len(lengths)), lengths, strict=True)
        )
    ]


def make_tokens(lengths: Any, rng: np.random.Generator) -> pa.ListArray:
    """Make N lists of token ids. lengths: (N,)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, (rng.gamma(0.5, 8_000, offsets[-1]) % 128_000).astype(np.int32))


def group(values: Any) -> pa.ListArray:
    """Group N * K values into N lists of K."""
    return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, K, dtype=np.int32), values)


def make_responses(prompts: list[str], rng: np.random.Generator) -> pa.Table:
    """Make a table of schemas.RESPONSES."""
    lengths = rng.integers(120, 641, len(prompts) * K)
    return pa.table(
        {
            "prompt_id": [schemas.prompt_id(prompt) for prompt in prompts],
            "prompt": prompts,
            "templated_prompt": [f"<s>user: {prompt}" for prompt in prompts],
            "prompt_token_ids": make_tokens(rng.integers(100, 281, len(prompts)), rng),
            "responses": group(make_texts(lengths * 4, rng)),
            "token_ids": group(make_tokens(lengths, rng)),
            "token_counts": group(lengths.astype(np.int32)),
            "finish_reasons": group(["stop"] * len(lengths)),
            "seeds": group(np.arange(len(lengths))),
        }
    )


def make_rankings(prompt_ids: Any, rng: np.random.Generator) -> pa.Table:
    """Make a table of schemas.RANKINGS with random logits."""
    count = len(prompt_ids)
    logits = torch.tensor(rng.normal(size=(count, K, K)).astype(np.float32)) * (1 - torch.eye(K))
    scores = sppo.pairwise_scores(logits.double(), 0.5)
    chosen, rejected = sppo.choose_pair(scores)
    return pa.table(
        {
            "prompt_id": prompt_ids,
            "logits": logits.tolist(),
            "probabilities": sppo.win_probabilities(scores).tolist(),
            "chosen": chosen.numpy(),
            "rejected": rejected.numpy(),
            "tie": (chosen == rejected).numpy(),
            "prompt_truncated": np.zeros(count, bool),
            "responses_truncated": np.zeros(count, int),
        }
    ).cast(schemas.RANKINGS)


def make_pairs(responses: pa.Table, rankings: pa.Table) -> pa.Table:
    """Make a table of schemas.PAIRS with constant log-probabilities."""
    unscored = reference.build_pairs(responses, rankings, LENGTHS)
    logps = pa.array(np.full(len(unscored), -99, np.float32))
    return pa.table({name: unscored[name] if name in unscored.column_names else logps for name in schemas.PAIRS.names})


def make_data(folder: Path, sizes: list[int]) -> None:
    """Write a folder for each size: the first rows of tables that have as many as the largest size."""
    rng, count = np.random.default_rng(0), max(sizes)
    responses = make_responses(make_texts(np.full(count, 760), rng), rng)
    rankings = make_rankings(responses["prompt_id"], rng)
    tables_by_path = {
        "prompts.parquet": (
            responses.select(["prompt_id", "prompt"]).append_column("iteration", pa.nulls(count, pa.string())),
            schemas.PROMPTS,
        ),
        f"responses/{NAME}.parquet": (responses, schemas.RESPONSES),
        f"rankings/{NAME}.parquet": (rankings, schemas.RANKINGS),
        f"pairs/{NAME}.parquet": (make_pairs(responses, rankings), schemas.PAIRS),
    }
    instructions = [{"instruction": text} for text in make_texts(np.full(805, 160), rng)]
    document = YAML(typ="safe").load(ROOT / "params.yaml")
    for size in sizes:
        data = folder / f"{size}"
        for path, (table, schema) in tables_by_path.items():
            tables.write(table.slice(0, size), schema, data / path)
        files.write_json(instructions, data / "instructions.json")
        files.write_json({"contaminated": {NAME: 0}}, data / "split" / "contamination.json")
        with files.replacing(data / "logs" / f"{NAME}.csv") as partial_log:
            steps = [dict.fromkeys(schemas.LOG_COLUMNS, 1.0) | {"step": step} for step in range(1, 301)]
            pd.DataFrame(steps).to_csv(partial_log, index=False)
        update = {"steps": 300, "effective_steps": 300, "weights": 1000, "changed": 1.0, "survived": 1.0}
        files.write_json(update, data / "logs" / f"{NAME}.json")
        document["split"] |= {"prompts_per_iteration": (size - 500) // 3, "hold_out": 500}
        with (data / "params.yaml").open("w") as file:
            YAML().dump(document, file)


def run_split(data: Path) -> None:
    os.chdir(data)
    split.main(argparse.Namespace(prompts=Path("prompts.parquet"), instructions=Path("instructions.json"), out=Path("parts")))


def make_ngrams(text: str) -> set[str]:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return {" ".join(words[start : start + split.NGRAM]) for start in range(len(words) - split.NGRAM + 1)}


def run_plain_split(data: Path) -> None:
    known = set().union(*(make_ngrams(row["instruction"]) for row in files.read_json(data / "instructions.json")))
    prompts = pd.read_parquet(data / "prompts.parquet")
    assert (prompts["prompt_id"] == [hashlib.sha256(text.encode()).hexdigest() for text in prompts["prompt"]]).all()
    prompts["contaminated"] = [not known.isdisjoint(make_ngrams(text)) for text in prompts["prompt"]]
    shuffled = prompts.sample(frac=1, random_state=0)
    (data / "plain").mkdir(exist_ok=True)
    for part, start in enumerate(range(0, len(shuffled), len(shuffled) // 3)):
        shuffled.iloc[start : start + len(shuffled) // 3].to_parquet(data / "plain" / f"{part}.parquet")


def run_check(data: Path) -> None:
    tables.read(data / "responses" / f"{NAME}.parquet", schemas.RESPONSES)


def run_plain_check(data: Path) -> None:
    ids, seeds = set[str](), set[int]()
    for row in pq.read_table(data / "responses" / f"{NAME}.parquet").to_pylist():
        assert row["prompt_id"] == schemas.prompt_id(row["prompt"])
        assert row["prompt_id"] not in ids
        ids.add(row["prompt_id"])
        lists = [row[name] for name in ("responses", "token_ids", "token_counts", "finish_reasons", "seeds")]
        assert [len(values) for values in lists] == [K] * 5
        for token_ids in [row["prompt_token_ids"], *row["token_ids"]]:
            assert token_ids
            assert min(token_ids) >= 0
        assert row["token_counts"] == [len(token_ids) for token_ids in row["token_ids"]]
        assert {"stop", "length"}.issuperset(row["finish_reasons"])
        assert seeds.isdisjoint(row["seeds"])
        seeds |= set(row["seeds"])


def run_pairs(data: Path) -> None:
    responses = tables.read(data / "responses" / f"{NAME}.parquet", schemas.RESPONSES)
    reference.build_pairs(responses, tables.read(data / "rankings" / f"{NAME}.parquet", schemas.RANKINGS), LENGTHS)


def run_plain_pairs(data: Path) -> None:
    responses = pq.read_table(data / "responses" / f"{NAME}.parquet").to_pylist()
    rankings = pq.read_table(data / "rankings" / f"{NAME}.parquet").to_pylist()
    rows = []
    for response, ranking in zip(responses, rankings, strict=True):
        prompt = response["prompt_token_ids"][-LENGTHS.prompt :]
        whole = [response["token_ids"][ranking[side]] for side in ("chosen", "rejected")]
        chosen, rejected = (token_ids[: LENGTHS.total - len(prompt)] for token_ids in whole)
        if not ranking["tie"] and [prompt, chosen, rejected] == [response["prompt_token_ids"], *whole]:
            row = {"prompt_id": response["prompt_id"], "prompt_token_ids": prompt}
            row |= {"chosen_token_ids": chosen, "rejected_token_ids": rejected}
            for side in ("chosen", "rejected"):
                row[f"{side}_probability"] = ranking["probabilities"][ranking[side]]
            rows.append(row | {"prompt_tokens_cut": 0, "chosen_tokens_cut": 0, "rejected_tokens_cut": 0})
    pa.Table.from_pylist(rows, schema=schemas.UNSCORED_PAIRS)


def iterate_epoch(rows: Any) -> None:
    for _ in DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=list):
        pass


def run_rows(data: Path) -> None:
    iterate_epoch(train.to_dataset(tables.read(data / "pairs" / f"{NAME}.parquet", schemas.PAIRS)))


def run_plain_rows(data: Path) -> None:
    iterate_epoch(tables.read(data / "pairs" / f"{NAME}.parquet", schemas.PAIRS).to_pylist())


def run_report(data: Path) -> None:
    settings = params.load("eta", "train", path=data / "params.yaml")
    health.measure_health(NAME, data, settings.eta, settings.train)


def run_plain_report(data: Path) -> None:
    responses = pd.read_parquet(data / "responses" / f"{NAME}.parquet")
    rankings = pd.read_parquet(data / "rankings" / f"{NAME}.parquet")
    pairs = pd.read_parquet(data / "pairs" / f"{NAME}.parquet")
    log = pd.read_csv(data / "logs" / f"{NAME}.csv")
    counts, reasons = responses["token_counts"].explode(), responses["finish_reasons"].explode()
    texts = responses["responses"]
    values = [len(counts), counts.sum(), reasons.eq("length").sum(), *counts.astype(int).quantile([0.05, 0.5, 0.95])]
    values += [texts.map(lambda row: len(row) - len(set(row))).sum(), texts.explode().str.strip().eq("").sum()]
    values += [rankings[name].sum() for name in ("tie", "prompt_truncated", "responses_truncated")]
    values += [pairs[f"{text}_tokens_cut"].gt(0).sum() for text in ("prompt", "chosen", "rejected")]
    values += [value for side in ("chosen", "rejected") for value in pairs[f"{side}_probability"].quantile([0.05, 0.95])]
    log.tail(len(log) // 5).mean(numeric_only=True)
    health.make_histogram(pairs)


TASKS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "split": (run_split, run_plain_split),
    "check": (run_check, run_plain_check),
    "pairs": (run_pairs, run_plain_pairs),
    "rows": (run_rows, run_plain_rows),
    "report": (run_report, run_plain_report),
}
"""Task -> ours and the baseline, functions of the folder of data."""


def run_and_measure(run: Callable[[], None], growth: Any) -> None:
    """Run in this process. growth: a shared value, set to the MB by which the process grew at most."""
    start = read_memory("VmRSS")
    run()
    growth.value = (read_memory("VmHWM") - start) / 2**20


def run_forked(run: Callable[[], None]) -> float:
    """Run in a fork of this process. Returns the MB by which the fork grew at most. Exits if it fails."""
    context = multiprocessing.get_context("fork")
    growth = context.Value("d", -1)
    process = context.Process(target=run_and_measure, args=(run, growth))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("one side failed: see its message above")
    return float(growth.value)


def run_and_append(run: Callable[[], None], growths: list[float]) -> None:
    growths.append(run_forked(run))


def measure_sides(sides: Mapping[str, Callable[[], None]]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds and the MB of each side in each round, without the warm-up."""
    growths: dict[str, list[float]] = {name: [] for name in sides}
    seconds = time_in_turn({name: partial(run_and_append, run, growths[name]) for name, run in sides.items()})
    return seconds, {name: values[-len(seconds[name]) :] for name, values in growths.items()}


def compare_memory(
    subject: str, size: str, ours: list[float], baseline: list[float], target: str = "", scale: float = 1
) -> Comparison:
    """Compare each round's MB. scale: the multiple of the baseline's MB that counts as a ratio of 1."""
    ratios = [scale * theirs / mine for mine, theirs in zip(ours, baseline, strict=True)]
    return summarize(subject, size, ours, baseline, ratios, target)


def compare_sides(task: str, folder: Path) -> list[Comparison]:
    """Compare ours with the baseline at the small size."""
    ours, plain = TASKS[task]
    data = folder / f"{SMALL}"
    seconds, growths = measure_sides({"ours": partial(ours, data), "plain": partial(plain, data)})
    size = f"{SMALL:,} prompts"
    return [
        compare_rates(f"{task}, prompts per second", size, SMALL, seconds["ours"], seconds["plain"]),
        compare_memory(f"{task}, MB", size, growths["ours"], growths["plain"]),
    ]


def compare_sizes(task: str, folder: Path) -> list[Comparison]:
    """Compare ours at the larger full size with the smaller one."""
    ours, _ = TASKS[task]
    small, large = FULL
    seconds, growths = measure_sides({f"{size}": partial(ours, folder / f"{size}") for size in FULL})
    size, scale = f"{large:,} against {small:,} prompts", large / small
    expected = [scale * taken for taken in seconds[f"{small}"]]
    return [
        compare_rates(f"{task}, prompts per second", size, large, seconds[f"{large}"], expected, LINEAR),
        compare_memory(f"{task}, MB", size, growths[f"{large}"], growths[f"{small}"], LINEAR, scale),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_forked(partial(make_data, folder, [SMALL, *FULL]))
        importlib.import_module("datasets")  # which train.to_dataset imports, before the forks
        for task in TASKS:
            report([*compare_sides(task, folder), *compare_sizes(task, folder)])


if __name__ == "__main__":
    main()

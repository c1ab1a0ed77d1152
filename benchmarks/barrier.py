"""Shards that each worker takes when it is free, against rounds of one shard a worker that wait for the slowest: seconds.

Two workers of vLLM as generate starts them, each with one thread; the model is that of the section generate. How long the
responses are is drawn as for `plan`, a tenth as long: the model does not stop by itself. Shards of a few responses take
different times, so that a barrier costs much. The more responses a shard has, the less it costs. Both sides sample the same
tokens, which is checked.
"""

import functools
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import generate, texts
from benchmarks.measure import Comparison, compare_times, report, time_in_turn
from stages.engines import sampling
from stages.runtime import params, workers
from stages.runtime.paths import ROOT
from stages.runtime.workers import Deal
from stages.tools.planning import lengths, sizes

WORKERS = 2
SIZES = (24, 1), (8, 4)
"""Numbers of shards, and of prompts in each; the responses to a prompt are as many as the miniature's K."""
TENTH = 10
LONGEST = 1024 // TENTH
"""Tokens of the longest response."""

Task = tuple[list[list[int]], list[int]]
"""The token IDs of a shard's prompts, and the number of tokens to sample after each."""


def load(model: Path, engine: params.Engine) -> Callable[[Task], list[list[int]]]:
    """Start vLLM. Returns the function that samples a shard."""
    return functools.partial(sample, sampling.start_engine(model, engine, 0))


def sample(llm: Any, task: Task) -> list[list[int]]:
    """Sample responses of the given lengths. Returns their token IDs."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    prompts, counts = task
    requests = [SamplingParams(seed=0, max_tokens=count, ignore_eos=True) for count in counts]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], requests, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def make_tasks(tokenizer: Any, shards: int, prompts: int, samples: int) -> list[Task]:
    """Make shards of so many prompts; each prompt is in its shard `samples` times."""
    count, size = shards * prompts * samples, prompts * samples
    drawn = lengths.draw_lengths(np.random.default_rng(0), count, sizes.RESPONSE_TOKENS / TENTH, lengths.SPREAD, LONGEST)
    made = generate.make_shard(tokenizer, shards * prompts)["prompt_token_ids"].to_pylist()
    repeated = [ids for ids in made for _ in range(samples)]
    return [(repeated[start : start + size], drawn[start : start + size].tolist()) for start in range(0, count, size)]


def run(deal: Deal, tasks: list[Task], size: int) -> list[list[list[int]]]:
    """Sample all shards, so many at a time. Returns the token IDs of each."""
    results: list[list[list[int]]] = []
    for start in range(0, len(tasks), size):
        done = dict(deal(tasks[start : start + size], lambda index: f"shard {index}"))
        results += [done[index] for index in range(len(done))]
    return results


def compare(deal: Deal, tasks: list[Task]) -> Comparison:
    """Compare dealing all shards with dealing a round of them at a time."""
    sides = {"ours": functools.partial(run, deal, tasks, len(tasks)), "baseline": functools.partial(run, deal, tasks, WORKERS)}
    assert sides["ours"]() == sides["baseline"]()
    seconds = time_in_turn(sides)
    size = f"{len(tasks)} shards of {len(tasks[0][0])} responses, {WORKERS} workers"
    return compare_times("seconds, against a barrier after each round", size, seconds["ours"], seconds["baseline"], ">= 1")


def main() -> None:
    settings = params.load("engine", "generate", path=ROOT / "params.yaml")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        rng = random.Random(0)
        examples = [(texts.make_text(rng, 60), texts.make_text(rng, 60)) for _ in range(500)]
        tokenizer = generate.make_model(Path(name) / "model", examples)
        cases = [make_tasks(tokenizer, *size, settings.generate.samples) for size in SIZES]
        with workers.start(load, (Path(name) / "model", settings.engine), [""] * WORKERS) as deal:
            report([compare(deal, tasks) for tasks in cases])


if __name__ == "__main__":
    main()

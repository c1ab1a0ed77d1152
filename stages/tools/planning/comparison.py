"""Hours of two recipes as `plan` estimates them and as they were computed by hand: a check on the estimates.

By hand: from the same assumptions about lengths, but stage by stage on paper and, for waiting and padding, by another
simulation; with shards of SHARD prompts, SEQUENCES responses at a time, and without training's checkpoints. Each value has two
digits at most.
"""

from pathlib import Path
from typing import NamedTuple

from stages.reporting import markdown
from stages.runtime import params
from stages.tools.planning import rates
from stages.tools.planning.hours import Machine, Seconds, estimate_seconds
from stages.tools.planning.methods import ALL, PLAIN, Methods
from stages.tools.planning.sizes import find_shape, measure_size

SHARD, SEQUENCES = 256, 256
RUNS = {
    "generate": 3,
    "rank": 3,
    "reference": 3,
    "train": 3,
    "answer": 4,
    "evaluate-lm": 4,
    "evaluate-alpaca": 4,
    "compare": 1,
}
"""How often each stage runs in a recipe of three iterations."""
ROWS = {
    "generate": ["generate"],
    "rank": ["rank", "compare"],
    "reference": ["reference"],
    "train": ["train"],
    "answer": ["answer"],
    "evaluate-lm": ["evaluate-lm"],
    "judge, hashing": ["evaluate-alpaca"],
}
"""The rows of the table -> the stages in each; what all stages spend on hashing is in the last."""


class Column(NamedTuple):
    """A recipe on a number of GPUs, and the hours of each of ROWS as computed by hand."""

    name: str
    recipe: str
    gpu: str
    gpus: int
    methods: Methods
    by_hand: list[float]


COLUMNS = [
    Column("8 × H100, plain", "llama-3-8b", "H100", 8, PLAIN, [0.40, 0.36, 0.17, 0.65, 0.16, 1.8, 0.27]),
    Column("8 × H100, all of methods.py", "llama-3-8b", "H100", 8, ALL, [0.35, 0.11, 0.12, 0.36, 0.16, 0.42, 0.19]),
    Column("8 × A100, plain", "llama-3-8b", "A100", 8, PLAIN, [0.79, 0.64, 0.35, 1.37, 0.19, 4.7, 0.27]),
    Column("small, one RTX 4090, plain", "small", "RTX 4090", 1, PLAIN, [0.9, 2.5, 0.2, 0.9, 0.35, 4.9, 0.2]),
]
"""evaluate-lm with all methods: the middle of 0.33 to 0.5."""


def estimate_rows(column: Column, root: Path) -> list[float]:
    """Estimate the hours of each of ROWS, with the parameters of the hours by hand."""
    path = root / "recipes" / column.recipe / "params.yaml"
    settings = params.validate_unpinned(params.read(path), path)
    changes = {
        "train": {"checkpoint_steps": 0},
        "generate": {"shard_size": SHARD},
        "engine": {"max_num_seqs": SEQUENCES},
    }
    settings = settings.model_copy(
        update={name: getattr(settings, name).model_copy(update=values) for name, values in changes.items()}
    )
    fresh = path.parent / "not-run"  # a folder that does not exist: nothing is measured
    (size, _), shape = measure_size(fresh, settings), find_shape(fresh, settings)
    machine = Machine(rates.GPUS[column.gpu], column.gpus, column.methods)
    seconds: dict[str, Seconds] = {stage: estimate_seconds(stage, settings, size, shape, machine) for stage in RUNS}
    hours = [
        sum(RUNS[stage] * (seconds[stage].start + seconds[stage].compute) for stage in stages) / 3600
        for stages in ROWS.values()
    ]
    hours[-1] += sum(RUNS[stage] * seconds[stage].hashing for stage in RUNS) / 3600
    return hours


def format_comparison(root: Path) -> str:
    """Format the table: for each of ROWS and COLUMNS, the hours by hand and those of `plan`."""
    estimated = [estimate_rows(column, root) for column in COLUMNS]
    rows = [
        [name, *(f"{column.by_hand[row]:g}, {hours[row]:.2f}" for column, hours in zip(COLUMNS, estimated, strict=True))]
        for row, name in enumerate(ROWS)
    ]
    sums = [f"{sum(column.by_hand):.1f}, {sum(hours):.1f}" for column, hours in zip(COLUMNS, estimated, strict=True)]
    return markdown.table(["stage", *(column.name for column in COLUMNS)], [*rows, ["all", *sums]])

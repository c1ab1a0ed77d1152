"""Functions for worker processes, which import them by this module's name."""

import os
from collections.abc import Callable

import pyarrow as pa

from stages.artifacts import schemas
from support import tables


def load_echo(samples: int) -> Callable[[pa.Table], pa.Table]:
    """Return a function that responds to each prompt with the prompt itself, `samples` times."""
    return lambda shard: respond(shard, lambda prompt: [prompt] * samples)


def load_visible_device() -> Callable[[pa.Table], pa.Table]:
    """Return a function that responds to each prompt with the GPUs that this process may see."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    return lambda shard: respond(shard, lambda _: [device])


def load_failure() -> Callable[[pa.Table], pa.Table]:
    """Raise the error of a model that does not load."""
    raise OSError(13, "Permission denied", "model")


def respond(shard: pa.Table, answer: Callable[[str], list[str]]) -> pa.Table:
    return pa.Table.from_pylist(tables.add_responses(shard.to_pylist(), answer), schema=schemas.RESPONSES)

"""Map a function over shards of a table, with one worker per device.

The shard size, never the number of devices, decides which rows are computed together, so the result does not depend on the
devices. Finished shards are kept in the stage's scratch folder, keyed by everything that determines them; a killed stage
resumes from there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from stages.artifacts import pointers, tables
from stages.runtime import durable, scratch, workers
from stages.runtime.devices import is_main_process, list_devices
from stages.runtime.logs import log

Compute = Callable[[pa.Table], pa.Table]


def map_shards(
    stage: str,
    table: pa.Table,
    size: int,
    load: Callable[..., Compute],
    arguments: tuple[Any, ...],
    schema: pa.Schema,
    key: Mapping[str, Any],
    *,
    cores: bool = False,
    gpus: int = 1,
) -> pa.Table:
    """Apply `load(*arguments)` to every `size` rows of the table and return the concatenated results, in order.

    stage: the stage's name, for its scratch folder. load: a module-level function that sets up a device (loads a model)
    and returns the function that computes one shard. schema: the schema of each result. key: JSON values that determine the
    results, including digests of the inputs. cores, gpus: one worker per CPU core, or for so many GPUs, see `list_devices`.
    Raises StageError if a worker fails or a finished shard has the wrong columns.
    """
    folder = scratch.folder(stage, {**key, "shard_size": size})
    shards = [table.slice(start, size) for start in range(0, table.num_rows, size)]
    paths, pending = list_shards(folder, len(shards))
    devices = list_devices(cores=cores, gpus=gpus)
    if pending:
        tasks = [copy_slice(shards[index]) for index in pending]
        inputs = [file for path in arguments if isinstance(path, Path) for file in pointers.list_files(path)]
        with workers.start(load, arguments, devices[: len(pending)], fork=cores, inputs=inputs) as deal:
            results = deal(tasks, lambda task: f"shard {pending[task] + 1} of {len(shards)}")
            for task, result in tqdm(results, total=len(pending), desc=stage, unit="shard"):
                tables.write(result, schema, paths[pending[task]])
    return pa.concat_tables([tables.read(path, schema) for path in paths])


def copy_slice(shard: pa.Table) -> pa.Table:
    """Copy a slice of a table: pickling a slice itself would include the whole table."""
    return shard.take(pa.array(range(shard.num_rows)))


def list_shards(folder: Path, count: int) -> tuple[list[Path], list[int]]:
    """Return the paths of `count` shards in the folder and the indices of those to compute.

    Every process of a group gets the same. A shard that `is_kept` sets aside is computed again.
    """
    paths = [folder / f"{index:05}.parquet" for index in range(count)]
    pending = [index for index, path in enumerate(paths) if not is_kept(path)]
    if len(pending) < count:
        log.info("%d of %d shards are already finished, in %s", count - len(pending), count, folder)
    return paths, pending


def is_kept(path: Path) -> bool:
    """Return whether an earlier run kept its work in this Parquet file. One that is not whole, as after a power cut, is set
    aside, by the main process of a group."""
    kept = tables.is_readable(path)
    if not kept and is_main_process() and path.exists():
        durable.set_aside(path, "not a readable Parquet file")
    return kept

"""Map a function over shards of a table, with one worker per device.

The shard size, never the number of devices, decides which rows are computed together, so the result does not depend on the
devices. Finished shards are kept in the stage's scratch folder, keyed by everything that determines them; a killed stage
resumes from there.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from stages.artifacts import tables
from stages.runtime import durable, processes, scratch
from stages.runtime.devices import is_main_process, list_devices
from stages.runtime.errors import StageError, exit_with
from stages.runtime.logs import log, setup_logging

Compute = Callable[[pa.Table], pa.Table]
Task = tuple[pa.Table, Path]
"""A shard and the file for its result."""


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
    tasks = [[(shards[index], paths[index]) for index in pending[worker :: len(devices)]] for worker in range(len(devices))]
    tasks = [task for task in tasks if task]
    if len(tasks) == 1:
        _compute_shards(stage, load, arguments, schema, tasks[0])
    elif tasks:
        jobs = ((stage, load, arguments, schema, [(copy_slice(shard), path) for shard, path in task]) for task in tasks)
        _run_workers(jobs, devices)
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


def _compute_shards(
    stage: str, load: Callable[..., Compute], arguments: tuple[Any, ...], schema: pa.Schema, tasks: list[Task]
) -> None:
    compute = load(*arguments)
    for shard, path in tqdm(tasks, desc=stage, unit="shard"):
        tables.write(compute(shard), schema, path)


def _run_workers(jobs: Iterable[tuple[Any, ...]], devices: list[str]) -> None:
    """Run `_compute_shards` for each job in its own process, on its own device. Raises StageError if one fails."""
    context = multiprocessing.get_context("spawn")
    workers = []
    for job, device in zip(jobs, devices, strict=False):
        workers.append(context.Process(target=_run_worker, args=job, daemon=True))
        with processes.block_sigint(), _visible_device(device):
            workers[-1].start()
    for worker in workers:
        worker.join()
    for index, worker in enumerate(workers):
        if worker.exitcode:
            killed = f"was ended by signal {-worker.exitcode} (out of memory?)" if worker.exitcode < 0 else ""
            how = killed or "failed; see its message above"
            raise StageError(f"worker {index} of {len(workers)} {how}: fix the cause, then re-run to resume")


@contextlib.contextmanager
def _visible_device(device: str) -> Iterator[None]:
    """Make only this GPU visible to processes that start within the block; "" changes nothing."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield
    finally:
        if device and before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        elif device and before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _run_worker(*job: Any) -> None:
    processes.setup_worker()
    setup_logging()
    try:
        _compute_shards(*job)
    except Exception as error:
        exit_with(error)

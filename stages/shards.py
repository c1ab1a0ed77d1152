"""A map over shards of fixed size, one worker per device.

What is computed together is decided by the shard, never by the number of devices, so the result does not depend on it.
Finished shards lie in the scratch folder, keyed by everything that determines them: a killed stage goes on from there.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from stages import cli, files, processes, scratch
from stages.cli import StageError

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
) -> pa.Table:
    """Apply `load(*arguments)` to each `size` rows of the table and return the results in order.

    stage: names the folder in scratch.
    load: a module's function that prepares a device (loads a model) and returns the function of one shard.
    schema: of each result. key: JSON values that determine the results, the inputs' digests among them.
    cores: see `devices`. Raises StageError where a worker fails, or where a finished shard is harmed.
    """
    folder = scratch.folder(stage, {**key, "shard_size": size})
    shards = [table.slice(start, size) for start in range(0, table.num_rows, size)]
    paths, pending = places(folder, len(shards))
    names = devices(cores=cores)
    tasks = [[(shards[index], paths[index]) for index in pending[rank :: len(names)]] for rank in range(len(names))]
    tasks = [task for task in tasks if task]
    if len(tasks) == 1:
        _work(stage, load, arguments, schema, tasks[0])
    elif tasks:
        _spawn(((stage, load, arguments, schema, [(own(shard), path) for shard, path in task]) for task in tasks), names)
    return pa.concat_tables([files.read_table(path, schema) for path in paths])


def own(shard: pa.Table) -> pa.Table:
    """A copy of a slice: pickled as it is, a slice takes all of the table that it is of along."""
    return shard.take(pa.array(range(shard.num_rows)))


def places(folder: Path, count: int) -> tuple[list[Path], list[int]]:
    """The files of `count` shards in the folder, and the indices of those that are to be made yet."""
    paths = [folder / f"{index:05}.parquet" for index in range(count)]
    pending = [index for index, path in enumerate(paths) if not path.exists()]
    if len(pending) < count:
        cli.log.info("%d of %d shards are finished already, in %s", count - len(pending), count, folder)
    return paths, pending


def devices(*, cores: bool = False) -> list[str]:
    """CUDA_VISIBLE_DEVICES for each worker: a GPU each; without a GPU "" for as many workers as SPPO_WORKERS says.

    cores: without SPPO_WORKERS one worker for each processor core, where a worker takes one thread, instead of one in all.
    Raises StageError where SPPO_WORKERS is no number.
    """
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    default = len(os.sched_getaffinity(0)) if cores else 1
    count = os.environ.get("SPPO_WORKERS", str(default))
    if not count.isdecimal() or not int(count):
        raise StageError(f"SPPO_WORKERS is {count!r} and must be a number of processes: correct it, or unset it")
    return [""] * int(count)


def _work(
    stage: str,
    load: Callable[..., Compute],
    arguments: tuple[Any, ...],
    schema: pa.Schema,
    tasks: list[tuple[pa.Table, Path]],
) -> None:
    compute = load(*arguments)
    for shard, path in tqdm(tasks, desc=stage, unit="shard"):
        files.write_table(compute(shard), schema, path)


def _spawn(jobs: Iterable[tuple[Any, ...]], names: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    workers = []
    for job, device in zip(jobs, names, strict=False):
        if device:
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        workers.append(context.Process(target=_worker, args=job, daemon=True))
        with processes.starting_workers():
            workers[-1].start()
    for worker in workers:
        worker.join()
    failed = [index for index, worker in enumerate(workers) if worker.exitcode]
    if failed:
        raise StageError(f"worker {failed[0]} of {len(workers)} failed: its message stands above; run again to go on")


def _worker(*job: Any) -> None:
    processes.worker()
    cli.quiet()
    try:
        _work(*job)
    except Exception as error:
        cli.fail(error)

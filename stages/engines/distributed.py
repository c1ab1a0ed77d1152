"""Start a stage's processes, one per device, and form their distributed group.

A stage that uses one device runs in its own process. With several devices it starts itself again under torchrun: on this
machine or, with train.nodes, on each of so many nodes of a Ray cluster. Under another launcher (DeepSpeed's, or torchrun on
several nodes that share `scratch`) it takes the rank that the launcher assigned.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages.artifacts import files, pointers
from stages.runtime import cluster, durable, processes
from stages.runtime.devices import LAUNCH_FOLDER, explain_out_of_memory, has_gpus, is_launched, is_main_process
from stages.runtime.errors import StageError, message_or_raise
from stages.runtime.logs import log

DIGESTS = "digests.json"
"""In LAUNCH_FOLDER: the digests of the stage's inputs, so that they are hashed once rather than once per worker."""
ERROR = "error"
"""In that folder: a worker's message, for the launching process to report once, below torchrun's own output."""

PROCESSES_PER_CORE = 8
"""Without GPUs, more processes than that would only fill the memory."""


@dataclass(frozen=True)
class Group:
    """What a process needs to join its distributed group and to run a stage in it."""

    devices: int
    """The number of processes, one per device."""
    digests: Mapping[str, str]
    """Digests of the stage's inputs, by the names of the inputs."""
    meeting_file: Path | None = None
    """For a group of one: the file for its rendezvous, instead of a port that would be open to the network."""


Work = Callable[[Group], None]
"""A stage's work in one process, which calls `start_group`."""


def launch(devices: int, inputs: Mapping[str, Path], work: Work, nodes: int = 1) -> None:
    """Call `work` in each of `devices` processes.

    inputs: files or folders to hash, by name. nodes: of the Ray cluster, each with the same number of the processes; 1: this
    machine alone. Raises StageError if there are fewer GPUs than `devices` (without GPUs, PROCESSES_PER_CORE processes share a
    core), if `devices` is not a multiple of `nodes`, if the cluster is not there or too small, if an input is missing, if a GPU
    runs out of memory, or if a process fails.
    """
    if is_launched():
        _prepare_cpu(devices)
        _run_under_launcher(devices, inputs, work)
    elif nodes > 1:
        _check_nodes(devices, nodes)
        _run_on_nodes(devices, nodes, inputs)
    else:
        _prepare_cpu(devices)
        _check_devices(devices)
        digests = _hash_inputs(inputs)
        if devices == 1:
            _run_in_this_process(digests, work)
        else:
            _run_torchrun(["--standalone", f"--nproc_per_node={devices}"], sys.orig_argv[1:], digests)


def _prepare_cpu(devices: int) -> None:
    """Set the environment variables of a machine without GPUs."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))


def start_group(group: Group) -> None:
    """Join the distributed group, which waits for all of its processes.

    Raises StageError if a launcher started a number of processes other than group.devices.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise the first start on a CPU compiles C++ (1 minute)
    alone = (
        {"auto_mpi_discovery": False, "init_method": f"file://{group.meeting_file}", "rank": 0, "world_size": 1}
        if group.meeting_file
        else {}
    )
    deepspeed.init_distributed(verbose=False, **alone)
    if int(os.environ["WORLD_SIZE"]) != group.devices:
        raise StageError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, but train.devices is {group.devices}: make them equal"
        )


def leave_group() -> None:
    """Leave the distributed group, if there is one: its threads may abort a process that exits with them running."""
    import torch

    if torch.distributed.is_initialized():  # False if `work` never called start_group
        torch.distributed.destroy_process_group()


def _check_devices(devices: int) -> None:
    """Raise StageError if this machine cannot run a process for each of the devices, and as `has_gpus` does."""
    import torch

    if has_gpus():
        available, what = torch.cuda.device_count(), f"{torch.cuda.device_count()} GPUs"
    else:
        cores = len(os.sched_getaffinity(0))
        available, what = PROCESSES_PER_CORE * cores, f"no GPU, and cores for {PROCESSES_PER_CORE * cores} processes at most"
    if devices > available:
        raise StageError(
            f"train.devices is {devices}, but this machine has {what}: lower train.devices to that number (gradient "
            "accumulation keeps the global batch the same)"
        )


def _work_in_group(group: Group, work: Work) -> None:
    """Do the stage's work in this process, then leave the group."""
    with explain_out_of_memory("lower train.device_batch (gradient accumulation keeps the global batch the same)"):
        work(group)
    leave_group()


def _run_in_this_process(digests: Mapping[str, str], work: Work) -> None:
    """Run a stage that uses one device, as a group of one."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        _work_in_group(Group(1, digests, Path(folder) / "group"), work)


def _run_under_launcher(devices: int, inputs: Mapping[str, Path], work: Work) -> None:
    """Run one worker of a launcher: ours, which passes a folder to exchange files, or another one."""
    if not is_main_process():
        log.setLevel(logging.WARNING)  # otherwise every worker would log the same lines
    exchange = Path(os.environ[LAUNCH_FOLDER]) if LAUNCH_FOLDER in os.environ else None
    try:
        digests = json.loads((exchange / DIGESTS).read_text(encoding="utf-8")) if exchange else _hash_inputs(inputs)
        _work_in_group(Group(devices, digests), work)
    except Exception as error:
        if not exchange:
            raise
        durable.write(exchange / ERROR, message_or_raise(error))  # the process that launched this one says it, once
        sys.exit(1)


def _check_nodes(devices: int, nodes: int) -> None:
    """Raise StageError if the processes cannot be divided among the nodes, or if there is no cluster."""
    if devices % nodes:
        raise StageError(
            f"train.devices, the number of all processes, is {devices}, not a multiple of train.nodes, {nodes}: change one"
        )
    if not cluster.is_asked_for():
        raise StageError(
            f"train.nodes is {nodes}, but {cluster.ADDRESS} is not set: set it to the address of a Ray cluster "
            "(docs/scaling.md), or set train.nodes to 1"
        )


def _run_on_nodes(devices: int, nodes: int, inputs: Mapping[str, Path]) -> None:
    """Run this command again in `devices` workers of torchrun on the cluster's nodes. Raises StageError if one fails."""
    with_gpus = cluster.has_gpus(cluster.list_nodes(cluster.connect()))
    digests = _hash_inputs(inputs)
    paths = [file for given in inputs.values() for file in pointers.list_files(given)]
    each = devices // nodes
    cluster.run_on_nodes(nodes, each if with_gpus else 0, paths, _run_node, each, devices, sys.orig_argv[1:], digests)


def _run_node(place: cluster.Place, processes_here: int, devices: int, command: list[str], digests: Mapping[str, str]) -> None:
    """Run torchrun on one of several nodes; see `_run_torchrun`. devices: on all nodes."""
    _prepare_cpu(devices)  # otherwise torchrun, or Ray, would choose another number of threads
    options = [f"--nnodes={place.count}", f"--node_rank={place.rank}", f"--nproc_per_node={processes_here}"]
    _run_torchrun([*options, f"--master_addr={place.host}", f"--master_port={place.port}"], command, digests)


def _run_torchrun(options: list[str], command: list[str], digests: Mapping[str, str]) -> None:
    """Run a command of Python in workers of torchrun. Raises StageError if one fails.

    options: torchrun's. command: Python's arguments.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options]
    # If this process is killed, so is torchrun, and with it the workers. Ctrl-C in the terminal reaches this process only.
    die_with_us = partial(processes.die_with_parent, os.getpid(), signal.SIGKILL)
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder)
        (exchange / DIGESTS).write_text(json.dumps(dict(digests)), encoding="utf-8")
        done = subprocess.run(
            [*torchrun, *command],
            env=os.environ | {LAUNCH_FOLDER: folder},
            check=False,
            preexec_fn=die_with_us,
            start_new_session=True,
        )
        if done.returncode:
            error = exchange / ERROR
            raise StageError(error.read_text(encoding="utf-8") if error.exists() else cluster.WORKER_FAILED)


def _hash_inputs(inputs: Mapping[str, Path]) -> dict[str, str]:
    return {name: files.digest(path) for name, path in inputs.items()}

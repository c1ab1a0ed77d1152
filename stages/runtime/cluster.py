"""Work on the nodes of an existing Ray cluster, which the environment variable RAY_ADDRESS names; it is never started here.

Without RAY_ADDRESS, no process imports Ray. All nodes see the repository and what it refers to under the same paths, and the
stage's own process alone writes its outputs and its record.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.runtime import devices, processes, scratch
from stages.runtime.errors import StageError, describe, quote
from stages.runtime.logs import log, setup_logging
from stages.runtime.paths import ROOT

ADDRESS = "RAY_ADDRESS"
"""Environment variable: HOST:PORT of the cluster, as `ray start` prints it, or `auto`: the one that this machine is part of."""
SECONDS = 5
"""How long the cluster may take to answer. Ray itself would try for minutes."""
GREETING, ANSWER = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 4
"""What a client of gRPC, and so of Ray, says first, and the type of the frame that the server answers with: SETTINGS."""
OF_A_NODE = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "RAY_", "SLURM", "HOSTNAME", "TMPDIR", "LD_LIBRARY_PATH")
"""Beginnings of the environment variables that each node has its own values of."""
GPU_TYPE = "accelerator_type:"
"""Beginning of the names of Ray's resources that tell a node's kind of GPU."""
SECRET = re.compile("(^|_)(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS)(_|$)")
"""Names of environment variables that Ray, which logs them, must not start workers with."""
WORKER_FAILED = "a worker process failed: see its error message above"
"""What is said of a process that said nothing itself; another process may know the cause."""
GRACE = 15
"""Seconds that the other nodes have to say why they failed, once one has failed: the first is seldom the cause."""


@dataclass(frozen=True)
class Place:
    """Where a process started by `run_on_nodes` runs."""

    rank: int
    """0 on the stage's own node if that takes part."""
    count: int
    """The number of nodes."""
    host: str
    """The address of the node of rank 0."""
    port: int
    """A port that was free there."""


def is_asked_for() -> bool:
    """Return whether RAY_ADDRESS names a cluster to work on."""
    return bool(os.environ.get(ADDRESS))


def hide_ray() -> None:
    """Hide Ray from the libraries in this process, unless it works on a cluster: vLLM imports it wherever it is installed."""
    if not is_asked_for() and "ray" not in sys.modules:
        sys.modules["ray"] = None  # type: ignore[assignment]  # an import then raises ImportError


def connect() -> Any:
    """Connect this process to the cluster. Returns the module `ray`. Raises StageError if there is no cluster."""
    address = os.environ.get(ADDRESS, "")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns about a default that will change
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray

    if ray.is_initialized():
        return ray
    _check_reachable(address)
    handlers = {number: signal.getsignal(number) for number in processes.STOP_SIGNALS}
    try:
        ray.init(address=address, logging_level=logging.ERROR)
    except Exception as error:
        raise StageError(
            f"{ADDRESS}: cannot join the Ray cluster at {address} ({describe(error)}): see docs/scaling.md"
        ) from error
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray sets its own
    return ray


def _check_reachable(address: str) -> None:
    """Raise StageError if nothing that may be Ray answers at the address within SECONDS."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.-]+", host) or not re.fullmatch("[0-9]{1,5}", port):
        raise StageError(
            f"{ADDRESS} is {quote(address)} but must be HOST:PORT, as `ray start` prints it, or auto: correct it or unset it"
        )
    from ray.util import get_node_ip_address

    local = host in ("localhost", "127.0.0.1")  # for which Ray takes this machine's address
    try:
        place = get_node_ip_address() if local else host  # type: ignore[no-untyped-call]
        with socket.create_connection((place, int(port)), SECONDS) as connection:
            connection.sendall(GREETING)
            is_ray = os.environ.get("RAY_USE_TLS") == "1" or connection.recv(9)[3:4] == bytes([ANSWER])
            problem = "" if is_ray else "what listens there is not Ray"
    except (OSError, OverflowError) as error:
        problem = describe(error)
    if problem:
        raise StageError(
            f"{ADDRESS}: no Ray cluster at {address} ({problem}): start one (docs/scaling.md), or correct or unset {ADDRESS}"
        )


def list_nodes(ray: Any) -> list[dict[str, Any]]:
    """Return the nodes that are alive, as `ray.nodes()` describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def check_kinds(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise StageError if Ray knows that nodes have two kinds of GPU. It does not tell their memory apart."""
    types = [(name.partition(":")[2], node) for node in nodes for name in node["Resources"] if name.startswith(GPU_TYPE)]
    refuse_kinds((kind, node["NodeManagerAddress"]) for kind, node in types)


def refuse_kinds(found: Iterable[tuple[str, str]]) -> None:
    """Raise StageError if GPUs are of two kinds. found: pairs of a kind and a node's address; "" is no kind."""
    kinds: dict[str, list[str]] = {}
    for kind, host in found:
        if kind and host not in kinds.setdefault(kind, []):
            kinds[kind].append(host)
    if len(kinds) > 1:
        listing = "; ".join(f"{kind}: {', '.join(hosts)}" for kind, hosts in sorted(kinds.items()))
        raise StageError(
            f"the cluster has two kinds of GPU, which give different results ({listing}): stop Ray on the nodes of one kind"
        )


def has_gpus(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any of the nodes has a GPU."""
    return any(node["Resources"].get("GPU") for node in nodes)


def hand_over() -> dict[str, str]:
    """Return this process's environment variables but those that each node has its own values of."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OF_A_NODE)}


def take_over(folder: str, environment: Mapping[str, str]) -> None:
    """Prepare a process that Ray started: the stage's folder and environment variables, and logging.

    environment: from `hand_over`, in the stage's process. What else the node's `ray start` was given may not change a result.
    """
    for name in list(os.environ):
        if name not in environment and not name.startswith(OF_A_NODE):
            del os.environ[name]
    os.environ.update(environment)
    os.chdir(folder)
    setup_logging()


def worker_environment() -> dict[str, Any]:
    """Return Ray's runtime_env for this stage's processes: this Python environment, and the environment variables, which
    Python and C libraries read when a process starts."""
    variables = {name: value for name, value in hand_over().items() if not SECRET.search(name)}
    given = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    return {"py_executable": sys.executable, "env_vars": variables | {"PYTHONPATH": ":".join([str(ROOT), *given])}}


@contextlib.contextmanager
def shared_paths(paths: Sequence[Path], scratch_folder: Path | None = None) -> Iterator[list[str]]:
    """Yield the paths that a node must see: the given ones, this folder, this Python, and a file that exists within the block,
    to tell the shared folder for unfinished work from another one of that name. scratch_folder: where that is."""
    folder = scratch_folder or scratch.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder.resolve(), prefix="cluster-") as mark:
        yield [str(Path.cwd()), str(ROOT), sys.executable, *(str(path.absolute()) for path in paths), mark.name]


def on_node(node: str) -> Any:
    """Return Ray's scheduling strategy for a node, by its ID."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def find_missing(ray: Any, paths: Sequence[str], scheduling: Any) -> Any:
    """Look for paths on a node. Returns Ray's reference to: the node's address, the first path that is missing there or None,
    and a free port."""

    def look(paths: Sequence[str]) -> tuple[str, str | None, int]:  # an inner function: the node may not see this module
        import os
        import socket

        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        missing = next((path for path in paths if not os.path.exists(path)), None)  # noqa: PTH110
        return ray.util.get_node_ip_address(), missing, port  # type: ignore[no-untyped-call]

    return ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=scheduling).remote(list(paths))


def refuse_missing(host: str, path: str | None) -> None:
    """Raise StageError if the node at `host` does not see a path."""
    if path:
        raise StageError(
            f"the cluster's node {host} does not see {path}: mount the same folder at the same path on every node (for the "
            "Hub's cache, set HF_HOME to a folder on such a file system)"
        )


def run_on_nodes(count: int, gpus: int, paths: Sequence[Path], function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(place, *arguments)` on each of `count` nodes, in a process like this one; return when all have finished.

    gpus: per node. paths: what the nodes must see besides this folder. function: of a module; when it fails on one node, it is
    ended on the others. Raises StageError if the cluster has too few such nodes, if one of them does not see a path, and if
    the function does, or if the nodes have two kinds of GPU.
    """
    ray = connect()
    from ray.util.placement_group import placement_group, remove_placement_group

    nodes = list_nodes(ray)
    check_kinds(nodes)
    fitting = [node for node in nodes if node["Resources"].get("GPU", 0) >= gpus and node["Resources"].get("CPU")]
    if len(fitting) < count:
        each = f" with {gpus} GPUs each" if gpus else ""
        raise StageError(f"{count} nodes{each} are needed and the cluster has {len(fitting)}: add nodes, or lower train.nodes")
    group = placement_group([{"CPU": 1, **({"GPU": gpus} if gpus else {})}] * count, strategy="STRICT_SPREAD")
    try:
        if not group.wait(SECONDS):
            log.info("waiting for %d free nodes of the cluster", count)
            ray.get(group.ready())
        _run_in_group(ray, group, paths, function, arguments)
    finally:
        with contextlib.suppress(Exception):  # the cluster may have gone
            remove_placement_group(group)
        ray.shutdown()  # what the nodes log is not to follow this stage's last line


def _run_in_group(
    ray: Any, group: Any, paths: Sequence[Path], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Run as `run_on_nodes` says, one process for each bundle of a placement group that is ready."""
    from ray.util import placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    nodes = placement_group_table(group)["bundles_to_node_id"]
    here = ray.get_runtime_context().get_node_id()
    bundles = sorted(nodes, key=lambda bundle: (nodes[bundle] != here, bundle))
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle) for bundle in bundles]
    with shared_paths(paths) as shared:
        found = ray.get([find_missing(ray, shared, place) for place in places])
    for host, path, _ in found:
        refuse_missing(host, path)
    (host, _, port), gpus = found[0], int(group.bundle_specs[0].get("GPU", 0))
    options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0, "runtime_env": worker_environment()}
    hosts = [address for address, *_ in found]
    once = ray.remote(max_calls=1)(_call)  # its process then ends, and holds no GPU

    def call_everywhere(called: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> list[Any]:
        calls = {}
        for place, address, values in zip(places, hosts, given, strict=True):
            remote = once.options(scheduling_strategy=place, **options)
            calls[remote.remote(str(Path.cwd()), hand_over(), called, *values)] = address
        return _wait(ray, calls)

    if gpus:
        kinds = call_everywhere(devices.check_granted, [(gpus,)] * len(places))
        refuse_kinds(zip(kinds, hosts, strict=True))
        devices.note_remote(kinds[0], gpus * len(places))
    call_everywhere(function, [(Place(rank, len(places), host, port), *arguments) for rank in range(len(places))])


def _call(folder: str, environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> tuple[str | None, Any]:
    """Call a function in a process that Ray started. Returns the message of its StageError, None if it succeeded, and what it
    returned."""
    take_over(folder, environment)
    try:
        return None, function(*arguments)
    except StageError as error:
        return str(error), None


def _wait(ray: Any, calls: Mapping[Any, str]) -> list[Any]:
    """Wait for calls of `_call`, by node, and return what their functions returned. Raises StageError, and ends the others, if
    one fails."""
    pending, said, lost = list(calls), list[str](), list[str]()  # what functions and Ray say, in order of arrival
    returned = dict[Any, Any]()
    while pending:
        done, pending = ray.wait(pending, timeout=GRACE if said or lost else None)
        if not done:
            break
        for call in done:
            try:
                message, returned[call] = ray.get(call)
            except ray.exceptions.RayError as error:
                reason = describe(error)
                lost.append(f"the cluster's node {calls[call]} failed ({reason}): fix the cause, then re-run to resume")
                continue
            said += [] if message is None else [message]
    for call in pending:
        ray.cancel(call, force=True)
    failures = sorted([*said, *lost], key=WORKER_FAILED.__eq__)
    for other in dict.fromkeys(failures[1:]):
        log.warning("%s", other)
    if failures:
        raise StageError(failures[0])
    return [returned[call] for call in calls]

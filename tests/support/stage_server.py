"""Run stages, tools and DVC without importing their libraries each time, which takes longer than most runs of the tests.

A server imports libraries and forks for each command. The fork runs `python -m MODULE` in the command's folder, with its
environment and streams; it imports the project's own modules itself, so it may run a copy of the repository. Servers start when
they are needed. Each is a fork of the one before it in ROUTES, which has imported what both need, or its child in another
environment. All processes of a run of pytest share the servers, which end with the last of them.

What a fork has in common with the others, and a process of its own would not: the order of sets of strings. To compare with a
process of its own, set PYTHONHASHSEED. And what its server had imported is never collected: `gc.unfreeze` does nothing.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stages.runtime import catalog
from stages.runtime.paths import ROOT
from support import stage_client

LIBRARIES = {
    "main": ("pandas", "pyarrow.parquet", "pyarrow.compute", "pyarrow.dataset", "pydantic.main", "ruamel.yaml", "jinja2"),
    "dvc": ("dvc.cli", "dvc.repo", "dvc.commands.repro", "dvc.stage.run", "dvc_render", "dvc.dvcfile", "dvc.output"),
    "judges": ("openai", "sklearn.linear_model", "scipy.stats", "datasets", "tiktoken", "fire", "patsy", "pkg_resources"),
    "torch": ("torch", "torch.distributed.tensor", "torch._dynamo", "scipy.stats", "sklearn.base"),
    "models": ("transformers.trainer", "transformers.models.llama.modeling_llama"),
    "training": ("deepspeed", "datasets", "deepspeed.runtime.zero.muon.muon_optimizer"),
    "sampling": ("vllm", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"),
    "rank": ("pydantic.main", "ruamel.yaml", "pandas", "pyarrow.parquet", "torch", "transformers", "llm_blender"),
    "harness": (
        "pydantic.main",
        "ruamel.yaml",
        "pandas",
        "pyarrow.parquet",
        "torch",
        "transformers.models.llama.modeling_llama",
        "sklearn.metrics",
        "peft",
        "rouge_score.rouge_scorer",
        "sacrebleu",
        "aiohttp",
        "ray",
    ),
}
"""What each server imports, in addition to the server that it is a fork of. alpaca-eval, lm-eval and, for it, datasets are left
to the stages: they read environment variables that the stages set."""
ROUTES = {
    **dict.fromkeys(("dvc", "stages.tools"), ("main", "dvc")),
    "evaluate-alpaca": ("main", "judges"),
    **dict.fromkeys(("assets-policy", "reference", "train"), ("main", "torch", "models", "training")),
    **dict.fromkeys(("generate", "answer", "answer-reference"), ("main", "torch", "models", "sampling")),
    **{stage: (environment,) for stage, environment in catalog.ENVIRONMENTS.items()},
}
"""The servers of a stage or module; ("main",) for all others."""
HUB = ("main", "torch")
"""The servers of programs with a Hub of their own: no library that they import reads the Hub's variables."""
LIGHT = ("main",)
"""The servers of any stage in a fast test: most stages then end before they import a library. A stage of another environment
starts its interpreter, as it does from a user's shell."""

is_fast = False
"""Whether the current test is a fast one."""

ENVIRONMENT = dict(os.environ)
"""That of the first server."""


@functools.cache
def start() -> Path:
    """Start the first server, which imports nothing, unless another process of this run of pytest has. Returns a folder:
    `socket`, where the server listens, and `python`, for programs that start stages."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # the same for all of pytest-xdist's workers
    folder = Path(tempfile.gettempdir(), f"stage-servers-{run}") if run else Path(tempfile.mkdtemp())
    folder.mkdir(mode=0o700, exist_ok=True)
    presence = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            presence.connect(str(folder / "socket"))
            presence.send(b"null")
        except (FileNotFoundError, ConnectionRefusedError):  # there is none yet, or its processes have ended
            launch(folder)
    atexit.register(presence.close)
    return folder


def launch(folder: Path) -> None:
    """Start the first server as a child of this process, which waits for its end so that what it used is counted."""
    (folder / "socket").unlink(missing_ok=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "support.stage_server", folder / "socket"],
        env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.communicate)  # the end of its stdin tells it that this process ends
    assert server.stdout
    assert server.stdout.readline() == "ready\n"
    command = [sys.executable, "-IS", stage_client.__file__, folder / "socket", sys.executable, json.dumps(ENVIRONMENT)]
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n', encoding="utf-8")
    python.chmod(0o755)


def run(
    module: str,
    folder: Path,
    arguments: list[str],
    environment: dict[str, str],
    *,
    merged: bool = False,
    route: tuple[str, ...] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m MODULE ARGUMENTS` in a folder with this environment.

    merged: write stderr to stdout. route: the servers, if not those of ROUTES.
    """
    request: dict[str, Any] = {"module": module, "arguments": arguments, "folder": str(folder), "environment": environment}
    if is_fast and module in stage_client.STAGES:
        route = LIGHT
    if route:
        request["route"] = route
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, Path(os.devnull).open("rb") as nothing:
        streams = (nothing.fileno(), out.fileno(), (out if merged else err).fileno())
        code = stage_client.ask(str(start() / "socket"), request, streams)
        texts = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in (out, err)]
    return subprocess.CompletedProcess(arguments, code, *texts)


class Server:
    """Passes requests on to its children, or forks to run them. Each comes with four handles: the connection that waits for the
    exit code, stdin, stdout and stderr."""

    def __init__(self) -> None:
        self.children: dict[str, socket.socket] = {}
        self.running: dict[int, tuple[int, int]] = {}
        """Handle of a process that runs a command -> its PID, and the connection that waits for it."""

    def accept(self, request: dict[str, Any], handles: list[int]) -> None:
        """Run a request, or pass it on to the next server of its route."""
        if not request["route"]:
            if not (pid := os.fork()):
                self.close()
                become(request, handles)
            self.running[os.pidfd_open(pid)] = pid, os.dup(handles[0])
        else:
            name, *request["route"] = request["route"]
            child = self.children.get(name) or self.start(name, handles)
            socket.send_fds(child, [json.dumps(request).encode()], handles)
        for handle in handles:
            os.close(handle)

    def start(self, name: str, handles: list[int]) -> socket.socket:
        """Start a child: as a fork, which does not keep a request's handles, or, in another environment, by its interpreter."""
        self.children[name], theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if name in ("main", *catalog.ENVIRONMENTS.values()):
            python = Path(sys.prefix).parent / name / "bin" / "python"
            handle = theirs.fileno()
            command = [python, "-m", "support.stage_server", name, str(handle)]
            subprocess.Popen(command, pass_fds=[handle], stdin=subprocess.DEVNULL, stdout=sys.stderr)
        elif not os.fork():
            self.close()
            for given in handles:  # others wait for the end of what is written to them
                os.close(given)
            prepare(name)
            Server().serve(theirs)
            sys.exit()
        theirs.close()
        return self.children[name]

    def reap(self, process: int) -> None:
        """Reply to the connection that waits for an ended process."""
        pid, connection = self.running.pop(process)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(process)
        with socket.socket(fileno=connection) as waiting, contextlib.suppress(BrokenPipeError):
            waiting.send(str(code).encode())

    def serve(self, source: socket.socket) -> None:
        """Accept what another server passes on, until it ends."""
        while True:
            for ready in select.select([source, *self.running], [], [])[0]:
                if ready is not source:
                    self.reap(ready)
                    continue
                data, handles, _, _ = socket.recv_fds(source, 2**20, 4)
                if not data:
                    return self.end()
                self.accept(json.loads(data), handles)

    def listen(self, listener: socket.socket) -> None:
        """Pass on requests of any process, until all processes of pytest that use this server have ended."""
        present: list[Any] = [sys.stdin]
        while True:
            for ready in select.select([listener, *present], [], [])[0]:
                if ready is listener:
                    self.receive(listener.accept()[0], present)
                    continue
                present.remove(ready)
                if not present:
                    return self.end()

    def receive(self, connection: socket.socket, present: list[Any]) -> None:
        """Pass on the request of a new connection, or add it to those that say that their process is present."""
        data, handles, _, _ = socket.recv_fds(connection, 2**20, 3)
        if not data:  # its process has ended
            connection.close()
            return
        request = json.loads(data)
        if request is None:
            present.append(connection)
            return
        name = request["module"]
        if name in stage_client.STAGES and request["arguments"]:
            name = request["arguments"][0]
        self.accept({"route": ROUTES.get(name, ("main",))} | request, [connection.detach(), *handles])

    def close(self) -> None:
        """Leave everything to the parent, in a fork."""
        for child in self.children.values():
            child.close()
        for process, (_, connection) in self.running.items():
            os.close(process)
            os.close(connection)

    def end(self) -> None:
        """End the children, and wait for them, so that what they used is counted."""
        for child in self.children.values():
            child.close()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()


def prepare(name: str) -> None:
    """Import a server's libraries, as the stages would find them."""
    from stages.engines import numerics
    from stages.runtime import run as runtime

    runtime.prepare_process()
    if name in ("main", *catalog.ENVIRONMENTS.values()):
        numerics.apply("portable")
    if name == "sampling":
        from stages.engines import sampling
        from stages.runtime import params

        sampling.set_variables(params.load("engine", path=ROOT / "params.yaml").engine)
        numerics.restrict_vllm()
    for library in LIBRARIES[name]:
        importlib.import_module(library)
    gc.freeze()  # otherwise each fork would scan all of it


def become(request: dict[str, Any], handles: list[int]) -> None:
    """Become `python -m MODULE`, in a fork."""
    connection, *streams = handles
    os.close(connection)
    for number, handle in enumerate(streams):
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("stages", "support")]:
        del sys.modules[name]
    ours = filter(None, os.environ.get("PYTHONPATH", "").split(":"))
    sys.path[:] = [request["folder"], *ours, *(path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix)))]
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # otherwise the forks would draw the same numbers
    gc.unfreeze = lambda: None  # vLLM calls it at its end, and would then scan, and so copy, all that the server has imported
    sys.argv[:] = sys.orig_argv[1:] = ["-m", request["module"], *request["arguments"]]
    del sys.argv[0]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(sys.argv[1])
            listener.listen()
            print("ready", flush=True)
            Server().listen(listener)
    else:
        prepare(sys.argv[1])
        Server().serve(socket.socket(fileno=int(sys.argv[2])))

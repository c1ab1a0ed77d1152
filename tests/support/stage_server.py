"""Run the stages of training without importing their libraries each time, which takes 10 seconds of CPU and several times as
long as a training of the tests.

A server, one per pytest process, applies portable numerics, imports the libraries and forks for each run, so that a stage finds
the process as `python -m stages` would have prepared it.
"""

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from stages.runtime.paths import ROOT

SERVED = ("reference", "train")
"""Stages without workers of their own, which would start as copies of the server."""
LIBRARIES = ("deepspeed", "transformers.trainer", "transformers.models.llama.modeling_llama", "datasets", "pandas")


@functools.cache
def start() -> "subprocess.Popen[str]":
    """Start this process's server."""
    server = subprocess.Popen(
        [sys.executable, "-m", "support.stage_server"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # end of input ends it
    return server


def run(folder: Path, arguments: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run `python -m stages ARGUMENTS` in a folder with this environment."""
    server = start()
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / "stdout", Path(name) / "stderr"]
        request = {"folder": str(folder), "arguments": arguments, "environment": environment, "outputs": list(map(str, paths))}
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(path.read_text(encoding="utf-8") for path in paths))


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Fork for every request, and reply with the exit code. A fork leaves through `run_stage`, which raises SystemExit."""
    for line in requests:
        child = os.fork()
        if not child:
            run_stage(json.loads(line))
        replies.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        replies.flush()


def run_stage(request: dict[str, Any]) -> None:
    """Become `python -m stages`."""
    for descriptor, path in zip((1, 2), request["outputs"], strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[1:] = request["arguments"]
    sys.orig_argv[1:] = ["-m", "stages", *sys.argv[1:]]  # which training on several devices runs again
    from stages.__main__ import main

    main(sys.argv[1:])
    sys.exit(0)


if __name__ == "__main__":
    from stages.engines import numerics
    from stages.runtime import run as runtime

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries write to stdout while they are imported
    runtime.prepare_process()
    numerics.apply("portable")
    for library in LIBRARIES:
        importlib.import_module(library)
    serve(sys.stdin, replies)

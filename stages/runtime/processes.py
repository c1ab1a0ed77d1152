"""End a stage's processes on a signal, and when the process that started them ends for any reason.

DVC starts a stage and waits. If DVC is killed, it cannot tell the stage, but the kernel can (Linux's PR_SET_PDEATHSIG): the
stage gets SIGTERM and shuts down cleanly. A stage's own workers are killed at once: the next run can use whatever they
leave behind.
"""

import atexit
import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import NoReturn

from stages.runtime.devices import is_launched

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, `kill` or a shutdown, and a closed terminal."""
GRACE_PERIOD = 60
"""Seconds from such a signal to the forced end, in case a library swallows the exception or blocks."""
GC_THRESHOLD = 100_000
"""torch and vLLM create millions of lasting objects at import. Python's default, a collection every 700 new objects, scans
them repeatedly and doubles the import time."""

_prctl = ctypes.CDLL(None).prctl
_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """Raised in the main thread by one of STOP_SIGNALS; the exit code is the shell's, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


def die_with_parent(parent: int, number: int) -> None:
    """Ask the kernel to send this process the signal when its parent (PID `parent`) ends, or now if it has ended already."""
    _prctl(_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def die_with_launcher() -> None:
    """Request SIGTERM when DVC, which started the stage, ends; in a distributed worker, SIGKILL when its launcher ends.

    Call this first. Until `handle_stop_signals`, Ctrl-C ends the process without a traceback.
    """
    parent, group = os.getppid(), os.getpgrp()
    if "DVC_STAGE" in os.environ and group not in (os.getpid(), os.getpgid(parent)):
        parent = -1  # DVC and its stages share a process group, so this parent has adopted an orphan
    die_with_parent(parent, signal.SIGKILL if is_launched() else signal.SIGTERM)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def handle_stop_signals() -> None:
    """Raise Stopped on STOP_SIGNALS, so that half-written files are removed.

    Signals that whoever started this process ignores stay ignored: SIGHUP under nohup, SIGINT in a script's background job.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    # Both SIGTERM from the parent's end and the group's signal may arrive; honour a second Ctrl-C.
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
    signal.alarm(GRACE_PERIOD)
    for child in multiprocessing.active_children():
        child.kill()  # nothing waits for their work
    raise Stopped(number)


@contextlib.contextmanager
def block_sigint() -> Iterator[None]:
    """Start workers within this block: Ctrl-C reaches every process of a terminal but must stop only the stage itself."""
    resource_tracker.ensure_running()  # the first worker's start would start it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def setup_worker() -> None:
    """Set up a multiprocessing worker, before anything else: the kernel kills it when the stage ends."""
    for number in STOP_SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)  # a forked worker inherits the stage's handlers
    parent = multiprocessing.parent_process()
    assert parent
    assert parent.pid
    die_with_parent(parent.pid, signal.SIGKILL)
    gc.set_threshold(GC_THRESHOLD)


def redirect_output(path: Path) -> None:
    """Let what this process prints to stdout and stderr, and what libraries written in C++ print, go to a new file."""
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(handle, stream.fileno())
    os.close(handle)


@contextlib.contextmanager
def restore_output() -> Iterator[None]:
    """After this block, let stdout and stderr go where they went before it, though `redirect_output` was called in it."""
    streams = (sys.stdout, sys.stderr)
    before = [os.dup(stream.fileno()) for stream in streams]
    try:
        yield
    finally:
        for stream, original in zip(streams, before, strict=True):
            stream.flush()
            os.dup2(original, stream.fileno())
            os.close(original)


def exit_worker() -> NoReturn:
    """End a distributed worker that has done its work, with exit code 0 and without the destructors of C++ libraries.

    With the threads of gloo and DeepSpeed, they sometimes abort the process ("terminate called without an active exception"),
    and torchrun then stops the other workers: a finished training would be lost.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

"""How a stage's processes end: when they are asked to, and with the process that started them, whatever ended that one.

DVC starts a stage and waits. Killed, it tells nobody; the kernel does (PR_SET_PDEATHSIG, of Linux): the stage gets SIGTERM
and ends in order, a stage's own workers are killed at once, for what they leave is nothing that the next run cannot use.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, `kill` and the machine's shutdown, a closed terminal."""
PATIENCE = 60
"""Seconds from such a signal to the end, even where a library swallows the exception or waits for something."""

_prctl = ctypes.CDLL(None).prctl
_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """Raised in the main thread by one of STOPS; the exit code is the shell's, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


def end_with(parent: int, number: int) -> None:
    """Have the kernel send this process the signal when its parent, this one, ends; now if it has ended already."""
    _prctl(_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """SIGTERM when the process ends that started a stage, DVC; SIGKILL for one of a distributed group, with its launcher.

    To be called first of all. Ctrl-C ends the process without a traceback until it is `stoppable`.
    """
    parent, group = os.getppid(), os.getpgrp()
    if "DVC_STAGE" in os.environ and group not in (os.getpid(), os.getpgid(parent)):
        parent = -1  # DVC and its stages are of one group: this parent is the one that takes in orphans
    end_with(parent, signal.SIGKILL if "LOCAL_RANK" in os.environ else signal.SIGTERM)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def stoppable() -> None:
    """Turn STOPS into Stopped, so that what is half-written is removed; but not those that are ignored, as under nohup."""
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in STOPS:  # DVC's end and the group's signal may come both; Ctrl-C a second time is meant
        signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
    signal.alarm(PATIENCE)
    for child in multiprocessing.active_children():
        child.kill()  # nothing waits for their work
    raise Stopped(number)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Start workers within: Ctrl-C reaches every process of a terminal, but is for the stage alone, which ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker() -> None:
    """For a multiprocessing worker to call first: it is killed when the stage ends."""
    for number in STOPS[1:]:
        signal.signal(number, signal.SIG_DFL)  # a forked one has the stage's handlers
    parent = multiprocessing.parent_process()
    assert parent
    assert parent.pid
    end_with(parent.pid, signal.SIGKILL)

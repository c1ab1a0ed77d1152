"""Evaluate tasks in turn, each prepared in a thread of its own while workers compute another.

The harness draws a task's few-shot examples before it asks for anything, and computes the metrics at the end: at full size,
the workers would wait for minutes.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from stages.runtime.errors import StageError
from stages.runtime.workers import Deal

Message = tuple[str, str, Any]
"""What a thread says: "deal", its task's name, and what to deal; or "finished" or "failed", the name, and the outcome."""


def evaluate_in_turn(names: Sequence[str], evaluate: Callable[[str, Deal], Any], deal: Deal) -> Iterator[tuple[str, Any]]:
    """Yield each name and `evaluate(name, deal)` when that is finished.

    An evaluation starts when the one before it deals for the first time. `deal` itself is called in this thread, for one
    evaluation after the other: the processes that it may start end with the thread that started them. If an evaluation fails,
    no other is started, those that compute no more are finished, and its exception is raised.
    """
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    waiting, running, failure = deque(names), list[str](), list[BaseException]()

    def start() -> None:
        if waiting and not failure:
            running.append(waiting.popleft())
            threading.Thread(target=_work, args=(running[-1], evaluate, messages), daemon=True).start()

    start()
    while running:
        kind, name, value = messages.get()
        if kind == "deal":
            if name == running[-1]:
                start()
            _answer(deal, failure[0] if failure else None, *value)
            continue
        running.remove(name)
        if kind == "failed":
            failure.append(value)
        else:
            yield name, value
        if not running:
            start()
    if failure:
        raise failure[0]


def _work(name: str, evaluate: Callable[[str, Deal], Any], messages: "queue.SimpleQueue[Message]") -> None:
    """Evaluate a task in a thread."""
    try:
        messages.put(("finished", name, evaluate(name, partial(_ask, name, messages))))
    except BaseException as error:  # the other thread raises it
        messages.put(("failed", name, error))


def _ask(
    name: str, messages: "queue.SimpleQueue[Message]", tasks: Sequence[Any], describe: Callable[[int], str]
) -> Iterator[tuple[int, Any]]:
    """Let the other thread deal: see `Deal`."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    messages.put(("deal", name, (tasks, describe, answers)))
    while (answer := answers.get()) is not None:
        if isinstance(answer, BaseException):
            raise answer
        yield answer


def _answer(
    deal: Deal,
    refusal: BaseException | None,
    tasks: Sequence[Any],
    describe: Callable[[int], str],
    answers: "queue.SimpleQueue[Any]",
) -> None:
    """Deal for a thread. refusal: what to tell it instead."""
    try:
        for answer in () if refusal else deal(tasks, describe):
            answers.put(answer)
        answers.put(refusal)
    except StageError as error:
        answers.put(error)

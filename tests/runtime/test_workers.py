"""Workers compute every task once, whatever their number, and one that fails, dies or hangs is noticed."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.runtime import workers
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.workers import load_play


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def describe(index: int) -> str:
    return f"task {index + 1}"


def play(tasks: list[tuple[Any, Any]], count: int = 2, start: str = "", **options: Any) -> Iterator[tuple[int, Any]]:
    """Deal tasks of support.workers to as many forks of this process."""
    with workers.start(load_play, (start,), [""] * count, fork=True, **options) as deal:
        yield from deal(tasks, describe)


def collect(stream: Iterator[tuple[int, Any]], results: dict[int, Any]) -> None:
    """Add what a stream yields to the results, each once, as long as it yields."""
    for index, value in stream:
        assert index not in results
        results[index] = value


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_task_is_computed_once_by_one_of_the_workers(count: int) -> None:
    results = list(play([("pid", number) for number in range(20)], count))
    assert sorted((index, value) for index, (_, value) in results) == [(number, number) for number in range(20)]
    pids = {pid for _, (pid, _) in results}
    assert pids == {os.getpid()} if count == 1 else os.getpid() not in pids


def test_all_workers_work_and_the_next_task_goes_to_the_one_that_is_free() -> None:
    """The first task ends only once the second worker has one, too; after that, one of them may do all of the rest."""
    results = dict(play([("meet", 3), ("meet", 3), ("meet", 3), *[("pid", None)] * 5], 3))
    assert len({results[index] for index in range(3)}) == 3
    assert {results[index][0] for index in range(3, 8)} <= {results[index] for index in range(3)}


def test_a_slow_task_holds_up_no_other() -> None:
    """The first task meets the last one."""
    results = play([("meet", 2), *[("pid", None)] * 10, ("meet", 2)])
    assert [index for index, _ in results][-2:] in ([0, 11], [11, 0])


def test_workers_stay_for_the_next_tasks() -> None:
    with workers.start(load_play, (), ["", ""], fork=True) as deal:
        before = {pid for _, pid in deal([("meet", 2)] * 2, describe)}
        for path in Path().glob("here-*"):
            path.unlink()
        assert {pid for _, pid in deal([("meet", 2)] * 2, describe)} == before
        assert not list(deal([], describe))
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_spawned_workers_get_the_same() -> None:
    with workers.start(load_play, (), ["", ""]) as deal:
        assert sorted(deal([(None, 10 * number) for number in range(4)], describe)) == [(n, 10 * n) for n in range(4)]


def test_results_of_any_size_arrive() -> None:
    sizes = [0, 1, 2**16, 5 * 2**20]
    assert {index: len(value) for index, value in play([("large", size) for size in sizes])} == dict(enumerate(sizes))


@pytest.mark.parametrize("count", [1, 2])
def test_the_message_of_a_worker_is_the_stages(count: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError, match=r"^model: lower the batch$"):
        list(play([("fail", "model: lower the batch")] * 3, count))
    assert "model" not in capfd.readouterr().err


def test_a_bug_in_a_worker_shows_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError) as error:
        list(play([("crash", "why")]))
    assert_message(str(error.value), "worker", "of 2 failed", "message above", "re-run to resume")
    assert "ZeroDivisionError: why" in capfd.readouterr().err


def test_what_workers_print_goes_to_their_logs(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError) as error:
        list(play([("crash", "why"), ("pid", 0)], folder=folder))
    assert_message(str(error.value), f"its log in {folder}")
    texts = [path.read_text() for path in folder.glob("worker-*.log")]
    assert texts, "that of the other worker may be missing, if it had not started yet"
    assert all(text.startswith("loaded") for text in texts if text)
    assert sum("ZeroDivisionError: why" in text for text in texts) == 1
    assert "why" not in capfd.readouterr().err


@pytest.mark.parametrize("task", [("die", None), ("stop in the middle", signal.SIGKILL)])
def test_a_worker_that_dies_is_named_and_finished_tasks_are_kept(task: tuple[Any, Any]) -> None:
    results: dict[int, Any] = {}
    with pytest.raises(StageError) as error:
        results.update(
            {index: value for index, value in play([(None, 1), (None, 2), task]) if results.setdefault(index, value)}
        )
    assert_message(
        str(error.value), "worker", "of 2 was ended by signal 9 (out of memory?)", "fix the cause", "re-run to resume"
    )
    assert results == {0: 1, 1: 2}


def test_a_worker_that_dies_while_it_loads_is_named() -> None:
    with pytest.raises(StageError, match="signal 9"):
        list(play([(None, 1)] * 3, start="die"))


def test_what_others_compute_when_one_fails_is_kept_and_no_more_is_begun() -> None:
    results: dict[int, Any] = {}
    with pytest.raises(StageError, match=r"^no$"):
        collect(play([("meet", 2), ("meet and fail", "no"), *[(None, 0)] * 50]), results)
    assert 0 in results
    assert len(results) < 50


@pytest.mark.slow
@pytest.mark.parametrize("task", [("hang once", "x"), ("stop in the middle", signal.SIGSTOP)])
def test_a_task_that_hangs_is_dealt_again_to_a_fresh_worker(
    task: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPPO_TIMEOUT", "2")
    caplog.set_level(logging.WARNING)
    if task[0] == "hang once":
        assert dict(play([(None, 1), task, (None, 3)])) == {0: 1, 1: "x", 2: 3}
    else:
        with pytest.raises(StageError, match="task 2: not finished after 2 seconds, 2 times"):
            list(play([(None, 1), task, (None, 3)]))
    (line,) = caplog.messages
    assert_message(line, "task 2: not finished after 2 seconds", "SPPO_TIMEOUT", "starting again")


@pytest.mark.slow
def test_a_task_that_hangs_twice_is_given_up_and_the_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_TIMEOUT", "2")
    results: dict[int, Any] = {}
    started = time.monotonic()
    with pytest.raises(StageError) as error:
        collect(play([("hang", None), (None, 1), (None, 2)]), results)
    assert_message(str(error.value), "task 1", "2 seconds, 2 times", "SPPO_TIMEOUT", "re-run to resume")
    assert results == {1: 1, 2: 2}
    assert time.monotonic() - started < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "start", "counts"),
    [(("hang once", "x"), "", {3}), (("hang", None), "", {3}), ((None, 1), "hang", {2, 3})],
    ids=["once", "twice", "loading"],
)
def test_no_worker_is_started_that_would_have_nothing_to_do(
    task: tuple[Any, Any], start: str, counts: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two to begin with, and one in the place of the first that hangs, but none after the last timeout."""
    monkeypatch.setenv("SPPO_TIMEOUT", "2")
    started: list[str] = []

    class Process(workers._Process):
        def __init__(self, context: Any, job: tuple[Any, ...], device: str) -> None:
            started.append(device)
            super().__init__(context, job, device)

    monkeypatch.setattr(workers, "_Process", Process)
    with contextlib.suppress(StageError):
        list(play([task, (None, 2)], start=start))
    assert len(started) in counts


@pytest.mark.slow
def test_workers_that_hang_while_loading_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_TIMEOUT", "2")
    with pytest.raises(StageError, match=r"^loading: not finished after 2 seconds, 2 times"):
        list(play([(None, 1)], start="hang"))


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "12345678"])
def test_an_invalid_timeout_is_rejected(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_TIMEOUT", value)
    with pytest.raises(StageError) as error:
        list(play([(None, 1)], 1))
    assert_message(str(error.value), "SPPO_TIMEOUT", repr(value), "number of seconds", "correct it or unset it")


def test_a_lost_worker_of_another_kind_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """A crew may have workers elsewhere that come and go: the task of one that is lost is dealt again."""
    caplog.set_level(logging.WARNING)
    assert dict(workers.deal(Others(), ["a", "b", "c"], describe, None)) == {0: "A", 1: "B", 2: "C"}
    assert_message(caplog.messages[0], "task 2: the node is gone", "starting again")


class Other:
    since: float | None = None

    def __init__(self, present: bool = True) -> None:
        self.present = present
        self.task: Any = None

    def is_free(self) -> bool:
        return self.present and self.task is None

    def send(self, task: Any) -> None:
        self.task = task


class Others:
    """Two workers of which the second is lost with its first task, and another that joins after that."""

    def __init__(self) -> None:
        self.workers = [Other(), Other()]

    def wait(self, seconds: float | None) -> list[tuple[Other, str, Any]]:
        assert seconds is None
        if len(self.workers) == 2:
            self.workers[1].present = False
            self.workers.append(Other())
            return [(self.workers[1], "lost", "the node is gone"), (self.workers[2], "ready", None)]
        busy = [worker for worker in self.workers if worker.present and worker.task]
        reports = [(worker, "result", worker.task.upper()) for worker in busy]
        for worker in busy:
            worker.task = None
        return reports

    def replace(self, worker: workers.Worker) -> None:
        raise NotImplementedError

    def stop_hiring(self) -> None:
        raise NotImplementedError

    def end(self) -> None: ...

    def kill(self) -> None: ...

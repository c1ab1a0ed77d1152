"""Each evaluation gets its own answers, prepares itself while another one's are computed, and none is lost if one fails."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from stages.engines.overlap import evaluate_in_turn
from stages.runtime.errors import StageError
from stages.runtime.workers import Deal

NAMES = ["a", "b", "c", "d"]


def double(tasks: Sequence[int], describe: Callable[[int], str]) -> Iterator[tuple[int, int]]:
    """Deal tasks, the last one first."""
    assert describe(0) == "task 0"
    for index in reversed(range(len(tasks))):
        yield index, 2 * tasks[index]


def ask(deal: Deal, tasks: Sequence[int]) -> list[tuple[int, Any]]:
    return list(deal(tasks, lambda index: f"task {index}"))


@pytest.mark.parametrize("names", [[], NAMES[:1], NAMES])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_each_evaluation_gets_the_answers_to_its_own_questions(names: list[str], rounds: int) -> None:
    def evaluate(name: str, deal: Deal) -> Any:
        return [ask(deal, [ord(name) + turn, 5]) for turn in range(rounds)]

    expected = {name: [[(1, 10), (0, 2 * (ord(name) + turn))] for turn in range(rounds)] for name in names}
    outcomes = list(evaluate_in_turn(names, evaluate, double))
    assert len(outcomes) == len(names)
    assert dict(outcomes) == expected


def test_the_next_evaluation_prepares_itself_while_this_ones_tasks_are_computed() -> None:
    begun = {name: threading.Event() for name in NAMES}
    callers = []

    def deal(tasks: Sequence[int], describe: Callable[[int], str]) -> Iterator[tuple[int, int]]:
        callers.append(threading.get_ident())
        next_one, *later = [*NAMES[tasks[0] + 1 :], NAMES[-1]]
        assert begun[next_one].wait(60)
        assert not any(begun[name].is_set() for name in later if name != next_one), "no more than one"
        return double(tasks, describe)

    def evaluate(name: str, deal: Deal) -> list[tuple[int, Any]]:
        begun[name].set()
        return ask(deal, [NAMES.index(name)])

    assert sorted(name for name, _ in evaluate_in_turn(NAMES, evaluate, deal)) == NAMES
    assert set(callers) == {threading.get_ident()}


def test_what_is_finished_when_an_evaluation_fails_is_kept_and_no_other_is_started() -> None:
    started, failed, outcomes = list[str](), threading.Event(), list[tuple[str, Any]]()

    def evaluate(name: str, deal: Deal) -> str:
        started.append(name)
        if name == "b":
            failed.set()
            raise StageError("b: no")
        ask(deal, [1])
        assert failed.wait(60)
        return name

    with pytest.raises(StageError, match=r"^b: no$"):
        outcomes.extend(evaluate_in_turn(NAMES, evaluate, double))
    assert outcomes == [("a", "a")]
    assert started == ["a", "b"]


def test_after_a_failure_nothing_is_dealt() -> None:
    dealt, waits = list[int](), threading.Event()

    def deal(tasks: Sequence[int], describe: Callable[[int], str]) -> Iterator[tuple[int, int]]:
        dealt.append(tasks[0])
        return double(tasks, describe)

    def evaluate(name: str, deal: Deal) -> None:
        if name == "b":
            assert waits.wait(60)
        ask(deal, [ord(name)])
        if name == "a":
            threading.Timer(0.2, waits.set).start()  # this thread has ended by then
            raise KeyError(name)

    with pytest.raises(KeyError, match="a"):
        list(evaluate_in_turn(NAMES, evaluate, deal))
    assert dealt == [ord("a")]


def test_an_evaluation_gets_what_was_computed_before_a_worker_failed() -> None:
    got = list[tuple[int, int]]()

    def deal(tasks: Sequence[int], describe: Callable[[int], str]) -> Iterator[tuple[int, int]]:
        yield 0, 7
        raise StageError("out of memory")

    def evaluate(name: str, deal: Deal) -> None:
        for answer in deal([1, 2], str):
            got.append(answer)

    with pytest.raises(StageError, match=r"^out of memory$"):
        list(evaluate_in_turn(["a"], evaluate, deal))
    assert got == [(0, 7)]

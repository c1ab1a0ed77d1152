from functools import partial

from benchmarks import measure


def test_sides_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    seconds = measure.time_in_turn({name: partial(calls.append, name) for name in ("a", "b")}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    comparison = measure.compare_rates("x", "y", 12, [1.0, 2.0, 4.0], [3.0, 4.0, 20.0])
    assert (comparison.ratio, comparison.low, comparison.high) == (3.0, 2.0, 5.0)
    assert (comparison.ours, comparison.baseline) == (12 / 2, 12 / 4)


def test_fewer_seconds_are_better() -> None:
    comparison = measure.compare_times("x", "y", [1.0, 2.0, 4.0], [3.0, 4.0, 20.0], ">= 2")
    assert (comparison.ours, comparison.baseline, comparison.ratio) == (2.0, 4.0, 3.0)
    assert (comparison.low, comparison.high, comparison.target) == (2.0, 5.0, ">= 2")

import math

import pytest

from gpu_check import rows


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.5, "pass"), (1.0, "pass"), (1.01, "fail"), (math.nan, "fail"), (math.inf, "fail")]
)
def test_a_value_passes_up_to_its_limit(value: float, verdict: str) -> None:
    assert rows.at_most("x", value, 1.0).verdict == verdict


@pytest.mark.parametrize(("digests", "verdict"), [(["a", "a"], "pass"), (["a", "b"], "fail"), (["a", "a", "b"], "fail")])
def test_all_digests_must_be_the_same(digests: list[str], verdict: str) -> None:
    assert rows.same_bytes("x", digests).verdict == verdict


def test_a_row_survives_its_way_between_processes(capsys: pytest.CaptureFixture[str]) -> None:
    row = rows.skip("x | y", "no reason")
    rows.report(row)
    assert rows.parse(capsys.readouterr().out) == row
    assert rows.parse("something else\n") is None


def test_a_rehearsal_shows_speed_but_does_not_judge_it() -> None:
    slow = rows.judge("speed", "1 token/s", ">= 2", False)
    assert rows.judge_on_gpu(slow, rehearsal=False) is slow
    shown = rows.judge_on_gpu(slow, rehearsal=True)
    assert (shown.verdict, shown.value, shown.expected) == ("skipped", "1 token/s", ">= 2")
    assert "rehearsal" in shown.reason


def test_what_is_only_measured_is_no_pass() -> None:
    row = rows.measure("seconds", "12")
    assert (row.verdict, row.expected) == ("measured", "")
    assert rows.format_line(row) == "measured  seconds: 12"
    assert rows.judge_on_gpu(row, rehearsal=True).verdict == "skipped"


def test_a_line_for_the_terminal_shows_what_was_expected_and_why_it_was_not_run() -> None:
    assert rows.format_line(rows.at_most("x", 2.0, 1.0)) == "fail      x: 2 (expected <= 1)"
    assert rows.format_line(rows.skip("x", "no reason")) == "skipped   x: no reason"


def test_the_table_has_a_line_per_row_and_four_cells_in_each() -> None:
    table = rows.format_table([rows.judge("a | b", "1", "<= 2", True), rows.skip("c", "not installed")])
    assert table.splitlines()[2:] == ["| a \\| b | 1 | <= 2 | pass |", "| c |  |  | skipped: not installed |"]

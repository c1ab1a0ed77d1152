import math

import pytest

from stages.method import parity


@pytest.mark.parametrize(
    ("error", "usual", "expected"),
    [(0, 0, True), (0.001, 0, True), (0.0011, 0, False), (0.04, 0.01, True), (0.042, 0.01, False), (math.nan, 1, False)],
)
def test_an_error_is_rounding_up_to_four_times_the_usual_one(error: float, usual: float, expected: bool) -> None:
    assert parity.is_rounding(error, usual) is expected

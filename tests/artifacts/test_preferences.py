import math

import pytest

from stages.artifacts.preferences import is_preference


@pytest.mark.parametrize("value", [None, 0, 0.0, 1, 1.0, 1.5, 1.999, 2, 2.0])
def test_preferences_are_accepted(value: object) -> None:
    assert is_preference(value)


@pytest.mark.parametrize("value", [True, False, "1", "missing", -1, 0.5, 0.999, 2.001, 3, math.nan, math.inf, [1], {}])
def test_anything_else_is_not(value: object) -> None:
    assert not is_preference(value)

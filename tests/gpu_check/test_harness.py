import pytest

from gpu_check import harness

EXPECTED = {"a": [1.0, 0.0], "b": [0.25, 0.5]}


@pytest.mark.parametrize(
    ("ours", "share"),
    [
        (EXPECTED, 1.0),
        ({"a": [1.0, 1.0], "b": [0.25, 0.5]}, 0.75),
        ({"a": [1.0, 0.0], "b": [0.25 + 1e-6, 0.5]}, 1.0),
        ({"a": [1.0, 0.0], "b": [0.2, 0.6]}, 0.5),
        ({"a": [1.0, 0.0]}, 0.0),
        ({"a": [1.0], "b": [0.25, 0.5]}, 0.0),
    ],
)
def test_equal_scores_are_counted_and_missing_ones_are_none(ours: dict[str, list[float]], share: float) -> None:
    assert harness.share_alike(ours, EXPECTED) == share

"""The values of `preference` in annotations.json, which alpaca-eval writes and report reads."""


def is_preference(value: object) -> bool:
    """Return whether a value is a preference.

    It is a number from 1 (the baseline wins) to 2 (the model wins), 0 (a tie on the scale of older annotations, which
    alpaca-eval reads as 1.5: metrics/helpers.py) or None (the judge gave no usable answer).
    """
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and (value == 0 or 1 <= value <= 2)

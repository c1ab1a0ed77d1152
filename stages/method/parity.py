"""When a fused kernel's numbers are taken for those of the usual computation."""

PARITY, ROUNDING = 4, 1e-3
"""How many times the error of the usual computation in the same precision the kernel's may be, and what may be added."""


def is_rounding(error: float, usual: float) -> bool:
    """Return whether a kernel's error may be rounding; NaN may not. error, usual: of the kernel and of the usual computation
    in the same precision, the root mean square of the difference from float32."""
    return error <= PARITY * usual + ROUNDING

"""Random seeds and deterministic operations."""

import os


def make_deterministic(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, and make torch use operations that do not vary between runs.

    torch then raises RuntimeError for an operation that varies. A warning would not do: with `warn_only`, the backward pass of
    attention on a GPU varies.
    """
    import torch
    from transformers import set_seed

    set_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at its first use; deterministic with streams
    torch.use_deterministic_algorithms(True)
    # A debugging aid that torch switches on together with deterministic algorithms; it is slow.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

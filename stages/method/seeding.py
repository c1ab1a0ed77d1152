"""Random seeds and deterministic operations."""

import os


def make_deterministic(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, and make torch use deterministic operations only.

    torch then raises RuntimeError for an operation that has no deterministic implementation. A warning is not enough: with
    `warn_only`, the backward pass of attention on a GPU varies from run to run.
    """
    import torch
    from transformers import set_seed

    set_seed(seed)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read at its first use; deterministic with streams
    torch.use_deterministic_algorithms(True)
    # A debugging aid that torch switches on together with deterministic algorithms; it is slow.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

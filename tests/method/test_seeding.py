import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from stages.method import seeding


@pytest.fixture(autouse=True)
def default_algorithms() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def draw_numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(()).item()


def test_a_seed_determines_the_numbers_of_every_generator() -> None:
    draws = []
    for seed in (1, 1, 2):
        seeding.make_deterministic(seed)
        draws.append(draw_numbers())
    assert draws[0] == draws[1]
    assert all(first != third for first, third in zip(draws[0], draws[2], strict=True))


def test_torch_refuses_operations_that_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning would leave the backward pass of a GPU's attention varying."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seeding.make_deterministic(0)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

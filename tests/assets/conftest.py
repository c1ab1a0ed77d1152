"""A Hub on this machine, and Python processes that use it."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub import FakeHub, Run, run_python, serve


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    """An empty Hub."""
    with serve() as hub:
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run Python in tmp_path with an empty Hub cache there. Pass `endpoint=fake_hub.endpoint` to let it reach the Hub."""
    return functools.partial(run_python, tmp_path)

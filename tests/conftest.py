"""A tiny base policy, its responses and its pairs, and a small ranker, made once per session; a Hub for each test."""

import contextlib
import functools
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from support import stage_server
from support.hub import FakeHub, Run, run_python, serve
from support.ranker import make_ranker
from support.running import TINY, run_stage, set_params

# Before a test imports torch, and for the programs that tests start: their tensors are so small that a second thread mostly
# waits, which costs more than the work itself. Stages set the number themselves.
os.environ["OMP_NUM_THREADS"] = "1"

# No deadline: a busy machine takes any time for the first example.
settings.register_profile("quick", deadline=None, max_examples=25)  # the default, see pyproject.toml
settings.register_profile("full", deadline=None)


SLOW_FILES = [
    "test_figures.py",  # runs the fixture `smallest`, for which test_miniature.py would wait
    "test_train.py",
    "test_evaluate_alpaca.py",
    "test_miniature.py",
    "test_resume.py",
    "test_rank.py",
    "test_run.py",
    "test_evaluate_lm.py",
]
"""Files that take minutes: they start first, so that all of pytest-xdist's workers end at about the same time."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with restored_environment():
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    stage_server.is_fast = not {"slow", "slowest"} & {mark.name for mark in item.iter_markers()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    with restored_environment():
        return (yield)


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """Undo all changes of the environment: libraries set variables when they are imported, which the stages that later tests
    start would inherit, and with which support.stage_server runs no stage."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before:
            del os.environ[name]
        os.environ.update(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml, a tiny base policy, 20 prompts and responses to them."""
    import pyarrow as pa

    from stages.artifacts import schemas, tables
    from stages.miniature import domain

    folder = tmp_path_factory.mktemp("tiny")
    set_params(folder, TINY)
    done = run_stage(folder, "assets-policy", "--out", "base")
    assert done.returncode == 0, done.stderr
    prompts = domain.distinct_prompts("tests", "training", 20)
    ids = [schemas.prompt_id(prompt) for prompt in prompts]
    tables.write(
        pa.table({"prompt_id": ids, "prompt": prompts}, schema=schemas.SPLIT), schemas.SPLIT, folder / "prompts.parquet"
    )
    options = ("--iteration", "iter1", "--model", "base", "--prompts", "prompts.parquet", "--out", "responses.parquet")
    done = run_stage(folder, "generate", *options)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def pairs(tiny: Path) -> Path:
    """`tiny` with random rankings of the responses, and the pairs with their reference log-probabilities."""
    import torch

    from stages.artifacts import schemas, tables
    from stages.engines import ranking

    torch.manual_seed(0)
    rows = [
        ranking.rank_row(row["prompt_id"], torch.randn(3, 3).fill_diagonal_(0), row["responses"], "pairwise", 0.5)
        | {"prompt_truncated": False, "responses_truncated": 0}
        for row in tables.read(tiny / "responses.parquet", schemas.RESPONSES).to_pylist()
    ]
    tables.write(rows, schemas.RANKINGS, tiny / "rankings.parquet")
    options = (
        "--model",
        "base",
        "--responses",
        "responses.parquet",
        "--rankings",
        "rankings.parquet",
        "--out",
        "pairs.parquet",
    )
    done = run_stage(tiny, "reference", *options)
    assert done.returncode == 0, done.stderr
    return tiny


@pytest.fixture(scope="session")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small ranker, which tests must not change."""
    return make_ranker(tmp_path_factory.mktemp("ranker"))


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    """An empty Hub on this machine."""
    with serve() as hub:
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run Python in tmp_path with an empty Hub cache there. Pass `endpoint=fake_hub.endpoint` to let it reach the Hub."""
    return functools.partial(run_python, tmp_path)

"""Nothing in stages/runtime can change a number: what stages import from it is listed here, and altering it changes no output.

Parameters are the exception by nature; tests/runtime/test_params.py shows that each of their values is the file's.
"""

import argparse
import ast
import contextlib
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from stages import evaluate_alpaca, split
from stages.artifacts import schemas, shards, tables
from stages.assets import alpaca_eval, harness, prompts
from stages.runtime import (
    actors,
    catalog,
    cluster,
    devices,
    durable,
    errors,
    fingerprint,
    hashes,
    logs,
    params,
    paths,
    processes,
    run,
    scratch,
    versions,
    workers,
)
from stages.runtime.paths import ROOT
from support import tables as examples
from support.running import SMALLEST, set_params
from support.workers import load_echo

RUNTIME = [
    actors,
    catalog,
    cluster,
    devices,
    durable,
    errors,
    fingerprint,
    hashes,
    logs,
    params,
    paths,
    processes,
    run,
    scratch,
    versions,
    workers,
]
VALUES = {
    "params.load",
    "params.read",
    "params.find_named",
    "params.validate_model",
    "durable.read_json",
    "documents.load_mapping",
}
"""Functions whose values enter results: the tests of their modules in tests/runtime show that they are the file's."""
DECLARATIONS = {
    *(f"params.{name}" for name, value in vars(params).items() if isinstance(value, type)),
    "params.BASE",  # a name, that of data/models/base
    "params.MODEL_NAME",  # the form of such names
    *(f"params.{name}" for name in ("Precision", "Text", "Positive", "PositiveFloat")),  # types
    "paths.ROOT",
    "cluster.ADDRESS",  # the name of an environment variable
    "cluster.Place",
    "cluster.WORKER_FAILED",
    "workers.Deal",
    "scratch.FOLDER",
    "scratch.NUMERICS",  # the name of an environment variable
    "logs.log",
    "devices.LAUNCH_FOLDER",  # the name of an environment variable
    "devices.REMOTE",  # what a record says of a cluster's GPUs
    "errors.StageError",
    "errors.DISK_FULL",
    "errors.FREE_SPACE",
}
"""Types, names, paths and texts of messages."""


@contextlib.contextmanager
def do_nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def ignore(*_: Any, **__: Any) -> None:
    return None


@contextlib.contextmanager
def compute_backwards(load: Any, arguments: Any, devices: list[str], **_: Any) -> Iterator[Any]:
    """In place of `workers.start`: compute the tasks in this process, the last one first."""
    compute = load(*arguments)
    yield lambda tasks, _: [(index, compute(tasks[index])) for index in reversed(range(len(tasks)))]


MUTANTS: dict[str, Callable[..., Any]] = {
    "errors.quote": lambda value: "mutant",
    "errors.one_line": lambda text: "mutant",
    "errors.describe": lambda error: "mutant",
    "errors.user_message": lambda error: "mutant",
    "errors.message_or_raise": lambda error: "mutant",
    "errors.is_disk_full": lambda error: True,
    "errors.exit_with": lambda error, prefix="": sys.exit(3),
    "logs.setup_logging": ignore,
    "devices.list_devices": lambda cores=False, gpus=1: ["", "", ""],
    "devices.has_gpus": lambda: False,  # True means that torch itself sees some
    "devices.find_driver": lambda: "",
    "devices.query_gpus": lambda field: ["mutant"],
    "devices.describe_gpu": lambda index=0: "mutant",
    "devices.check_granted": lambda count: "",
    "devices.note_remote": ignore,
    "devices.explain_out_of_memory": do_nothing,
    "devices.is_launched": lambda: False,
    "devices.forget_launchers": ignore,
    "devices.forget_overrides": ignore,
    "cluster.is_asked_for": lambda: False,
    "cluster.hide_ray": ignore,
    "cluster.connect": ignore,
    "cluster.list_nodes": lambda ray: [],
    "cluster.has_gpus": lambda nodes: False,
    "cluster.run_on_nodes": ignore,
    "durable.append_line": ignore,
    "durable.flush": ignore,
    "durable.replace": lambda new, path: new.replace(path),
    "durable.set_aside": lambda path, reason: path.rename(path.with_name("aside")),
    "durable.set_aside_unless_file": ignore,
    "durable.write": lambda path, text: path.write_text(text, encoding="utf-8"),
    "errors.escape_controls": lambda text: "mutant",
    "devices.is_main_process": lambda: True,  # False means that another process writes the outputs
    "processes.redirect_output": ignore,
    "processes.restore_output": do_nothing,
    "processes.block_sigint": do_nothing,
    "processes.exit_worker": ignore,
    "processes.setup_worker": ignore,
    "processes.die_with_parent": ignore,
    "processes.die_with_launcher": ignore,
    "processes.handle_stop_signals": ignore,
    "workers.start": compute_backwards,
    "workers.deal": lambda crew, tasks, describe, timeout: reversed(list(DEAL(crew, tasks, describe, timeout))),
    "workers.read_timeout": lambda: None,
    "versions.tool_versions": lambda: {"torch": "mutant"},
    "fingerprint.fingerprint": lambda stage: {"mutant": "0"},
    "fingerprint.hash_code": lambda source: "0",
    "fingerprint.hash_requirements": lambda text: "0",
    "hashes.digest_file": lambda path: b"0",
    "hashes.hash_content": lambda file: b"0",
    "catalog.stage_modules": dict,
    "catalog.environment_of": lambda stage: "mutant",
    "catalog.may_go_online": lambda stage: True,
    "catalog.has_numerics": lambda stage: True,
    "catalog.summary": lambda path: "mutant",
    "scratch.folder": lambda stage, key: Path("elsewhere") / hashlib.sha256(json.dumps(key).encode()).hexdigest(),
    "scratch.claim": ignore,
    "scratch.finish": ignore,
    "scratch.sweep": ignore,
    "run.prepare_process": ignore,
    "run.enter_environment": ignore,
    "run.log_timing": ignore,
    "run.output_paths": lambda args: [],
}
"""A function of stages/runtime -> what takes its place."""
DEAL = workers.deal


def imported_names() -> set[str]:
    """Return what modules outside runtime/ and tools/ use from stages.runtime, as `module.name`."""
    used = set()
    for path in (ROOT / "stages").rglob("*.py"):
        if (
            path.is_relative_to(ROOT / "stages/runtime")
            or path.is_relative_to(ROOT / "stages/tools")
            or path.stem == "__main__"
        ):
            continue
        tree = ast.parse(path.read_text())
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "stages.runtime":
                modules |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages.runtime."):
                used |= {f"{(node.module or '').rpartition('.')[2]}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                used.add(f"{modules[node.value.id]}.{node.attr}")
    return used


def public_functions() -> set[str]:
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in RUNTIME
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or hasattr(value, "cache_info"))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }


def test_stages_use_nothing_from_runtime_that_is_not_listed_here() -> None:
    assert imported_names() <= VALUES | DECLARATIONS | MUTANTS.keys()


def test_every_function_of_runtime_is_listed_here() -> None:
    other = {  # of no stage's computation
        "params.validate",
        "params.validate_unpinned",
        "params.validate_evaluation",
        "params.is_evaluation",
        "params.unchecked_asset",
        "actors.start",
        "run.build_parser",
        "run.run_stage",
        *(
            f"cluster.{name}"
            for name in (
                "check_kinds",
                "refuse_kinds",
                "hand_over",
                "take_over",
                "worker_environment",
                "shared_paths",
                "find_missing",
                "refuse_missing",
                "on_node",
            )
        ),
        *(
            f"run.{name}"
            for name in (
                "printing",
                "log_progress",
                "read_plan",
                "read_rows",
                "read_timings",
                "describe_progress",
                "format_duration",
            )
        ),
    }
    assert public_functions() <= VALUES | other | MUTANTS.keys()


def compute(folder: Path) -> dict[str, bytes]:
    """Run the stages that need no model, and a map over shards; return their outputs."""

    def call(stage: ModuleType, **options: Path) -> None:
        stage.main(argparse.Namespace(**options))

    call(prompts, out=folder / "prompts.parquet")
    call(alpaca_eval, out=folder / "set")
    call(harness, out=folder / "harness")
    call(split, prompts=folder / "prompts.parquet", instructions=folder / "set/instructions.json", out=folder / "split")
    rows = json.loads((folder / "set/instructions.json").read_text())
    for name in ("answers", "references"):
        answers = [row | {"output": f"Sure! {name} {len(row['instruction'])}.", "generator": name} for row in rows]
        (folder / f"{name}.json").write_text(json.dumps(answers))
    call(
        evaluate_alpaca,
        answers=folder / "answers.json",
        reference_outputs=folder / "references.json",
        alpaca_eval_set=folder / "set",
        out=folder / "evaluation",
    )
    table = pa.Table.from_pylist(examples.split(), schema=schemas.SPLIT)
    echoes = shards.map_shards("generate", table, 1, load_echo, (2,), schemas.RESPONSES, {})
    tables.write(echoes, schemas.RESPONSES, folder / "responses.parquet")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    set_params(folder, SMALLEST)
    with contextlib.chdir(folder):
        outputs = compute(folder / "out")
        scratch.finish()
    assert len(outputs) > 60
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_altering_it_changes_no_output(
    name: str, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_name, _, attribute = name.partition(".")
    (module,) = [module for module in RUNTIME if module.__name__ == f"stages.runtime.{module_name}"]
    original = getattr(module, attribute)
    for loaded in list(sys.modules.values()):  # every module that has imported it by name, too
        if getattr(loaded, "__name__", "").startswith("stages.") and getattr(loaded, attribute, None) is original:
            monkeypatch.setattr(loaded, attribute, MUTANTS[name])
    assert getattr(module, attribute) is not original
    set_params(tmp_path, SMALLEST)
    monkeypatch.chdir(tmp_path)
    outputs = compute(tmp_path / "out")
    monkeypatch.undo()
    with contextlib.chdir(tmp_path):
        scratch.finish()
    assert outputs == expected

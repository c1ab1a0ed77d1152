"""Randomly corrupted input is either still valid or rejected in one line.

`make torture` tries it for half an hour with fresh seeds, and counts what is neither (tests/support/fuzz.py).
"""

import contextlib
import copy
import functools
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages import reference
from stages.artifacts import files, machine, models, pointers, schemas, shards, tables
from stages.engines import checkpoints, harness
from stages.judges import endpoint
from stages.method import chat
from stages.reporting import inputs, published, reproductions
from stages.reporting.published import TASKS
from stages.runtime import durable, params, run, scratch
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import attest, diff, drift, gate, locks, recipe, revisions, timings, verify
from support import fuzz
from support import tables as examples
from support.messages import assert_message
from support.models import make_model
from support.revisions import LOCK, commit, git, make_metrics
from support.running import dvc, run_stage, set_params

pytestmark = pytest.mark.slow

QUICK = settings(
    deadline=None,
    max_examples=int(os.environ.get("SPPO_FUZZ", 50)),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""SPPO_FUZZ=10000 for a long search."""


TRIED: Counter[str] = Counter()
"""How many inputs were `read`, and how many of them `rejected`."""


@pytest.fixture(scope="session", autouse=True)
def _report_counts() -> Iterator[None]:
    """Report to the run that asked for it, in another process, how many inputs this one has tried."""
    yield
    if path := os.environ.get(fuzz.COUNTS):
        durable.append_line(Path(path), json.dumps(TRIED))


def read_or_reject(read: Callable[[], Any]) -> Any:
    """Return the result of `read`, or None if it raises StageError, whose message must be one line that can be printed."""
    TRIED["read"] += 1
    try:
        return read()
    except StageError as error:
        TRIED["rejected"] += 1
        message = str(error)
        assert len(message.splitlines()) == 1
        assert len(message) < 20_000
        message.encode(errors="backslashreplace")
        return None


TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(["a\nb", "\x00", "\u2028", "\x85", "é" * 300, "${x}", "../x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
FRAGMENTS = st.sampled_from(
    "&a [*a]|&a {x: *a}|*a|2001-99-99|2001-01-01T99:99:99|!!bool maybe|!!int x|!!float x|!!binary z|!!set {a}|!!omap [a: 1]"
    "|!!timestamp x|!!python/object:os.system x|? [a]|{[1]: 2}|{{a: 1}: 2}|{1.5: 1}|{~: 1}|<<: [1]|0b|0x_|1_|.inf|-.nan|1e999"
    f'|{"9" * 5000}|{"[" * 500}|"\\ud800"|"\\x00"|"a\\nb"|%YAML 9.9|---|...|[|{{|"|!x y|>9'.encode().split(b"|")
)


def list_places(node: Any) -> list[tuple[Any, Any]]:
    """List every (container, key) of a document."""
    entries = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else [])
    return [(node, key) for key, _ in entries] + [pair for _, value in entries for pair in list_places(value)]


PARAMETERS = [ROOT / "params.yaml", *sorted(ROOT.glob("recipes/*/p*.yaml")), *sorted(ROOT.glob("recipes/variants/*.yaml"))]
LOADED = {path: YAML(typ="safe").load(path) for path in PARAMETERS}
READERS: list[Callable[[Path], Any]] = [
    params.validate,
    published.read_published,
    recipe.read_variant,
    lambda path: params.validate_unpinned(params.read(path), path),
    lambda path: params.validate_evaluation(params.read(path), path),
    lambda path: params.load("seed", "iterations", "assets.prompts", "train", path=path),
]


@QUICK
@given(data=st.data())
def test_parameters_with_random_values_keys_and_types(data: st.DataObject, tmp_path: Path) -> None:
    document = copy.deepcopy(LOADED[data.draw(st.sampled_from(PARAMETERS))])
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(list_places(document)))
        if data.draw(st.booleans()):
            container[key] = data.draw(VALUES)
        elif isinstance(container, dict):
            container[data.draw(TEXTS)] = container.pop(key)
    (tmp_path / "params.yaml").write_text(json.dumps(document))  # JSON is YAML, and json writes values that YAML() refuses to
    read_or_reject(lambda: data.draw(st.sampled_from(READERS))(tmp_path / "params.yaml"))


@QUICK
@given(data=st.data())
def test_parameters_that_are_barely_yaml(data: st.DataObject, tmp_path: Path) -> None:
    lines = data.draw(st.sampled_from(PARAMETERS)).read_bytes().split(b"\n")
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(lines) - 1))
        key = lines[index].partition(b":")[0] + b": "
        lines[index] = data.draw(st.binary(max_size=9) | FRAGMENTS.map(key.__add__) | FRAGMENTS)
    (tmp_path / "params.yaml").write_bytes(b"\n".join(lines))
    read_or_reject(lambda: data.draw(st.sampled_from(READERS))(tmp_path / "params.yaml"))


OTHER_TYPES = [pa.string(), pa.int64(), pa.float64(), pa.binary(), pa.list_(pa.string()), pa.large_string(), pa.null()]


def change_cell(value: Any, data: st.DataObject) -> Any:
    """Replace a cell, or a value within it, by another value, a longer or shorter list, or None."""
    if isinstance(value, list) and value and data.draw(st.booleans()):
        index = data.draw(st.integers(0, len(value) - 1))
        return [*value[:index], change_cell(value[index], data), *value[index + 1 :]]
    if isinstance(value, list):
        return data.draw(st.sampled_from([[], value[1:], [*value, *value[:1]], None]))
    kinds = {bool: st.booleans(), int: st.integers(-(2**31), 2**31 - 1), float: st.floats(), str: st.text()}
    return data.draw(st.none() | kinds.get(type(value), st.none()))


@QUICK
@given(data=st.data())
def test_tables_with_random_columns_rows_and_values(data: st.DataObject, tmp_path: Path) -> None:
    schema, rows = examples.VALID[data.draw(st.sampled_from(sorted(examples.VALID)))]
    table = pa.Table.from_pylist(rows, schema=pa.schema([field.with_nullable(True) for field in schema]))
    column = data.draw(st.sampled_from(schema.names))
    where = schema.names.index(column)
    match data.draw(st.sampled_from(["drop", "rename", "type", "repeat", "none", "twice", "cell"])):
        case "drop":
            table = table.drop_columns([column])
        case "rename":
            table = table.rename_columns([data.draw(st.text(max_size=8)) if name == column else name for name in schema.names])
        case "type":
            kind = data.draw(st.sampled_from(OTHER_TYPES))
            table = table.set_column(where, column, pa.array([None] * table.num_rows, kind))
        case "repeat":
            table = table.take([0, 1, data.draw(st.integers(0, 1))])
        case "none":
            table = table.slice(0, 0)
        case "twice":
            table = table.append_column(column, table[column])
        case "cell":
            cells = table[column].to_pylist()
            row = data.draw(st.integers(0, 1))
            cells[row] = change_cell(cells[row], data)
            table = table.set_column(where, column, pa.array(cells, schema.field(column).type))
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    result = read_or_reject(lambda: tables.read(path, schema))
    if result is not None:
        tables.write(result, schema, path)


@QUICK
@given(data=st.data())
def test_parquet_files_truncated_or_with_flipped_bits(data: st.DataObject, tmp_path: Path) -> None:
    schema, rows = examples.VALID[data.draw(st.sampled_from(sorted(examples.VALID)))]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    del content[data.draw(st.just(len(content)) | st.integers(0, len(content))) :]
    (tmp_path / "x.parquet").write_bytes(content)
    result = read_or_reject(lambda: tables.read(tmp_path / "x.parquet", schema))
    if result is not None:
        assert result.to_pylist()


JSON_READERS: list[Callable[[Path], Any]] = [
    files.read_json,
    lambda path: files.read_records(path, ["instruction", "output"]),
    lambda path: inputs.read_alpaca(path.parent),
    lambda path: inputs.read_harness(path.parent, TASKS),
    lambda path: inputs.read_comparison(path, ["base", "iter1"]),
    lambda path: inputs.read_contamination("iter1", path),
]
DOCUMENTS: list[Any] = [
    [{"instruction": "Why?", "output": "So."}, {"instruction": "Who?", "output": ""}],
    {"win_rate": 50.5, "standard_error": 1.5, "avg_length": 52, "n_total": 805, "judge": "gold"},
    {task: {"value": 10.5, "standard_error": 1, "metric": "acc", "shots": 5} for task in published.TASKS},
    {"models": ["base", "iter1"], "win_rates": [[50, 40], [60, 50]], "standard_errors": [[0, 1.5], [1.5, 0]], "n": 9},
    {"contaminated": {"iter1": 3}, "dropped": 0, "instructions": 805},
]


@QUICK
@given(data=st.data())
def test_json_of_any_kind(data: st.DataObject, tmp_path: Path) -> None:
    document = copy.deepcopy(data.draw(st.sampled_from(DOCUMENTS)))
    for _ in range(data.draw(st.integers(0, 2))):
        places = list_places(document)
        if places:
            container, key = data.draw(st.sampled_from(places))
            container[key] = data.draw(VALUES)
    content = bytearray(json.dumps(document).encode())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(content)))
        content[place:place] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"[" * 10**5, b"9" * 5000, b'"\\ud800"', b"NaN", b"1e999", b"\xff"])
        )
    for name in ("metrics.json", "summary.json"):
        (tmp_path / name).write_bytes(content)
    result = read_or_reject(lambda: data.draw(st.sampled_from(JSON_READERS))(tmp_path / "metrics.json"))
    if result is not None:
        json.dumps(result, ensure_ascii=False).encode()


EXPERIMENT: dict[str, Any] = {
    "params.yaml": {"seed": 1, "eta": 10.0, "iterations": {"iter1": "base"}, "train": {"lora": {"rank": 0}}},
    "dvc.lock": {"schema": "2.0", "stages": LOCK | {"code": {"cmd": "x", "outs": [{"path": "data/code/x.json", "md5": "0"}]}}},
    "reports/metrics.json": make_metrics(0),
    "reports/seeds.json": {
        "seeds": [1, 2],
        "figures": {"alpaca_eval.iter1.win_rate": [50.0, 60.0], "training.iter1.kl": [0.0, 0.1]},
    },
    "published.yaml": {"published": {"alpaca_eval": {"models": {"iter1": {"win_rate": 50, "standard_error": 1.5}}}}},
    "record.json": {
        "tools": {"torch": "2.13.0"},
        "numerics": "portable",
        "processor": "x",
        "instruction_set": "AVX2",
        "gpus": [],
    },
}
"""What `drift`, `diff` and `attest` read."""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, revisions.Revision]:
    """A repository with EXPERIMENT in its only commit, and that revision."""
    folder = tmp_path_factory.mktemp("experiment")
    for name, document in EXPERIMENT.items():
        files.write_json(document, folder / name)
    git(folder, "init", "-q")
    commit(folder, "run")
    with contextlib.chdir(folder):
        return folder, revisions.read_revision("HEAD", Path())


def compare_all(committed: revisions.Revision) -> str:
    """Do what `drift`, `diff` and `attest` do with the workspace."""
    current = revisions.read_revision(revisions.WORKSPACE, Path())
    before, after = committed.stages or {}, current.stages or {}
    text = diff.compare(committed, current, Path()) + diff.compare(current, committed, Path())
    text += drift.format_drift(locks.compare(before, after), "0" * 40)
    text += drift.format_figures(committed.metrics or {}, current.metrics or {}, current.limits or {})
    attest.collect_figures(current.metrics or {}, Path("params.yaml"))
    records = [attest.read_record(Path("record.json"))]
    return f"{text}{attest.summarize_numerics(records)}{attest.collect_versions(records)}{attest.list_records(Path(), current)}"


@QUICK
@given(data=st.data())
def test_runs_of_any_kind_are_compared_or_rejected(data: st.DataObject, experiment: tuple[Path, revisions.Revision]) -> None:
    folder, committed = experiment
    name = data.draw(st.sampled_from(sorted(EXPERIMENT)))
    document = copy.deepcopy(EXPERIMENT[name])
    for _ in range(data.draw(st.integers(1, 2))):
        places = list_places(document)
        if places:
            container, key = data.draw(st.sampled_from(places))
            container[key] = data.draw(VALUES)
    (folder / name).write_text(json.dumps(document))
    try:
        with contextlib.chdir(folder):
            read_or_reject(lambda: compare_all(committed))
    finally:
        files.write_json(EXPERIMENT[name], folder / name)


def test_the_example_of_a_run_is_valid(experiment: tuple[Path, revisions.Revision]) -> None:
    folder, committed = experiment
    with contextlib.chdir(folder):
        assert "No changes in parameters, metrics, artifacts." in compare_all(committed)


PIPELINE = {
    "stages": {
        "assets-prompts": {"cmd": "cp -r mine data/prompts", "deps": ["data/local/prompts"], "outs": ["data/prompts"]},
        "split": {
            "cmd": "mkdir -p reports; cat data/prompts/* > reports/a.md",
            "deps": ["data/prompts/a.jsonl", "published.yaml"],
            "params": ["assets", "seed"],
            "outs": [{"reports/a.md": {"cache": False}}],
        },
        "answer": {"foreach": "${iterations}", "do": {"cmd": "echo > ${key}", "deps": ["reports/a.md"], "outs": ["${key}"]}},
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose PIPELINE has run, and whose files that `gate` and `verify` read are JSON, which is YAML."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {"seed": 1, "iterations": {"iter1": "base"}, "assets": {"prompts": {"repo": "./mine"}}}
    for name, document in (("dvc.yaml", PIPELINE), ("params.yaml", settings), ("published.yaml", {}), ("mine/a.jsonl", {})):
        files.write_json(document, folder / name)
    (folder / "data/local").mkdir(parents=True)
    (folder / "data/local/prompts").symlink_to("../../mine")
    (folder / ".gitignore").write_text("/data/*\n/iter1\n")
    git(folder, "init", "-q")
    for command in ("init", "repro"):
        dvc(folder, command, "-q")
    files.write_json(YAML(typ="safe").load(folder / "dvc.lock"), folder / "dvc.lock")
    commit(folder, "run")
    with contextlib.chdir(folder):
        assert gate.check_pipeline(Path()) == []
        assert verify.verify(Path())[0] == []
    return folder


@settings(QUICK, max_examples=max(20, QUICK.max_examples // 3))
@given(data=st.data())
def test_locks_and_pipelines_of_any_kind_are_checked_or_rejected(data: st.DataObject, finished: Path) -> None:
    (listing,) = finished.glob(".dvc/cache/files/md5/*/*.dir")
    path = data.draw(st.sampled_from([*(finished / name for name in ("dvc.lock", "dvc.yaml", "params.yaml")), listing]))
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(corrupt(whole, data))
    try:
        with contextlib.chdir(finished):
            read_or_reject(lambda: gate.check_pipeline(Path()))
            read_or_reject(lambda: verify.verify(Path()))
    finally:
        path.write_bytes(whole)


RUNS = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("reproductions/*.json"))]


@QUICK
@given(data=st.data())
def test_runs_on_other_machines_of_any_kind(data: st.DataObject, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(corrupt(json.dumps(data.draw(st.sampled_from(RUNS))).encode(), data))
    table = read_or_reject(lambda: reproductions.format_reproductions(tmp_path))
    assert table is None or len(table.encode().splitlines()) == 3


@QUICK
@given(
    content=st.lists(st.sampled_from([b"model name", b"flags", b"\t: ", b"avx2 fma", b"\n\n"]) | st.binary(max_size=3)).map(
        b"".join
    )
)
def test_descriptions_of_processors_of_any_kind(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
        processor, _ = read_or_reject(machine.describe_processor)
    assert processor
    assert len(processor.splitlines()) == 1


def make_task_results(name: str) -> dict[str, Any]:
    """Return the results of `evaluate_task` for a task of two subtasks."""
    task = harness.TASKS[name]
    scores = {f"{task.metric},{task.filter}": 0.5, f"{task.metric}_stderr,{task.filter}": 0.25}
    items = {name: [0.0, 1.0] for name in ("a", "b")}
    return {"results": dict.fromkeys([name, *items], scores), "items": items, "n": dict.fromkeys(items, 2), "cut": {"a": 1}}


@QUICK
@given(data=st.data())
def test_kept_results_of_tasks_of_any_kind(data: st.DataObject, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(sorted(harness.TASKS)))
    results = make_task_results(name)
    path = tmp_path / "task.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    assert durable.read_json(path, functools.partial(harness.check_kept, name)) == results
    path.write_bytes(change_document(corrupt(path.read_bytes(), data), data))
    kept = read_or_reject(lambda: durable.read_json(path, functools.partial(harness.check_kept, name)))
    assert path.exists() == (kept is not None)
    if kept is not None:
        json.dumps(kept, allow_nan=False, ensure_ascii=False).encode()


UNSCORED = [{name: row[name] for name in schemas.UNSCORED_PAIRS.names} for row in examples.pairs()]


@QUICK
@given(data=st.data())
def test_kept_pairs_of_any_kind(data: st.DataObject, tmp_path: Path) -> None:
    rows = copy.deepcopy(UNSCORED)
    for _ in range(data.draw(st.integers(0, 2))):
        row = data.draw(st.sampled_from(rows))
        column = data.draw(st.sampled_from(schemas.UNSCORED_PAIRS.names))
        row[column] = change_cell(row[column], data)
    nullable = pa.schema([field.with_nullable(True) for field in schemas.UNSCORED_PAIRS])
    try:
        table = pa.Table.from_pylist(rows, schema=nullable)
    except (pa.ArrowException, UnicodeEncodeError):
        return
    path = tmp_path / "unscored.parquet"
    pq.write_table(table, path)
    path.write_bytes(data.draw(st.sampled_from([path.read_bytes(), corrupt(path.read_bytes(), data)])))
    pairs = read_or_reject(lambda: tables.read(path, schemas.UNSCORED_PAIRS))
    if pairs is not None:
        reference.longest_pair(pairs)


@QUICK
@given(data=st.data())
def test_training_logs_of_any_kind(data: st.DataObject, tmp_path: Path) -> None:
    row = [1, 5.6, 0, 40.9, 1, 0, -2.9e-07, 2.7e-13]
    cells = [list(schemas.LOG_COLUMNS), [str(cell) for cell in row], ["2", *[str(cell) for cell in row[1:]]]]
    for _ in range(data.draw(st.integers(0, 2))):
        line = data.draw(st.sampled_from(cells))
        line[data.draw(st.integers(0, 7))] = data.draw(TEXTS | st.sampled_from(["nan", "", "-inf", "1e999", "9" * 5000, "2"]))
    content = "\n".join(",".join(line) for line in cells).encode(errors="surrogatepass") + data.draw(
        st.binary(max_size=4) | st.just(b"\n")
    )
    (tmp_path / "iter1.csv").write_bytes(content)
    result = read_or_reject(lambda: inputs.read_training_log(tmp_path / "iter1.csv"))
    if result is not None:
        assert result.dtypes.map(lambda kind: kind.kind in "iuf").all()


def corrupt(content: bytes, data: st.DataObject) -> bytes:
    """Return what a power cut, another program or an editor may leave of a small file."""
    match data.draw(st.sampled_from(["cut", "emptied", "bits", "zeros", "inserted", "other", "value"])):
        case "cut":
            return content[: data.draw(st.integers(0, len(content)))]
        case "emptied":
            return b""
        case "bits" if content:
            place = data.draw(st.integers(0, len(content) - 1))
            return content[:place] + bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))]) + content[place + 1 :]
        case "zeros":
            return bytes(len(content))
        case "inserted":
            place = data.draw(st.integers(0, len(content)))
            return content[:place] + data.draw(st.binary(max_size=4) | FRAGMENTS) + content[place:]
        case "value":
            return change_document(content, data)
    return data.draw(st.binary(max_size=9) | st.sampled_from([b"[]", b"null", b"5", b"{}", b"[" * 10**5, b"9" * 5000]))


def change_document(content: bytes, data: st.DataObject) -> bytes:
    """Change one value of JSON; other content stays as it is."""
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(content)
        if places := list_places(document):
            container, key = data.draw(st.sampled_from(places))
            container[key] = data.draw(VALUES)
        return json.dumps(document).encode()
    return content


ROW = {"stage": "train@iter1", "seconds": 1.5, "peak_gb": 0.5}
BOOKS: dict[str, Any] = {
    "scratch/train/0123/finished": {"stage": "train@iter1", "outs": {"data/models/iter1": {"size": 5, "nfiles": 2}}},
    "scratch/plan.json": {"started": 1.5, "stages": {"split": 2.0, "report": None}, "seconds": {"split": 2.0}},
    "scratch/timings.jsonl": ROW,
    "scratch/train/0123/checkpoint-2/complete": "4 latest\n",
    "scratch/generate/0123/00000.parquet": "PAR1",
    "dvc.lock": {"schema": "2.0", "stages": LOCK},
}
"""Small files that a run keeps, as a killed run, a power cut or an editor may change them."""


@QUICK
@given(data=st.data())
def test_files_of_a_run_of_any_kind(data: st.DataObject, tmp_path: Path) -> None:
    """Nothing but a message: a stage goes on without what it cannot read."""
    shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
    for name, document in BOOKS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(document if isinstance(document, str) else json.dumps(document) + "\n", encoding="utf-8")
    name = data.draw(st.sampled_from(sorted(BOOKS)))
    (tmp_path / name).write_bytes(corrupt((tmp_path / name).read_bytes(), data))

    def start_a_stage() -> None:
        scratch.sweep()
        run.log_progress("split", "split")
        run.log_timing("split", 1.0)
        timings.format_timings(run.read_rows())
        checkpoints.newest_checkpoint(tmp_path / "scratch/train/0123")
        assert shards.list_shards(tmp_path / "scratch/generate/0123", 1)[1] == [0]

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(tmp_path):
        for variable, value in (("DVC_STAGE", "split"), (run.PROGRESS, "1")):
            patch.setenv(variable, value)
        read_or_reject(start_a_stage)
        read_or_reject(start_a_stage)  # whatever was set aside


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("model") / "model")
    files.write_json({"weight_map": {"lm_head.weight": pointers.WEIGHTS}, "metadata": {}}, folder / "index")
    (folder / "index").rename(folder / pointers.INDEX)
    return folder


POINTER = {"repo": "a/b", "revision": "0" * 40, "repo_type": "model", "files": {"config.json": {"size": 5, "sha256": "0" * 64}}}


@settings(QUICK, max_examples=max(20, QUICK.max_examples // 5))
@given(data=st.data())
def test_small_files_of_models_of_any_kind(data: st.DataObject, model: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    shutil.copytree(model, tmp_path / "model")
    if data.draw(st.booleans()):
        files.write_json(POINTER, tmp_path / "model" / pointers.NAME)
    small = sorted(path.name for path in (tmp_path / "model").iterdir() if path.suffix == ".json")
    path = tmp_path / "model" / data.draw(st.sampled_from(small))
    path.write_bytes(corrupt(path.read_bytes(), data))
    read_or_reject(lambda: pointers.check_model(tmp_path / "model"))


SAFETENSORS_HEADER = 8
"""Bytes before the header of a safetensors file: its length."""


def corrupt_header(content: bytes, data: st.DataObject) -> bytes:
    """Change the JSON at the start of a safetensors file, and often state its new length."""
    end = SAFETENSORS_HEADER + int.from_bytes(content[:SAFETENSORS_HEADER], "little")
    header = corrupt(content[SAFETENSORS_HEADER:end], data)
    length = len(header) if data.draw(st.booleans()) else data.draw(st.integers(0, 2**64 - 1))
    return length.to_bytes(SAFETENSORS_HEADER, "little") + header + content[end:]


@settings(QUICK, max_examples=max(20, QUICK.max_examples // 5))
@given(data=st.data())
def test_policies_of_any_kind(data: st.DataObject, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    if data.draw(st.booleans()):
        (folder / pointers.INDEX).unlink()  # with it, check_policy refuses a single file of weights
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    change = corrupt_header if path.suffix == ".safetensors" else corrupt
    path.write_bytes(change(path.read_bytes(), data))
    read_or_reject(lambda: models.check_policy(folder))


PIECES = [
    "{{ messages[0]['content'] }}",
    "{{ bos_token }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ messages[0]['content'][0]['text'] }}",
    "{{ 1 / 0 }}",
    "{{ none + 1 }}",
    "{{ 2 ** 9999 }}",
    "{{ messages[9] }}",
    "{{ raise_exception('no') }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ strftime_now('%Y') }}",
    "{{ ''.__class__ }}",
    "{{ messages | tojson }}",
    "{{ '\\ud800' }}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ undefined.x.y }}",
    "{% if add_generation_prompt %}A:{% endif %}",
    "{%",
]


@settings(QUICK, max_examples=max(20, QUICK.max_examples // 5))
@given(template=st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=4).map("".join), prompt=st.text(max_size=8))
def test_chat_templates_of_any_kind(template: str, prompt: str, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template
    text = read_or_reject(lambda: chat.prompt_text(tokenizer, prompt))
    assert text is None or isinstance(text, str)


@functools.cache
def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


ANSWER = {
    "message": {"content": "m", "role": "assistant"},
    "logprobs": {"content": [{"token": "m", "logprob": -0.1, "top_logprobs": [{"token": "m", "logprob": -0.1}]}]},
    "total_tokens": 500,
}


@QUICK
@given(data=st.data())
def test_kept_answers_of_judges_of_any_kind(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    path.write_bytes(corrupt(json.dumps(ANSWER).encode(), data))
    answer = read_or_reject(lambda: durable.read_json(path, endpoint.check_kept))
    assert path.exists() == (answer is not None)
    if answer is not None:
        (preference,) = endpoint.parse_choice(answer)
        assert 1 <= preference <= 2


@QUICK
@given(data=st.data())
def test_answers_of_endpoints_of_any_kind(data: st.DataObject) -> None:
    """Whatever a server replies is a preference or none: NaN."""
    text = change_document(change_document(json.dumps(ANSWER).encode(), data), data)
    (preference,) = read_or_reject(lambda: endpoint.parse_choice(json.loads(text)))
    assert preference != preference or 1 <= preference <= 2


def test_a_stage_prints_that_line_and_nothing_else(tmp_path: Path) -> None:
    set_params(tmp_path, {"iterations": {"iter1": "base"}, "split.prompts_per_iteration": 1, "split.hold_out": 2})
    texts = ["One?", "Two?", "Three?"]
    rows = [{"prompt_id": schemas.prompt_id(text), "prompt": text, "iteration": None} for text in texts]
    tables.write(rows, schemas.PROMPTS, tmp_path / "prompts.parquet")
    files.write_json([{"instruction": "Why?"}], tmp_path / "instructions.json")
    arguments = "split", "--prompts", "prompts.parquet", "--instructions", "instructions.json", "--out", "out"
    assert run_stage(tmp_path, *arguments).returncode == 0
    files.remove(tmp_path / "out")
    corrupted = {"instructions.json": b"[" * 10**5, "prompts.parquet": b"PAR1" * 9, "params.yaml": b"seed: 2001-99-99\n"}
    for name, content in corrupted.items():
        (tmp_path / name).write_bytes(content)
        done = run_stage(tmp_path, *arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert_message(done.stderr, "split: error: ", name)
        assert not (tmp_path / "out").exists()

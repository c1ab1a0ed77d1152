"""Files between the stages: Parquet with a written-down schema, JSON, and outputs that appear whole or not at all."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages import cli, scratch
from stages.cli import StageError

BATCH = 4096
"""Rows that are in work at a time, where a table is read or gone through."""

faults: dict[pa.Schema, Callable[[pa.Table], str | None]] = {}
"""Schema -> what is wrong with the values of such a table. stages/schemas.py fills it: not every stage depends on that."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to, moved to `path` when the block ends well and removed when it does not.

    What a killed process left there is removed first; DVC ignores it (.dvcignore). Raises StageError where the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        if path.is_dir() or partial.is_dir():
            remove(path)
        partial.replace(path)
        scratch.written.append(path)
    except Exception as error:
        if cli.no_space(error) and shutil.disk_usage(path.parent).free < 2**20:  # it may be another disk that is full
            raise StageError(f"{path}: {cli.NO_SPACE}: {cli.MORE_SPACE}") from error
        raise
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_table(rows: list[dict[str, Any]] | pa.Table, schema: pa.Schema, path: Path) -> None:
    """Write rows as Parquet, in the schema's columns and types. Raises StageError where they break the schema's rules."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
    if fault := faults[schema](table.select(schema.names)):
        raise StageError(f"{path}: not written: {fault}: check what the stage read (`make verify`), and run it again")
    with replacing(path) as partial:
        pq.write_table(table.cast(schema), partial, compression="zstd")


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read Parquet that must have the schema's columns, types and rules, and at least one row. Raises StageError."""
    present(path)
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # all at once it takes the table's memory twice
            table = pa.Table.from_batches(file.iter_batches(BATCH), file.schema_arrow)
        table.validate(full=True)  # Parquet's readers take any bytes for UTF-8
        names = table.column_names
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:  # the last of harmed sizes
        raise StageError(f"{path}: not a readable Parquet file ({error}): {_again(path)}") from error
    missing = [name for name in schema.names if name not in names]
    extra = [name for name in names if name not in schema.names]
    twice = [name for name in schema.names if names.count(name) > 1]
    if missing or extra or twice:
        problems = {"lacks": missing, "has unknown": extra, "has twice": twice}
        wrong = [f"{what} column {name!r}" for what, found in problems.items() for name in found]
        raise StageError(f"{path}: {', '.join(wrong)}: {_again(path)}")
    for field in schema:
        column = table.column(field.name)
        if column.type != field.type:
            raise StageError(f"{path}: column {field.name!r} is {column.type}, not {field.type}: {_again(path)}")
    table = table.select(schema.names)
    if fault := faults[schema](table):
        raise StageError(f"{path}: {fault}: {_again(path)}")
    return table


def write_json(value: Any, path: Path) -> None:
    """Write JSON with sorted keys, so that the same value gives the same bytes. NaN is refused."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises StageError where it is missing, not JSON, or holds half a surrogate pair, which is no text."""
    present(path)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, OSError, RecursionError) as error:
        raise StageError(f"{path}: not JSON ({error}): {_again(path)}") from error
    return value


def present(path: Path) -> Path:
    """`path`, which must exist. Raises StageError."""
    if not path.exists():
        raise StageError(f"{path} is missing: {_again(path)}")
    return path


def _again(path: Path) -> str:
    if path.is_relative_to(scratch.FOLDER):
        return "remove it, and run the stage again"
    return "make it with `dvc repro`" if path.parts[:1] == ("data",) else "check the path, or make the file again"


def digest(path: Path) -> str:
    """A hash of a file's bytes, or of the names and bytes of all files in a folder. Raises StageError where missing."""
    present(path)
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            total.update(str(file.relative_to(path)).encode() + b"\0")
            with file.open("rb") as handle:
                total.update(hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).digest())
    return total.hexdigest()


def read_records(path: Path, keys: list[str]) -> list[dict[str, Any]]:
    """Read a JSON list of objects that all have `keys`, strings each, and at least one of them. Raises StageError."""
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise StageError(f"{path}: a list of at least one object is wanted: {_again(path)}")
    for index, record in enumerate(records):
        for key in keys:
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise StageError(f"{path}: record {index}: {key!r} is missing or no string: {_again(path)}")
    return records

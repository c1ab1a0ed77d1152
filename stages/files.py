"""Files between the stages: Parquet with a written-down schema, JSON, and outputs that appear whole or not at all."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages import cli, scratch
from stages.cli import StageError


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
    """Write rows as Parquet, in the schema's columns and types."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
    with replacing(path) as partial:
        pq.write_table(table.cast(schema), partial, compression="zstd")


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read Parquet that must have the schema's columns and types and at least one row. Raises StageError."""
    present(path)
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise StageError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())}): {_again(path)}") from error
    missing = [name for name in schema.names if name not in table.column_names]
    extra = [name for name in table.column_names if name not in schema.names]
    if missing or extra:
        wrong = [*(f"lacks column {name!r}" for name in missing), *(f"has unknown column {name!r}" for name in extra)]
        raise StageError(f"{path}: {', '.join(wrong)}: {_again(path)}")
    for field in schema:
        column = table.column(field.name)
        if column.type != field.type:
            raise StageError(f"{path}: column {field.name!r} is {column.type}, not {field.type}: {_again(path)}")
        if column.null_count and not field.nullable:
            row = column.is_null().index(True).as_py()
            raise StageError(f"{path}: row {row}: {field.name!r} is empty: {_again(path)}")
    if not table.num_rows:
        raise StageError(f"{path}: no rows: {_again(path)}")
    return table.select(schema.names)


def write_json(value: Any, path: Path) -> None:
    """Write JSON with sorted keys, so that the same value gives the same bytes. NaN is refused."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises StageError where it is missing or not JSON."""
    present(path)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise StageError(f"{path}: not JSON ({error}): {_again(path)}") from error


def present(path: Path) -> Path:
    """`path`, which must exist. Raises StageError."""
    if not path.exists():
        raise StageError(f"{path} is missing: {_again(path)}")
    return path


def _again(path: Path) -> str:
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

"""Read and write Parquet tables with a declared schema."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.artifacts import files, rules
from stages.runtime.errors import StageError

BATCH = 4096
"""Rows to hold in memory at a time when a table is read or converted piece by piece."""


def write(rows: list[dict[str, Any]] | pa.Table, schema: pa.Schema, path: Path) -> None:
    """Write rows as Parquet with the schema's columns and types. Raises StageError if a value breaks the schema's rules."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
    if fault := rules.find_fault(table.select(schema.names), schema):
        raise StageError(f"{path}: not written: {fault}: check the stage's inputs with `make verify`, then re-run it")
    with files.replacing(path) as partial:
        pq.write_table(table.cast(schema), partial, compression="zstd")


def read(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file and select the schema's columns, in its order.

    Raises StageError if the file is missing or corrupted, if its columns or types differ from the schema's, if it has no rows,
    or if a value breaks the schema's rules.
    """
    table = _load(path)
    fault = _find_column_fault(table.schema, schema)
    if not fault:
        table = table.select(schema.names)
        fault = rules.find_fault(table, schema)
    if fault:
        raise StageError(f"{path}: {fault}: {files.suggest_remedy(path)}")
    return table


def is_readable(path: Path) -> bool:
    """Return whether there is a file that is Parquet and whole, whatever its columns."""
    try:
        _load(path)
    except StageError:
        return False
    return True


def _load(path: Path) -> pa.Table:
    if not files.require(path).is_file():  # a pipe may block its reader for ever
        raise StageError(f"{path}: not a regular file, which a Parquet file is: {files.suggest_remedy(path)}")
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # reading the whole file at once takes twice the table's memory
            table = pa.Table.from_batches(file.iter_batches(BATCH), file.schema_arrow)
        table.validate(full=True)  # Parquet readers do not check that strings are valid UTF-8
        _ = table.column_names  # raises for names that are not valid UTF-8
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:  # MemoryError: a corrupted size field
        raise StageError(f"{path}: not a readable Parquet file ({error}): {files.suggest_remedy(path)}") from error
    return table


def _find_column_fault(actual: pa.Schema, schema: pa.Schema) -> str | None:
    """Describe missing, unknown and duplicate columns or the first wrong type; return None if there are none."""
    names = actual.names
    columns = {
        "missing": [name for name in schema.names if name not in names],
        "unknown": [name for name in names if name not in schema.names],
        "duplicate": [name for name in schema.names if names.count(name) > 1],
    }
    if any(columns.values()):
        return ", ".join(f"{problem} column {name!r}" for problem, wrong in columns.items() for name in wrong)
    for field in schema:
        if actual.field(field.name).type != field.type:
            return f"column {field.name!r} is {actual.field(field.name).type}, expected {field.type}"
    return None

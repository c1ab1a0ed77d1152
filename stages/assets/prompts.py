"""Provide the prompts to train on: the miniature's, or a data set's.

A second data set may assign prompts to iterations, as the released code's does.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import hub, schemas, tables
from stages.miniature import domain
from stages.runtime import params
from stages.runtime.errors import StageError, quote
from stages.runtime.logs import log

MAX_UNKNOWN_SHARE = 0.1
"""If a larger share of the assigned prompts is missing from the data set, the assignment must be for another data set."""

REMEDY = "correct the row, or set column in params.yaml to another one"
OTHER_FORMAT = "store the data set as Parquet or JSON Lines"
CSV_REMEDY = f"put every text into double quotes and those inside it twice, or {OTHER_FORMAT}"
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!")
"""How files of gzip, bzip2, xz, zstd, lz4, zip, 7z and rar begin, which `datasets` reads like the text in them."""
Prompt = tuple[str, str | None]
"""A prompt and the iteration that it is assigned to, or None."""
Texts = Sequence[str | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="Parquet file to write: prompt_id, prompt, iteration")


def main(args: argparse.Namespace) -> None:
    settings = params.load("seed", "assets.prompts")
    asset: params.PromptsAsset = settings.prompts
    prompts = make_prompts(settings.seed, asset.count) if asset.count else read_prompts(asset)
    tables.write(make_table(prompts), schemas.PROMPTS, args.out)
    assigned = sum(iteration is not None for _, iteration in prompts)
    log.info("%s: %d prompts, %d assigned to an iteration", args.out, len(prompts), assigned)


def make_prompts(seed: int, count: int) -> list[Prompt]:
    """Make the miniature's prompts, assigned to no iteration. Raises StageError if the toy world has fewer."""
    try:
        return [(prompt, None) for prompt in domain.distinct_prompts(f"{seed}/prompts", "training", count)]
    except ValueError as error:
        raise StageError(f"params.yaml: assets.prompts.count: {error}: lower it") from error


def read_prompts(asset: params.PromptsAsset) -> list[Prompt]:
    """Read the assigned prompts, then the other prompts of the data set; count and drop empty and duplicate ones.

    Prompts that differ in white space only are duplicates; the first one is kept as it is. Raises StageError if there are no
    prompts, or if the assignment is for another data set.
    """
    assert asset.split
    assert asset.column
    all_texts = _read_column(asset, asset.split, asset.column)
    assigned: dict[str | None, Texts] = {}
    if assignment := asset.assignment:
        assigned |= {name: _read_column(assignment, split, assignment.column) for name, split in assignment.splits.items()}
        _check_assignment(asset, all_texts, [text for texts in assigned.values() for text in texts])
    prompts: dict[str, Prompt] = {}
    for iteration, texts in [*assigned.items(), (None, all_texts)]:
        kept = len(prompts)
        keys = [_normalize(text) for text in texts]
        for key, text in zip(keys, texts, strict=True):
            if key:
                prompts.setdefault(key, (str(text), iteration))
        empty, kept = keys.count(""), len(prompts) - kept
        duplicate = len(texts) - empty - kept
        log.info(
            "%s: %d prompts, %d empty, %d duplicate, %d kept", iteration or "unassigned", len(texts), empty, duplicate, kept
        )
    if not prompts:
        raise StageError(f"{asset.repo}, split {asset.split}: every prompt is empty: correct assets.prompts in params.yaml")
    return list(prompts.values())


def _check_assignment(asset: params.PromptsAsset, all_texts: Texts, assigned: Texts) -> None:
    assert asset.assignment
    known = {_normalize(text) for text in all_texts}
    distinct = {_normalize(text) for text in assigned} - {""}
    unknown = len(distinct - known)
    log.info("%d of %d distinct assigned prompts are not in %s", unknown, len(distinct), asset.repo)
    if unknown > MAX_UNKNOWN_SHARE * len(distinct):
        raise StageError(
            f"{unknown} of the {len(distinct)} prompts of {asset.assignment.repo} are not in {asset.repo}, split "
            f"{asset.split}, so it does not assign these prompts: correct assets.prompts.assignment (repo, column, splits) or "
            "assets.prompts in params.yaml"
        )


def _read_column(asset: params.Asset, split: str, column: str) -> Texts:
    """Read a column of texts, in which a missing one is None. Raises StageError for the first row that is not text.

    What reads a file may convert what it does not expect: `datasets` turns a whole column of JSON Lines into JSON texts if one
    value is not text, and pandas takes NA, null and None in a CSV file for missing values, and 007 for 7.
    """
    try:
        rows = hub.load_rows(asset, None, split)
    except StageError:
        _read_cells(asset, split, column)  # it can name the row
        raise
    place = f"{asset.repo}, split {split}"
    if column not in rows.column_names:
        known = ", ".join(map(quote, rows.column_names))
        raise StageError(f"{place}: there is no column {quote(column)}: set column in params.yaml to one of {known}")
    cells = _read_cells(asset, split, column)
    texts = _list_values(rows.with_format("arrow")[column][:])
    if type(rows.features[column]).__name__ == "Json":  # what datasets makes of a column with values of several types
        texts = [json.loads(text) if isinstance(text, str) else text for text in texts]
    for row, text in enumerate(texts):
        if text is None and rows.info.builder_name == "csv":
            raise StageError(
                f"{place}: row {row}: {quote(column)} is empty, or a word such as NA, null or None that stands for nothing in "
                f"CSV: remove the row, or {OTHER_FORMAT}"
            )
        if text is not None and not isinstance(text, str):
            raise StageError(f"{place}: {_describe_odd(row, column, text)}: {REMEDY}")
    if cells:
        _check_cells(cells, [text for text in texts if text and text.strip()], place, column)
    return texts


def _list_values(values: pa.ChunkedArray) -> list[Any]:
    """Convert an Arrow column to Python; a text that is not valid UTF-8 becomes bytes."""
    try:
        found: list[Any] = values.to_pylist()
    except UnicodeDecodeError:
        found = [_decode(value) for value in values.cast(pa.binary()).to_pylist()]
    return found


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return value


def _describe_odd(row: int, column: str, value: object) -> str:
    return f"row {row}: {quote(column)} is {quote(value)}, which is not text"


def _read_cells(asset: params.Asset, split: str, column: str) -> list[tuple[str, str]]:
    """Read a column from a split's files as they are stored: once `datasets` has read them, what is odd may look like text.

    Returns file and line, and content, of the cells of CSV files that are not blank; none for other formats. Raises StageError
    for a CSV or JSON file that is compressed or not UTF-8, for the first value in a JSON file that is not text, and for a row
    of a CSV file that has not as many cells as the header: one of them may be a part of another's text.
    """
    kind, paths, separator = hub.find_texts(asset, split)
    cells: list[tuple[str, str]] = []
    for path in paths:
        text = _read_text(path)
        if kind == "csv":
            cells += _list_cells(path, text, separator, column)
        elif fault := _find_fault(text, column):
            raise StageError(f"{path}: {fault}: {REMEDY}")
    return cells


def _read_text(path: Path) -> str:
    """Read a file with its own line breaks. Raises StageError if it is compressed or not UTF-8."""
    content = path.read_bytes()
    if content.startswith(COMPRESSED):
        raise StageError(
            f"{path} is compressed, so that its rows cannot be checked: decompress it, and remove this one (if it is from the "
            "Hub, in a local copy of the data set, which repo in params.yaml may name)"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StageError(f"{path}: line {line}: not valid UTF-8: {REMEDY}") from error


def _find_fault(text: str, column: str) -> str | None:
    """Describe the first row of a JSON file, a list or one object per line, whose value in the column is not text."""
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except (ValueError, RecursionError):  # not an object per row: left to `datasets`
        return None
    values = [row.get(column) if isinstance(row, dict) else None for row in rows]
    odd = (row for row, value in enumerate(values) if value is not None and not _is_text(value))
    return next((_describe_odd(row, column, values[row]) for row in odd), None)


def _list_cells(path: Path, text: str, separator: str, column: str) -> list[tuple[str, str]]:
    try:
        header, *rows = _read_csv(text, separator) or [(1, [])]
    except (ValueError, TypeError) as error:  # TypeError: a separator that is not one character
        raise StageError(f"{path}: {error}: {CSV_REMEDY}") from error
    if header[1].count(column) != 1:
        fault = f"line {header[0]}: {header[1].count(column)} columns are named {quote(column)}"
        raise StageError(f"{path}: {fault}: name one column so, or set column in params.yaml to another one")
    index = header[1].index(column)
    return [(f"{path}: line {line}", row[index]) for line, row in rows if row[index].strip()]


def _read_csv(text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Return the header and the rows of a CSV file, each with its first line. Raises ValueError if their lengths differ."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for row in reader:
            if len(row) > 1 or "".join(row).strip():  # pandas skips blank lines
                rows.append((line, row))
            if rows and len(rows[-1][1]) != len(rows[0][1]):
                raise ValueError(f"line {line}: {len(row)} cells, but the header has {len(rows[0][1])}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from error
    return rows


def _check_cells(cells: Sequence[tuple[str, str]], texts: Sequence[str], place: str, column: str) -> None:
    """Raise StageError for the first text that `datasets` read that is not the cell as it is written."""
    odd = next(((cell, text) for cell, text in zip(cells, texts, strict=False) if cell[1] != text), None)
    if odd:
        (line, written), text = odd
        raise StageError(f"{line}: {quote(column)} is {quote(written)}, but is read as {quote(text)}: {OTHER_FORMAT}")
    if len(cells) != len(texts):
        raise StageError(f"{place}: {len(texts)} texts are read from files that have {len(cells)}: {OTHER_FORMAT}")


def _is_text(value: object) -> bool:
    """Return whether a value from JSON is text that UTF-8 can encode: JSON may contain half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _normalize(text: str | None) -> str:
    """Collapse white space, for comparison."""
    return " ".join((text or "").split())


def make_table(prompts: Iterable[Prompt]) -> pa.Table:
    """Build a table of schemas.PROMPTS."""
    rows = [{"prompt_id": schemas.prompt_id(prompt), "prompt": prompt, "iteration": iteration} for prompt, iteration in prompts]
    return pa.Table.from_pylist(rows, schema=schemas.PROMPTS)

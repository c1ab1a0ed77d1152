"""The prompts: the miniature's questions, or a data set's, each with the iteration that a second data set gives it to."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import cli, domain, files, params, schemas
from stages.assets import hub
from stages.cli import StageError
from stages.params import Asset, PromptsAsset

UNKNOWN_SHARE = 0.1
"""Above this share of prompts that the main data set lacks, the parts are not of this data set."""


def published(asset: PromptsAsset) -> list[tuple[str, str | None]]:
    """(prompt, part) of the parts first, then of the data set's other prompts; empty and repeated ones dropped and counted.

    White space is folded where prompts are compared. Raises StageError where the parts are not of this data set.
    """
    whole = _column(asset, asset.split, asset.column)
    parts: list[tuple[str | None, list[str | None]]] = []
    if asset.parts:
        parts = [(name, _column(asset.parts, split, asset.parts.column)) for name, split in asset.parts.splits.items()]
        _same_source(asset, whole, [text for _, texts in parts for text in texts])
    rows: dict[str, tuple[str, str | None]] = {}
    for part, texts in [*parts, (None, whole)]:
        kept, empty = len(rows), 0
        for text in texts:
            if key := _fold(text):
                rows.setdefault(key, (str(text), part))
            else:
                empty += 1
        kept = len(rows) - kept
        repeated = len(texts) - empty - kept
        cli.log.info(
            "%s: %d prompts, %d empty, %d there already, %d kept", part or "no part", len(texts), empty, repeated, kept
        )
    return list(rows.values())


def _same_source(asset: PromptsAsset, whole: Iterable[str | None], given: Iterable[str | None]) -> None:
    assert asset.parts
    known, wanted = {_fold(text) for text in whole}, {_fold(text) for text in given} - {""}
    unknown = len(wanted - known)
    cli.log.info("%d of the parts' %d different prompts are not in %s", unknown, len(wanted), asset.repo)
    if unknown > UNKNOWN_SHARE * len(wanted):
        raise StageError(
            f"{unknown} of the {len(wanted)} prompts of {asset.parts.repo} are not in {asset.repo}, split {asset.split}: "
            "they are not parts of it; correct assets.prompts.parts (repo, column, splits) or assets.prompts in params.yaml"
        )


def _column(asset: Asset, split: str, column: str) -> list[str | None]:
    rows = hub.load_rows(asset, None, split)
    if column not in rows.column_names:
        there = ", ".join(rows.column_names)
        raise StageError(f"{asset.repo}, split {split}: no column {column!r} among {there}: name one of them in params.yaml")
    texts = rows.with_format("arrow")[column][:].to_pylist()
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise StageError(
                f"{asset.repo}, split {split}: row {row}: {column!r} is no text: name another column in params.yaml"
            )
    return texts  # type: ignore[no-any-return]


def _fold(text: str | None) -> str:
    return " ".join((text or "").split())


def table(rows: Iterable[tuple[str, str | None]]) -> pa.Table:
    """schemas.PROMPTS of (prompt, part)."""
    columns: list[dict[str, Any]] = [
        {"prompt_id": schemas.prompt_id(prompt), "prompt": prompt, "part": part} for prompt, part in rows
    ]
    return pa.Table.from_pylist(columns, schema=schemas.PROMPTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="Parquet to write: prompt_id, prompt, part")
    arguments = parser.parse_args()
    wanted = params.load("seed", "assets.prompts")
    asset: PromptsAsset = wanted.prompts
    if asset.made_here:
        assert asset.count
        try:
            made = domain.distinct_prompts(f"{wanted.seed}/prompts", "training", asset.count)
        except ValueError as error:
            raise StageError(f"assets.prompts.count: {error}: lower it in params.yaml") from error
        rows: list[tuple[str, str | None]] = [(prompt, None) for prompt in made]
    else:
        rows = published(asset)
        if not rows:
            raise StageError(f"{asset.repo}, split {asset.split}: every prompt is empty: correct assets.prompts in params.yaml")
    files.write_table(table(rows), schemas.PROMPTS, arguments.out)
    cli.log.info("%s: %d prompts, %d with a part", arguments.out, len(rows), sum(part is not None for _, part in rows))


if __name__ == "__main__":
    cli.run(main, online=True)

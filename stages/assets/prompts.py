"""Provide the prompts to train on: the miniature's, or a data set's.

A second data set may assign prompts to iterations, as the released code's does.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from stages.artifacts import hub, schemas, tables
from stages.miniature import domain
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.logs import log

MAX_UNKNOWN_SHARE = 0.1
"""If a larger share of the assigned prompts is missing from the data set, the assignment must be for another data set."""

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
    rows = hub.load_rows(asset, None, split)
    place = f"{asset.repo}, split {split}"
    if column not in rows.column_names:
        raise StageError(
            f"{place}: there is no column {column!r}: set column in params.yaml to one of {', '.join(rows.column_names)}"
        )
    texts: list[str | None] = rows.with_format("arrow")[column][:].to_pylist()
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise StageError(f"{place}: row {row}: {column!r} is not text: set column in params.yaml to another one")
    return texts


def _normalize(text: str | None) -> str:
    """Collapse white space, for comparison."""
    return " ".join((text or "").split())


def make_table(prompts: Iterable[Prompt]) -> pa.Table:
    """Build a table of schemas.PROMPTS."""
    rows = [{"prompt_id": schemas.prompt_id(prompt), "prompt": prompt, "iteration": iteration} for prompt, iteration in prompts]
    return pa.Table.from_pylist(rows, schema=schemas.PROMPTS)

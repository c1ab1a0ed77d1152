"""Score with alpaca-eval: win rates, and length-controlled win rates for the canonical instructions."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stages.runtime.errors import StageError

Records = list[dict[str, Any]]
"""alpaca-eval's outputs or annotations: one dictionary per instruction."""

VARYING = ("date", "version", "time_per_example")
"""Suffixes of the annotation columns that change from run to run."""

CANONICAL = "c5770d532bf3f697768ed9a57a05d8b58b2617321ca65070620f059676e7c99a"
"""SHA-256 of AlpacaEval's 805 instructions in their order, as a JSON list."""
NOT_CANONICAL = "the set is not the canonical 805 instructions, for which alone length control is defined"
"""The value of `length_controlled_absent` in metrics.json."""


def is_canonical(instructions: list[str]) -> bool:
    """Return whether these are AlpacaEval's 805 instructions in their order.

    Length control looks up an instruction's difficulty by its position, so it is defined for these instructions only.
    """
    return hashlib.sha256(json.dumps(instructions).encode()).hexdigest() == CANONICAL


def run_alpaca_eval(
    outputs: Records, references: Records, length_control: Path | None, **annotator: Any
) -> tuple[dict[str, Any], Records]:
    """Run alpaca-eval on one model's outputs.

    references: the outputs to compare with, in the same order of instructions.
    length_control: folder of df_gamed.csv; None computes win rates without length control.
    annotator: the arguments of alpaca_eval.evaluate that choose the judge.
    Returns metrics (rates and standard errors in percent, lengths in characters; None for NaN) and annotations.
    Raises StageError if df_gamed.csv is missing.
    """
    from alpaca_eval import evaluate

    logging.getLogger().setLevel(logging.WARNING)  # importing alpaca-eval sets the root logger to INFO
    options: dict[str, Any] = {"fn_metric": "get_winrate"}
    if length_control:
        options = {"fn_metric": "get_length_controlled_winrate", "metric_kwargs": {"save_weights_dir": None}}
    with _length_control_cache(length_control):
        table, annotations = evaluate(
            model_outputs=outputs,
            reference_outputs=references,
            precomputed_leaderboard=None,
            sort_by="win_rate",
            output_path=None,
            is_return_instead_of_print=True,
            annotation_kwargs={"chunksize": None},
            **options,
            **annotator,
        )
    row = {name: value.item() if hasattr(value, "item") else value for name, value in table.iloc[0].items() if name != "mode"}
    return _replace_nan(row), annotations


def score_annotations(annotations: Records, outputs: Records, length_control: Path | None) -> dict[str, Any]:
    """Compute the metrics of existing annotations, made by any judge, of one model's outputs.

    length_control: as in `run_alpaca_eval`.
    """
    annotated = SimpleNamespace(annotate_head2head=lambda **_: annotations)
    # alpaca-eval requires reference outputs, but only an annotator reads them, and the annotations exist already.
    metrics, _ = run_alpaca_eval(outputs, outputs, length_control, Annotator=lambda **_: annotated)
    return metrics


def clean_annotations(annotations: Records) -> Records:
    """Drop the columns that vary from run to run and replace NaN, which JSON lacks, with None."""
    return [_replace_nan({name: row[name] for name in row if not name.endswith(VARYING)}) for row in annotations]


def _replace_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in row.items()}


@contextmanager
def _length_control_cache(folder: Path | None) -> Iterator[None]:
    """Make alpaca-eval fit length-controlled win rates on the folder's df_gamed.csv within the block.

    alpaca-eval would download that file from the Hub, so it is copied to a temporary cache with the layout of the Hub's.
    folder: None does nothing. Raises StageError if the file is missing.
    """
    if folder is None:
        yield
        return
    from alpaca_eval import constants

    file = folder / "df_gamed.csv"
    if not file.exists():
        raise StageError(
            f"{file} is missing, but length control requires it: get it from the Hub's tatsu-lab/alpaca_eval data set"
        )
    revision = "0" * 40
    with tempfile.TemporaryDirectory() as cache:
        repository = Path(cache) / "datasets--tatsu-lab--alpaca_eval"
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision, encoding="utf-8")
        shutil.copyfile(file, snapshot / file.name)
        default = constants.DEFAULT_CACHE_DIR
        constants.DEFAULT_CACHE_DIR = cache
        try:
            yield
        finally:
            constants.DEFAULT_CACHE_DIR = default

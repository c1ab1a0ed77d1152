"""The sides of benchmarks/train.py, each in a process of its own that processes one batch per turn."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import TrainerCallback, trainer

from benchmarks.train import Turns
from stages import reference, train
from stages.artifacts import schemas, tables
from stages.engines import distributed, training
from stages.method import seeding
from stages.runtime import params

ETA = 1000.0
SEED = 0
UNUSED = {f"{side}_probability": 0.5 for side in ("chosen", "rejected")}
UNUSED |= {f"{text}_tokens_cut": 0 for text in ("prompt", "chosen", "rejected")}
"""Columns of pairs that sppo_hard does not read, for pairs without them."""

Rows = list[dict[str, Any]]
"""Pairs: prompt_id, three lists of token ids and, if the loss reads them, the columns of UNUSED."""


class TurnCallback(TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer wait for its turn before each step and answer after it."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.turns.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.turns.end(logs["loss"])

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.turns.end()
        self.turns.begin()


def run(name: str, folder: Path, turns: Turns) -> None:
    """Run one of train.SIDES on the inputs in `folder`."""
    trainer.DEFAULT_CALLBACKS.append(TurnCallback(turns))
    distributed.launch(1, {}, partial(run_in_group, name, folder, turns))


def run_in_group(name: str, folder: Path, turns: Turns, group: distributed.Group) -> None:
    """Run a side in a process of the distributed group."""
    training.quiet_libraries()
    distributed.start_group(group)
    seeding.make_deterministic(SEED)
    rows: Rows = json.loads((folder / "pairs.json").read_text())
    settings = params.Train.model_validate_json((folder / "settings.json").read_text())
    if name == "reference":
        run_reference(rows, settings, folder)
    elif name == "train":
        run_train(rows, settings, folder)
    else:
        from benchmarks import train_trl

        train_trl.run(rows, settings, folder, turns, precompute=name == "trl-precomputed")


def run_reference(rows: Rows, settings: params.Train, folder: Path) -> None:
    """Run the stage reference without reading and writing the file of pairs; its first batch is not timed."""
    arguments = training.training_arguments(folder / "scratch", settings.device_batch, settings.dtype, SEED)
    table = pa.Table.from_pylist([UNUSED | row for row in rows], schema=schemas.UNSCORED_PAIRS)
    reference.score_pairs(table, folder / "model", settings, arguments, folder / "logps")


def run_train(rows: Rows, settings: params.Train, folder: Path, eta: float = ETA) -> None:
    """Run the stage train with the log-probabilities that run_reference wrote."""
    logps = [row for path in sorted((folder / "logps").iterdir()) for row in tables.read(path, schemas.LOGPS).to_pylist()]
    scored = [UNUSED | row | scores for row, scores in zip(rows, logps, strict=True)]
    table = pa.Table.from_pylist(scored, schema=schemas.PAIRS)
    outputs = train.Outputs(folder / "out", folder / "log.csv", folder / "update.json")
    train.train_policy(table, folder / "model", eta, settings, SEED, folder / "scratch", outputs)

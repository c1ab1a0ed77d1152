"""What the training part runs in processes of their own, whose end frees the GPU: python -m gpu_check.workers NAME FOLDER.

prepare: make the model; plain: the oracle; reference, train: the stages' own code. The folder holds what benchmarks/train.py's
`prepare` writes, and `spec.json`. Each worker but `prepare` and `plain` writes `NAME.json`: the seconds of each batch or step
after the first, and the peak of its memory in bytes.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, trainer

from benchmarks import train as benchmark
from gpu_check import device, plain
from stages.engines import distributed, training
from stages.method import seeding
from stages.runtime import logs, params


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times a Trainer's steps, or the batches that it predicts."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def begin(self) -> None:
        device.synchronize()
        self.start = time.perf_counter()

    def end(self) -> None:
        device.synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end()

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.end()
        self.begin()


def run_stage(name: str, folder: Path, spec: dict[str, Any], watch: Stopwatch, group: distributed.Group) -> None:
    """Run reference or train in the distributed group."""
    training.quiet_libraries()
    distributed.start_group(group)
    seeding.make_deterministic(0)
    from benchmarks import train_sides

    rows = json.loads((folder / "pairs.json").read_text())
    settings = params.Train.model_validate_json((folder / "settings.json").read_text())
    if name == "reference":
        train_sides.run_reference(rows, settings, folder)
    else:
        train_sides.run_train(rows, settings, folder, spec["eta"])
    (folder / f"{name}.json").write_text(json.dumps({"seconds": watch.seconds[1:], "peak": device.peak_bytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["prepare", "plain", "reference", "train"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    logs.setup_logging()
    spec = json.loads((args.folder / "spec.json").read_text())
    if args.name == "prepare":
        benchmark.make_model(spec["vocabulary"], spec["shape"], "bfloat16", args.folder / "model")
    elif args.name == "plain":
        plain.run(args.folder, spec["eta"], spec["rates"])
    else:
        watch = Stopwatch()
        trainer.DEFAULT_CALLBACKS.append(watch)
        distributed.launch(1, {}, partial(run_stage, args.name, args.folder, spec, watch))


if __name__ == "__main__":
    main()

"""published.yaml: the published results that the reports compare with."""

import math
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from stages.runtime import params
from stages.runtime.params import HarnessAsset, Section, Text

TASKS = list(HarnessAsset.model_fields)
"""The tasks of the Open LLM Leaderboard v1, in the order of the published tables."""
ROUNDING = 0.0101
"""Percent points by which a published average may differ from the mean of the published tasks, all rounded to two decimals."""

Percent = Annotated[float, Field(ge=0, le=100)]


class PublishedAlpacaEval(Section):
    """Published AlpacaEval results of one model, as far as they are known: percent, and length in characters."""

    length_controlled_winrate: Percent | None = None
    lc_standard_error: Percent | None = None
    win_rate: Percent | None = None
    standard_error: Percent | None = None
    avg_length: float | None = None


class PublishedTable(Section):
    """What the two published tables have in common."""

    source: Text
    sources: dict[str, dict[str, Text]] = Field(default_factory=dict)
    """Model -> figure -> its source, for figures that `source` does not give."""
    notes: list[Text] = Field(default_factory=list)
    """What else differs between the published evaluation and ours: sentences to show beside the comparison."""

    def check_sources(self, figures: dict[str, set[str]]) -> None:
        """Raise ValueError if a source is that of a figure that the table lacks. figures: model -> its figures."""
        for model, sources in self.sources.items():
            if unknown := sorted(sources.keys() - figures.get(model, set())):
                raise ValueError(f"sources: {model}.{unknown[0]} is not in the table: add the figure, or remove its source")


class PublishedAlpacaEvalTable(PublishedTable):
    judge: Text
    models: dict[str, PublishedAlpacaEval]

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        self.check_sources({name: set(figures.model_dump(exclude_none=True)) for name, figures in self.models.items()})
        return self


class PublishedHarnessTable(PublishedTable):
    models: dict[str, dict[str, Percent]]
    """Model -> task or `average` -> percent, as far as they are known, in the order of TASKS. mmlu: lm-evaluation-harness
    0.4.1's own, weighted by the subjects' sizes."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        columns = [*TASKS, "average"]
        self.check_sources({name: set(results) for name, results in self.models.items()})
        for name, results in self.models.items():
            if list(results) != [column for column in columns if column in results]:
                raise ValueError(f"{name}: expected some or all of these keys, in this order: {', '.join(columns)}")
            if len(results) < len(columns):
                continue
            mean = math.fsum(results[task] for task in TASKS) / len(TASKS)
            if abs(results["average"] - mean) > ROUNDING:
                raise ValueError(f"{name}: average is {results['average']}, but the mean of the tasks is {mean:.2f}")
        return self


class Hyperparameters(Section):
    """Hyperparameters of training, under the names and in the order of the published model cards; null: not stated."""

    learning_rate: float | None = None
    eta: float | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    seed: int | None = None
    distributed_type: Text | None = None
    num_devices: int | None = None
    optimizer: Text | None = None
    lr_scheduler_type: Text | None = None
    lr_scheduler_warmup_ratio: float | None = None
    num_train_epochs: float | None = None
    """Epochs of the learning-rate schedule."""
    stop_epoch: float | None = None
    """The epoch at which training stops."""


class PublishedHyperparameters(Section):
    source: Text
    values: Hyperparameters


class Published(Section):
    """Published results, keyed by the names of the models in params.yaml."""

    models: dict[str, Text]
    """Model -> name of the published model."""
    alpaca_eval: PublishedAlpacaEvalTable | None = None
    open_llm_leaderboard: PublishedHarnessTable | None = None
    hyperparameters: PublishedHyperparameters | None = None
    """Those of all iterations, which the models' cards compare with ours."""

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        for table in (self.alpaca_eval, self.open_llm_leaderboard):
            if table and (unknown := sorted(table.models.keys() - self.models.keys())):
                raise ValueError(f"{', '.join(unknown)}: in a table, but not in published.models")
        return self


class PublishedFile(Section):
    """The whole of published.yaml."""

    published: Published | None
    """null if there are no published results."""


def read_published(path: Path) -> Published | None:
    """Read and validate published.yaml; None if it says that nothing is published. Raises StageError."""
    return params.validate_model(PublishedFile, params.read(path), path).published

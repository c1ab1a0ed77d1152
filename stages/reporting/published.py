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
    """Published AlpacaEval results of one model: percent, and length in characters."""

    length_controlled_winrate: Percent
    lc_standard_error: Percent | None = None
    win_rate: Percent
    standard_error: Percent | None = None
    avg_length: float | None = None


class PublishedAlpacaEvalTable(Section):
    source: Text
    judge: Text
    models: dict[str, PublishedAlpacaEval]
    notes: list[Text] = Field(default_factory=list)
    """What else differs between the published evaluation and ours: sentences to show beside the comparison."""


class PublishedHarnessTable(Section):
    source: Text
    models: dict[str, dict[str, Percent]]
    """Model -> task or `average` -> percent. mmlu: lm-evaluation-harness 0.4.1's own, weighted by the subjects' sizes."""
    notes: list[Text] = Field(default_factory=list)
    """As in PublishedAlpacaEvalTable."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        columns = [*TASKS, "average"]
        for name, results in self.models.items():
            if list(results) != columns:
                raise ValueError(f"{name}: expected exactly these keys in this order: {', '.join(columns)}")
            mean = math.fsum(results[task] for task in TASKS) / len(TASKS)
            if abs(results["average"] - mean) > ROUNDING:
                raise ValueError(f"{name}: average is {results['average']}, but the mean of the tasks is {mean:.2f}")
        return self


class Published(Section):
    """Published results, keyed by the names of the models in params.yaml."""

    models: dict[str, Text]
    """Model -> name of the published model."""
    alpaca_eval: PublishedAlpacaEvalTable
    open_llm_leaderboard: PublishedHarnessTable | None = None

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

"""published.yaml: the published results that the reports compare with."""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from stages.runtime import params
from stages.runtime.params import HarnessAsset, Section

TASKS = list(HarnessAsset.model_fields)
"""The tasks of the Open LLM Leaderboard v1, in the order of the published tables."""


class PublishedAlpacaEval(Section):
    """Published AlpacaEval results of one model: percent, and length in characters."""

    length_controlled_winrate: float
    lc_standard_error: float | None = None
    win_rate: float
    standard_error: float | None = None
    avg_length: float | None = None


class PublishedAlpacaEvalTable(Section):
    source: str
    judge: str
    models: dict[str, PublishedAlpacaEval]


class PublishedHarnessTable(Section):
    source: str
    models: dict[str, dict[str, float]]
    """Model -> task or `average` -> percent."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        columns = [*TASKS, "average"]
        for name, results in self.models.items():
            if list(results) != columns:
                raise ValueError(f"{name}: expected exactly these keys in this order: {', '.join(columns)}")
        return self


class Published(Section):
    """Published results, keyed by the names of the models in params.yaml."""

    models: dict[str, str]
    """Model -> name of the published model."""
    alpaca_eval: PublishedAlpacaEvalTable
    open_llm_leaderboard: PublishedHarnessTable | None = None


class PublishedFile(Section):
    """The whole of published.yaml."""

    published: Published | None
    """null if there are no published results."""


def read_published(path: Path) -> Published | None:
    """Read and validate published.yaml; None if it says that nothing is published. Raises StageError."""
    return params.validate_model(PublishedFile, params.read(path), path).published

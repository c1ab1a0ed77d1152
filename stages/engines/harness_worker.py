"""Calls of the unmodified lm-eval 0.4.1, made in the workers of stages/engines/harness.py.

Import this module only with the data sets' folder as the working directory: lm_eval loads its metric exact_match from there
when it is imported.
"""

import functools
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
from lm_eval.api.registry import GROUP_REGISTRY
from lm_eval.models.huggingface import HFLM

from stages.artifacts import pointers
from stages.runtime.errors import StageError, one_line

KEPT = ["results", "groups", "versions", "n-shot", "configs"]
"""Keys of the harness's results that do not contain the host's paths or the state of a repository."""


class Float32Logits(HFLM):  # type: ignore[misc]
    """The harness's model with logits in float32; otherwise it would compute a bf16 model's log-softmax in bf16."""

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(*args, **kwargs)
        return logits.float()


@functools.cache
def register_tasks(folders: tuple[str, ...]) -> None:
    """Register the stock tasks in these folders below lm_eval/tasks, instead of all tasks, which would take many seconds."""
    for folder in folders:
        lm_eval.tasks.include_path(str(Path(lm_eval.tasks.__file__).parent / folder))
    for names in GROUP_REGISTRY.values():
        names.sort()  # the file system's order would change the last digit of MMLU's weighted mean


@functools.cache
def load_policy(model: str, dtype: str, batch_size: int) -> Any:
    """Load a model for the harness, on the GPU if there is one. Raises StageError if transformers cannot load it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # the number of threads changes the last digit of sums
    try:
        lm = Float32Logits(pretrained=model, dtype=dtype, batch_size=batch_size, device=device)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{model}: transformers cannot load this model ({one_line(error)}): use a complete checkpoint"
        ) from error
    pointers.cap_attention(lm.model)
    return lm


def evaluate(task: str, shots: int, metric: str, model: str, dtype: str, batch_size: int) -> dict[str, Any]:
    """Evaluate a model on a registered task.

    Returns the harness's results and, by (sub)task, `n`, the number of questions, and `items`, the metric's value for each
    question in the order of the data set. The harness's samples, which also hold every prompt, stay in this process.
    """
    results = lm_eval.simple_evaluate(model=load_policy(model, dtype, batch_size), tasks=[task], num_fewshot=shots)
    items = {name: read_items(samples, metric) for name, samples in results["samples"].items()}
    counts = {name: len(scores) for name, scores in items.items()}
    return {name: results[name] for name in KEPT if name in results} | {"n": counts, "items": items}


def read_items(samples: list[dict[str, Any]], metric: str) -> list[float]:
    """Return the metric's value for each of the harness's samples, in the order of their doc_id."""
    return [float(sample[metric]) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]

"""Calls of the unmodified lm-eval 0.4.1, made in the workers of stages/engines/harness.py.

The working directory is the data sets' folder, from which lm_eval would also load code: its metric exact_match.
"""

import functools
from pathlib import Path
from typing import Any

import torch

from stages.artifacts import pointers
from stages.engines import exact_match
from stages.runtime.errors import StageError, one_line, quote

exact_match.install()
import lm_eval.tasks  # noqa: E402 - it loads the metric when it is imported
from lm_eval.api.registry import GROUP_REGISTRY  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

KEPT = ["results", "groups", "versions", "n-shot", "configs"]
"""Keys of the harness's results that do not contain the host's paths or the state of a repository."""


class CountingModel(HFLM):  # type: ignore[misc]
    """The harness's model, with logits in float32, and never NaN: it would compute a bf16 model's log-softmax in bf16, and
    count an answer that scores NaN as right or wrong.

    The harness cuts off the start of a context that does not fit into the model, without a word: `cut` collects these contexts.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cut: set[str] = set()

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute logits, (batch, tokens, vocabulary), float32. Raises StageError if one is NaN."""
        logits: torch.Tensor = super()._model_call(*args, **kwargs)
        if logits.max().isnan():  # a maximum needs no other tensor of this size
            raise StageError(
                f"{self.config._name_or_path}: logits are NaN: check the numbers in its config.json, and its weights "
                "(`make verify`), or use another model"
            )
        return logits.float()

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Compute log-likelihoods. requests: ((context, continuation), and the token IDs of each).

        Raises StageError if a continuation alone does not fit into the model.
        """
        for (context, continuation), context_ids, continuation_ids in requests:
            if len(continuation_ids) > self.max_length:
                raise StageError(
                    f"an answer of {len(continuation_ids)} tokens does not fit into the model, whose context has "
                    f"{self.max_length} ({quote(continuation)}): leave this task out of evaluate_lm.tasks"
                )
            if len(context_ids) + len(continuation_ids) > self.max_length + 1:  # the last token is only predicted
                self.cut.add(context)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list[Any]) -> Any:
        """Generate texts. Raises StageError if the harness reserves more tokens for them than the model's context has."""
        for context, options in (request.args for request in requests):
            reserved = options.get("max_gen_toks", self.max_gen_toks)
            if reserved > self.max_length:
                raise StageError(
                    f"the model's context has {self.max_length} tokens, but the harness reserves {reserved} for an answer: "
                    "leave this task out of evaluate_lm.tasks"
                )
            if len(self.tok_encode(context)) + reserved > self.max_length:
                self.cut.add(context)
        return super().generate_until(requests)


@functools.cache
def register_tasks(folders: tuple[str, ...]) -> None:
    """Register the stock tasks in these folders below lm_eval/tasks, instead of all tasks, which would take many seconds."""
    for folder in folders:
        lm_eval.tasks.include_path(str(Path(lm_eval.tasks.__file__).parent / folder))
    for names in GROUP_REGISTRY.values():
        names.sort()  # the file system's order would change the last digit of MMLU's weighted mean


@functools.cache
def load_policy(model: str, dtype: str, batch_size: int) -> Any:
    """Load a model for the harness, on the GPU if there is one.

    Raises StageError if transformers cannot load it, or if its logits are NaN.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # the number of threads changes the last digit of sums
    try:
        lm = CountingModel(pretrained=model, dtype=dtype, batch_size=batch_size, device=device)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{model}: transformers cannot load this model ({one_line(error)}): use a complete checkpoint"
        ) from error
    pointers.cap_attention(lm.model)
    lm._model_call(torch.zeros(1, 2, dtype=torch.long, device=device))  # tasks that generate texts make no such call
    return lm


def evaluate(task: str, shots: int, metric: str, model: str, dtype: str, batch_size: int) -> dict[str, Any]:
    """Evaluate a model on a registered task.

    Returns the harness's results and, by (sub)task, `n`, the number of questions, `items`, the metric's value for each question
    in the order of the data set, and `cut`, the number of questions whose prompt did not fit into the model; (sub)tasks without
    any are left out, and so is an empty `cut`. The harness's samples, which also hold every prompt, stay in this process.
    Raises StageError if the task's answers do not fit into the model at all.
    """
    lm = load_policy(model, dtype, batch_size)
    lm.cut.clear()
    try:
        results = lm_eval.simple_evaluate(model=lm, tasks=[task], num_fewshot=shots)
    except StageError as error:
        raise StageError(f"{task}: {error}") from error
    items = {name: read_items(samples, metric) for name, samples in results["samples"].items()}
    counts = {name: len(scores) for name, scores in items.items()}
    cut = {name: count for name, samples in results["samples"].items() if (count := count_cut(samples, lm.cut))}
    kept = {name: results[name] for name in KEPT if name in results}
    return kept | {"n": counts, "items": items} | ({"cut": cut} if cut else {})


def count_cut(samples: list[dict[str, Any]], cut: set[str]) -> int:
    """Count the questions of which a request has one of the contexts in `cut`. samples: the harness's."""
    return sum(any(context in cut for context, _ in sample["arguments"]) for sample in samples)


def read_items(samples: list[dict[str, Any]], metric: str) -> list[float]:
    """Return the metric's value for each of the harness's samples, in the order of their doc_id."""
    return [float(sample[metric]) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]

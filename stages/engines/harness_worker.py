"""Calls of the unmodified lm-eval 0.4.1: a model that computes requests in a worker, and one that deals them to the workers.

The stage's process evaluates tasks; its working directory is then the data sets' folder, from which lm_eval would also load
code: its metric exact_match.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stages.artifacts import pointers
from stages.engines import exact_match
from stages.engines.harness_requests import Encoded, choose_size, cut, group_generations, share_rows
from stages.runtime import durable
from stages.runtime.devices import explain_out_of_memory
from stages.runtime.errors import StageError, one_line, quote
from stages.runtime.logs import log
from stages.runtime.workers import Deal

exact_match.install()
import lm_eval.tasks  # noqa: E402 - it loads the metric when it is imported
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import GROUP_REGISTRY  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

templates = lm_eval.utils.env
templates.from_string = functools.cache(templates.from_string)  # it compiles each one anew for every few-shot example

KEPT = ["results", "groups", "versions", "n-shot", "configs"]
"""Keys of the harness's results that do not contain the host's paths or the state of a repository."""
TEXTS = 256
"""Requests in a chunk to tokenize; a chunk of texts to generate is one batch."""

Row = tuple[list[int], list[list[int]]]
"""The token IDs of a context and of the continuations to score: more than one only if each is one token."""


class ComputingModel(HFLM):  # type: ignore[misc]
    """The harness's model, with logits in float32, and never NaN: it would compute a bf16 model's log-softmax in bf16, and
    count an answer that scores NaN as right or wrong.

    Its public methods that are not the harness's return JSON values for a chunk of requests.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tok_encode = functools.lru_cache(16)(super().tok_encode)  # a question's choices follow each other
        self._choices: list[list[list[int]]] = []
        self._scores: list[list[tuple[float, bool]]] = []

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute logits, (batch, tokens, vocabulary), float32. Raises StageError if one is NaN."""
        logits: torch.Tensor = super()._model_call(*args, **kwargs)
        if logits.max().isnan():  # a maximum needs no other tensor of this size
            raise StageError(
                f"{self.config._name_or_path}: logits are NaN: check the numbers in its config.json, and its weights "
                "(`make verify`), or use another model"
            )
        return logits.float()

    def encode(self, requests: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int], bool]]:
        """Tokenize contexts and continuations, as HFLM.loglikelihood does; the third value says whether the harness will cut
        off the start of the context, which does not fit into the model, without a word.

        Raises StageError if a continuation alone does not fit.
        """
        encoded = []
        for context, continuation in requests:
            if context:
                context_ids, continuation_ids = self._encode_pair(context, continuation)
            else:
                context_ids, continuation_ids = [self.eot_token_id], self.tok_encode(continuation)
            if len(continuation_ids) > self.max_length:
                raise StageError(
                    f"an answer of {len(continuation_ids)} tokens does not fit into the model, whose context has "
                    f"{self.max_length} ({quote(continuation)}): leave this task out of evaluate_lm.tasks"
                )
            room = self.max_length + 1  # the last token is only predicted
            encoded.append((context_ids, continuation_ids, len(context_ids) + len(continuation_ids) > room))
        return encoded

    def measure(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[int, bool]]:
        """Count the tokens of the contexts of texts to generate; the second value is as the third of `encode`.

        Raises StageError if the harness reserves more tokens for a text than the model's context has.
        """
        lengths = []
        for context, options in requests:
            reserved: Any = options.get("max_gen_toks", self.max_gen_toks)
            if reserved > self.max_length:
                raise StageError(
                    f"the model's context has {self.max_length} tokens, but the harness reserves {reserved} for an answer: "
                    "leave this task out of evaluate_lm.tasks"
                )
            length = len(self.tok_encode(context))
            lengths.append((length, length + reserved > self.max_length))
        return lengths

    def score(self, rows: Sequence[Row]) -> list[list[tuple[float, bool]]]:
        """Compute, for rows in the order of `share_rows`, the log-likelihood of each continuation, and whether it is the most
        likely one, token by token."""
        self._choices, self._scores = [continuations for _, continuations in rows], []
        requests = [(("", ""), context, continuations[0]) for context, continuations in rows]
        answers = self._loglikelihood_tokens(requests, disable_tqdm=True)
        return [scores or [answer] for answer, scores in zip(answers, self._scores, strict=True)]

    def _select_cont_toks(self, logits: torch.Tensor, contlen: int, inplen: int) -> torch.Tensor:
        """Return the log-probabilities, (contlen, vocabulary), from which the harness scores a continuation of this row; score
        all of the row's choices here. The harness calls this for one row after the other."""
        selected: torch.Tensor = super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)
        choices = self._choices[len(self._scores)]
        scores: list[tuple[float, bool]] = []
        if len(choices) > 1:
            best = int(selected[0].argmax())
            tokens = [token for (token,) in choices]
            scores = [(value, token == best) for value, token in zip(selected[0, tokens].tolist(), tokens, strict=True)]
        self._scores.append(scores)
        return selected

    def generate(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Generate the text that follows each context."""
        texts: list[str] = self.generate_until([SimpleNamespace(args=request) for request in requests])
        return texts


class DealingModel(LM):  # type: ignore[misc]
    """A model for the harness, whose requests workers compute; finished chunks are kept in a folder.

    cut: the contexts of which the harness cut off the start, because they do not fit into the model.
    """

    def __init__(self, deal: Deal, batch_size: int, folder: Path) -> None:
        super().__init__()
        self.deal, self.batch_size, self.folder = deal, batch_size, folder
        self.cut: set[str] = set()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        texts = [request.args for request in requests]
        encoded: list[Encoded] = []
        for (context, _), (context_ids, continuation_ids, is_cut) in zip(texts, self._map("encode", texts, TEXTS), strict=True):
            encoded.append((context_ids, continuation_ids))
            self.cut |= {context} if is_cut else set()
        shared = share_rows(encoded)
        rows = [(encoded[indices[0]][0], [encoded[index][1] for index in indices]) for indices in shared]
        answers: dict[int, tuple[float, bool]] = {}
        for indices, scores in zip(shared, self._map("score", rows, choose_size(len(rows), self.batch_size)), strict=True):
            answers |= {index: (value, best) for index, (value, best) in zip(indices, scores, strict=True)}
        return [answers[index] for index in range(len(requests))]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        texts = [request.args for request in requests]
        measured = self._map("measure", texts, TEXTS)
        self.cut |= {context for (context, _), (_, is_cut) in zip(texts, measured, strict=True) if is_cut}
        answers: dict[int, str] = {}
        for number, group in enumerate(group_generations(texts, [length for length, _ in measured])):
            generated = self._map("generate", [texts[index] for index in group], self.batch_size, number)
            answers |= dict(zip(group, generated, strict=True))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise NotImplementedError("no task of ours asks for it")

    def _map(self, kind: str, requests: Sequence[Any], size: int, group: int = 0) -> list[Any]:
        """Let the workers call a method of ComputingModel for every `size` requests; return the results of all, in order."""
        chunks = cut(requests, size)
        paths = [self.folder / f"{kind}-{group}-{index:05}.json" for index in range(len(chunks))]
        keep = kind in ("score", "generate")  # tokenizing again takes less time than writing
        results: dict[int, list[Any]] = {}
        for index, path in enumerate(paths if keep else ()):
            if (kept := durable.read_json(path, functools.partial(check_chunk, kind, len(chunks[index])))) is not None:
                results[index] = kept
        pending = [index for index in range(len(chunks)) if index not in results]
        tasks = [(kind, chunks[index]) for index in pending]
        for task, result in self.deal(tasks, lambda task: f"{kind}, chunk {pending[task] + 1} of {len(chunks)}"):
            results[pending[task]] = result
            if keep:
                durable.write(paths[pending[task]], json.dumps(result))
            log.info("%s: %d of %d chunks are finished", kind, len(results), len(chunks))
        return [value for index in range(len(chunks)) for value in results[index]]


def check_chunk(kind: str, count: int, results: Any) -> Any:
    """Return the results of a chunk of `count` requests that an earlier run kept.

    Raises ValueError or TypeError if they are not as ComputingModel returns them.
    """
    values = results if kind == "generate" else [value for row in results for value, _ in row]
    if len(results) != count or not all(isinstance(value, str if kind == "generate" else float) for value in values):
        raise ValueError(f"expected the results of {count} requests")
    return results


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
        lm = ComputingModel(pretrained=model, dtype=dtype, batch_size=batch_size, device=device)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{model}: transformers cannot load this model ({one_line(error)}): use a complete checkpoint"
        ) from error
    pointers.cap_attention(lm.model)
    lm._model_call(torch.zeros(1, 2, dtype=torch.long, device=device))  # tasks that generate texts make no such call
    return lm


def load(model: str, dtype: str, batch_size: int) -> Callable[[tuple[str, Any]], Any]:
    """Load a model as `load_policy` does; return the function that computes a chunk of requests: the name of a method of
    ComputingModel, and its argument.

    That function raises StageError if the GPU's memory does not suffice, and what the methods raise.
    """
    with explain_out_of_memory("stop the other processes on this GPU (see `nvidia-smi`): the model does not fit beside them"):
        lm = load_policy(model, dtype, batch_size)

    def compute(task: tuple[str, Any]) -> Any:
        kind, requests = task
        with explain_out_of_memory(f"lower evaluate_lm.batch_size (now {batch_size})"):
            return getattr(lm, kind)(requests)

    return compute


def evaluate(task: str, shots: int, metric: str, lm: Any) -> dict[str, Any]:
    """Evaluate a model on a registered task, as the harness does when it runs that task alone. lm: e.g. a DealingModel.

    Returns the harness's results and, by (sub)task, `n`, the number of questions, `items`, the metric's value for each question
    in the order of the data set, and `cut`, the number of questions whose prompt did not fit into the model; (sub)tasks without
    any are left out, and so is an empty `cut`. The harness's samples, which also hold every prompt, stay in this process.
    Raises StageError if the task's answers do not fit into the model at all.
    """
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

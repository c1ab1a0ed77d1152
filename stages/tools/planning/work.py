"""The work of each stage: texts, tokens, FLOPs, disk space and dollars, counted from params.yaml and the sizes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from stages.artifacts import harness_sets
from stages.runtime.params import EvaluationParams, Params
from stages.tools.planning import lengths
from stages.tools.planning.methods import Methods
from stages.tools.planning.sizes import Size

RANKER_FLOPS_PER_TOKEN, RANKER_FLOPS_PER_PASS = 0.75e9, 51.5e9
"""PairRM, a DeBERTa-v3-large of 0.4 billion parameters: its layers per token, and its relative positions per pass."""

HARNESS_TOKENS = {
    "arc_challenge": 9_000_000,
    "truthfulqa_mc2": 500_000,
    "winogrande": 400_000,
    "gsm8k": 1_200_000,
    "hellaswag": 34_400_000,
    "mmlu": 37_000_000,
}
"""Estimate: prefill of each task with its few-shot examples, with a forward pass for each answer of a question."""
MMLU_CHOICES = 4
"""Answers of one token to a question of MMLU: one forward pass can score all."""
JUDGE_TOKENS = 1_250
"""Per request to AlpacaEval's judge: instruction and two answers. Its README: 805 requests cost "less than 10 dollars"."""

BYTES_PER_TOKEN = 6
"""Disk space of a response's compressed text and token IDs in Parquet: measured on the miniature, rounded up."""
CHECKPOINT_BYTES = 8
"""Of a parameter in a training checkpoint: float32 weights and RMSProp's mean squares."""


@dataclass(frozen=True)
class Work:
    """Work of a stage: passes of texts through a model, their tokens, sampled tokens, FLOPs (forward, rank, train), bytes kept
    on disk, dollars."""

    passes: float = 0
    tokens: float = 0
    sampled: float = 0
    forward: float = 0
    rank: float = 0
    train: float = 0
    disk: float = 0
    dollars: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


def estimate_work(stage: str, settings: Params | EvaluationParams, size: Size, methods: Methods) -> Work:
    """Estimate the work of one stage, by its name in `python -m stages NAME`; none for a stage that takes seconds."""
    if stage in EVALUATION_ESTIMATES:
        return EVALUATION_ESTIMATES[stage](settings, size, methods)
    if isinstance(settings, Params) and stage in TRAINING_ESTIMATES:
        return TRAINING_ESTIMATES[stage](settings, size, methods)
    return Work()


def estimate_generate(settings: Params, size: Size, methods: Methods) -> Work:
    responses = size.prompts * settings.generate.samples
    return _sample(responses, responses * size.response_tokens)


def estimate_rank(settings: Params, size: Size, methods: Methods) -> Work:
    samples = settings.generate.samples
    return _compare_responses(size.prompts * samples * (samples - 1), settings, size)


def estimate_reference(settings: Params, size: Size, methods: Methods) -> Work:
    """Without padding: what a GPU computes beyond the pairs' tokens counts as time."""
    tokens = size.prompts * count_pair_tokens(settings, size)
    return Work(2 * size.prompts, tokens, forward=2 * size.parameters * tokens, disk=tokens * BYTES_PER_TOKEN)


def estimate_train(settings: Params, size: Size, methods: Methods) -> Work:
    """Per parameter and token: 2 FLOP forward, 2 backward to the activations, 2 to the weights unless only adapters are
    trained, and 2 to compute activations again for gradient checkpointing."""
    pairs = size.prompts * settings.train.stop_epoch
    tokens = pairs * count_pair_tokens(settings, size)
    each = (4 if settings.train.lora.rank else 6) + (2 if settings.train.gradient_checkpointing else 0)
    weights = 2 * size.parameters if settings.train.checkpoint_dtype == "bfloat16" else 4 * size.parameters
    return Work(2 * pairs, tokens, train=each * size.parameters * tokens, disk=weights)


def estimate_answer_reference(settings: Params | EvaluationParams, size: Size, methods: Methods) -> Work:
    """The miniature samples its own reference outputs; every other set comes with them."""
    count = settings.assets.alpaca_eval.count
    return _sample(count, count * size.response_tokens) if count else Work()


def estimate_answer(settings: Params | EvaluationParams, size: Size, methods: Methods) -> Work:
    texts = size.instructions + (settings.split.hold_out if isinstance(settings, Params) else 0)
    return _sample(texts, texts * size.response_tokens)


def estimate_evaluate_alpaca(settings: Params | EvaluationParams, size: Size, methods: Methods) -> Work:
    if settings.evaluate_alpaca.judge == "gold":
        return Work()
    price = settings.evaluate_alpaca.price_per_million_tokens or math.nan
    tokens = size.instructions * JUDGE_TOKENS
    return Work(size.instructions, tokens, dollars=tokens * price / 1e6)


def estimate_evaluate_lm(settings: Params | EvaluationParams, size: Size, methods: Methods) -> Work:
    tokens = sum(count_task_tokens(settings, methods).values())
    return Work(tokens=tokens, forward=2 * size.parameters * tokens)


def count_task_tokens(settings: Params | EvaluationParams, methods: Methods) -> dict[str, float]:
    """Return the tokens of each chosen task of the harness; none if the tasks are the miniature's, which take seconds."""
    names = harness_sets.select_tasks(settings.evaluate_lm.tasks)
    if any(getattr(settings.assets.harness, name).made_here for name in names):
        return {}
    shared = {"mmlu": MMLU_CHOICES} if methods.chunked_harness else {}
    return {name: HARNESS_TOKENS[name] / shared.get(name, 1) for name in names}


def estimate_compare(settings: Params, size: Size, methods: Methods) -> Work:
    models = len(settings.iterations) + 1
    return _compare_responses(settings.split.hold_out * models * (models - 1), settings, size)


def estimate_compare_answers(settings: Params | EvaluationParams, size: Size, methods: Methods) -> Work:
    assert isinstance(settings, EvaluationParams)
    models = len(settings.models) + len(settings.answers)
    return _compare_responses(size.instructions * models * (models - 1), settings, size)


EVALUATION_ESTIMATES: dict[str, Callable[[Params | EvaluationParams, Size, Methods], Work]] = {
    "answer-reference": estimate_answer_reference,
    "answer": estimate_answer,
    "evaluate-alpaca": estimate_evaluate_alpaca,
    "evaluate-alpaca-answers": estimate_evaluate_alpaca,
    "compare-answers": estimate_compare_answers,
    "evaluate-lm": estimate_evaluate_lm,
}
TRAINING_ESTIMATES: dict[str, Callable[[Params, Size, Methods], Work]] = {
    "generate": estimate_generate,
    "rank": estimate_rank,
    "reference": estimate_reference,
    "train": estimate_train,
    "compare": estimate_compare,
}
"""The work of each stage that takes longer than seconds: of any pipeline, and of one with training."""


def _sample(texts: float, tokens: float) -> Work:
    return Work(texts, tokens, sampled=tokens, disk=tokens * BYTES_PER_TOKEN)


def _compare_responses(passes: float, settings: Params | EvaluationParams, size: Size) -> Work:
    """Passes of the ranker, each over a prompt and two responses; the miniature's own ranker costs almost nothing."""
    tokens = passes * (size.prompt_tokens + 2 * size.response_tokens)
    free = isinstance(settings, Params) and settings.assets.ranker.made_here
    return Work(passes, tokens, rank=0 if free else tokens * RANKER_FLOPS_PER_TOKEN + passes * RANKER_FLOPS_PER_PASS)


def count_pair_tokens(settings: Params, size: Size) -> float:
    """Return the mean tokens of a packed pair, which contains the prompt once, as `lengths` cuts it."""
    return lengths.deal_pairs(settings, size.prompt_tokens, size.response_tokens).tokens

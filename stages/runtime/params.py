"""params.yaml: every parameter declared, validated and documented once.

A stage loads the sections that it reads, `load("seed", "generate")`, and dvc.yaml lists the same keys as its params; a test
compares the two. Unknown or missing keys, wrong types and values out of range stop the stage with one message.

Every value comes from the file: no field has a default other than None ("absent"), and no value is converted or computed.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from stages.runtime import documents
from stages.runtime.errors import StageError, quote
from stages.runtime.paths import ROOT

LARGEST_INTEGER = 2**31 - 1
"""Counts and token IDs are columns of 32 bits."""


def _check_float32(value: float) -> float:
    """Return a number. Raises ValueError if it is 0 or infinite in float32, in which models compute, but not by itself."""
    if value and not 1.2e-38 <= value <= 3.4e38:
        raise ValueError(f"{value} does not fit in float32: use a number from 1.2e-38 to 3.4e38")
    return value


def _check_exact(value: Any) -> Any:
    """Return a number unchanged. Raises ValueError for an integer with more digits than a float has, which would be rounded."""
    if isinstance(value, int) and abs(value) <= 10**300 and float(value) != value:
        raise ValueError(f"{value} has more digits than a number with a fraction can have: write {float(value)!r}")
    return value


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""NumPy takes no larger seed."""
Positive = Annotated[int, Field(gt=0, le=LARGEST_INTEGER)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Fraction = Annotated[float, BeforeValidator(_check_exact), Field(gt=0, le=1), AfterValidator(_check_float32)]
PositiveFloat = Annotated[float, BeforeValidator(_check_exact), Field(gt=0), AfterValidator(_check_float32)]
NotNegativeFloat = Annotated[float, BeforeValidator(_check_exact), Field(ge=0), AfterValidator(_check_float32)]
Text = Annotated[str, Field(min_length=1)]
Precision = Literal["float32", "bfloat16"]
Numerics = Literal["portable", "fast"]

BASE = "base"
"""The model that the first iteration starts from."""
MINIATURE = "miniature"
MODEL_NAME = "[a-z][a-z0-9-]*"
"""Pattern of the names of iterations and models."""
NOT_PINNED = "is not a full 40-digit commit"

Model = TypeVar("Model", bound=BaseModel)
Named = TypeVar("Named")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Asset(Section):
    """An input of the experiment: generated from the seed, a local directory, or a pinned revision on the Hub."""

    repo: Text
    """`miniature` (made from the seed), a directory (starts with `/` or `.`), or the ID of a Hub repository."""
    revision: str | None = None
    """40-digit commit of the Hub repository. `python -m stages.tools hub --pin --recipe DIR` looks it up."""

    @property
    def made_here(self) -> bool:
        return self.repo == MINIATURE

    @property
    def on_hub(self) -> bool:
        return not self.made_here and not self.is_local

    @property
    def is_local(self) -> bool:
        return self.repo.startswith(("/", "."))

    @model_validator(mode="after")
    def _check_revision(self) -> Self:
        if self.repo.startswith("~"):
            raise ValueError(f"{self.repo}: ~ does not stand for a home directory here: write an absolute path, or one from ./")
        if self.on_hub and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError(f"revision {self.revision!r} of {self.repo} {NOT_PINNED}")
        if not self.on_hub and self.revision is not None:
            raise ValueError(f"{self.repo} is not on the Hub: remove its revision")
        return self


def _check_miniature(asset: Asset, key: str, value: object) -> None:
    """Require `key` for an asset that is generated from the seed, and reject it for any other."""
    if asset.made_here != (value is not None):
        raise ValueError(f"{key} {'is missing: repo is miniature' if asset.made_here else 'applies to repo: miniature only'}")


MiniatureSize = Annotated[int, Field(gt=0, multiple_of=32, le=4096)]
"""32 for each attention head."""
MiniatureLayers = Annotated[int, Field(gt=0, le=100)]


class MiniaturePolicy(Section):
    """Architecture and pre-training of the miniature's base policy."""

    hidden_size: MiniatureSize
    layers: MiniatureLayers
    vocabulary: Annotated[int, Field(ge=262, le=65536)]
    """Maximum number of tokens, of which 256 are the bytes and 6 the special tokens."""
    right_answers: Positive
    """Number of clean right answers that it is trained on first."""
    mixed_answers: Positive
    """Number of answers of mixed quality that it is trained on next, which leave SPPO room for improvement."""
    learning_rate: PositiveFloat


class GoldenChat(Section):
    """A prompt and the token IDs of its chat, with which the model's tokenizer and its chat template are checked."""

    text: Text
    ids: Annotated[list[NotNegative], Field(min_length=1)]


class ChatModelAsset(Asset):
    golden: Annotated[list[GoldenChat], Field(min_length=1)] | None = None
    """The token IDs of a few chats; `hub --pin` writes those of the pinned tokenizer. null: no check."""


class PolicyAsset(ChatModelAsset):
    miniature: MiniaturePolicy | None = None
    license: Text | None = None
    """The licence of the base model's card, as the Hub names it (`llama3`, `apache-2.0`, `gemma`): that of the trained models,
    which their cards state. report needs it. Absent if repo is miniature, whose licence is this repository's."""

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        _check_miniature(self, "miniature", self.miniature)
        if self.made_here and self.license:
            raise ValueError("license does not apply to repo: miniature, whose licence is this repository's")
        if self.made_here and self.golden:
            raise ValueError("golden does not apply to repo: miniature, whose tokenizer is trained from the seed: remove it")
        return self


class MiniatureRanker(Section):
    """Architecture and training of the miniature's PairRM-shaped ranker."""

    hidden_size: MiniatureSize
    layers: MiniatureLayers
    prompts: Positive
    """Training prompts, each with `candidates` responses."""
    candidates: Annotated[int, Field(ge=2, le=100)]
    """Of the toy world's distinct answers to a question, which are a few hundred at least."""
    noise: NotNegativeFloat
    """Standard deviation of the noise added to each gold score before preferences are drawn."""
    learning_rate: PositiveFloat


class RankerAsset(Asset):
    base: Asset | None = None
    """The DeBERTa model that PairRM's configuration names, required in addition to its weights."""
    miniature: MiniatureRanker | None = None

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        _check_miniature(self, "miniature", self.miniature)
        return self


class Assignment(Asset):
    """A data set whose splits assign prompts to iterations."""

    column: Text
    splits: dict[str, str]
    """Iteration -> name of the split."""


class PromptsAsset(Asset):
    split: Text | None = None
    column: Text | None = None
    """Split of the data set and its column of prompts; required unless repo is miniature."""
    count: Positive | None = None
    """Number of prompts that the miniature makes."""
    assignment: Assignment | None = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        _check_miniature(self, "count", self.count)
        for key in ("split", "column"):
            if self.made_here != (getattr(self, key) is None):
                raise ValueError(f"{key} {'does not apply to repo: miniature' if self.made_here else 'is missing'}")
        return self


class EvaluationAsset(Asset):
    count: Positive | None = None
    """Number of evaluation prompts, or of questions per task, that the miniature makes."""

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        _check_miniature(self, "count", self.count)
        return self


HarnessTask = Literal["arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu"]


class HarnessAsset(Section):
    """The six data sets of the Open LLM Leaderboard, each an asset, in the order of the published tables."""

    arc_challenge: EvaluationAsset
    truthfulqa_mc2: EvaluationAsset
    winogrande: EvaluationAsset
    gsm8k: EvaluationAsset
    hellaswag: EvaluationAsset
    mmlu: EvaluationAsset


class EvaluationAssets(Section):
    alpaca_eval: EvaluationAsset
    harness: HarnessAsset


class Assets(EvaluationAssets):
    policy: PolicyAsset
    ranker: RankerAsset
    prompts: PromptsAsset


class Split(Section):
    prompts_per_iteration: Positive | None
    """null: all prompts that are assigned to the iteration."""
    hold_out: Annotated[Positive, Field(ge=2)]
    """Prompts that no iteration trains on; the ranker compares the models on them."""
    contamination: Literal["count", "drop", "refuse"]
    """What to do about prompts that AlpacaEval also contains: count them, drop them, or stop."""


class Engine(Section):
    """Settings of vLLM, shared by generate and answer."""

    dtype: Precision
    max_model_length: Positive
    """Maximum number of prompt and response tokens together."""
    stop_token_ids: list[NotNegative]
    """Tokens that end a response, in addition to those of the model's generation config."""
    kv_cache_gib: Annotated[PositiveFloat, Field(le=100_000)] | None
    """Size of the KV cache in GiB; null: what is left of gpu_memory_utilization."""
    max_num_seqs: Positive
    """Responses that are sampled at the same time, at most."""
    max_num_batched_tokens: Positive
    """Tokens that one step of the engine computes, at most: a part of the prompts, and a token of each response that is being
    sampled. At least max_num_seqs and, on a CPU, max_model_length."""
    gpu_memory_utilization: Fraction
    """The part of a GPU's memory (on a CPU: of the machine's) that vLLM uses. As much must be free when it starts, also with
    kv_cache_gib. Not part of the key of unfinished work, so that it can be lowered for a GPU that another program uses."""
    tensor_parallel: Annotated[int, Field(gt=0, le=64)]
    """GPUs that share one copy of the model, for a model that one GPU is too small for. A stage's number of GPUs must be a
    multiple of it."""
    batch_invariant: bool
    """Whether vLLM uses kernels whose results do not depend on what else is in the batch, which are slower and need an NVIDIA
    GPU of compute capability 8.0 or higher."""

    @model_validator(mode="after")
    def _check_room(self) -> Self:
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs ({self.max_num_seqs}) exceeds max_num_batched_tokens ({self.max_num_batched_tokens}), of which "
                "each response needs one: lower it"
            )
        return self


class Generate(Section):
    samples: Annotated[int, Field(ge=2, le=1000)]
    """K responses per prompt, which the ranker compares in K (K - 1) pairs."""
    temperature: Annotated[float, Field(ge=0.01, le=100)]
    """At least 0.01, below which vLLM samples at 0.01 or greedily: that would give the same response K times."""
    top_p: Fraction
    max_new_tokens: Positive
    shard_size: Positive
    """Prompts per unit of work. The shard, not the number of devices, decides what is batched together."""


def _check_temperature(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError(f"{value} is between 0 (greedy decoding) and 0.01, the lowest temperature that vLLM samples at")
    return value


class Answer(Section):
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_check_temperature)]
    """0: greedy decoding."""
    top_p: Fraction
    max_new_tokens: Positive
    shard_size: Positive


class Compare(Section):
    """How a ranker compares responses."""

    scale: PositiveFloat
    """The logit of "i beats j" is scale * (L_ij - L_ji), where L_ij is PairRM's logit with i shown before j. 0.5, the mean of
    the two orders, is this project's choice; 1 is llm-blender's."""
    shard_size: Positive
    tokens_per_batch: Positive
    """Tokens per forward pass, including padding: as many pairs of responses as fit, at least one."""
    attention: Literal["plain", "fused"]
    """How a GPU computes PairRM's attention. plain: by llm-blender's own forward pass. fused: by one kernel per layer, after a
    check that the logits are llm-blender's; it has not run on a GPU yet. A CPU has its own way, whatever is set."""


class Rank(Compare):
    probability: Literal["pairwise", "aggregate"]
    """How P^ is computed from PairRM's logits: the mean of pairwise win probabilities (section 5.3), or the
    sigmoid of the difference between aggregate scores (the released code)."""
    input: Literal["instruction", "templated"]
    """What PairRM reads as the prompt: the instruction itself, as in its training, or the instruction in the policy's chat
    template, special tokens included (the released code)."""


class Lengths(Section):
    """Maximum lengths of training pairs, in tokens. A pair whose prompt and longer response together fit is kept whole."""

    prompt: Positive
    """The part of a prompt that truncation keeps."""
    total: Positive
    """Maximum number of tokens of the prompt and the longer response together."""
    too_long: Literal["drop", "truncate", "released"]
    """What to do about a pair that does not fit. drop: leave it out. truncate: remove as many tokens as needed from the
    start of the prompt, of which `prompt` are kept, then from the end of the responses. released (the released code): keep the
    prompt's last `prompt` tokens and, if that is not enough, the first `total` - `prompt` tokens of both responses."""

    @model_validator(mode="after")
    def _check_room(self) -> Self:
        if self.prompt >= self.total:
            raise ValueError(f"prompt ({self.prompt}) must be below total ({self.total}), which includes the response")
        return self


class Lora(Section):
    """Low-rank adapters on all linear layers instead of full training, merged into the checkpoint that is passed on."""

    rank: NotNegative
    """0: no adapters, all weights are trained."""
    alpha: Positive
    """The product of the adapters is scaled by alpha / rank."""


class Train(Section):
    loss: Literal["sppo", "sppo_hard", "dpo", "ipo"]
    """sppo: eq. 4.7; sppo_hard: the same with 1 and 0 instead of P^; dpo and ipo: the paper's baselines, which use beta."""
    beta: PositiveFloat | None
    """KL coefficient for dpo and ipo; must be null for sppo and sppo_hard, which use eta."""
    lora: Lora
    learning_rate: PositiveFloat
    global_batch: Positive
    """Pairs per optimizer step, on any number of devices."""
    device_batch: Positive
    """Pairs per device and forward pass. Gradient accumulation makes up the rest of the global batch."""
    devices: Annotated[int, Field(gt=0, le=1024)]
    """Processes that train together, on all nodes; each has a GPU of its own, where there are any."""
    nodes: Annotated[int, Field(gt=0, le=1024)]
    """Nodes of a Ray cluster (docs/scaling.md) that share the devices equally; 1: this machine alone. It cannot change a
    result."""
    epochs: Annotated[PositiveFloat, Field(le=10_000)]
    """Epochs of the learning-rate schedule."""
    stop_epoch: PositiveFloat
    """The epoch at which training stops; its checkpoint is passed on to the next iteration."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    max_grad_norm: NotNegativeFloat
    """0: no clipping."""
    dtype: Precision
    """Precision of the forward and backward passes. The optimizer's weights are float32."""
    checkpoint_dtype: Precision
    """Precision of the checkpoint that is passed on to the next iteration."""
    gradient_checkpointing: bool
    attention: Literal["plain", "fused"]
    """How a GPU computes the policy's attention, here and in reference. plain: by the model's own, with a dense mask. fused: by
    one kernel per layer, which skips what is masked, so that pairs need no padding, after checks of its outputs and gradients;
    it has not run on a GPU yet. A CPU computes it the plain way, whatever is set."""
    offload: Literal["none", "optimizer"]
    """optimizer: keep the float32 master weights and the optimizer's state in the host's memory, and compute the optimizer's
    steps on the CPU: slower, but the GPUs hold little more than the weights and activations. none: keep them on the GPUs."""
    checkpoint_steps: NotNegative
    """Steps between checkpoints in scratch/, from which a killed training resumes; 0: none."""
    report_to: Literal["none", "tensorboard", "wandb"]
    """Where the training log is sent live, in addition to its file: to scratch/tensorboard, or to Weights & Biases."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.global_batch % (self.device_batch * self.devices):
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of device_batch {self.device_batch} x devices "
                f"{self.devices}: change device_batch or devices"
            )
        if (self.beta is None) == (self.loss in ("dpo", "ipo")):
            problem = "beta is missing: loss is" if self.beta is None else "beta applies to dpo and ipo, not"
            raise ValueError(f"{problem} {self.loss}")
        if self.stop_epoch > self.epochs:
            raise ValueError(f"stop_epoch {self.stop_epoch} is beyond the schedule's {self.epochs} epochs")
        return self


def _check_address(url: str) -> str:
    """Require an address that cannot hold a key: it is in dvc.lock and in reports. The message must not show it either."""
    if not re.fullmatch(r"https?://[^@?#\s]+", url):
        raise ValueError(
            "expected http(s)://HOST/PATH, without a user, a query or a fragment, which may hold a key: put that into the "
            "environment variable OPENAI_API_KEY"
        )
    return url


class EvaluateAlpaca(Section):
    judge: Text
    """`gold`, the miniature's own rule, or a model, by its name at an OpenAI-compatible endpoint."""
    base_url: Annotated[str, AfterValidator(_check_address)] | None = None
    """The model's endpoint, such as `http://127.0.0.1:8000/v1`; null: OpenAI's. OPENAI_API_KEY holds its key."""
    price_per_million_tokens: NotNegativeFloat | None = None
    """In dollars, for the cost estimate before the first request; null: unknown."""
    workers: Annotated[int, Field(gt=0, le=1000)] | None = None
    """Concurrent requests to the endpoint; required with a model as judge."""

    @model_validator(mode="after")
    def _check_judge(self) -> Self:
        extra = sorted(self.model_fields_set - {"judge"})
        if self.judge == "gold" and extra:
            raise ValueError(f"judge gold is a rule, not a model: remove {', '.join(extra)}")
        if self.judge != "gold" and self.workers is None:
            raise ValueError(f"workers is missing: {self.judge} is a model: set the number of concurrent requests, such as 8")
        return self


def _check_tasks(tasks: list[str]) -> list[str]:
    known = list(HarnessAsset.model_fields)
    if not tasks or tasks != [task for task in known if task in tasks]:
        raise ValueError(f"{quote(tasks)}: expected at least one of {', '.join(known)}, in this order, or null for all of them")
    return tasks


class EvaluateLm(Section):
    tasks: Annotated[list[HarnessTask], AfterValidator(_check_tasks)] | None
    """The tasks to run, in the order of the published tables; null: all six. Only the average of all six is comparable with
    published ones."""
    dtype: Precision
    batch_size: Positive


def _check_iterations(iterations: dict[str, str]) -> dict[str, str]:
    known = {BASE}
    for name, start in iterations.items():
        if not re.fullmatch(MODEL_NAME, name) or name in (BASE, "hold-out"):
            raise ValueError(f"{name!r} is not a valid name for an iteration: use a-z, 0-9 and '-', not 'base' or 'hold-out'")
        if start not in known:
            raise ValueError(f"{name} starts from {start!r}, which is not one of {', '.join(sorted(known))}")
        known.add(name)
    return iterations


class Params(Section):
    """The whole of params.yaml."""

    seed: Seed
    numerics: Numerics
    """portable: on CPUs, the same bytes on every x86-64 processor with AVX2 and for any number of cores. fast: whatever is
    fastest on this processor. GPUs are not affected. See stages/engines/numerics.py."""
    eta: Annotated[PositiveFloat, Field(le=1e18)]
    """SPPO's step size, 1/beta of the released code (eq. 4.7). The loss starts at up to eta^2 / 4, which must fit in
    float32."""
    iterations: Annotated[dict[str, str], Field(min_length=1), AfterValidator(_check_iterations)]
    """Iteration -> the model that it starts from."""
    assets: Assets
    split: Split
    engine: Engine
    generate: Generate
    answer: Answer
    rank: Rank
    lengths: Lengths
    train: Train
    evaluate_alpaca: EvaluateAlpaca
    evaluate_lm: EvaluateLm


class ModelAsset(ChatModelAsset):
    """A model that exists already: a local directory, or a pinned revision on the Hub."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        _require_existing(self)
        return self


class ExistingRanker(Asset):
    """A ranker with PairRM's architecture that exists already: a local directory, or a pinned revision on the Hub."""

    base: Asset
    """The DeBERTa model that it is based on, of which only the configuration and tokenizer are needed."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        _require_existing(self)
        _require_existing(self.base)
        return self


def _require_existing(asset: Asset) -> None:
    if asset.made_here:
        raise ValueError(
            f"repo is {MINIATURE}, which only a pipeline with training makes: set it to a directory or to a Hub ID"
        )


def _check_models(models: dict[str, ModelAsset]) -> dict[str, ModelAsset]:
    _check_names(models)
    if next(iter(models), None) != BASE:
        raise ValueError(
            f"the first model is {quote(next(iter(models), None))}, expected {BASE}, which the others are compared with"
        )
    return models


def _check_names(section: dict[str, Named]) -> dict[str, Named]:
    for name in section:
        if not re.fullmatch(MODEL_NAME, name):
            raise ValueError(f"{name!r} is not a valid name for a model: use a-z, 0-9 and '-'")
    return section


class EvaluationParams(Section):
    """The whole of params.yaml in a recipe that evaluates existing models, without training any."""

    seed: Seed
    numerics: Numerics
    models: Annotated[dict[str, ModelAsset], AfterValidator(_check_models)]
    """Model -> where it comes from; the first is `base`, and each is compared with it and with the one before."""
    answers: Annotated[dict[str, Text], AfterValidator(_check_names)]
    """Model -> a file with its answers to AlpacaEval's instructions, as in alpaca-eval's model_outputs.json; {}: none. They are
    judged like the answers of `models`, whose rows they follow in the tables of AlpacaEval."""
    rankers: Annotated[dict[str, ExistingRanker], AfterValidator(_check_names)]
    """Ranker -> where it comes from; {}: none. Each compares the answers of all models with each other."""
    assets: EvaluationAssets
    engine: Engine
    answer: Answer
    rank: Compare
    """How `rankers` compare."""
    evaluate_alpaca: EvaluateAlpaca
    evaluate_lm: EvaluateLm

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        if both := sorted(self.models.keys() & self.answers.keys()):
            raise ValueError(f"answers: {both[0]} is also one of models: choose another name")
        if both := sorted(self.rankers.keys() & (self.models.keys() | self.answers.keys())):
            raise ValueError(f"rankers: {both[0]} is also one of models or answers: choose another name")
        return self


def load(*keys: str, path: Path = Path("params.yaml")) -> Any:
    """Read and validate the named keys of params.yaml; dots separate the levels (`assets.policy`). The keys are those of
    EvaluationParams if they include `models`, `answers` or `rankers`, otherwise those of Params.

    Returns an object with exactly one attribute per key, named after the last part of the key.
    Raises StageError with one line that names the file, the key and the problem.
    """
    document = read(path)
    values: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    # What both have under the same key is the same, except for `rank` and `assets` as a whole, which are loaded with `models`.
    schema = EvaluationParams if {"models", "answers", "rankers"} & set(keys) else Params
    for key in keys:
        section: type[BaseModel] = schema
        value: Any = document
        *parents, last = key.split(".")
        for parent in parents:
            section = section.model_fields[parent].annotation  # type: ignore[assignment]
            value = value.get(parent, {}) if isinstance(value, dict) else {}
        field = section.model_fields[last]
        fields[last] = (Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation, ...)
        if isinstance(value, dict) and last in value:
            values[last] = value[last]
    model = create_model("Params", __base__=Section, **fields)
    loaded = validate_model(model, values, path, {key.rpartition(".")[2]: key for key in keys})
    assert loaded.model_dump(exclude_unset=True) == values  # validation changes no value
    return loaded


def is_evaluation(document: dict[str, Any]) -> bool:
    """Return whether the contents of params.yaml are those of a recipe that evaluates existing models: EvaluationParams."""
    return "models" in document


def validate(path: Path) -> Params:
    """Validate the whole file. Raises StageError, also for a recipe that evaluates existing models."""
    document = read(path)
    _require_training(document, path)
    return validate_model(Params, document, path)


def validate_evaluation(document: dict[str, Any], path: Path) -> EvaluationParams:
    """Validate the contents of `path`, those of a recipe that evaluates existing models, except for revisions that
    `hub --pin` has yet to look up. Raises StageError."""
    return validate_model(EvaluationParams, _pretend_pinned(document), path)


def validate_unpinned(document: dict[str, Any], path: Path) -> Params:
    """Validate the contents of `path` except for revisions that `hub --pin` has yet to look up.

    Raises StageError, also for a recipe that evaluates existing models.
    """
    _require_training(document, path)
    return validate_model(Params, _pretend_pinned(document), path)


def _require_training(document: dict[str, Any], path: Path) -> None:
    if is_evaluation(document):
        raise StageError(
            f"{path}: this recipe evaluates existing models, and this tool applies to recipes that train only: see "
            "docs/reproducing.md, 'Evaluate the published checkpoints first'"
        )


def unchecked_asset(repo: str) -> Asset:
    """Return an asset that is not validated, to ask where its `repo` is."""
    return Asset.model_construct(repo=repo)


def find_named(section: str, entries: Mapping[str, Named], name: str) -> Named:
    """Return the entry of a section of params.yaml that a stage's option --name names. Raises StageError if there is none."""
    if name not in entries:
        known = ", ".join(entries) or f"none, there are no {section}"
        raise StageError(f"params.yaml: {section}: {quote(name)} is not one of {known}: add it, or correct --name")
    return entries[name]


def _pretend_pinned(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    copy = {key: _pretend_pinned(value) for key, value in node.items()}
    if isinstance(node.get("repo"), str) and unchecked_asset(node["repo"]).on_hub:
        copy["revision"] = "0" * 40
    return copy


def read(path: Path) -> dict[str, Any]:
    """Read the YAML mapping in `path`, without validating it. Raises StageError if there is none."""
    if not path.is_file():
        raise StageError(f"{path.resolve()} is missing: run stages in the folder of params.yaml and published.yaml")
    return documents.load_mapping(path.read_bytes(), str(path))


def validate_model(model: type[Model], values: dict[str, Any], path: Path, names: dict[str, str] | None = None) -> Model:
    """Validate values read from `path`. names: model field -> key in the file, where they differ. Raises StageError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_describe_problem(problem, names or {}) for problem in error.errors()]
        if any(NOT_PINNED in line for line in lines):
            folder = path.resolve().parent
            place = shlex.quote(str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder))
            lines.append(f"branches move: look commits up once with `python -m stages.tools hub --pin --recipe {place}`")
        raise StageError(f"{path}: " + "; ".join(lines)) from error


def _describe_problem(problem: Any, names: dict[str, str]) -> str:
    """Format one of pydantic's errors: the key, the problem and, unless the message contains it, the value."""
    head, *tail = [str(part) for part in problem["loc"]] or ["file"]
    key = ".".join([names.get(head, head), *tail])
    kind = problem["type"]
    message = {"missing": "is missing", "extra_forbidden": "is not a parameter: correct its name or remove it"}.get(
        kind, problem["msg"].removeprefix("Value error, ")
    )
    value = "" if kind in ("missing", "value_error", "extra_forbidden") else f" (got {quote(problem['input'])})"
    return f"{key}: {message}{value}"

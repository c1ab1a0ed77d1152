"""params.yaml: every parameter declared, validated and documented once.

A stage asks for the sections it reads, `load("seed", "generate")`, and dvc.yaml lists the same keys as its params;
a test compares the two. Unknown or missing keys, wrong types and values out of range stop the stage with one message.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from stages import documents
from stages.cli import ROOT, StageError, shown

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Precision = Literal["float32", "bfloat16"]

BASE = "base"
"""The model that the first iteration starts from."""
MINIATURE = "miniature"
NOT_PINNED = "is not a full 40-digit commit"

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Asset(Section):
    """Something the experiment starts from: made here, a local directory, or a pinned revision on the Hub."""

    repo: Annotated[str, Field(min_length=1)]
    """`miniature` (made from the seed), a directory (starts with `/` or `.`), or the id of a Hub repository."""
    revision: str | None = None
    """40-digit commit of the Hub repository. `python -m stages.assets --pin RECIPE` looks it up."""

    @property
    def made_here(self) -> bool:
        return self.repo == MINIATURE

    @property
    def on_hub(self) -> bool:
        return not self.made_here and not self.repo.startswith(("/", "."))

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.on_hub and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError(f"revision {self.revision!r} of {self.repo} {NOT_PINNED}")
        if not self.on_hub and self.revision is not None:
            raise ValueError(f"{self.repo} is not on the Hub: leave its revision out")
        return self


def _check_sizes(asset: Asset, key: str, sizes: object) -> None:
    """Refuse an asset that is made here without its sizes, or that is not and has some."""
    if asset.made_here != (sizes is not None):
        raise ValueError(f"{key} {'is missing: repo is miniature' if asset.made_here else 'goes with repo: miniature only'}")


class MiniaturePolicy(Section):
    """Size and schooling of the miniature's base policy."""

    hidden_size: Positive
    layers: Positive
    vocabulary: Positive
    right_answers: Positive
    """Clean right answers it is trained on first."""
    mixed_answers: Positive
    """Answers of mixed quality that follow: what SPPO then has to improve."""
    learning_rate: PositiveFloat


class PolicyAsset(Asset):
    miniature: MiniaturePolicy | None = None

    @model_validator(mode="after")
    def _sized(self) -> Self:
        _check_sizes(self, "miniature", self.miniature)
        return self


class MiniatureRanker(Section):
    """Size and schooling of the miniature's PairRM-shaped ranker."""

    hidden_size: Positive
    layers: Positive
    prompts: Positive
    """Prompts it is trained on, each with `candidates` responses."""
    candidates: Annotated[int, Field(ge=2)]
    noise: Annotated[float, Field(ge=0)]
    """Standard deviation of the noise on each gold score that its preferences are drawn from."""
    learning_rate: PositiveFloat


class RankerAsset(Asset):
    base: Asset | None = None
    """The DeBERTa model that PairRM's configuration names, needed beside its weights."""
    miniature: MiniatureRanker | None = None

    @model_validator(mode="after")
    def _sized(self) -> Self:
        _check_sizes(self, "miniature", self.miniature)
        return self


class Parts(Asset):
    """A data set whose splits say which iteration a prompt belongs to."""

    column: str
    splits: dict[str, str]
    """Iteration name -> name of the split."""


class PromptsAsset(Asset):
    split: str = "train"
    column: str = "instruction"
    count: Positive | None = None
    """How many prompts the miniature makes."""
    parts: Parts | None = None

    @model_validator(mode="after")
    def _sized(self) -> Self:
        _check_sizes(self, "count", self.count)
        return self


class EvaluationAsset(Asset):
    count: Positive | None = None
    """How many evaluation prompts, or questions a task, the miniature makes."""

    @model_validator(mode="after")
    def _sized(self) -> Self:
        _check_sizes(self, "count", self.count)
        return self


class HarnessAsset(Section):
    """The six data sets of the Open LLM Leaderboard, each an asset, in the published tables' order."""

    arc_challenge: EvaluationAsset
    truthfulqa_mc2: EvaluationAsset
    winogrande: EvaluationAsset
    gsm8k: EvaluationAsset
    hellaswag: EvaluationAsset
    mmlu: EvaluationAsset


class Assets(Section):
    policy: PolicyAsset
    ranker: RankerAsset
    prompts: PromptsAsset
    alpaca_eval: EvaluationAsset
    harness: HarnessAsset


class Split(Section):
    prompts_per_iteration: Positive | None
    """null: all of a given part."""
    hold_out: Annotated[int, Field(ge=2)]
    """Prompts that no iteration trains on; on them the ranker compares the models."""
    contamination: Literal["count", "drop", "refuse"]
    """What is done about prompts that are in AlpacaEval too: they are counted, dropped, or a reason to stop."""


class Engine(Section):
    """vLLM, for generate and answer alike."""

    dtype: Precision
    max_model_length: Positive
    """Prompt and response tokens together."""
    stop_token_ids: list[NotNegative]
    """Tokens that end a response, besides those of the model's generation config."""
    kv_cache_gib: PositiveFloat | None
    """Memory for keys and values; null leaves it to vLLM (nine tenths of the GPU)."""


class Generate(Section):
    samples: Annotated[int, Field(ge=2)]
    """K responses per prompt."""
    temperature: Annotated[float, Field(ge=0)]
    top_p: Fraction
    max_new_tokens: Positive
    shard_size: Positive
    """Prompts per unit of work. The shard, not the number of devices, decides what is batched together."""


class Answer(Section):
    temperature: Annotated[float, Field(ge=0)]
    top_p: Fraction
    max_new_tokens: Positive
    shard_size: Positive


class Rank(Section):
    probability: Literal["pairwise", "aggregate"]
    """How P^ follows from PairRM's logits: the mean of pairwise win probabilities (section 5.3), or the released code's
    sigmoid of differences of aggregate scores."""
    input: Literal["instruction", "templated"]
    """What PairRM reads as the prompt: the instruction itself, as it was trained, or the policy's chat template around it,
    special tokens included (the released code)."""
    shard_size: Positive
    tokens_per_batch: Positive
    """Tokens of a forward pass, padding counted: of as many pairs of prompt and two responses as fit, at least one."""


class Lengths(Section):
    """What fits in training, in tokens."""

    prompt: Positive
    total: Positive
    too_long: Literal["drop", "truncate"]
    """drop the pair, or truncate: keep the prompt's end and the response's beginning (the released code)."""

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.prompt >= self.total:
            raise ValueError(f"prompt ({self.prompt}) must be below total ({self.total}), which holds the response too")
        return self


class Lora(Section):
    """Low-rank adapters on all linear layers instead of full training, merged into the checkpoint that is handed on."""

    rank: NotNegative
    """0: no adapters, all weights are trained."""
    alpha: Positive
    """The adapters' product is scaled by alpha / rank."""


class Train(Section):
    loss: Literal["sppo", "sppo_hard", "dpo", "ipo"]
    """sppo: eq. 4.7; sppo_hard: the same with 1 and 0 in the place of P^; dpo and ipo: the paper's baselines, with beta."""
    beta: PositiveFloat | None
    """Of dpo and ipo; null for the others, whose step size is eta."""
    lora: Lora
    learning_rate: PositiveFloat
    global_batch: Positive
    """Pairs per optimizer step, on any number of devices."""
    device_batch: Positive
    """Pairs per device and forward pass; gradient accumulation follows from it."""
    devices: Positive
    epochs: PositiveFloat
    """Epochs of the learning-rate schedule."""
    stop_epoch: PositiveFloat
    """Where training stops and the checkpoint goes on to the next iteration."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    max_grad_norm: Annotated[float, Field(ge=0)]
    """0: no clipping."""
    dtype: Precision
    gradient_checkpointing: bool
    checkpoint_steps: NotNegative
    """Steps from one checkpoint in scratch to the next, from which a killed training goes on; 0: none."""
    report_to: Literal["none", "tensorboard", "wandb"]
    """Where the training log goes while it grows, beside its file: to scratch/tensorboard, or to Weights & Biases."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.global_batch % (self.device_batch * self.devices):
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of device_batch {self.device_batch} x devices "
                f"{self.devices}: change device_batch or devices so that it is"
            )
        if (self.beta is None) == (self.loss in ("dpo", "ipo")):
            raise ValueError(
                f"beta {'is missing: loss' if self.beta is None else 'goes with loss dpo or ipo, and it'} is {self.loss}"
            )
        if self.stop_epoch > self.epochs:
            raise ValueError(f"stop_epoch {self.stop_epoch} is beyond the schedule's {self.epochs} epochs")
        return self

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.device_batch * self.devices)


class EvaluateAlpaca(Section):
    judge: Annotated[str, Field(min_length=1)]
    """`gold`, the miniature's own rule, or a model, by the name that its OpenAI-compatible endpoint knows it by."""
    base_url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")] | None = None
    """The model's endpoint, `http://127.0.0.1:8000/v1`; null: OpenAI's. OPENAI_API_KEY in the environment is the key to it."""
    price_per_million_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """In dollars, for the estimate before the first request; null: not known."""
    workers: Positive = 8
    """Requests to the endpoint at a time."""

    @model_validator(mode="after")
    def _asked(self) -> Self:
        extra = sorted(self.model_fields_set - {"judge"})
        if self.judge == "gold" and extra:
            raise ValueError(f"judge gold is a rule, not a model: leave {', '.join(extra)} out")
        return self


class EvaluateLm(Section):
    dtype: Precision
    batch_size: Positive


def _iterations(iterations: dict[str, str]) -> dict[str, str]:
    known = {BASE}
    for name, start in iterations.items():
        if not re.fullmatch("[a-z][a-z0-9-]*", name) or name in (BASE, "hold-out"):
            raise ValueError(f"{name!r} is no name for an iteration: small letters, digits and '-', not 'base' or 'hold-out'")
        if start not in known:
            raise ValueError(f"{name} starts from {start!r}, which is not one of {', '.join(sorted(known))}")
        known.add(name)
    return iterations


class Params(Section):
    """The whole of params.yaml."""

    seed: NotNegative
    eta: PositiveFloat
    """SPPO's step size, 1/beta of the released code (eq. 4.7)."""
    iterations: Annotated[dict[str, str], Field(min_length=1), AfterValidator(_iterations)]
    """Name -> the model it starts from."""
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


class PublishedAlpacaEval(Section):
    """One model's published figures: percent, and length in characters."""

    length_controlled_winrate: float
    lc_standard_error: float | None = None
    win_rate: float
    standard_error: float | None = None
    avg_length: float | None = None


class PublishedTable(Section):
    source: str


class PublishedAlpacaEvalTable(PublishedTable):
    judge: str
    models: dict[str, PublishedAlpacaEval]


class PublishedHarnessTable(PublishedTable):
    models: dict[str, dict[str, float]]
    """Model -> task or `average` -> percent."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name, figures in self.models.items():
            if list(figures) != [*HarnessAsset.model_fields, "average"]:
                raise ValueError(f"{name}: the six tasks and their average are wanted, in the published order")
        return self


class Published(Section):
    """published.yaml: the figures that the reports compare with, by the names of params.yaml's models."""

    models: dict[str, str]
    """Model -> the published model's name."""
    alpaca_eval: PublishedAlpacaEvalTable
    open_llm_leaderboard: PublishedHarnessTable | None = None


class PublishedFile(Section):
    published: Published | None
    """null where there are none."""


def published(path: Path) -> Published | None:
    """Read and validate published.yaml. Raises StageError."""
    return _validated(PublishedFile, read(path), path, {}).published


class Variant(Section):
    """recipes/variants/*.yaml: what a variant of a recipe has otherwise."""

    params: dict[str, Any]
    """Key in params.yaml, dotted -> value."""
    published: dict[str, Published] | None = None
    """Base policy's repo -> figures published of this variant of it; no such key: those of the recipe stay."""


def variant(path: Path) -> Variant:
    """Read and validate a variant, all but the values of its parameters. Raises StageError."""
    return _validated(Variant, read(path), path, {})


def models(iterations: dict[str, str]) -> list[str]:
    """The names of all models: the base and one of each iteration."""
    return [BASE, *iterations]


def load(*keys: str, path: Path = Path("params.yaml")) -> Any:
    """Read and validate the named keys of params.yaml, dots for a part of a section (`assets.policy`).

    Returns an object with one attribute per key, named after its last part. No other key can be read through it.
    Raises StageError with one line that names file, key and what is wrong.
    """
    document = read(path)
    wanted: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for key in keys:
        section: type[BaseModel] = Params
        value: Any = document
        *parents, last = key.split(".")
        for parent in parents:
            section = section.model_fields[parent].annotation  # type: ignore[assignment]
            value = value.get(parent, {}) if isinstance(value, dict) else {}
        field = section.model_fields[last]
        fields[last] = (Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation, ...)
        if isinstance(value, dict) and last in value:
            wanted[last] = value[last]
    model = create_model("Params", __base__=Section, **fields)
    return _validated(model, wanted, path, {key.rpartition(".")[2]: key for key in keys})


def validate(path: Path) -> Params:
    """Validate the whole file. Raises StageError."""
    return _validated(Params, read(path), path, {})


def validate_unpinned(document: dict[str, Any], path: Path) -> Params:
    """Validate what stands or is to stand in `path`, but for revisions that `--pin` is to look up. Raises StageError."""
    return _validated(Params, _as_if_pinned(document), path, {})


def _as_if_pinned(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    copy = {key: _as_if_pinned(value) for key, value in node.items()}
    if isinstance(node.get("repo"), str) and Asset.model_construct(repo=node["repo"]).on_hub:
        copy["revision"] = "0" * 40
    return copy


def read(path: Path) -> dict[str, Any]:
    """The YAML mapping in `path`, unvalidated. Raises StageError where there is none."""
    if not path.is_file():
        raise StageError(f"{path.resolve()} is missing: stages run in the folder of params.yaml and published.yaml")
    return documents.mapping(path.read_bytes(), str(path))


def _validated(model: type[Model], values: dict[str, Any], path: Path, names: dict[str, str]) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"])
            head, _, tail = where.partition(".")
            where = names.get(head, head) + (f".{tail}" if tail else "")
            message = {"missing": "is missing", "extra_forbidden": "is not a parameter"}.get(
                problem["type"], problem["msg"].removeprefix("Value error, ")
            )
            given = (
                ""
                if problem["type"] in ("missing", "value_error", "extra_forbidden")
                else f" (found {shown(problem['input'])})"
            )
            lines.append(f"{where or 'file'}: {message}{given}")
        if any(NOT_PINNED in line for line in lines):
            folder = path.resolve().parent
            folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
            lines.append(f"branches move: look commits up once with `python -m stages.assets --pin {folder}`")
        raise StageError(f"{path}: " + "; ".join(lines)) from error

"""Sizes that work depends on: of the policy, the prompts, the responses and the evaluation set.

They are taken from an earlier run, or from local files that params.yaml names, if there are any, otherwise from the assumptions
in this module, which are printed with the plan.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.artifacts import files, pointers
from stages.assets import alpaca_eval, prompts
from stages.runtime import params
from stages.runtime.errors import StageError, describe
from stages.runtime.params import Asset, EvaluationParams, Params
from stages.tools.planning.memory import SHAPES, Shape

Source = TypeVar("Source", bound=Asset)

PROMPTS = 20_000
PROMPT_TOKENS, RESPONSE_TOKENS = 190, 375
"""Estimates: a third of UltraFeedback, the mean lengths of its prompts and of Llama-3-8B-Instruct's responses."""
INSTRUCTIONS = 805
"""Of AlpacaEval's set on the Hub."""


@dataclass(frozen=True)
class Size:
    """Sizes that work depends on: prompts per iteration, mean tokens of a prompt and of a response, the policy's parameters,
    and AlpacaEval's instructions.

    prompts: 0 if there are no iterations.
    """

    prompts: float
    prompt_tokens: float
    response_tokens: float
    parameters: float
    instructions: int = INSTRUCTIONS


def measure_size(folder: Path, settings: Params | EvaluationParams) -> tuple[Size, list[str]]:
    """Return the sizes of the experiment in `folder`, and the assumptions made for lack of an earlier run.

    Raises StageError if the policy's number of parameters is unknown.
    """
    assumed = []
    sampled = sorted((folder / "data/responses").glob("*.parquet"))
    count = count_prompts(folder, settings) if isinstance(settings, Params) else 0
    if sampled:
        table = pq.read_table(sampled[0], columns=["prompt_token_ids", "token_counts"])
        lengths = pc.mean(pc.list_value_length(table["prompt_token_ids"])), pc.mean(pc.list_flatten(table["token_counts"]))
        prompt_tokens, response_tokens = (value.as_py() for value in lengths)
        count = table.num_rows if count is None else count
    else:
        prompt_tokens, response_tokens = PROMPT_TOKENS, RESPONSE_TOKENS
        assumed.append(f"{PROMPT_TOKENS} tokens per prompt and {RESPONSE_TOKENS} per response")
    if count is None:
        count = PROMPTS
        assumed.append(f"{PROMPTS:,} prompts per iteration")
    parameters, instructions = count_parameters(folder, settings), count_instructions(folder, settings)
    return Size(count, prompt_tokens, response_tokens, parameters, instructions), assumed


def count_prompts(folder: Path, settings: Params) -> float | None:
    """Return the number of prompts per iteration: `split.prompts_per_iteration` or, if it is null, the mean number that a local
    data set assigns to an iteration. None if that is not known before the data set is fetched."""
    asset = settings.assets.prompts
    if settings.split.prompts_per_iteration or asset.made_here:
        return settings.split.prompts_per_iteration
    if asset.on_hub or (asset.assignment and asset.assignment.on_hub):
        return None
    assigned = asset.assignment and locate(asset.assignment, folder)
    rows = prompts.read_prompts(locate(asset, folder).model_copy(update={"assignment": assigned}))
    return sum(iteration in settings.iterations for _, iteration in rows) / len(settings.iterations)


def count_instructions(folder: Path, settings: Params | EvaluationParams) -> int:
    """Count AlpacaEval's instructions: those of the miniature, of a local set, of an earlier run, or of the set on the Hub."""
    asset, fetched = settings.assets.alpaca_eval, folder / "data/alpaca_eval_set/instructions.json"
    if asset.count:
        return asset.count
    original = folder / asset.repo / alpaca_eval.REFERENCE_OUTPUTS
    if asset.on_hub and not fetched.exists():
        return INSTRUCTIONS
    return len(files.read_records(fetched if asset.on_hub or not original.exists() else original, ["instruction"]))


def locate(asset: Source, folder: Path) -> Source:
    """Return a local asset with a path that does not depend on the current folder. folder: that of params.yaml."""
    return asset.model_copy(update={"repo": str((folder / asset.repo).resolve())})


def count_parameters(folder: Path, settings: Params | EvaluationParams) -> float:
    """Count the base policy's parameters in its files or, if they are not on this machine, by their size; otherwise look them
    up. Raises StageError if unknown."""
    base = find_base(folder, settings)
    if not base:
        return find_shape(folder, settings).parameters
    try:
        return count_weights(pointers.resolve(base))
    except StageError:
        if not (base / pointers.NAME).exists():
            raise
    bytes_each = 2 if settings.engine.dtype == "bfloat16" else 4
    listed = pointers.read(base)["files"]  # a snapshot that is no longer in the Hub cache
    return float(sum(file["size"] for name, file in listed.items() if name.endswith(".safetensors")) / bytes_each)


def count_weights(folder: Path) -> float:
    """Count the parameters of a model by the headers of its safetensors files, whatever their precision. Raises StageError."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for name in pointers.list_weights(folder):
        try:
            with safe_open(files.require(folder / name), "np") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StageError(f"{folder / name} is corrupted ({describe(error)}): recreate it") from error
    return float(total)


def find_shape(folder: Path, settings: Params | EvaluationParams) -> Shape:
    """Return the shape of the base policy from its files, if they exist, or look it up. Raises StageError if unknown."""
    asset, base = get_base_asset(settings), find_base(folder, settings)
    if asset.repo in SHAPES:
        return SHAPES[asset.repo]
    if base:
        return read_shape(pointers.resolve(base) / "config.json", count_parameters(folder, settings))
    if isinstance(asset, params.PolicyAsset) and asset.miniature:
        width, vocabulary, layers = asset.miniature.hidden_size, asset.miniature.vocabulary, asset.miniature.layers
        return Shape(float(12 * layers * width**2 + 2 * vocabulary * width), layers, width, 2 * width, width, vocabulary)
    stage = "assets-policy" if isinstance(settings, Params) else "assets-model@base"
    raise StageError(f"{folder}: the number of parameters of {asset.repo} is unknown: fetch it with `dvc repro {stage}`")


def get_base_asset(settings: Params | EvaluationParams) -> Asset:
    return settings.assets.policy if isinstance(settings, Params) else settings.models[params.BASE]


def find_base(folder: Path, settings: Params | EvaluationParams) -> Path | None:
    """Return the folder of the base policy, or of its pointer: the pipeline's or, before it has run, the local original."""
    asset = get_base_asset(settings)
    places = [folder / "data/models/base", *([folder / asset.repo] if asset.is_local else [])]
    return next((place for place in places if place.is_dir()), None)


def read_shape(path: Path, parameters: float) -> Shape:
    """Read a model's shape from its config.json. Raises StageError if a size is missing."""
    config = files.read_json(path)
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        key_width = config.get("num_key_value_heads", heads) * (config.get("head_dim") or hidden // heads)
        return Shape(
            parameters, config["num_hidden_layers"], hidden, config["intermediate_size"], key_width, config["vocab_size"]
        )
    except KeyError as error:
        raise StageError(f"{path}: {error} is missing, so the memory cannot be estimated: use a model like Llama") from error

"""The memory that a stage needs, on each GPU and on the host: what `plan` prints beside its hours.

Bytes that follow from params.yaml and the shape of the model are counted; what libraries need is assumed, by the constants of
this module. Nothing here has been compared with a full-size run.
"""

from collections.abc import Callable
from dataclasses import dataclass

from stages.runtime.params import Engine, EvaluationParams, Params, Precision

BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2}
PROCESS = 3e9
"""Host memory of a process: Python, torch, CUDA's libraries, and the stage's tables. Assumed."""
ENGINE = 3e9
"""GPU memory of vLLM beside weights and KV cache: activations, logits of a batch, CUDA graphs. Assumed."""
RANKER_WEIGHTS = 0.87e9
"""PairRM, a DeBERTa-v3-large, in float16."""
RANKER_LENGTH = 2048
"""Tokens of PairRM's longest pairs."""
LOGITS = 1024
"""Tokens whose logits training holds at a time."""
LIVE_PARAMETERS = 1e9
"""Parameters that ZeRO-3 gathers from all GPUs at a time, and those whose gradients it converts at a time: DeepSpeed's
defaults of stage3_max_live_parameters and sub_group_size."""
BUCKET = 5e8
"""Gradients that ZeRO-3 collects before it reduces them, in a buffer of its own: DeepSpeed's default of reduce_bucket_size."""
HARNESS_LENGTH = 3000
"""Tokens of the longest few-shot requests. Assumed."""


@dataclass(frozen=True)
class Shape:
    """Shape of a causal language model: numbers of parameters and layers, width of the hidden states, the feed-forward layers
    and the keys (key-value heads times their dimension), and the size of the vocabulary."""

    parameters: float
    layers: int
    hidden: int
    intermediate: int
    key_width: int
    vocabulary: int


SHAPES = {
    "meta-llama/Meta-Llama-3-8B-Instruct": Shape(8.03e9, 32, 4096, 14336, 1024, 128256),
    "mistralai/Mistral-7B-Instruct-v0.2": Shape(7.24e9, 32, 4096, 14336, 1024, 32000),
    "google/gemma-2-9b-it": Shape(9.24e9, 42, 3584, 14336, 2048, 256000),
    "Qwen/Qwen2.5-1.5B-Instruct": Shape(1.54e9, 28, 1536, 8960, 256, 151936),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(134.5e6, 30, 576, 1536, 192, 49152),
}
"""Policies by their ID on the Hub, from their config.json, used until their files are fetched."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage needs on each GPU, and on the host for all processes together; and the part of a GPU's memory that
    the stage may take."""

    gpu: float = 0
    host: float = 0
    share: float = 1


def estimate_memory(stage: str, settings: Params | EvaluationParams, shape: Shape, gpus: int) -> Memory:
    """Estimate the memory of a stage, by its name in `python -m stages NAME`, on a machine with `gpus` GPUs.

    Nothing for a stage that uses no GPU: what it needs on the host is a matter of its tables.
    """
    if isinstance(settings, Params) and stage in TRAINING_ESTIMATES:
        return TRAINING_ESTIMATES[stage](settings, shape, gpus)
    if stage.startswith("answer"):
        return estimate_sampling(settings.engine, shape, gpus)
    if stage == "compare-answers":
        return estimate_ranking(settings, shape, gpus)
    if stage == "evaluate-lm":
        return estimate_evaluate_lm(settings, shape, gpus)
    return Memory()


def name_remedy(stage: str, settings: Params | EvaluationParams) -> str:
    """Return what to change in params.yaml if a GPU has too little memory for a stage."""
    if stage == "generate" or stage.startswith("answer"):
        if settings.engine.kv_cache_gib is not None:
            return "lower engine.kv_cache_gib, or raise engine.tensor_parallel"
        return "raise engine.gpu_memory_utilization or engine.tensor_parallel, or lower engine.max_model_length"
    if stage in ("rank", "compare", "compare-answers"):
        return "lower rank.tokens_per_batch"
    if stage == "evaluate-lm":
        return "lower evaluate_lm.batch_size"
    assert isinstance(settings, Params)
    if settings.train.device_batch > 1 or stage == "reference":
        return "lower train.device_batch, or raise train.devices"
    return "raise train.devices, or set train.offload=optimizer or train.lora"


def estimate_sampling(engine: Engine, shape: Shape, gpus: int) -> Memory:
    """vLLM with a model on every engine.tensor_parallel GPUs.

    Without engine.kv_cache_gib, it takes engine.gpu_memory_utilization of each GPU, and does not start unless the cache has
    room for one of the longest requests.
    """
    each = BYTES[engine.dtype] / engine.tensor_parallel
    host = gpus * PROCESS
    if engine.kv_cache_gib is not None:
        return Memory(shape.parameters * each + engine.kv_cache_gib * 2**30 + ENGINE, host)
    longest = 2 * shape.layers * shape.key_width * each * engine.max_model_length
    return Memory(shape.parameters * each + longest + ENGINE, host, engine.gpu_memory_utilization)


def estimate_ranking(settings: Params | EvaluationParams, shape: Shape, gpus: int) -> Memory:
    """PairRM on each GPU; the miniature's own ranker needs almost nothing.

    That of llm-blender's forward pass. `rank.attention=fused`, which stores no matrix of scores, needs less.
    """
    if isinstance(settings, Params) and settings.assets.ranker.made_here:
        return Memory(host=gpus * PROCESS)
    batch = settings.rank.tokens_per_batch * ranker_bytes_per_token(RANKER_LENGTH)
    return Memory(RANKER_WEIGHTS + batch, gpus * PROCESS)


def ranker_bytes_per_token(length: int) -> float:
    """Bytes per token of a batch of pairs of this length in transformers' forward pass of DeBERTa-v3-large, in float16.

    The hidden states of all layers, and five matrices of scores of 16 heads with their mask; or the feed-forward layer, if
    pairs are short. Fitted to counts on torch's meta device, within a tenth of them.
    """
    return max(113e3, 57.5e3 + 168.2 * length)


def estimate_reference(settings: Params, shape: Shape, gpus: int) -> Memory:
    """The policy in ZeRO-3's shards, without gradients."""
    train = settings.train
    gpu = partitioned_weights(settings, shape) + layer_activations(settings, shape) + held_logits(settings, shape)
    return Memory(gpu, train.devices * PROCESS)


def estimate_train(settings: Params, shape: Shape, gpus: int) -> Memory:
    """The policy in ZeRO-3's shards with gradients and RMSProp's state, or with adapters, at the longest pairs.

    With either `train.attention`: of the longest pairs, a batch has as many tokens without padding as with it, and neither the
    dense mask (some ten MB a pair) nor the fused attention's list of blocks counts beside the rest.
    """
    train = settings.train
    each, offloaded = BYTES[train.dtype], train.offload == "optimizer"
    trained = count_adapters(settings, shape) if train.lora.rank else shape.parameters
    summed = 4 if train.global_batch > train.devices * train.device_batch else each  # gradients of several batches: float32
    state = trained * (summed + 4 + (4 if each == 2 else 0))  # gradients, mean squares, and master weights if they are separate
    saved = held_pair_tokens(settings) * shape.layers * shape.hidden * each  # the input of every layer
    inner = layer_activations(settings, shape) * (1 if train.gradient_checkpointing else shape.layers)
    converted = 4 * min(trained / train.devices, LIVE_PARAMETERS)  # float32 gradients of one group, during a step
    gpu = partitioned_weights(settings, shape) + BUCKET * each + max(saved + inner + held_logits(settings, shape), converted)
    host = train.devices * PROCESS + measure_ends(settings, shape)
    if offloaded:
        return Memory(
            gpu, host + trained * (4 + 4 + 4 + summed)
        )  # master weights, mean squares, gradients of a step and a batch
    return Memory(gpu + state / train.devices, host)


def estimate_evaluate_lm(settings: Params | EvaluationParams, shape: Shape, gpus: int) -> Memory:
    """The policy on each GPU, and for a batch of the longest requests the logits and their log-softmax, both in float32, beside
    the log-softmax of the batch before, which lm-eval still holds (`HFLM._loglikelihood_tokens`)."""
    logits = settings.evaluate_lm.batch_size * HARNESS_LENGTH * shape.vocabulary * (4 + 4 + 4)
    return Memory(shape.parameters * BYTES[settings.evaluate_lm.dtype] + logits, gpus * PROCESS)


TRAINING_ESTIMATES: dict[str, Callable[[Params, Shape, int], Memory]] = {
    "generate": lambda settings, shape, gpus: estimate_sampling(settings.engine, shape, gpus),
    "rank": estimate_ranking,
    "reference": estimate_reference,
    "train": estimate_train,
    "compare": estimate_ranking,
}
"""The memory of the stages that only a pipeline with training has."""


def partitioned_weights(settings: Params, shape: Shape) -> float:
    """A GPU's share of the weights, and those gathered from other GPUs."""
    train = settings.train
    gathered = min(shape.parameters, LIVE_PARAMETERS) if train.devices > 1 else 0
    return BYTES[train.dtype] * (shape.parameters / train.devices + gathered)


def held_pair_tokens(settings: Params) -> int:
    """Tokens of a batch of the longest pairs: two responses beside a prompt of which little remains."""
    return settings.train.device_batch * 2 * settings.lengths.total


def layer_activations(settings: Params, shape: Shape) -> float:
    """One layer's intermediate results for a batch of the longest pairs: about ten of the hidden width, four of the wider."""
    width = 10 * shape.hidden + 4 * shape.intermediate
    return held_pair_tokens(settings) * width * BYTES[settings.train.dtype]


def held_logits(settings: Params, shape: Shape) -> float:
    """Logits of one block of tokens, as float32 and their log-softmax too."""
    return LOGITS * shape.vocabulary * (BYTES[settings.train.dtype] + 4 + 4)


def count_adapters(settings: Params, shape: Shape) -> float:
    """Number of parameters of LoRA adapters on the seven linear layers of a Llama's block."""
    ends = 9 * shape.hidden + 2 * shape.key_width + 3 * shape.intermediate
    return settings.train.lora.rank * ends * shape.layers


def measure_ends(settings: Params, shape: Shape) -> float:
    """Host memory for copies of the weights: those that training starts from, and those that are gathered and written."""
    train = settings.train
    if train.lora.rank:
        return shape.parameters * (BYTES[train.dtype] + 4)  # gathered, and the model that adapters are merged into
    masters = max(BYTES[train.dtype], BYTES[train.checkpoint_dtype])
    written = BYTES[train.checkpoint_dtype]
    return shape.parameters * (2 * masters + (written if written < masters else 0))

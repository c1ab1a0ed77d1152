"""The time of each stage on a number of GPUs of one kind, from its work and the rates.

The slowest GPU decides: a stage ends with its last shard, batch or task.
"""

import math
from dataclasses import dataclass

from stages.runtime.params import EvaluationParams, Params
from stages.tools.planning import lengths, rates
from stages.tools.planning.memory import BYTES, ENGINE, RANKER_WEIGHTS, Shape
from stages.tools.planning.methods import Methods
from stages.tools.planning.rates import Gpu
from stages.tools.planning.sizes import Size
from stages.tools.planning.work import CHECKPOINT_BYTES, Work, count_task_tokens, estimate_work

OFFLOADED_BYTES = 80
"""Bytes of the host's memory that an offloaded optimizer step moves per parameter: gradients, clipping, RMSprop's operations
one by one, and the new weights. Estimate."""
GENERATED_TOKENS, GSM8K_QUESTIONS = 200, 1_319
"""Of gsm8k: questions, and the tokens of the longest answer in a batch. The latter is a guess."""


@dataclass(frozen=True)
class Machine:
    """What a plan is for: a number of GPUs of one kind, and the ways in which the stages use them."""

    gpu: Gpu
    count: int
    methods: Methods


@dataclass(frozen=True)
class Seconds:
    """Seconds of a stage: to start and load weights, to compute and wait for the slowest GPU, and to hash models."""

    start: float = 0
    compute: float = 0
    hashing: float = 0

    @property
    def total(self) -> float:
        return self.start + self.compute + self.hashing


def estimate_seconds(stage: str, settings: Params | EvaluationParams, size: Size, shape: Shape, machine: Machine) -> Seconds:
    """Estimate the time of one stage, by its name in `python -m stages NAME`; none for a stage that takes seconds."""
    work = estimate_work(stage, settings, size, machine.methods)
    hashing = count_hashed(stage, machine.methods) * BYTES[settings.engine.dtype] * size.parameters / rates.HASHING.value
    loading = BYTES[settings.engine.dtype] * size.parameters / rates.LOADING.value
    if work == Work():
        return Seconds()
    if stage.startswith("evaluate-alpaca"):
        return Seconds(compute=work.passes / (settings.evaluate_alpaca.workers or 1) * rates.JUDGING.value)
    if work.sampled:
        return Seconds(rates.ENGINE_START.value + loading, time_sampling(stage, settings, size, shape, machine), hashing)
    if stage == "evaluate-lm":
        return Seconds(rates.HARNESS_START.value + loading, time_harness(settings, size, shape, machine), hashing)
    if isinstance(settings, Params) and stage in ("reference", "train"):
        return Seconds(rates.TRAINING_START.value + loading, time_pairs(stage, settings, size, work, machine), hashing)
    if not work.rank:
        return Seconds()
    start = rates.HARNESS_START.value + RANKER_WEIGHTS / rates.LOADING.value
    return Seconds(start, time_ranking(settings, work, machine))


def count_hashed(stage: str, methods: Methods) -> int:
    """Return how often a stage has a model hashed: DVC hashes what train writes, and a stage what it reads, or the first one
    that reads it: answer reads every model."""
    ours = ("answer",) if methods.cached_digests else ("generate", "reference", "train", "answer", "evaluate-lm")
    return (stage in ours) + (stage == "train")


def time_sampling(stage: str, settings: Params | EvaluationParams, size: Size, shape: Shape, machine: Machine) -> float:
    """Seconds of the worker with the most shards, each of which ends with its longest response, or of one queue of all.

    A worker has one GPU, or engine.tensor_parallel of them.
    """
    if stage == "generate":
        assert isinstance(settings, Params)
        texts, samples, limit, shard = (
            size.prompts,
            settings.generate.samples,
            settings.generate.max_new_tokens,
            settings.generate.shard_size,
        )
    else:
        texts = estimate_work(stage, settings, size, machine.methods).passes
        samples, limit, shard = 1, settings.answer.max_new_tokens, settings.answer.shard_size
    shards = math.ceil(texts / shard)
    busiest = math.ceil(shards / (machine.count // settings.engine.tensor_parallel))
    rows = min(shard, math.ceil(texts))
    queues = [(busiest * rows, 1)] if machine.methods.shared_queue else [(rows, busiest)]
    longest = min(limit, settings.engine.max_model_length)
    return sum(
        times * time_queue(round(count * samples), longest, settings, size, shape, machine.gpu) for count, times in queues
    )


def time_queue(requests: int, limit: int, settings: Params | EvaluationParams, size: Size, shape: Shape, gpu: Gpu) -> float:
    """Seconds of one worker to sample a queue of requests: each step reads the weights and the KV cache of its sequences, or is
    limited by computing, and costs something for each sequence and, with engine.tensor_parallel, for each layer's sums over the
    GPUs, which share all the rest."""
    engine = settings.engine
    each = BYTES[engine.dtype] / engine.tensor_parallel
    weights, per_token = each * shape.parameters, 2 * shape.layers * shape.key_width * each
    cache = engine.gpu_memory_utilization * gpu.memory.value - weights - ENGINE
    if engine.kv_cache_gib is not None:
        cache = engine.kv_cache_gib * 2**30
    fitting = cache / (per_token * (size.prompt_tokens + size.response_tokens))
    slots = max(1, int(min(engine.max_num_seqs, fitting)))
    sums = shape.layers * rates.SUMMED_LAYER.value if engine.tensor_parallel > 1 else 0.0
    seconds, repeats = 0.0, lengths.SHARDS if requests < 2_000 else 1
    for seed in range(repeats):
        running, sampled = lengths.simulate_queue(requests, slots, round(size.response_tokens, 1), limit, seed)
        read = weights + per_token * (running * size.prompt_tokens + sampled)
        computed = running * 2 * shape.parameters / engine.tensor_parallel / (gpu.peak.value * gpu.forward.value)
        steps = (read / (gpu.bandwidth.value * rates.DECODING.value)).clip(min=computed) + running * gpu.sequence.value
        seconds += float((steps + sums).sum()) / repeats
    return seconds


def time_ranking(settings: Params | EvaluationParams, work: Work, machine: Machine) -> float:
    """Seconds of PairRM: limited by memory or, with fused attention, by computing. Bytes moved grow with the length."""
    gpu = machine.gpu
    if machine.methods.fused_ranker or settings.rank.attention == "fused":
        one = work.rank / (gpu.peak.value * rates.FUSED_RANKING.value)
    else:
        length = work.tokens / work.passes
        moved = work.tokens * measure_moved(length)
        one = moved / (gpu.bandwidth.value * rates.RANKING.value)
    return one / machine.count


def measure_moved(length: float) -> float:
    """Bytes that PairRM moves per token of a text: a part of them grows with the text's length, as attention's scores do."""
    return rates.RANKER_BYTES.value * (0.22 + 0.78 * length / 1000)


def time_pairs(stage: str, settings: Params, size: Size, work: Work, machine: Machine) -> float:
    """Seconds of the slowest GPU in reference or train, and to write checkpoints and weights."""
    gpu, train, methods = machine.gpu, settings.train, machine.methods
    pairs = lengths.deal_pairs(settings, size.prompt_tokens, size.response_tokens)
    dealt = methods.dealt_batches and stage == "train"
    fused = methods.block_attention or train.attention == "fused"
    packed, unpadded = (pairs.dealt, pairs.dealt_unpadded) if dealt else (pairs.in_order, pairs.in_order_unpadded)
    uneven = unpadded if fused else packed
    if stage == "reference":
        return uneven * work.forward / (gpu.peak.value * gpu.forward.value * train.devices)
    share = gpu.train.value * (rates.BLOCKS.value if fused else 1)
    computing = uneven * work.train / (gpu.peak.value * share * train.devices)
    steps = size.prompts * train.stop_epoch // train.global_batch
    saved = steps // train.checkpoint_steps if train.checkpoint_steps and not train.lora.rank else 0
    writing = (saved * CHECKPOINT_BYTES * size.parameters + work.disk) / rates.WRITING.value
    moved = steps * size.parameters * OFFLOADED_BYTES if train.offload == "optimizer" and not train.lora.rank else 0
    return computing + writing + moved / rates.HOST_BANDWIDTH.value


def time_harness(settings: Params | EvaluationParams, size: Size, shape: Shape, machine: Machine) -> float:
    """Seconds of the tasks, dealt out whole to the GPUs, the longest first, or shared evenly."""
    gpu, evaluate = machine.gpu, settings.evaluate_lm
    forward = 2 * size.parameters / (gpu.peak.value * gpu.forward.value)
    tasks = {name: tokens * forward for name, tokens in count_task_tokens(settings, machine.methods).items()}
    if "gsm8k" in tasks:
        reading = BYTES[evaluate.dtype] * size.parameters / (gpu.bandwidth.value * rates.DECODING.value)
        step = max(reading, shape.layers * rates.DECODED_LAYER.value)
        tasks["gsm8k"] += math.ceil(GSM8K_QUESTIONS / evaluate.batch_size) * GENERATED_TOKENS * step
    if machine.methods.chunked_harness:
        return sum(tasks.values()) / machine.count
    busy = [0.0] * machine.count
    for seconds in sorted(tasks.values(), reverse=True):
        busy[busy.index(min(busy))] += seconds
    return max(busy)

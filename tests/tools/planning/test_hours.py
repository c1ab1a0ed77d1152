"""The time of each stage, computed by hand from rates of round numbers."""

from dataclasses import replace

import pytest

from oracles.deberta_traffic import count_traffic
from stages.runtime import params
from stages.tools.planning import hours, lengths, rates
from stages.tools.planning.memory import Shape
from stages.tools.planning.methods import ALL, PLAIN, Methods
from stages.tools.planning.rates import Rate
from stages.tools.planning.sizes import Size
from support.recipes import change, read_recipe

SIZE = Size(prompts=6400, prompt_tokens=200, response_tokens=400, parameters=1e9)
SHAPE = Shape(1e9, layers=10, hidden=1000, intermediate=3000, key_width=500, vocabulary=50_000)
"""Of 2 GB of weights, and 20 kB per token of the KV cache."""


def make_gpu(**values: float) -> rates.Gpu:
    usual = {"memory": 100e9, "bandwidth": 1e12, "peak": 1e14, "forward": 0.5, "train": 0.25, "sequence": 1e-5}
    return rates.Gpu(**{name: Rate(value, name, "this test") for name, value in (usual | values).items()})


def machine(count: int = 1, methods: Methods = PLAIN, **values: float) -> hours.Machine:
    return hours.Machine(make_gpu(**values), count, methods)


SEQUENCES = change(read_recipe("llama-3-8b"), "engine", max_num_seqs=256)
LLAMA = change(change(SEQUENCES, "generate", shard_size=256), "train", checkpoint_steps=0, devices=8)


def estimate(stage: str, where: hours.Machine, settings: params.Params = LLAMA, size: Size = SIZE) -> hours.Seconds:
    return hours.estimate_seconds(stage, settings, size, SHAPE, where)


def test_each_step_of_sampling_reads_weights_and_cache_and_costs_something_per_sequence() -> None:
    """Responses of one token each: 640 requests are three steps of 256, 256 and 128 sequences."""
    once = change(LLAMA, "generate", max_new_tokens=1, shard_size=10_000, samples=1)
    size = replace(SIZE, prompts=640)
    steps = 3 * 2e9 / 0.75e12 + 640 * (200 * 20e3 / 0.75e12 + 1e-5)
    assert estimate("generate", machine(peak=1e16), once, size).compute == pytest.approx(steps)
    slow = estimate("generate", machine(peak=1e11), once, size).compute
    assert slow == pytest.approx(640 * (2 * 1e9 / (1e11 * 0.5) + 1e-5)), "limited by computing"
    assert estimate("generate", machine(), once, size).start == pytest.approx(90 + 2)


def test_the_kv_cache_limits_the_sequences_in_a_batch() -> None:
    """600 tokens of 20 kB for each sequence; in 12 MB there is room for one."""
    small = change(LLAMA, "engine", kv_cache_gib=12.1e6 / 2**30)
    once = change(small, "generate", max_new_tokens=1, shard_size=10_000, samples=1)
    found = estimate("generate", machine(), once, replace(SIZE, prompts=5)).compute
    assert found == pytest.approx(5 * ((2e9 + 200 * 20e3) / 0.75e12 + 1e-5))
    utilized = change(once, "engine", kv_cache_gib=None, gpu_memory_utilization=0.8)
    free = estimate("generate", machine(memory=(2e9 + 3e9 + 12.1e6) / 0.8), utilized)
    tight = estimate("generate", machine(), once)
    assert free.compute == pytest.approx(tight.compute), "what vLLM takes beside weights and activations"


def test_as_many_sequences_are_sampled_at_once_as_the_engine_allows() -> None:
    once = change(LLAMA, "generate", max_new_tokens=1, shard_size=10_000, samples=1)
    found = [
        estimate("generate", machine(peak=1e16), change(once, "engine", max_num_seqs=most), replace(SIZE, prompts=640)).compute
        for most in (64, 128)
    ]
    assert found[0] - found[1] == pytest.approx(5 * 2e9 / 0.75e12), "ten steps read the weights, or five"


def test_gpus_that_share_a_model_read_and_compute_a_part_of_it_each_and_sum() -> None:
    """Two of 4 GPUs a worker: 2 steps of 256 and 64 of 320 requests each, in two shards, and 30 microseconds for a layer."""
    once = change(LLAMA, "generate", max_new_tokens=1, shard_size=320, samples=1)
    shared = change(once, "engine", tensor_parallel=2)
    size = replace(SIZE, prompts=640)
    found = estimate("generate", machine(4, peak=1e16), shared, size).compute
    expected = 2 * 1e9 / 0.75e12 + 320 * (200 * 10e3 / 0.75e12 + 1e-5) + 2 * 10 * 30e-6
    assert found == pytest.approx(expected)
    assert estimate("generate", machine(2, peak=1e16), shared, size).compute == pytest.approx(2 * expected), "one worker"
    slow = estimate("generate", machine(4, peak=1e11), shared, size).compute
    assert slow == pytest.approx(320 * (1e9 / (1e11 * 0.5) + 1e-5) + 2 * 10 * 30e-6), "limited by computing"


def test_gpus_that_share_a_model_have_more_room_for_the_cache() -> None:
    """Half of the weights, and 600 tokens of 10 kB for each sequence, in 6 MB: room for one."""
    once = change(LLAMA, "generate", max_new_tokens=1, shard_size=10_000, samples=1)
    shared = change(once, "engine", tensor_parallel=2, gpu_memory_utilization=0.5)
    found = estimate("generate", machine(2, memory=2 * (1e9 + 3e9 + 6.1e6)), shared, replace(SIZE, prompts=5)).compute
    assert found == pytest.approx(5 * ((1e9 + 200 * 10e3) / 0.75e12 + 1e-5 + 10 * 30e-6))


def test_the_gpu_with_the_most_shards_decides() -> None:
    """25 shards of 256 prompts: 25 on one GPU, 4 on the busiest of 8."""
    times = {gpus: estimate("generate", machine(gpus)).compute for gpus in (1, 8, 25, 50)}
    assert times[1] / 25 == pytest.approx(times[8] / 4) == pytest.approx(times[25]) == pytest.approx(times[50])


@pytest.mark.parametrize(("shard_size", "longer"), [(256, (0.20, 0.23)), (512, (0.09, 0.12)), (1024, (0.02, 0.07))])
def test_shards_take_longer_than_one_queue(shard_size: int, longer: tuple[float, float]) -> None:
    """By another simulation, on the H100: 20 to 23%, 11% and 6%."""
    shape = Shape(8.03e9, 32, 4096, 14336, 1024, 128256)
    size = Size(8 * 2048, 190, 375, 8.03e9)
    settings = change(LLAMA, "generate", shard_size=shard_size)
    gpu = rates.GPUS["H100"]
    shards, queue = (
        hours.estimate_seconds("generate", settings, size, shape, hours.Machine(gpu, 8, methods)).compute
        for methods in (PLAIN, replace(PLAIN, shared_queue=True))
    )
    assert longer[0] <= shards / queue - 1 <= longer[1]


def test_published_throughputs_of_vllm_are_met() -> None:
    """12,500 and 7,516 tokens per second, in one long queue."""
    for name, shape, published in (
        ("H100", Shape(8.03e9, 32, 4096, 14336, 1024, 128256), 12_500),
        ("A100", Shape(8.03e9, 32, 4096, 14336, 1024, 128256), 7_516),
    ):
        drawn = sum(lengths.simulate_queue(10_000, 256, 375, 2048, 0)[0])
        one = hours.time_queue(10_000, 2048, LLAMA, Size(1, 190, 375, 8.03e9), shape, rates.GPUS[name])
        assert drawn / one == pytest.approx(published, rel=0.05)


def test_ranking_is_limited_by_memory_or_with_a_fused_kernel_by_computing() -> None:
    """128,000 passes over 1,000 tokens, 22 MB each at 70% of the bandwidth."""
    plain = estimate("rank", machine(4))
    assert plain.compute == pytest.approx(128_000 * 1000 * 22e6 / 0.7e12 / 4)
    assert plain.start == pytest.approx(20 + 0.87)
    fused = estimate("rank", machine(4, ALL)).compute
    assert fused == pytest.approx(128_000 * (1000 * 0.75e9 + 51.5e9) / (1e14 * 0.4) / 4)
    longer = estimate("rank", machine(4), size=replace(SIZE, response_tokens=900)).compute
    assert longer / plain.compute == pytest.approx(2 * 1.78), "twice the tokens, and 78% of a token's bytes twice"


@pytest.mark.parametrize("length", [500, 1000, 2048])
def test_pairrm_moves_what_transformers_model_does(length: int) -> None:
    """In a batch of 65,536 tokens, on torch's meta device. llm-blender needs some more than the bare model."""
    assert 1.0 <= hours.measure_moved(length) / count_traffic(length, 65_536 // length) <= 1.15


@pytest.mark.parametrize(
    ("methods", "reference", "train", "faster"),
    [
        (PLAIN, "in_order", "in_order", 1),
        (replace(PLAIN, dealt_batches=True), "in_order", "dealt", 1),
        (ALL, "in_order_unpadded", "dealt_unpadded", 4 / 3),
    ],
)
def test_reference_and_train_wait_for_the_gpu_with_the_most_tokens(
    methods: Methods, reference: str, train: str, faster: float
) -> None:
    pairs = lengths.simulate_pairs(200, 400, 512, 1024, 64, 8, 8)
    tokens = 6400 * pairs.tokens
    found = estimate("reference", machine(8, methods)).compute
    assert found == pytest.approx(getattr(pairs, reference) * tokens * 2e9 / (0.5e14 * 8))
    trained = estimate("train", machine(8, methods)).compute
    expected = getattr(pairs, train) * tokens * 8e9 / (0.25 * faster * 1e14 * 8)
    assert trained == pytest.approx(expected + 2e9 / 2e9), "and writes the weights"


def test_fused_attention_is_planned_without_padding() -> None:
    fused, methods = change(LLAMA, "train", attention="fused"), replace(PLAIN, dealt_batches=True)
    for stage in ("reference", "train"):
        found = estimate(stage, machine(8, methods), fused).compute
        assert found == estimate(stage, machine(8, replace(methods, block_attention=True))).compute
        assert found < estimate(stage, machine(8, methods)).compute


def test_the_devices_of_train_count_and_not_the_machines() -> None:
    tokens = 6400 * lengths.simulate_pairs(200, 400, 512, 1024, 64, 8, 1).tokens
    alone = estimate("train", machine(8, ALL), change(LLAMA, "train", devices=1)).compute
    assert alone - 1 == pytest.approx(tokens * 8e9 / (0.25e14 * 4 / 3))


def test_checkpoints_and_offloaded_steps_count() -> None:
    """100 steps: 8 bytes per parameter twice, at 2 GB/s; 80 bytes per parameter and step, at 100 GB/s."""
    usual = estimate("train", machine(8)).compute
    saved = estimate("train", machine(8), change(LLAMA, "train", checkpoint_steps=50)).compute
    assert saved - usual == pytest.approx(2 * 8e9 / 2e9)
    offloaded = estimate("train", machine(8), change(LLAMA, "train", offload="optimizer")).compute
    assert offloaded - usual == pytest.approx(100 * 80e9 / 100e9)
    adapters = change(LLAMA, "train", lora=params.Lora(rank=4, alpha=4), checkpoint_steps=50, offload="optimizer")
    less = change(adapters, "train", checkpoint_steps=0, offload="none")
    assert estimate("train", machine(8), adapters) == estimate("train", machine(8), less), "adapters are small"


def test_the_longest_task_decides_unless_requests_are_shared() -> None:
    tasks = change(LLAMA, "evaluate_lm", tasks=["hellaswag", "mmlu"])
    each = 2e9 / 0.5e14
    assert estimate("evaluate-lm", machine(1), tasks).compute == pytest.approx(71.4e6 * each)
    for gpus in (2, 8):
        assert estimate("evaluate-lm", machine(gpus), tasks).compute == pytest.approx(37e6 * each)
    assert estimate("evaluate-lm", machine(8, ALL), tasks).compute == pytest.approx((34.4e6 + 37e6 / 4) * each / 8)


def test_gsm8k_also_generates() -> None:
    """In batches of 8, 200 tokens each, at 0.8 ms for each of 10 layers, or as fast as the weights are read."""
    one = change(LLAMA, "evaluate_lm", tasks=["gsm8k"], batch_size=8)
    read = 1.2e6 * 2e9 / 0.5e14
    assert estimate("evaluate-lm", machine(), one).compute == pytest.approx(read + 165 * 200 * 0.008)
    found = estimate("evaluate-lm", machine(bandwidth=1e11), one).compute
    assert found == pytest.approx(read + 165 * 200 * 2e9 / 0.75e11)


def test_the_judge_answers_several_requests_at_a_time() -> None:
    judged = change(LLAMA, "evaluate_alpaca", workers=5)
    assert estimate("evaluate-alpaca", machine(), judged) == hours.Seconds(compute=pytest.approx(805 / 5 * 1.2))


def test_a_model_is_hashed_by_every_stage_or_once() -> None:
    """2 GB at 0.63 GB/s; DVC also hashes what train writes."""
    once = 2 / 0.63
    for stage in ("generate", "reference", "train", "answer", "evaluate-lm"):
        more = stage == "train"
        assert estimate(stage, machine(8)).hashing == pytest.approx(once * (1 + more))
        assert estimate(stage, machine(8, ALL)).hashing == pytest.approx(once * ((stage == "answer") + more))
    assert estimate("rank", machine(8)).hashing == 0


def test_other_stages_take_no_time() -> None:
    assert estimate("split", machine()) == hours.Seconds()
    assert estimate("answer-reference", machine()) == hours.Seconds()
    assert estimate("rank", machine(), read_recipe("../")).total == 0, "the miniature's ranker"

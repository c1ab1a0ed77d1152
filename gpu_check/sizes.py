"""What is computed: the sizes of the check on a GPU, which fit 24 GB, and of its rehearsal on a CPU."""

from dataclasses import dataclass

from stages.runtime import params


@dataclass(frozen=True)
class Model:
    """A Llama with random weights. key_heads: heads of keys and values, which `heads` queries share."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int

    def shape(self) -> dict[str, int]:
        """Return the shape by transformers' names."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
        }

    def parameters(self) -> int:
        """Count the weights: attention, the gated feed-forward layers, two norms a layer and one more, embeddings twice."""
        keys = self.width // self.heads * self.key_heads
        layer = self.width * (2 * self.width + 2 * keys + 3 * self.inner + 2)
        return self.layers * layer + self.width * (2 * self.vocabulary + 1)


@dataclass(frozen=True)
class Training:
    """A training: `steps` batches of `batch` pairs; a prompt and a response have at most `length` tokens together."""

    model: Model
    batch: int
    device_batch: int
    steps: int
    length: int


@dataclass(frozen=True)
class Ranking:
    """PairRM on `prompts` prompts with `samples` responses each; tokens of a prompt and of a response, on average, and at most
    in the pairs that `rank.attention: fused` is checked with."""

    width: int
    layers: int
    heads: int
    buckets: int
    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    longest_prompt: int
    longest_response: int
    tokens_per_batch: int


@dataclass(frozen=True)
class Sampling:
    """vLLM on shards of `prompts` prompts, `samples` responses each."""

    model: Model
    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    kv_cache_gib: float
    dtype: params.Precision

    def engine(self, *, batch_invariant: bool = False) -> params.Engine:
        """Return the settings of vLLM: none of them from params.yaml, so that the check is the same for everybody."""
        return params.Engine(
            dtype=self.dtype,
            max_model_length=2 * (self.prompt_tokens + self.new_tokens),
            stop_token_ids=[],
            kv_cache_gib=self.kv_cache_gib,
            max_num_seqs=256,
            max_num_batched_tokens=4096,
            gpu_memory_utilization=0.5,  # as much must be free; the KV cache has a size of its own
            tensor_parallel=1,
            batch_invariant=batch_invariant,
        )


@dataclass(frozen=True)
class Harness:
    """The harness's tasks with `count` questions each (of each of MMLU's subjects), in batches of `batch`."""

    model: Model
    tasks: tuple[str, ...]
    count: int
    batch: int


@dataclass(frozen=True)
class Sizes:
    """What each part of the check computes. product: the side of the matrices whose product measures the GPU's limit; copy:
    bytes that are copied to measure its memory's bandwidth."""

    product: int
    copy: int
    parity: Training
    speed: Training
    ranking: Ranking
    sampling: Sampling
    harness: Harness


_SMALL = Model(width=1024, inner=2816, layers=8, heads=16, key_heads=4, vocabulary=8192)
_BILLION = Model(width=2048, inner=8192, layers=16, heads=32, key_heads=8, vocabulary=32000)
"""Llama 3.2 1B's layers with a vocabulary of 32,000: with 128,256 tokens, training would need more than 24 GB."""
_TINY = Model(width=64, inner=176, layers=2, heads=2, key_heads=1, vocabulary=384)

GPU = Sizes(
    product=8192,
    copy=2**31,
    parity=Training(_SMALL, batch=16, device_batch=8, steps=8, length=512),
    speed=Training(_BILLION, batch=8, device_batch=8, steps=8, length=1024),
    ranking=Ranking(
        *(1024, 24, 16, 256),
        prompts=16,
        samples=5,
        prompt_tokens=200,
        response_tokens=350,
        longest_prompt=1224,
        longest_response=412,
        tokens_per_batch=16384,
    ),
    sampling=Sampling(_BILLION, prompts=64, samples=5, prompt_tokens=200, new_tokens=256, kv_cache_gib=8, dtype="bfloat16"),
    harness=Harness(_SMALL, ("mmlu", "arc_challenge", "gsm8k"), count=4, batch=4),
)
"""DeBERTa-v3-large's shape and PairRM's limits, and elsewhere what keeps the whole check below eight minutes."""
CPU = Sizes(
    product=256,
    copy=2**20,
    parity=Training(_TINY, batch=4, device_batch=2, steps=8, length=64),
    speed=Training(_TINY, batch=4, device_batch=4, steps=4, length=64),
    ranking=Ranking(
        *(64, 2, 2, 16),
        prompts=6,
        samples=3,
        prompt_tokens=12,
        response_tokens=16,
        longest_prompt=60,
        longest_response=40,
        tokens_per_batch=512,
    ),
    sampling=Sampling(_TINY, prompts=4, samples=2, prompt_tokens=20, new_tokens=8, kv_cache_gib=0.0625, dtype="float32"),
    harness=Harness(_TINY, ("winogrande", "arc_challenge"), count=3, batch=4),
)
"""The rehearsal: the same code on shapes that take seconds on a CPU."""

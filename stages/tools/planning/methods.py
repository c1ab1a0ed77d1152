"""How the stages use the GPUs, where that changes the hours: the one place to edit when a stage learns a faster way."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Methods:
    """Faster ways of computing the same."""

    shared_queue: bool
    """generate, answer: a worker samples for its next shard while the last responses of one shard end."""
    fused_ranker: bool
    """rank, compare: PairRM's attention in one kernel, so that its speed is limited by computing, not by memory."""
    dealt_batches: bool
    """train: the pairs of a global batch are dealt out to the GPUs by length."""
    block_attention: bool
    """reference, train: the pairs of a batch are not padded, and attention skips what is masked."""
    chunked_harness: bool
    """evaluate-lm: requests are shared by all GPUs, and MMLU's four answers share a forward pass."""
    cached_digests: bool
    """A model is hashed once, not by every stage that reads it."""


PLAIN = Methods(False, False, False, False, False, False)
"""None of them."""
ALL = Methods(True, True, True, True, True, True)
CURRENT = Methods(
    shared_queue=False,
    fused_ranker=False,
    dealt_batches=True,
    block_attention=False,
    chunked_harness=True,
    cached_digests=True,
)
"""Those of this version, by which `plan` estimates."""

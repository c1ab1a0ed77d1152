"""plan's estimate of the memory of a batch in rank, PairRM's weights included, against a count: GB.

Counted are the bytes that are alive at the peak of transformers' forward pass of a DeBERTa-v3-large in float16, on torch's meta
device, where tensors have sizes only; the same on every machine. Here the ratio is the count over the estimate: an estimate is
neither better if it is lower nor if it is higher, so it should be close to 1.
"""

from typing import Any

import torch

from benchmarks.live_bytes import LiveBytes
from benchmarks.measure import Comparison, compare_times, report
from stages.tools.planning import memory

LENGTHS = 1000, 2048
"""Tokens of the pairs."""
TOKENS = 16_384
"""Tokens of a batch, as in the recipes."""


def make_deberta() -> Any:
    """Make DeBERTa-v3-large in float16, without memory."""
    from transformers import DebertaV2Config, DebertaV2Model

    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    positions = {"relative_attention": True, "position_buckets": 256, "share_att_key": True, "pos_att_type": "p2c|c2p"}
    config = DebertaV2Config(vocab_size=128_100, **shape, **positions, norm_rel_ebd="layer_norm", position_biased_input=False)
    with torch.device("meta"):
        return DebertaV2Model(config).eval().half()


def count_batch(model: Any, count: int, length: int) -> int:
    """Count the bytes alive at the peak of a forward pass of `count` pairs of `length` tokens, without the weights."""
    ids = torch.ones(count, length, dtype=torch.long, device="meta")
    with torch.inference_mode(), LiveBytes() as counted:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    peak: int = counted.peak
    return peak


def compare(model: Any, length: int) -> Comparison:
    """Compare the estimate with the count for pairs of this length."""
    count = TOKENS // length
    estimated = memory.RANKER_WEIGHTS + memory.ranker_bytes_per_token(length) * count * length
    counted = 2 * model.num_parameters() + count_batch(model, count, length)
    subject, size = "GB, estimated, against counted", f"{count} pairs of {length} tokens"
    return compare_times(subject, size, [estimated / 1e9], [counted / 1e9], "0.9 to 1.1")


def main() -> None:
    model = make_deberta()
    report([compare(model, length) for length in LENGTHS])


if __name__ == "__main__":
    main()

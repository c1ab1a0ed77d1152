"""How much training changed the policy, and how much of that change survives in a checkpoint of lower precision.

Training updates float32 master weights w. A checkpoint in bfloat16 keeps 8 significant bits of each, q(w), so an update that is
small compared with its weight disappears, and the next iteration starts without it.
"""

from typing import Any

import torch
from torch import Tensor

from stages.runtime import params

CHUNK = 2**24
"""Weights compared at a time, which bounds the memory for copies in float64."""


def compare_weights(before: Tensor, after: Tensor, dtype: params.Precision) -> Tensor:
    """Compare the weights w0 before training with w1 after it, (N,) each, in a precision of at least dtype.

    dtype: the checkpoint's precision, to which q rounds. Returns (4,) float64, to be summed over all weights: N, the number of
    weights with q(w1) != q(w0), <q(w1) - q(w0), w1 - w0>, and <w1 - w0, w1 - w0>.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=after.device)
    for start, end in zip(torch.split(before, CHUNK), torch.split(after, CHUNK), strict=True):
        start = start.to(end.device)
        left = end.to(getattr(torch, dtype)).double() - start.to(getattr(torch, dtype)).double()
        update = end.double() - start.double()
        sums += torch.stack([update.new_tensor(update.numel()), (left != 0).sum(), left @ update, update @ update])
    return sums


def measure_shards(model: Any, start: list[Tensor], dtype: params.Precision) -> Tensor:
    """Compare this process's ZeRO-3 shards of the master weights with those before training; see `compare_weights`.

    model: trained by DeepSpeed, with all its weights. start: from `training.load_start`.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    rank, sums = torch.distributed.get_rank(), []
    for weights, before in zip(model.parameters(), start, strict=True):
        kept = max(0, min(before.numel(), weights.ds_numel - rank * before.numel()))  # the last shard is padded
        sums.append(compare_weights(before[:kept], safe_get_local_fp32_param(weights)[:kept], dtype))
    return torch.stack(sums).sum(0)


def measure_adapters(model: Any, dtype: params.Precision) -> Tensor:
    """Compare a model's weights without and with its LoRA adapters; see `compare_weights`. model: from `load_adapters`."""
    total = sum(weights.numel() for name, weights in model.named_parameters() if "lora_" not in name)
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    sums = []
    with torch.no_grad():
        for layer in layers:
            before = layer.get_base_layer().weight
            after = before + layer.get_delta_weight("default")  # as PEFT merges them
            sums.append(compare_weights(before.flatten(), after.flatten(), dtype))
    measured = torch.stack(sums).sum(0)
    measured[0] = total
    return measured


def summarize(sums: Tensor) -> dict[str, Any]:
    """Turn the sums of `compare_weights` over all weights into their number, and two shares with six significant digits.

    changed: the share of the weights that differ in the checkpoint. survived: the part of the update that the checkpoint keeps,
    by projection onto it: <q(w1) - q(w0), w1 - w0> / <w1 - w0, w1 - w0>; 0 if there was no update. It is 1 without rounding, 0
    if rounding undoes every change, and may exceed 1, because rounding can also make changes larger.
    """
    weights, changed, projection, square = sums.tolist()
    # Fewer digits than float64 has: the order of summation differs between processors.
    shares = {"changed": changed / weights, "survived": projection / square if square else 0.0}
    return {"weights": int(weights)} | {name: float(f"{share:.6g}") for name, share in shares.items()}

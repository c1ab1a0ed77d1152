"""Count a model's own operations."""

from typing import Any


def count_flops(pairs: list[dict[str, Any]], shape: dict[str, int], vocabulary: int) -> float:
    """Count the FLOPs of a forward pass over packed pairs: each text once, causal attention, logits for responses only."""
    width, head = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    attention = width * (2 * width + 2 * head * shape["num_key_value_heads"])
    layer = attention + 3 * width * shape["intermediate_size"]
    total = 0.0
    for pair in pairs:
        prompt, *responses = (len(pair[f"{text}_token_ids"]) for text in ("prompt", "chosen", "rejected"))
        tokens = prompt + sum(responses)
        attended = prompt**2 / 2 + sum(prompt * response + response**2 / 2 for response in responses)
        total += shape["num_hidden_layers"] * (2 * tokens * layer + 4 * width * attended)
        total += 2 * sum(responses) * width * vocabulary
    return total

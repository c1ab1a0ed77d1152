"""Models of a few thousand random weights, and ways to corrupt them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from stages.miniature.policy import make_tokenizer


def make_model(folder: Path, shard: str = "5GB") -> Path:
    """Write an untrained Llama and its tokenizer to a folder, and return the folder. shard: maximum size of a weights file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer([("What is 2 plus 2?", "The answer is 4.")] * 10, 300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Change values of a JSON object in a file."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def flip_header_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[9] ^= 0x80
    (folder / "model.safetensors").write_bytes(content)


def pickle_weights(folder: Path) -> None:
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    make_model(folder, "20KB")
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncate_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def rename_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="new")


def require_code(folder: Path) -> None:
    """Make the model need Python code of its own, which must not run."""
    (folder / "configuration_new.py").write_text("open('ran', 'w')\n")
    edit_json(folder / "config.json", model_type="new", auto_map={"AutoConfig": "configuration_new.NewConfig"})


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def add_token(folder: Path) -> None:
    """Give the tokenizer a token that the model has no embedding for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)

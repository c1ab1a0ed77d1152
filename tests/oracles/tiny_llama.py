"""Make an untrained Llama and its tokenizer: python tiny_llama.py OUT TEXT_FOLDER (harness environment)."""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

out, texts = Path(sys.argv[1]), Path(sys.argv[2])
bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = bytes_, decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=bytes_.alphabet(), show_progress=False
)
tokenizer.train_from_iterator([path.read_text() for path in sorted(texts.rglob("*.jsonl"))], trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(out)

set_seed(0)
sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlamaConfig(**sizes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, initializer_range=0.2)
LlamaForCausalLM(config).save_pretrained(out)

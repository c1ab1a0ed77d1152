"""The miniature's base policy: a small Llama, pre-trained here from the seed.

It learns right answers first, then chat of mixed quality. The result is fluent but mediocre, so that SPPO can improve it.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.artifacts import files, models
from stages.method import chat
from stages.method.seeding import make_deterministic
from stages.miniature import domain
from stages.runtime.logs import log
from stages.runtime.params import MiniaturePolicy

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
CHAT_TEMPLATE = (  # Llama 3's
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONTEXT = 2048
"""Maximum number of positions of the model."""
BATCH = 32
WARMUP_STEPS = 50
IGNORED = -100
"""Label of a token that is not trained on, and of padding; transformers' convention."""

Example = tuple[str, str]
"""A prompt and an answer."""
Row = tuple[list[int], list[int]]
"""Token IDs of an example and their labels."""


def make_policy(size: MiniaturePolicy, seed: int, out: Path) -> None:
    """Pre-train the miniature's base policy from the seed and write it as a transformers checkpoint."""
    make_deterministic(seed)
    rng = random.Random(f"{seed}/policy")
    source = domain.draw_prompts(rng, "pretraining")
    right = [(prompt, question.right) for prompt, question in (next(source) for _ in range(size.right_answers))]
    mixed = [
        (prompt, domain.draw_mixed_answer(question, rng))
        for prompt, question in (next(source) for _ in range(size.mixed_answers))
    ]
    tokenizer = make_tokenizer(mixed, size.vocabulary)
    model = build_model(size, tokenizer)
    log.info(
        "base policy: %.2f M parameters, %d right and %d mixed answers", model.num_parameters() / 1e6, len(right), len(mixed)
    )
    pretrain(model, tokenizer, [right, mixed], size.learning_rate, rng)
    with files.replacing(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        models.share_weights(partial)


def make_tokenizer(examples: list[Example], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer on prompts and answers, with Llama 3's special tokens and chat template.

    vocabulary: the maximum number of tokens. Returns a transformers tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([f"user\n\n{prompt} assistant\n\n{answer}" for prompt, answer in examples], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(size: MiniaturePolicy, tokenizer: Any) -> Any:
    """Build a LlamaForCausalLM with random weights and the generation config of a chat model."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    heads = max(1, size.hidden_size // 32)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden_size,
            intermediate_size=size.hidden_size * 8 // 3 // 16 * 16,
            num_hidden_layers=size.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.08,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eot_id|>")],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
    )
    return model


def pretrain(model: Any, tokenizer: Any, phases: list[list[Example]], learning_rate: float, rng: random.Random) -> None:
    """Train for one epoch on the examples of each phase in turn; only the answers' tokens have a loss."""
    import torch
    from tqdm import tqdm

    batches = [batch for examples in phases for batch in make_batches(tokenizer, examples, rng)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, make_schedule(len(batches)))
    model.train()
    for batch in tqdm(batches, desc="pre-training the base policy", unit="step"):
        ids = pad([torch.tensor(ids) for ids, _ in batch], tokenizer.pad_token_id)
        labels = pad([torch.tensor(labels) for _, labels in batch], IGNORED)
        loss = model(input_ids=ids, labels=labels).loss  # padding follows the text, so the causal mask hides it
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    log.info("base policy: %d steps, final loss %.3f nats per token", len(batches), loss.item())


def make_batches(tokenizer: Any, examples: list[Example], rng: random.Random) -> list[list[Row]]:
    """Tokenize examples and group them into batches of similar lengths, in random order."""
    rows = []
    texts = chat.prompt_texts(tokenizer, [prompt for prompt, _ in examples])
    for text, (_, answer) in zip(texts, examples, strict=True):
        head = chat.text_ids(tokenizer, text)
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((head + tail, [IGNORED] * len(head) + tail))
    rows.sort(key=lambda row: (len(row[0]), rng.random()))  # similar lengths share a batch: little padding
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    rng.shuffle(batches)
    return batches


def make_schedule(steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor as a function of the step: a linear warmup, then linear decay to 5 %."""
    return lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * max(0.05, 1 - step / steps)


def pad(rows: list[Any], value: int) -> Any:
    """Pad B tensors (L,) on the right to (B, max L)."""
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence(rows, batch_first=True, padding_value=value)

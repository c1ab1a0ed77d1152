"""The base policy: a Hub model at a pinned revision, or the miniature's small Llama, made and schooled here.

The miniature's policy first learns right answers, then chat of mixed quality: fluent, mediocre, with something to improve.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from stages import chat, cli, domain, files, params
from stages.assets import hub

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
CHAT_TEMPLATE = (  # Llama 3's
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONTEXT = 2048
BATCH = 32
WARMUP_STEPS = 50

Example = tuple[str, str]


def make_tokenizer(examples: list[Example], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with Llama 3's special tokens and chat template, learnt from prompts and answers."""
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


def school(model: Any, tokenizer: Any, lessons: list[list[Example]], learning_rate: float, draw: random.Random) -> None:
    """Train on each lesson's examples once, one lesson after the other, on the answers' tokens only."""
    import torch
    from tqdm import tqdm

    batches = []
    for examples in lessons:
        rows = []
        for prompt, answer in examples:
            head = chat.prompt_ids(tokenizer, prompt)
            tail = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            rows.append((head + tail, [-100] * len(head) + tail))
        rows.sort(key=lambda row: (len(row[0]), draw.random()))  # alike lengths share a batch: little padding
        lesson = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        draw.shuffle(lesson)
        batches += lesson

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * max(0.05, 1 - step / len(batches))
    )
    model.train()
    for batch in tqdm(batches, desc="schooling the base policy", unit="step"):
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(row[part]) for row in batch], batch_first=True, padding_value=pad)
            for part, pad in ((0, tokenizer.pad_token_id), (1, -100))
        )
        loss = model(input_ids=ids, labels=labels).loss  # padding follows the text: the causal mask hides it
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    cli.log.info("base policy: %d steps, last loss %.3f nats a token", len(batches), loss.item())


def make_miniature(size: params.MiniaturePolicy, seed: int, out: Path) -> None:
    """Make the miniature's base policy from the seed and write it as a transformers checkpoint."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    cli.deterministic(seed)
    draw = random.Random(f"{seed}/policy")
    source = domain.prompts(draw, "schooling")
    right = [(prompt, asked.right) for prompt, asked in (next(source) for _ in range(size.right_answers))]
    mixed = [(prompt, domain.mixed_answer(asked, draw)) for prompt, asked in (next(source) for _ in range(size.mixed_answers))]
    tokenizer = make_tokenizer(mixed, size.vocabulary)
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
    cli.log.info(
        "base policy: %.2f M parameters, %d right and %d mixed answers", model.num_parameters() / 1e6, len(right), len(mixed)
    )
    school(model, tokenizer, [right, mixed], size.learning_rate, draw)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eot_id|>")]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    with files.replacing(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    wanted = params.load("seed", "assets.policy")
    if wanted.policy.made_here:
        make_miniature(wanted.policy.miniature, wanted.seed, out)
    else:
        hub.fetch_model(wanted.policy, out)


if __name__ == "__main__":
    cli.run(main, online=True)

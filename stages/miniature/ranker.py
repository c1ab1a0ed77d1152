"""The miniature's ranker: a small model of PairRM's architecture, trained here on noisy gold preferences."""

import io
import itertools
import random
import string
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from stages.artifacts import files, pointers
from stages.engines.pairrm import import_llm_blender
from stages.miniature import domain
from stages.runtime.errors import StageError
from stages.runtime.logs import log
from stages.runtime.params import MiniatureRanker

VOCABULARY = 1000
"""Maximum size of the vocabulary: words of the toy world, single characters for anything else, [UNK] for unknown ones."""

BATCH = 32
"""Pairs per training step."""

HELD_OUT = 200
"""Prompts on which the ranker's agreement with the gold rule is measured."""

MAX_LENGTHS = 1224, 412
"""PairRM's maximum lengths of prompt and response, in tokens."""

PAIRRM_CONFIG = {  # llm-blender's
    "ranker_type": "pairranker",
    "model_type": "deberta",
    "model_name": "base",  # the folder beside PairRM's; stages/engines/pairrm.py passes its path
    "source_maxlength": MAX_LENGTHS[0],
    "candidate_maxlength": MAX_LENGTHS[1],
    "n_tasks": 1,
    "sub_sampling_mode": "all_pair",
    "loss_type": "instructgpt",
    "reduce_type": "linear",
    "inference_mode": "bubble",
    "drop_out": 0.0,
    "fp16": True,
}

Prompt = tuple[str, list[str]]
"""A prompt and its candidate responses."""


def make_ranker(size: MiniatureRanker, seed: int, out: Path) -> None:
    """Train a ranker from the seed and write the folders `PairRM` and `base` in `out`.

    PairRM: weights, tokenizer and llm-blender's configuration; base: the untrained DeBERTa model that PairRM is
    built on, with its tokenizer. Raises StageError if the toy world has too few prompts.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} ranker")
    prompts = draw_prompts(rng, size.prompts + HELD_OUT, size.candidates)
    write_base(prompts, size, out / "base")
    ranker, tokenizer = build_ranker(out)
    train(ranker, tokenizer, prompts[HELD_OUT:], size, rng)
    agreement = measure_agreement(ranker, tokenizer, prompts[:HELD_OUT])
    log.info(
        "the ranker agrees with the gold preference on %.1f %% of held-out pairs that differ by more than 0.5", 100 * agreement
    )
    from safetensors.torch import save_model

    save_model(ranker, str(out / "PairRM" / pointers.WEIGHTS))
    tokenizer.save_pretrained(out / "PairRM")


def draw_prompts(rng: random.Random, count: int, candidates: int) -> list[Prompt]:
    """Draw `count` distinct prompts, each with `candidates` distinct responses of varying quality. Raises StageError."""
    source = domain.draw_prompts(rng, "pretraining")
    prompts: dict[str, list[str]] = {}
    for prompt, question in itertools.islice(source, 100 * count):
        if len(prompts) == count:
            break
        if prompt not in prompts:
            responses: dict[str, None] = {}
            while len(responses) < candidates:
                responses[draw_response(question, rng)] = None
            prompts[prompt] = list(responses)
    if len(prompts) < count:
        raise StageError(
            f"params.yaml: assets.ranker.miniature.prompts is {count - HELD_OUT} but the miniature has only about "
            f"{len(prompts) - HELD_OUT}: lower it"
        )
    return list(prompts.items())


def draw_response(question: domain.Question, rng: random.Random) -> str:
    """Draw a response: half resemble the base policy's, half those of a better policy, which is mostly polite."""
    kind = rng.random()
    if kind < 0.5:
        return domain.draw_mixed_answer(question, rng)
    answer = question.right if rng.random() < 0.5 else question.wrong
    if kind > 0.95:  # off topic: the answer to another question
        answer = domain.draw_question(rng).right
    opening = rng.choice(["", *domain.POLITE_OPENINGS]) if rng.random() < 0.8 else rng.choice(domain.RUDE_OPENINGS)
    closing = rng.choice(["", *domain.POLITE_CLOSINGS]) if rng.random() < 0.8 else rng.choice(domain.RUDE_CLOSINGS)
    return " ".join(filter(None, [opening, answer, closing]))


def write_base(prompts: list[Prompt], size: MiniatureRanker, out: Path) -> None:
    """Write a DebertaV2Model with random weights, and a tokenizer trained on prompts and responses."""
    from transformers import DebertaV2Config, DebertaV2Model

    out.mkdir(parents=True)
    pieces = write_tokenizer(prompts, out)
    config = DebertaV2Config(
        vocab_size=pieces + 1,  # [MASK]
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.hidden_size // 32),
        intermediate_size=4 * size.hidden_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=512,
        relative_attention=True,
        position_buckets=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        layer_norm_eps=1e-7,
        max_relative_positions=-1,
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=0,
        initializer_range=0.05,  # DeBERTa's 0.02 is for a width of 1024
    )
    DebertaV2Model(config).save_pretrained(out)


def write_tokenizer(prompts: list[Prompt], out: Path) -> int:
    """Train a SentencePiece model on the texts and write it as a DebertaV2Tokenizer. Returns its number of tokens."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for prompt, responses in prompts for text in [prompt, *responses]),
        model_writer=model,  # not a file, whose path would be stored in the model
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        model_type="unigram",
        required_chars="".join(sorted(set(string.printable) - set(string.whitespace))),
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        num_threads=1,
        minloglevel=2,
    )
    (out / "spm.model").write_bytes(model.getvalue())
    config = {"do_lower_case": False, "vocab_type": "spm", "tokenizer_class": "DebertaV2Tokenizer"}
    files.write_json(config, out / "tokenizer_config.json")
    pieces: int = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    return pieces


def build_ranker(out: Path) -> tuple[Any, Any]:
    """Write llm-blender's configuration to `out`/PairRM and build an untrained ranker on `out`/base, with its tokenizer."""
    from transformers import AutoTokenizer

    files.write_json(PAIRRM_CONFIG, out / "PairRM" / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    with import_llm_blender():
        from llm_blender.pair_ranker import model_util
        from llm_blender.pair_ranker.config import RankerConfig

        model_util.build_collator("pairranker", tokenizer, *MAX_LENGTHS)  # adds PairRM's markers to the tokenizer
        config = RankerConfig.from_dict(PAIRRM_CONFIG)
        ranker = model_util.build_ranker("pairranker", "deberta", str(out / "base"), None, config, tokenizer)
    return ranker, tokenizer


def pair_logits(ranker: Any, tokenizer: Any, pairs: list[tuple[str, str, str]]) -> Tensor:
    """Compute PairRM's logits (N,) for N triples: prompt, response on the left, response on the right."""
    prompts, left, right = zip(*pairs, strict=True)
    inputs = []
    for marker, texts in (("<|source|>", prompts), ("<|candidate|>", left), ("<|candidate|>", right)):
        encoded = tokenizer([marker + text for text in texts], padding=True, return_tensors="pt")
        inputs += [encoded["input_ids"], encoded["attention_mask"]]
    logits: Tensor = ranker._forward(*inputs)["logits"]
    return logits


def train(ranker: Any, tokenizer: Any, prompts: list[Prompt], size: MiniatureRanker, rng: random.Random) -> None:
    """Train for one epoch on all ordered pairs, with loss -log sigmoid(L_ij) if noisy gold scores prefer i (on the left)."""
    examples = []
    for prompt, responses in prompts:
        scores = [domain.quality(prompt, response) + rng.gauss(0, size.noise) for response in responses]
        for i, j in itertools.permutations(range(len(responses)), 2):
            examples.append(((prompt, responses[i], responses[j]), 1.0 if scores[i] > scores[j] else -1.0))
    rng.shuffle(examples)
    steps = len(examples) // BATCH
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=size.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.learning_rate, total_steps=steps, pct_start=0.1)
    ranker.train()
    for step in tqdm(range(steps), desc="training the ranker", unit="step"):
        pairs, signs = zip(*examples[step * BATCH : (step + 1) * BATCH], strict=True)
        loss = functional.softplus(-torch.tensor(signs) * pair_logits(ranker, tokenizer, list(pairs))).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    ranker.eval()


@torch.no_grad()
def measure_agreement(ranker: Any, tokenizer: Any, prompts: list[Prompt]) -> float:
    """Return the share of pairs that the ranker, averaged over both orders, ranks like the gold rule.

    Only pairs of responses that differ by more than 0.5 in quality count.
    """
    examples: list[tuple[str, str, str]] = []
    signs = []
    for prompt, responses in prompts:
        quality = [domain.quality(prompt, response) for response in responses]
        for i, j in itertools.combinations(range(len(responses)), 2):
            if abs(quality[i] - quality[j]) > 0.5:
                examples += [(prompt, responses[i], responses[j]), (prompt, responses[j], responses[i])]
                signs.append(1 if quality[i] > quality[j] else -1)
    batches = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
    logits = torch.cat([pair_logits(ranker, tokenizer, batch) for batch in batches])
    right = torch.sign(logits[::2] - logits[1::2]) == torch.tensor(signs)
    return float(right.float().mean())

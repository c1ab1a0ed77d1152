"""The ranker: PairRM from the Hub or a small one of its architecture trained here on noisy gold preferences.

OUT holds `PairRM` (weights and llm-blender's configuration) and `base` (the DeBERTa model and tokenizer under it).
"""

import argparse
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

from stages import cli, domain, files, pairrm, params
from stages.assets import hub
from stages.cli import StageError, log
from stages.params import Asset, MiniatureRanker, RankerAsset

VOCABULARY = 1000
"""Pieces of the tokenizer: the domain's words whole, anything else by letter, and [UNK] for what it never saw."""

BATCH = 32
"""Pairs per step of the ranker's training."""


def prepare(asset: RankerAsset, seed: int, out: Path) -> None:
    """Write `PairRM` and `base` to the folder `out`. Raises StageError where the asset lacks a part."""
    with files.replacing(out) as partial:
        if asset.made_here:
            assert asset.miniature  # params.py sees to it
            make(asset.miniature, seed, partial)
        else:
            if asset.base is None:
                raise StageError(
                    "params.yaml: assets.ranker.base is missing: name the DeBERTa model under the ranker, "
                    "microsoft/deberta-v3-large under PairRM"
                )
            hub.fetch_model(Asset(repo=asset.repo, revision=asset.revision), partial / "PairRM")
            hub.fetch_model(asset.base, partial / "base", weights=False)


def make(size: MiniatureRanker, seed: int, out: Path) -> None:
    """Make and train a ranker of PairRM's architecture from the seed, and write it to the folder `out`."""
    # The number of threads decides the order of sums: the same seed is to give the same weights on any number of cores.
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    draw = random.Random(f"{seed} ranker")
    prompts = school(draw, size.prompts + 200, size.candidates)
    write_base(prompts, size, out / "base")
    ranker, tokenizer = untrained(out)
    train(ranker, tokenizer, prompts[200:], size, draw)
    agreement = agreement_with_gold(ranker, tokenizer, prompts[:200])
    log.info("agrees with the gold preference on %.1f %% of held-out pairs more than 0.5 apart", 100 * agreement)
    from safetensors.torch import save_model

    save_model(ranker, str(out / "PairRM" / "model.safetensors"))
    tokenizer.save_pretrained(out / "PairRM")


Prompt = tuple[str, list[str]]
"""A prompt and its candidate responses."""


def school(draw: random.Random, count: int, candidates: int) -> list[Prompt]:
    """`count` prompts, each with `candidates` different responses of every quality."""
    source = domain.prompts(draw, "schooling")
    found: dict[str, list[str]] = {}
    for prompt, asked in itertools.islice(source, 100 * count):
        if len(found) == count:
            break
        if prompt not in found:
            responses: dict[str, None] = {}
            while len(responses) < candidates:
                responses[candidate(asked, draw)] = None
            found[prompt] = list(responses)
    if len(found) < count:
        raise StageError(f"params.yaml: assets.ranker.miniature.prompts: the domain has {len(found) - 200}, not {count - 200}")
    return list(found.items())


def candidate(asked: domain.Question, draw: random.Random) -> str:
    """A response as the base policy gives them or, as often, one that a better policy would give, right or nearly so."""
    kind = draw.random()
    if kind < 0.5:
        return domain.mixed_answer(asked, draw)
    answer = asked.right if draw.random() < 0.5 else asked.wrong
    if kind > 0.95:  # off the question: the answer to another
        answer = domain.question(draw).right
    opening = draw.choice(["", *domain.POLITE_OPENINGS]) if draw.random() < 0.8 else draw.choice(domain.RUDE_OPENINGS)
    closing = draw.choice(["", *domain.POLITE_CLOSINGS]) if draw.random() < 0.8 else draw.choice(domain.RUDE_CLOSINGS)
    return " ".join(filter(None, [opening, answer, closing]))


def write_base(prompts: list[Prompt], size: MiniatureRanker, out: Path) -> None:
    """Write a DebertaV2 model with random weights and its SentencePiece tokenizer, trained on the prompts."""
    import sentencepiece
    from transformers import DebertaV2Config, DebertaV2Model

    out.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for prompt, responses in prompts for text in [prompt, *responses]),
        model_writer=model,  # a file's name would stand in the model
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
    files.write_json(
        {"do_lower_case": False, "vocab_type": "spm", "tokenizer_class": "DebertaV2Tokenizer"}, out / "tokenizer_config.json"
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
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


def untrained(out: Path) -> tuple[Any, Any]:
    """Write llm-blender's configuration to `out`/PairRM and build, over `out`/base, the ranker and its tokenizer."""
    from transformers import AutoTokenizer

    config = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": "base",  # beside this folder, wherever it is: stages/rank.py says where when it loads
        "source_maxlength": 1224,
        "candidate_maxlength": 412,
        "n_tasks": 1,
        "sub_sampling_mode": "all_pair",
        "loss_type": "instructgpt",
        "reduce_type": "linear",
        "inference_mode": "bubble",
        "drop_out": 0.0,
        "fp16": True,
    }
    files.write_json(config, out / "PairRM" / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    with pairrm.loading():
        from llm_blender.pair_ranker.config import RankerConfig
        from llm_blender.pair_ranker.model_util import build_collator, build_ranker

        build_collator("pairranker", tokenizer, 1224, 412)  # gives the tokenizer PairRM's four markers
        ranker = build_ranker("pairranker", "deberta", str(out / "base"), None, RankerConfig.from_dict(config), tokenizer)
    return ranker, tokenizer


def pair_logits(ranker: Any, tokenizer: Any, pairs: list[tuple[str, str, str]]) -> Tensor:
    """PairRM's logits (N,) of N triples of prompt, left and right response."""

    def encode(marker: str, texts: tuple[str, ...]) -> list[Tensor]:
        encoded = tokenizer([marker + text for text in texts], padding=True, return_tensors="pt")
        return [encoded["input_ids"], encoded["attention_mask"]]

    prompts, left, right = zip(*pairs, strict=True)
    inputs = encode("<|source|>", prompts) + encode("<|candidate|>", left) + encode("<|candidate|>", right)
    logits: Tensor = ranker._forward(*inputs)["logits"]
    return logits


def train(ranker: Any, tokenizer: Any, prompts: list[Prompt], size: MiniatureRanker, draw: random.Random) -> None:
    """One epoch over all ordered pairs: -log sigmoid(L_ij) where noisy gold prefers i, on the left, to j, on the right."""
    examples = []
    for prompt, responses in prompts:
        scores = [domain.quality(prompt, response) + draw.gauss(0, size.noise) for response in responses]
        for i, j in itertools.permutations(range(len(responses)), 2):
            examples.append(((prompt, responses[i], responses[j]), 1.0 if scores[i] > scores[j] else -1.0))
    draw.shuffle(examples)
    steps = len(examples) // BATCH
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=size.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.learning_rate, total_steps=steps, pct_start=0.1)
    ranker.train()
    for step in tqdm(range(steps), desc="ranker", unit="step"):
        pairs, signs = zip(*examples[step * BATCH : (step + 1) * BATCH], strict=True)
        loss = functional.softplus(-torch.tensor(signs) * pair_logits(ranker, tokenizer, list(pairs))).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    ranker.eval()


@torch.no_grad()
def agreement_with_gold(ranker: Any, tokenizer: Any, prompts: list[Prompt]) -> float:
    """Share of pairs of responses more than 0.5 apart in quality, both orders averaged, that the ranker orders right."""
    right = []
    for prompt, responses in prompts:
        quality = [domain.quality(prompt, response) for response in responses]
        for i, j in itertools.combinations(range(len(responses)), 2):
            if abs(quality[i] - quality[j]) > 0.5:
                pairs = [(prompt, responses[i], responses[j]), (prompt, responses[j], responses[i])]
                forth, back = pair_logits(ranker, tokenizer, pairs).tolist()
                right.append((forth > back) == (quality[i] > quality[j]))
    return float(sum(right) / len(right))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.assets.ranker", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write")
    out = parser.parse_args().out
    read = params.load("seed", "assets.ranker")
    prepare(read.ranker, read.seed, out)
    log.info("wrote %s", out)


if __name__ == "__main__":
    cli.run(main, environment="rank", online=True)

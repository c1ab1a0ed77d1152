"""Rank the K responses of each prompt with PairRM: all ordered pairs, P^, winner and loser (Alg. 1, section 5.1).

PairRM reads the instruction (rank.input says in which form) and two responses; llm-blender cuts texts beyond PairRM's
limits, by how long the batch's texts are. Here they are cut by one prompt's, which gives the scores of batch size 1, and
only then share batches with others.
"""

import argparse
import itertools
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from stages import cli, deberta, files, pairrm, params, pointers, schemas, shards, sppo
from stages.cli import StageError


def parts(ranker: Path) -> tuple[Path, Path]:
    """The folders of PairRM's weights and of the model under it. Raises StageError where either is not to be loaded."""
    weights = pointers.model(files.present(ranker) / "PairRM", tokenizer=False)
    if files.read_json(weights / "config.json").get("ranker_type") != "pairranker":
        raise StageError(f"{weights / 'config.json'} is not of a ranker of PairRM's architecture: name one as assets.ranker")
    return weights, pointers.model(ranker / "base", weights=False)


def load_blender(ranker: Path) -> Any:
    """llm-blender with PairRM, from a folder with `PairRM` and `base`, on a GPU in half precision, else in float32.

    Raises StageError where they are not to be loaded.
    """
    import torch
    from safetensors.torch import load_model
    from transformers import AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights, base = parts(ranker)
    with pairrm.loading():
        import llm_blender
        from llm_blender.blender import blender_utils
        from llm_blender.pair_ranker import model_util

        # PairRM's checkpoint holds every weight (strict loading sees to that): of its base model only the configuration
        # and the tokenizer are needed, and DeBERTa's own weights are to be had as a pickle only.
        model_util.build_pretrained_model = _untrained
        # llm-blender pads on the left where a model's name has "llama" in it, and here the name is a path.
        blender_utils.build_tokenizer = AutoTokenizer.from_pretrained
        blender = llm_blender.Blender()
        # llm-blender itself would load a pickle first, if there is one, and take its word for missing weights.
        blender.loadranker(str(weights), device=device, model_name=str(base), load_checkpoint=None)
    try:
        load_model(blender.ranker, weights / pointers.WEIGHTS, device=device)
    except RuntimeError as error:
        raise StageError(
            f"{weights / pointers.WEIGHTS}: not the weights of PairRM over {base} ({cli.folded(error)}): "
            "correct assets.ranker in params.yaml"
        ) from error
    return blender


def _untrained(model_type: str, model_name: str, **_: Any) -> Any:
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.from_pretrained(model_name))
    model.config.out_hidden_state_size = model.config.hidden_size  # as llm-blender's own function does
    return model


def plain(ids: Any, marker: int, tokenizer: Any) -> Any:
    """Token ids (..., L) of texts with PairRM's own tokens in them made [UNK]: each text keeps its marker and its last [SEP].

    llm-blender finds prompt and responses by these tokens, and would take one in a text for another text. The ids are
    looked at, not the text: the tokenizer's normalisation makes markers of other characters too (＜|source|＞).
    """
    import torch

    own = ["source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id", "sep_token_id"]
    stray = torch.isin(ids, torch.tensor([getattr(tokenizer, name) for name in own], device=ids.device))
    first = (ids == marker).int().argmax(-1, keepdim=True)
    last = ids.shape[-1] - 1 - (ids == tokenizer.sep_token_id).flip(-1).int().argmax(-1, keepdim=True)
    return ids.masked_fill(stray.scatter(-1, first, False).scatter(-1, last, False), tokenizer.unk_token_id)


def apart(text: str) -> str:
    """The text, after a space where it starts with a combining character: that would alter the marker put before it."""
    return f" {text}" if unicodedata.combining(text[:1] or " ") else text


class Texts(NamedTuple):
    """A prompt and its distinct responses as PairRM's token ids (L,), without padding, and what was cut."""

    source: Any
    candidates: list[Any]
    where: list[int]
    """The candidate that each of the K responses is."""
    prompt_cut: bool
    responses_cut: int


def encode(blender: Any, prompt: str, responses: list[str]) -> Texts:
    """Tokens of a prompt and its K responses, cut where llm-blender cuts them when they are a batch of their own.

    Its collator tokenizes by the same rule, but does not say what it cut.
    """
    collator, tokenizer = blender.ranker_collator, blender.ranker_tokenizer
    distinct = list(dict.fromkeys(responses))
    (source,), (prompt_cut,) = tokens(tokenizer, collator.source_prefix, [prompt], collator.source_maxlength)
    longest = collator.candidate_maxlength + (collator.source_maxlength - len(source)) // 2
    candidates, cut = tokens(tokenizer, collator.candidate_prefix, distinct, longest)
    where = [distinct.index(response) for response in responses]
    return Texts(
        plain(source, tokenizer.source_prefix_id, tokenizer),
        [plain(one, tokenizer.cand_prefix_id, tokenizer) for one in candidates],
        where,
        prompt_cut,
        sum(cut[index] for index in where),
    )


def tokens(tokenizer: Any, marker: str, texts: list[str], longest: int) -> tuple[list[Any], list[bool]]:
    """Token ids (L,) of each text after the marker, the first `longest` with [SEP] as the last, and whether it was cut."""
    import torch

    marked = [(marker + apart(text)).replace(tokenizer.sep_token, " ") for text in texts]
    whole = tokenizer(marked, verbose=False)["input_ids"]
    cut = [len(ids) > longest for ids in whole]
    return [torch.tensor(ids[: longest - 1] + ids[-1:] if long else ids) for ids, long in zip(whole, cut, strict=True)], cut


Compare = Callable[[list[tuple[Any, Any, Any]]], Any]
"""PairRM's logits (N,) of N triples of prompt, left and right response, as token ids (L,) each."""


def comparing(blender: Any) -> Compare:
    """llm-blender's forward pass on a GPU; on a processor the same figures sooner, by stages/deberta.py."""
    on_processor = blender.ranker_config.device == "cpu" and deberta.understood(blender.ranker.pretrained_model)
    return quick(blender) if on_processor else llm_blenders_own(blender)


def llm_blenders_own(blender: Any) -> Compare:
    import torch

    tokenizer, device = blender.ranker_tokenizer, blender.ranker_config.device

    @torch.inference_mode()
    def compare(batch: list[tuple[Any, Any, Any]]) -> Any:
        inputs = [one.to(device) for texts in zip(*batch, strict=True) for one in padded(texts, tokenizer)]
        return blender.ranker._forward(*inputs)["logits"]

    return compare


def quick(blender: Any) -> Compare:
    import torch

    ranker, tokenizer = blender.ranker, blender.ranker_tokenizer
    distances = deberta.distances(ranker.pretrained_model)
    markers = torch.tensor([tokenizer.source_prefix_id, tokenizer.cand1_prefix_id, tokenizer.cand2_prefix_id])

    @torch.inference_mode()
    def compare(batch: list[tuple[Any, Any, Any]]) -> Any:
        ids, mask = padded([torch.cat(triple) for triple in batch], tokenizer)
        # PairRM reads the states of the markers, of which each stands behind its text's [CLS].
        places = torch.tensor([[1, len(source) + 1, len(source) + len(left) + 1] for source, left, _ in batch])
        ids.scatter_(1, places, markers.expand_as(places))
        states = deberta.states(ranker.pretrained_model, distances, ids, mask, places)
        source, *responses = states.unbind(1)
        left, right = (ranker.head_layer(torch.cat([source, response], -1)) for response in responses)
        return (left - right).mean(-1)

    return compare


def padded(texts: Sequence[Any], tokenizer: Any) -> tuple[Any, Any]:
    """Token ids and mask (B, L) of B texts (their length,)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence(list(texts), batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, pad_sequence([torch.ones_like(one) for one in texts], batch_first=True)


def pair_logits(compare: Compare, prompts: list[Texts], tokens_per_batch: int) -> list[Any]:
    """PairRM's logits (K, K) float32 of each prompt's K responses, L_ij with response i on the left; 0 where i and j are alike.

    Ordered pairs of any of the prompts share a batch, by length, for as many tokens as tokens_per_batch with the padding.
    """
    import torch

    pairs = sorted(
        (len(texts.source) + len(texts.candidates[i]) + len(texts.candidates[j]), prompt, i, j)
        for prompt, texts in enumerate(prompts)
        for i, j in itertools.permutations(range(len(texts.candidates)), 2)
    )
    logits = [torch.zeros(len(texts.candidates), len(texts.candidates)) for texts in prompts]
    start = 0
    while start < len(pairs):
        end = start + 1
        while end < len(pairs) and pairs[end][0] * (end + 1 - start) <= tokens_per_batch:
            end += 1
        batch = [
            (prompts[prompt].source, prompts[prompt].candidates[i], prompts[prompt].candidates[j])
            for _, prompt, i, j in pairs[start:end]
        ]
        output = compare(batch)
        for (_, prompt, i, j), value in zip(pairs[start:end], output.float().tolist(), strict=True):
            logits[prompt][i, j] = value
        start = end
    return [found[texts.where][:, texts.where] for found, texts in zip(logits, prompts, strict=True)]


def ranking(prompt_id: str, logits: Any, responses: list[str], probability: str) -> dict[str, Any]:
    """Of one row of schemas.RANKINGS what follows from the logits; probability: rank.probability.

    Raises StageError where a logit is not finite.
    """
    if not logits.isfinite().all():
        raise StageError(f"prompt {prompt_id}: PairRM's logits are not finite: check the ranker's weights")
    scores = sppo.pairwise_scores(logits.double())
    winner, loser = (int(index) for index in sppo.choose_pair(scores))
    tie = responses[winner] == responses[loser]
    compared = sppo.aggregate_scores(scores) if probability == "aggregate" else scores
    return {
        "prompt_id": prompt_id,
        "logits": logits.tolist(),
        "probabilities": sppo.win_probabilities(compared).tolist(),
        "winner": winner,
        "loser": winner if tie else loser,
        "tie": tie,
    }


def load(ranker: Path, settings: params.Rank) -> Callable[[pa.Table], pa.Table]:
    """Load PairRM on this process's device. Returns the function that ranks one shard of schemas.RESPONSES."""
    import torch

    torch.set_num_threads(1)  # the order of sums, and so the last digits, must not depend on the number of cores
    blender = load_blender(ranker)
    compare = comparing(blender)

    def rank(shard: pa.Table) -> pa.Table:
        rows = shard.to_pylist()
        column = "prompt" if settings.input == "instruction" else "templated_prompt"
        prompts = [encode(blender, row[column], row["responses"]) for row in rows]
        with cli.within_memory(f"lower rank.tokens_per_batch (now {settings.tokens_per_batch})"):
            logits = pair_logits(compare, prompts, settings.tokens_per_batch)
        ranked = [
            ranking(row["prompt_id"], found, row["responses"], settings.probability)
            | {"prompt_cut": texts.prompt_cut, "responses_cut": texts.responses_cut}
            for row, found, texts in zip(rows, logits, prompts, strict=True)
        ]
        return pa.Table.from_pylist(ranked, schema=schemas.RANKINGS)

    return rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranker", type=Path, help="folder with PairRM and base")
    parser.add_argument("responses", type=Path)
    parser.add_argument("out", type=Path, help="Parquet of rankings")
    args = parser.parse_args()
    settings = params.load("rank").rank
    responses = files.read_table(args.responses, schemas.RESPONSES)
    samples = len(responses["responses"][0])
    if samples < 2:
        raise StageError(f"{args.responses}: a single response to each prompt: generate at least 2 (generate.samples)")
    parts(args.ranker)  # before the workers, each of which would say it
    key = {"ranker": files.digest(args.ranker), "responses": files.digest(args.responses), "rank": settings.model_dump()}
    rankings = shards.map_shards(
        "rank", responses, settings.shard_size, load, (args.ranker, settings), schemas.RANKINGS, key, cores=True
    )
    ties, prompts_cut, responses_cut = (pc.sum(rankings[name]).as_py() for name in ("tie", "prompt_cut", "responses_cut"))
    cli.log.info("%d prompts of %d responses ranked, %d ties", rankings.num_rows, samples, ties)
    cli.log.info("too long for the ranker and cut: %d prompts, %d responses", prompts_cut, responses_cut)
    files.write_table(rankings, schemas.RANKINGS, args.out)


if __name__ == "__main__":
    cli.run(main, environment="rank")

"""Rank the K responses of each prompt with PairRM: all ordered pairs, P^, winner and loser (Alg. 1, section 5.1).

PairRM reads the instruction (rank.input says in which form) and two responses; llm-blender cuts texts beyond PairRM's
limits, by how long the batch's texts are. Here a batch is one prompt's, which gives the scores of batch size 1.
"""

import argparse
import copy
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import cli, files, pairrm, params, pointers, schemas, shards, sppo
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
            f"{weights / pointers.WEIGHTS}: not the weights of PairRM over {base} ({' '.join(str(error).split())[:200]}): "
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


def pair_logits(blender: Any, prompt: str, responses: list[str], pairs_per_batch: int) -> tuple[Any, bool, int]:
    """PairRM's logits (K, K) float32 of K responses, L_ij with response i on the left; 0 where two texts are identical.

    Besides, whether llm-blender cut the prompt, and how many of the K responses it cut.
    """
    import torch

    distinct = list(dict.fromkeys(responses))
    logits = torch.zeros(len(distinct), len(distinct))
    prompt_cut, cut = False, [False] * len(distinct)
    if len(distinct) > 1:
        collator = copy.copy(blender.ranker_collator)
        texts = {"source": apart(prompt), "candidates": [apart(text) for text in distinct]}
        batch = {key: value.to(blender.ranker_config.device) for key, value in collator([texts]).items() if value is not None}
        tokenizer = blender.ranker_tokenizer
        prompt_cut = cut_short(batch["source_attention_mask"][0], collator.source_prefix + texts["source"], tokenizer)
        for index, text in enumerate(texts["candidates"]):
            mask = batch["candidate_attention_mask"][0, index]
            cut[index] = cut_short(mask, collator.candidate_prefix + text, tokenizer)
        batch["source_ids"] = plain(batch["source_ids"], tokenizer.source_prefix_id, tokenizer)
        batch["candidate_ids"] = plain(batch["candidate_ids"], tokenizer.cand_prefix_id, tokenizer)
        left, right = torch.where(~torch.eye(len(distinct), dtype=torch.bool))
        for start in range(0, len(left), pairs_per_batch):
            i, j = left[start : start + pairs_per_batch], right[start : start + pairs_per_batch]
            with torch.no_grad():
                output = blender.ranker._forward(
                    batch["source_ids"].expand(len(i), -1),
                    batch["source_attention_mask"].expand(len(i), -1),
                    batch["candidate_ids"][0, i],
                    batch["candidate_attention_mask"][0, i],
                    batch["candidate_ids"][0, j],
                    batch["candidate_attention_mask"][0, j],
                )
            logits[i, j] = output["logits"].float().cpu()
    where = [distinct.index(response) for response in responses]
    return logits[where][:, where], prompt_cut, sum(cut[index] for index in where)


def cut_short(mask: Any, text: str, tokenizer: Any) -> bool:
    """Whether the tokens under the mask (L,) are fewer than those of the text, as llm-blender prepares it."""
    whole = tokenizer(text.replace(tokenizer.sep_token, " "), verbose=False)["input_ids"]
    return int(mask.sum()) < len(whole)


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

    def rank(shard: pa.Table) -> pa.Table:
        rows = []
        for row in shard.to_pylist():
            prompt = row["prompt" if settings.input == "instruction" else "templated_prompt"]
            with cli.within_memory(f"lower rank.pairs_per_batch (now {settings.pairs_per_batch})"):
                logits, prompt_cut, responses_cut = pair_logits(blender, prompt, row["responses"], settings.pairs_per_batch)
            chosen = ranking(row["prompt_id"], logits, row["responses"], settings.probability)
            rows.append(chosen | {"prompt_cut": prompt_cut, "responses_cut": responses_cut})
        return pa.Table.from_pylist(rows, schema=schemas.RANKINGS)

    return rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranker", type=Path, help="folder with PairRM and base")
    parser.add_argument("responses", type=Path)
    parser.add_argument("out", type=Path, help="Parquet of rankings")
    args = parser.parse_args()
    settings = params.load("rank").rank
    responses = files.read_table(args.responses, schemas.RESPONSES)
    samples = [len(row) for row in responses.column("responses").to_pylist()]
    for row, count in enumerate(samples):
        if count != samples[0] or count < 2:
            raise StageError(
                f"{args.responses}: row {row} has {count} responses"
                + (f", row 0 has {samples[0]}" if count >= 2 else ", at least 2 are wanted")
                + ": generate them again"
            )
    parts(args.ranker)  # before the workers, each of which would say it
    key = {"ranker": files.digest(args.ranker), "responses": files.digest(args.responses), "rank": settings.model_dump()}
    rankings = shards.map_shards(
        "rank", responses, settings.shard_size, load, (args.ranker, settings), schemas.RANKINGS, key, cores=True
    )
    ties, prompts_cut, responses_cut = (
        sum(rankings.column(name).to_pylist()) for name in ("tie", "prompt_cut", "responses_cut")
    )
    cli.log.info("%d prompts of %d responses ranked, %d ties", rankings.num_rows, samples[0], ties)
    cli.log.info("too long for the ranker and cut: %d prompts, %d responses", prompts_cut, responses_cut)
    files.write_table(rankings, schemas.RANKINGS, args.out)


if __name__ == "__main__":
    cli.run(main, environment="rank")

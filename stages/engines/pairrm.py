"""PairRM: load it with llm-blender 0.0.2 under transformers 4.57, encode texts as it does, and compute pair logits.

PairRM reads a prompt and two responses. llm-blender truncates long texts to a limit that depends on the other texts in
the batch. Here each prompt's texts are truncated as if they were a batch of their own, which gives the
scores of batch size 1, and only then share batches with the texts of other prompts.
"""

import contextlib
import functools
import io
import itertools
import logging
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.artifacts import files, models, pointers
from stages.engines import deberta
from stages.method import parity
from stages.runtime.errors import StageError, one_line

Triple = tuple[Tensor, Tensor, Tensor]
"""Token ids (L,) of a prompt, the response on the left and the response on the right; their lengths may differ."""

Forward = Callable[[list[Triple]], Tensor]
"""Returns PairRM's logits (N,) of N triples."""

REMEDY = "set rank.attention to plain"


class EncodedTexts(NamedTuple):
    """A prompt and its distinct responses as PairRM's token ids (L,), without padding, and what was truncated."""

    source: Tensor
    candidates: list[Tensor]
    indices: list[int]
    """For each of the K responses, its index into the candidates."""
    prompt_truncated: bool
    responses_truncated: int
    """How many of the K responses were truncated."""


def check_ranker(ranker: Path) -> None:
    """Check a folder with `PairRM` and `base` before it is loaded. Reads every weight once.

    Raises StageError if either cannot be loaded, if a setting of theirs is a number that no model can compute with, or if a
    weight is not a finite floating-point number.
    """
    weights, _ = find_folders(ranker)
    stored = models.list_tensors(weights)
    models.check_values(stored, stored.keys())


def find_folders(ranker: Path) -> tuple[Path, Path]:
    """Return the folders of PairRM's weights and of its base model.

    Raises StageError as `check_ranker` does, except for the values of weights, which it does not read.
    """
    models.check_form(pointers.resolve(files.require(ranker) / "PairRM"))
    weights = pointers.check_model(ranker / "PairRM", tokenizer=False)
    if not (weights / pointers.WEIGHTS).exists():
        raise StageError(
            f"{weights / pointers.INDEX}: the weights of a ranker are read from one file: save the tensors of all its files as "
            f"{pointers.WEIGHTS} (`safetensors.torch.save_file`), and remove the index"
        )
    config = weights / "config.json"
    if files.read_json(config).get("ranker_type") != "pairranker":
        raise StageError(
            f"{config}: 'ranker_type' is not 'pairranker', PairRM's architecture: correct assets.ranker or rankers"
        )
    models.check_form(pointers.resolve(ranker / "base"))
    return weights, pointers.check_model(ranker / "base", weights=False)


@contextlib.contextmanager
def import_llm_blender() -> Iterator[None]:
    """Make llm-blender importable within the block, and keep it from printing and warning while it is imported or loads.

    llm-blender imports a name that transformers has since removed. The name, the logging level and the warning
    filters are restored.
    """
    import transformers.utils.hub

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            replace_attributes(transformers.utils.hub, TRANSFORMERS_CACHE="unused"),
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def replace_attributes(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """Set attributes of a module within the block; afterwards restore those that existed and delete the others."""
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(module)[name]
        vars(module).update(before)


def import_libraries() -> None:
    """Import what `load_blender` needs, which takes seconds."""
    with import_llm_blender():
        import llm_blender  # noqa: F401


def load_blender(ranker: Path) -> Any:
    """Load llm-blender with PairRM from a folder with `PairRM` and `base`: in half precision on a GPU, else in float32.

    Raises StageError if either cannot be loaded.
    """
    from safetensors.torch import load_model
    from transformers import AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights, base = find_folders(ranker)
    with import_llm_blender():
        import llm_blender
        from llm_blender.blender import blender_utils
        from llm_blender.pair_ranker import model_util

        with (
            # PairRM's checkpoint contains every weight (which strict loading checks). Only the configuration and
            # tokenizer of its base model are needed, and DeBERTa's own weights are published only as a pickle.
            replace_attributes(model_util, build_pretrained_model=_build_untrained_model),
            # llm-blender pads on the left if a model's name contains "llama", but here the name is a path.
            replace_attributes(blender_utils, build_tokenizer=AutoTokenizer.from_pretrained),
        ):
            blender = llm_blender.Blender()
            # llm-blender would load a pickle if there is one, and accept missing weights: we load them below.
            blender.loadranker(str(weights), device=device, model_name=str(base), load_checkpoint=None)
    try:
        load_model(blender.ranker, weights / pointers.WEIGHTS, device=device)
    except RuntimeError as error:
        raise StageError(
            f"{weights / pointers.WEIGHTS}: not the weights of a PairRM based on {base} ({one_line(error)}): "
            "correct assets.ranker or rankers in params.yaml"
        ) from error
    return blender


def _build_untrained_model(model_type: str, model_name: str, **_: Any) -> Any:
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.from_pretrained(model_name))
    model.config.out_hidden_state_size = model.config.hidden_size  # as llm-blender's own function does
    return model


def encode(blender: Any, prompt: str, responses: list[str]) -> EncodedTexts:
    """Tokenize a prompt and its K responses, truncated as llm-blender truncates them when they are a batch of their own.

    llm-blender's collator follows the same rule, but does not report what it truncated.
    """
    collator, tokenizer = blender.ranker_collator, blender.ranker_tokenizer
    distinct = list(dict.fromkeys(responses))
    (source,), (prompt_truncated,) = tokenize(tokenizer, collator.source_prefix, [prompt], collator.source_maxlength)
    max_length = collator.candidate_maxlength + (collator.source_maxlength - len(source)) // 2
    candidates, truncated = tokenize(tokenizer, collator.candidate_prefix, distinct, max_length)
    indices = [distinct.index(response) for response in responses]
    return EncodedTexts(
        mask_marker_tokens(source, tokenizer.source_prefix_id, tokenizer),
        [mask_marker_tokens(candidate, tokenizer.cand_prefix_id, tokenizer) for candidate in candidates],
        indices,
        prompt_truncated,
        sum(truncated[index] for index in indices),
    )


def tokenize(tokenizer: Any, marker: str, texts: list[str], max_length: int) -> tuple[list[Tensor], list[bool]]:
    """Tokenize each text after the marker. Returns token ids (L,) and whether each text was truncated.

    A text that is too long keeps its first max_length - 1 tokens and [SEP].
    """
    marked = [(marker + separate_combining(text)).replace(tokenizer.sep_token, " ") for text in texts]
    whole = tokenizer(marked, verbose=False)["input_ids"]
    truncated = [len(ids) > max_length for ids in whole]
    kept = [ids[: max_length - 1] + ids[-1:] if long else ids for ids, long in zip(whole, truncated, strict=True)]
    return [torch.tensor(ids) for ids in kept], truncated


def separate_combining(text: str) -> str:
    """Put a space before a text that starts with a combining character, which would change the marker in front of it."""
    return f" {text}" if unicodedata.combining(text[:1] or " ") else text


def mask_marker_tokens(ids: Tensor, marker: int, tokenizer: Any) -> Tensor:
    """Replace PairRM's special tokens within texts by [UNK], except each text's own marker and its last [SEP].

    llm-blender locates prompt and responses by these tokens, and would mistake one within a text for the start of another.
    This works on token ids (..., L), because the tokenizer's normalisation also turns other characters into markers
    (＜|source|＞).
    """
    names = ["source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id", "sep_token_id"]
    special = torch.isin(ids, torch.tensor([getattr(tokenizer, name) for name in names], device=ids.device))
    first = (ids == marker).int().argmax(-1, keepdim=True)
    last = ids.shape[-1] - 1 - (ids == tokenizer.sep_token_id).flip(-1).int().argmax(-1, keepdim=True)
    return ids.masked_fill(special.scatter(-1, first, False).scatter(-1, last, False), tokenizer.unk_token_id)


def select_forward(blender: Any, attention: str) -> Forward:
    """Select the forward pass: llm-blender's own on a GPU; on a CPU the faster one of stages/engines/deberta.py.

    attention: rank.attention; on a GPU, `fused` selects the latter too, after `check_parity`. Raises StageError as that does,
    or if a GPU's kernel cannot compute what the model does.
    """
    model, gpu = blender.ranker.pretrained_model, blender.ranker_config.device != "cpu"
    if gpu and attention == "fused":
        if not deberta.is_fusable(model):
            raise StageError(
                f"rank.attention: fused does not support this ranker's attention or the size of its heads: {REMEDY}"
            )
        forward = functools.partial(run_deberta, blender, deberta.project_distances(model), fused=True)
        check_parity(blender, forward)
        return forward
    if not gpu and deberta.is_supported(model):
        return functools.partial(run_deberta, blender, deberta.project_distances(model))
    return functools.partial(run_llm_blender, blender)


@torch.inference_mode()
def run_llm_blender(blender: Any, batch: list[Triple]) -> Tensor:
    """Compute PairRM's logits (N,) of N triples by llm-blender's own forward pass."""
    tokenizer, device = blender.ranker_tokenizer, blender.ranker_config.device
    inputs = [tensor.to(device) for texts in zip(*batch, strict=True) for tensor in pad(texts, tokenizer)]
    logits: Tensor = blender.ranker._forward(*inputs)["logits"]
    return logits


@torch.inference_mode()
def run_deberta(blender: Any, distances: deberta.Distances, batch: list[Triple], *, fused: bool = False) -> Tensor:
    """Compute PairRM's logits (N,) of N triples with stages/engines/deberta.py. distances: from `project_distances`."""
    ranker, tokenizer = blender.ranker, blender.ranker_tokenizer
    markers = torch.tensor([tokenizer.source_prefix_id, tokenizer.cand1_prefix_id, tokenizer.cand2_prefix_id])
    ids, mask = pad([torch.cat(triple) for triple in batch], tokenizer)
    # PairRM reads the hidden states of the markers, each of which follows its text's [CLS].
    positions = torch.tensor([[1, len(source) + 1, len(source) + len(left) + 1] for source, left, _ in batch])
    ids.scatter_(1, positions, markers.expand_as(positions))
    states = deberta.hidden_states(ranker.pretrained_model, distances, ids, mask, positions, fused=fused)
    source, *responses = states.unbind(1)
    left, right = (ranker.head_layer(torch.cat([source, response], -1)) for response in responses)
    logits: Tensor = (left - right).mean(-1)
    return logits


def check_parity(blender: Any, forward: Forward) -> None:
    """Check a forward pass against llm-blender's own on pairs of random tokens, of many lengths and in both orders.

    Half precision rounds, so the error is compared with that of llm-blender's own in half precision (`parity.is_rounding`).
    Raises StageError if it is larger or not a number, or if the forward pass fails, except for lack of memory.
    """
    triples = sample_triples(blender)
    # Kernels may be compiled again for a batch of one pair and for short ones.
    batches = [triples, triples[:2], triples[-1:]]
    batch = [triple for each in batches for triple in each]
    try:
        logits = torch.cat([forward(each) for each in batches]).double().cpu()  # there, an error of the GPU has been raised
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compilers raise
        raise StageError(f"the fused attention cannot be computed ({one_line(error)}): {REMEDY}") from error
    own = evaluate_singly(blender, batch)
    dtype = next(blender.ranker.parameters()).dtype
    blender.ranker.float()  # and back: no weight changes
    exact = evaluate_singly(blender, batch)
    blender.ranker.to(dtype)
    wrong, usual = ((each - exact).square().mean().sqrt().item() for each in (logits, own))
    if not parity.is_rounding(wrong, usual):
        raise StageError(
            f"the fused attention gives other logits than llm-blender: they differ by {wrong:.2g} from those in float32, and "
            f"llm-blender's by {usual:.2g}: {REMEDY}"
        )


def evaluate_singly(blender: Any, batch: list[Triple]) -> Tensor:
    """Compute logits (N,), float64, by llm-blender's own forward pass, one triple at a time to save memory."""
    return torch.cat([run_llm_blender(blender, [triple]) for triple in batch]).double().cpu()


def sample_triples(blender: Any) -> list[Triple]:
    """Return triples of random tokens, from the shortest texts to the longest that PairRM reads, in both orders."""
    tokenizer, collator = blender.ranker_tokenizer, blender.ranker_collator
    generator = torch.Generator().manual_seed(0)

    def sample(marker: int, share: float, longest: int) -> Tensor:
        words = torch.randint(tokenizer.vocab_size, (max(1, round(share * longest) - 3),), generator=generator)
        ids = torch.cat([torch.tensor([tokenizer.cls_token_id, marker]), words, torch.tensor([tokenizer.sep_token_id])])
        return mask_marker_tokens(ids, marker, tokenizer)

    triples = []
    for source, *responses in ((0, 0, 0), (0.01, 0.1, 0.05), (0.05, 0.3, 0.9), (0.3, 1, 0.6), (0.7, 0.4, 0), (1, 1, 1)):
        texts = sample(tokenizer.source_prefix_id, source, collator.source_maxlength)
        left, right = (sample(tokenizer.cand_prefix_id, share, collator.candidate_maxlength) for share in responses)
        triples += [(texts, left, right), (texts, right, left)]
    return triples


def pad(texts: Sequence[Tensor], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Pad B texts (L,) on the right. Returns token ids and attention mask, (B, L) each."""
    ids = pad_sequence(list(texts), batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)


class Pair(NamedTuple):
    """An ordered pair of one prompt's candidates; pairs are sorted by length, in tokens."""

    length: int
    prompt: int
    left: int
    right: int


def pair_logits(forward: Forward, prompts: list[EncodedTexts], tokens_per_batch: int) -> list[Tensor]:
    """Compute PairRM's logits (K, K), float32, of each prompt's K responses.

    L_ij is the logit with response i on the left and j on the right; 0 where their texts are identical. Pairs of all
    prompts share batches, by length, of at most tokens_per_batch tokens including the padding, and of at least one pair.
    """
    pairs = sorted(
        Pair(len(texts.source) + len(texts.candidates[i]) + len(texts.candidates[j]), prompt, i, j)
        for prompt, texts in enumerate(prompts)
        for i, j in itertools.permutations(range(len(texts.candidates)), 2)
    )
    logits = [torch.zeros(len(texts.candidates), len(texts.candidates)) for texts in prompts]
    for batch in split_batches(pairs, tokens_per_batch):
        output = forward([_triple(prompts[pair.prompt], pair) for pair in batch])
        for pair, value in zip(batch, output.float().tolist(), strict=True):
            logits[pair.prompt][pair.left, pair.right] = value
    return [matrix[texts.indices][:, texts.indices] for matrix, texts in zip(logits, prompts, strict=True)]


def _triple(texts: EncodedTexts, pair: Pair) -> Triple:
    return texts.source, texts.candidates[pair.left], texts.candidates[pair.right]


def split_batches(pairs: list[Pair], tokens_per_batch: int) -> Iterator[list[Pair]]:
    """Split sorted pairs into batches, each padded to its longest pair; see `pair_logits`."""
    start = 0
    while start < len(pairs):
        end = start + 1
        while end < len(pairs) and pairs[end].length * (end + 1 - start) <= tokens_per_batch:
            end += 1
        yield pairs[start:end]
        start = end

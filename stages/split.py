"""Split the prompts into disjoint parts, one per iteration plus a hold-out, and count the overlap with AlpacaEval."""

import argparse
import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from stages.artifacts import files, schemas, tables
from stages.runtime import params
from stages.runtime.errors import StageError, quote
from stages.runtime.logs import log

HOLD_OUT = "hold-out"
NGRAM = 13
"""Consecutive words that are not shared by chance, GPT-3's measure of contamination (arXiv 2005.14165, appendix C)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, required=True, help="Parquet file from assets-prompts")
    parser.add_argument("--instructions", type=Path, required=True, help="instructions.json from assets-alpaca-eval")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write: one ITERATION.parquet each, hold-out.parquet, contamination.json",
    )


def main(args: argparse.Namespace) -> None:
    settings = params.load("seed", "iterations", "split")
    prompts = tables.read(args.prompts, schemas.PROMPTS)
    instructions = [row["instruction"] for row in files.read_records(args.instructions, ["instruction"])]
    contaminated = pa.array(find_contaminated(prompts["prompt"].to_pylist(), instructions))
    log.info("%d of %d prompts are also in AlpacaEval", contaminated.true_count, prompts.num_rows)
    dropped = 0
    if settings.split.contamination == "drop":
        dropped = contaminated.true_count
        kept = pc.invert(contaminated)
        prompts, contaminated = prompts.filter(kept), contaminated.filter(kept)
    parts = allot(
        prompts["prompt_id"].to_pylist(),
        prompts["iteration"].to_pylist(),
        list(settings.iterations),
        seed=settings.seed,
        prompts_per_iteration=settings.split.prompts_per_iteration,
        hold_out=settings.split.hold_out,
    )
    if settings.split.contamination == "refuse":
        trained = [index for name in settings.iterations for index in parts[name]]
        refuse(args.prompts, [prompts["prompt"][index].as_py() for index in trained if contaminated[index].as_py()])
    counts = {name: contaminated.take(pa.array(indices, pa.int64())).true_count for name, indices in parts.items()}
    with files.replacing(args.out) as partial:
        partial.mkdir()
        for name, indices in parts.items():
            part = prompts.select(schemas.SPLIT.names).take(pa.array(indices, pa.int64()))
            tables.write(part, schemas.SPLIT, partial / f"{name}.parquet")
            log.info("%s: %d prompts, %d in AlpacaEval", args.out / f"{name}.parquet", len(indices), counts[name])
        record = {"contaminated": counts, "dropped": dropped, "instructions": len(instructions)}
        files.write_json(record, partial / "contamination.json")


class _Punctuation(dict[int, str | int]):
    """A table for str.translate that replaces the punctuation of any script with spaces; filled on first use of a character."""

    def __missing__(self, code: int) -> str | int:
        self[code] = " " if unicodedata.category(chr(code)).startswith("P") else code
        return self[code]


_PUNCTUATION = _Punctuation()


def normalize_words(text: str) -> list[str]:
    """Return a text's words for comparison, ignoring case, punctuation, white space and Unicode encoding variants."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION).split()


def find_contaminated(prompts: Sequence[str], instructions: Sequence[str]) -> list[bool]:
    """Return whether each prompt consists of the same words as an instruction, or shares NGRAM consecutive words with one."""
    known = [normalize_words(text) for text in instructions]
    whole, ngrams = set(map(tuple, known)), {ngram for words in known for ngram in list_ngrams(words)}
    return [tuple(words) in whole or not ngrams.isdisjoint(list_ngrams(words)) for words in map(normalize_words, prompts)]


def list_ngrams(words: list[str]) -> Iterator[tuple[str, ...]]:
    """Iterate over all sequences of NGRAM consecutive words."""
    return zip(*(words[start:] for start in range(NGRAM)), strict=False)


def allot(
    ids: Sequence[str],
    assigned: Sequence[str | None],
    iterations: Sequence[str],
    *,
    seed: int,
    prompts_per_iteration: int | None,
    hold_out: int,
) -> dict[str, list[int]]:
    """Allot prompts to the hold-out and the iterations. Returns disjoint lists of indices into `ids`, by name.

    ids: unique, one per prompt. assigned: the iteration that the source assigns the prompt to, or None.
    Prompts are ordered by the hash of seed and ID only, and iterations are served in their order: neither the order of the rows
    nor an additional iteration changes the others' prompts. The hold-out comes first, from unassigned prompts as long as there
    are any. An iteration with assigned prompts draws from these (all of them if prompts_per_iteration is None), the others draw
    from the unassigned ones. Raises StageError if there are too few prompts.
    """
    order = sorted(range(len(ids)), key=lambda index: hashlib.sha256(f"{seed}/split/{ids[index]}".encode()).digest())
    order.sort(key=lambda index: assigned[index] is not None)
    if hold_out > len(ids):
        raise StageError(f"params.yaml: split.hold_out is {hold_out} but only {len(ids)} prompts are available: lower it")
    parts = {HOLD_OUT: order[:hold_out]}
    available: dict[str | None, list[int]] = {None: []}
    for index in order[hold_out:]:
        available.setdefault(assigned[index], []).append(index)
    for name in iterations:
        source = name if name in available else None
        count = prompts_per_iteration
        if source and count is None:
            count = len(available[source])
        check_count(name, source, count, len(available[source]), len(ids))
        parts[name] = available[source][:count]
        available[source] = available[source][count:]
    indices = [index for part in parts.values() for index in part]
    assert len(indices) == len(set(indices))
    return parts


def check_count(name: str, source: str | None, count: int | None, available: int, total: int) -> None:
    """Raise StageError if iteration `name` cannot get `count` prompts from those assigned to `source` (None: unassigned)."""
    if count is None:
        raise StageError(
            f"params.yaml: split.prompts_per_iteration is null but no prompts are assigned to {name}: set it to a number"
        )
    if count <= available:
        return
    if source:
        raise StageError(
            f"params.yaml: {name} needs {count} prompts but only {available} are assigned to it: lower "
            "split.prompts_per_iteration, or set it to null to use all assigned prompts"
        )
    raise StageError(
        f"params.yaml: {name} needs {count} prompts but only {available} of {total} are left: lower "
        "split.prompts_per_iteration or split.hold_out, or provide more prompts (assets.prompts)"
    )


def refuse(path: Path, contaminated: Sequence[str]) -> None:
    """Raise StageError if there are contaminated training prompts. path: the file that they come from."""
    if contaminated:
        raise StageError(
            f"{path}: {len(contaminated)} training prompts are also in AlpacaEval, the first is {quote(contaminated[0])}: set "
            "split.contamination in params.yaml to drop or to count"
        )

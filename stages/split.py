"""Disjoint prompts for every iteration, and a hold-out that none of them trains on; which of them AlpacaEval asks too."""

import argparse
import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from stages import cli, files, params, schemas
from stages.cli import StageError

HOLD_OUT = "hold-out"
RUN = 13
"""Words in a row that no two texts share by chance: GPT-3's measure of contamination (arXiv 2005.14165, appendix C)."""


class Punctuation(dict[int, str | int]):
    """For str.translate: a space for punctuation of any script, looked up when a character is met first."""

    def __missing__(self, code: int) -> str | int:
        self[code] = " " if unicodedata.category(chr(code)).startswith("P") else code
        return self[code]


PUNCTUATION = Punctuation()


def words(text: str) -> list[str]:
    """A text's words as they are compared: without case, punctuation, white space and Unicode's forms of a character."""
    return unicodedata.normalize("NFKC", text).casefold().translate(PUNCTUATION).split()


def contaminated(prompts: Sequence[str], instructions: Sequence[str]) -> list[bool]:
    """Whether each prompt has the words of an instruction, all of them or any RUN in a row."""

    def runs(text: list[str]) -> Iterator[tuple[str, ...]]:
        return zip(*(text[start:] for start in range(RUN)), strict=False)

    asked = [words(text) for text in instructions]
    whole, parts = set(map(tuple, asked)), {run for text in asked for run in runs(text)}
    return [tuple(text) in whole or not parts.isdisjoint(runs(text)) for text in map(words, prompts)]


def allot(
    ids: Sequence[str],
    parts: Sequence[str | None],
    iterations: Sequence[str],
    *,
    seed: int,
    prompts_per_iteration: int | None,
    hold_out: int,
) -> dict[str, list[int]]:
    """Indices into `ids` of each iteration and of the hold-out, no index twice.

    ids: one per prompt, different. parts: the iteration a source gives the prompt to, or None. Only the hash of seed and id
    orders the prompts, and iterations are served in their order: neither the order of the rows nor a further iteration
    changes what the others get. The hold-out comes first, from prompts without a part as long as there are any. An iteration
    with a given part draws from it (all of it where prompts_per_iteration is None), the others from prompts without one.
    Raises StageError where there are not enough.
    """
    order = sorted(range(len(ids)), key=lambda index: hashlib.sha256(f"{seed}/split/{ids[index]}".encode()).digest())
    order.sort(key=lambda index: parts[index] is not None)
    if hold_out > len(ids):
        raise StageError(f"split.hold_out: {hold_out} prompts are wanted and there are {len(ids)}: lower it")
    result = {HOLD_OUT: order[:hold_out]}
    given: dict[str | None, list[int]] = {}
    for index in order[hold_out:]:
        given.setdefault(parts[index], []).append(index)
    free, taken = given.get(None, []), 0
    for name in iterations:
        if name in given:
            count = len(given[name]) if prompts_per_iteration is None else prompts_per_iteration
            if count > len(given[name]):
                raise StageError(
                    f"{name}: {count} prompts are wanted and its part has {len(given[name])}: lower "
                    "split.prompts_per_iteration, or make it null for all of a part"
                )
            result[name] = given[name][:count]
        else:
            if prompts_per_iteration is None:
                raise StageError(f"{name} has no part of its own in the prompts: set split.prompts_per_iteration to a number")
            if prompts_per_iteration > len(free) - taken:
                raise StageError(
                    f"{name}: {prompts_per_iteration} prompts are wanted and {len(free) - taken} of {len(ids)} are left: lower "
                    "split.prompts_per_iteration or split.hold_out, or have more prompts (assets.prompts)"
                )
            result[name] = free[taken : taken + prompts_per_iteration]
            taken += prompts_per_iteration
    chosen = [index for indices in result.values() for index in indices]
    assert len(chosen) == len(set(chosen))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path, help="Parquet: prompt_id, prompt, part")
    parser.add_argument("instructions", type=Path, help="JSON: AlpacaEval's instructions, from assets")
    parser.add_argument(
        "out", type=Path, help="folder to write: ITERATION.parquet each, hold-out.parquet and contamination.json"
    )
    arguments = parser.parse_args()
    wanted = params.load("seed", "iterations", "split")
    table = files.read_table(arguments.prompts, schemas.PROMPTS)
    instructions = [row["instruction"] for row in files.read_records(arguments.instructions, ["instruction"])]
    found = pa.array(contaminated(table["prompt"].to_pylist(), instructions))
    cli.log.info("%d of %d prompts are in AlpacaEval too", found.true_count, table.num_rows)
    dropped = 0
    if wanted.split.contamination == "drop":
        dropped = found.true_count
        table, found = table.filter(pc.invert(found)), found.filter(pc.invert(found))
    result = allot(
        table["prompt_id"].to_pylist(),
        table["part"].to_pylist(),
        list(wanted.iterations),
        seed=wanted.seed,
        prompts_per_iteration=wanted.split.prompts_per_iteration,
        hold_out=wanted.split.hold_out,
    )
    counts = {name: found.take(pa.array(indices, pa.int64())).true_count for name, indices in result.items()}
    trained = sum(counts[name] for name in wanted.iterations)
    if wanted.split.contamination == "refuse" and trained:
        prompt = table["prompt"][next(index for name in wanted.iterations for index in result[name] if found[index].as_py())]
        raise StageError(
            f"{arguments.prompts}: {trained} prompts to train on are in AlpacaEval too, {cli.shown(prompt.as_py())} the first: "
            "have them dropped (split.contamination)"
        )
    with files.replacing(arguments.out) as folder:
        folder.mkdir()
        for name, indices in result.items():
            part = table.select(schemas.PART.names).take(pa.array(indices, pa.int64()))
            files.write_table(part, schemas.PART, folder / f"{name}.parquet")
            cli.log.info("%s: %d prompts, %d in AlpacaEval", arguments.out / f"{name}.parquet", len(indices), counts[name])
        record = {"contaminated": counts, "dropped": dropped, "instructions": len(instructions)}
        files.write_json(record, folder / "contamination.json")


if __name__ == "__main__":
    cli.run(main)

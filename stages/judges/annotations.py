"""Check outputs and annotations in alpaca-eval's formats, which alpaca-eval itself would score whatever they contain.

Refused, with a message that names the file, the record and the key:
- an instruction that occurs twice, or that is missing from the outputs or from the annotations;
- outputs of several models (`generator`), annotations of several baselines (`generator_1`) or judges (`annotator`);
- an annotation whose output (`output_2`) or model (`generator_2`) is not the one in the outputs;
- a preference that is not a number from 1 (the baseline wins) to 2 (the model wins), 0 or null: a missing key, a boolean, a
  string, NaN, infinity. 0 is a tie on the scale of older annotations, which have only 0, 1 and 2; alpaca-eval reads it as 1.5;
- annotations without a single preference;
- with length control: a baseline other than BASELINE, an empty reference output, or one that differs from the set's, and
  outputs that all differ in length from their reference output by the same number of characters.

Counted, and left out of the win rate: null, which alpaca-eval writes if the judge gave no usable answer. Length
control is fitted without these instructions, but predicts a preference for them as well.
Counted, and compared like any other: empty reference outputs, without length control. A small policy may produce them.
"""

from pathlib import Path

from stages.artifacts.preferences import is_preference
from stages.judges.scoring import Records
from stages.runtime.errors import StageError, quote

BASELINE = "gpt4_1106_preview"
"""The generator of AlpacaEval 2.0's reference outputs, the baseline for which length control is defined."""


def check_outputs(path: Path, outputs: Records) -> None:
    """Raise StageError unless the outputs, from a file in alpaca-eval's format, are one model's, one per instruction."""
    _check_distinct(path, outputs)
    _check_equal(path, outputs, "generator", "one model at a time")


def check_references(path: Path, references: Records, output: str = "output", generator: str = "generator") -> None:
    """Raise StageError unless these may be AlpacaEval 2.0's reference outputs: of BASELINE, none of them empty.

    output, generator: the keys of the records that hold them.
    """
    remedy = "compare with alpaca_eval_gpt4_baseline.json from the Hub's tatsu-lab/alpaca_eval data set"
    for index, row in enumerate(references):
        if row[generator] != BASELINE:
            raise StageError(
                f"{path}: record {index}: {generator!r} is {quote(row[generator])}, but length control is defined for the "
                f"baseline {BASELINE!r} only: {remedy}"
            )
        if not row[output]:
            raise StageError(f"{path}: record {index}: {output!r} is empty, but no reference output of the set is: {remedy}")


def check_lengths(path: Path, model: str, outputs: list[str], references: list[str]) -> None:
    """Raise StageError if every output is longer than its reference output by the same number of characters.

    Length control divides by the standard deviation of these numbers. alpaca-eval does not fit it if the model is BASELINE.
    """
    differences = {len(output) - len(reference) for output, reference in zip(outputs, references, strict=True)}
    if len(differences) == 1 and model != BASELINE:
        raise StageError(
            f"{path}: every output of {quote(model)} is {differences.pop()} characters longer than its reference output, so "
            "length control is not defined: check that these are the model's own outputs"
        )


def check_annotations(path: Path | str, annotations: Records, outputs_path: Path, outputs: Records) -> None:
    """Raise StageError unless the annotations are one judge's preferences between one baseline and exactly these outputs.

    path: their file, or what to call them in messages. The records may be in any order.
    """
    _check_distinct(path, annotations)
    _check_equal(path, annotations, "generator_1", "one baseline at a time")
    _check_equal(path, annotations, "annotator", "one judge at a time")
    _check_same_outputs(path, annotations, outputs_path, outputs)
    for index, row in enumerate(annotations):
        if not is_preference(row.get("preference", "missing")):
            value = quote(row["preference"]) if "preference" in row else "missing"
            raise StageError(
                f"{path}: record {index}: 'preference' is {value}, but must be a number from 1 to 2, 0 (a tie) or null (none): "
                "annotate this instruction again"
            )
    if count_failed(annotations) == len(annotations):
        raise StageError(f"{path}: 'preference' is null in all {len(annotations)} records: annotate them with another judge")


def count_failed(annotations: Records) -> int:
    """Return the number of annotations without a preference."""
    return sum(row["preference"] is None for row in annotations)


def count_empty(rows: Records, key: str) -> int:
    """Return the number of records whose text under `key` is empty."""
    return sum(not row[key] for row in rows)


def _check_distinct(path: Path | str, rows: Records) -> None:
    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        first = seen.setdefault(row["instruction"], index)
        if first != index:
            raise StageError(
                f"{path}: record {index}: 'instruction' is that of record {first}: remove one of the two, since alpaca-eval "
                "compares one output per instruction"
            )


def _check_equal(path: Path | str, rows: Records, key: str, remedy: str) -> None:
    first = rows[0].get(key)
    for index, row in enumerate(rows):
        if row.get(key) != first:
            raise StageError(
                f"{path}: record {index}: {key!r} is {quote(row.get(key))}, but {quote(first)} in record 0: score {remedy}"
            )


def _check_same_outputs(path: Path | str, annotations: Records, outputs_path: Path, outputs: Records) -> None:
    remedy = "pass the outputs that were annotated"
    numbers = {row["instruction"]: number for number, row in enumerate(outputs)}
    for index, row in enumerate(annotations):
        number = numbers.pop(row["instruction"], None)
        if number is None:
            raise StageError(f"{path}: record {index}: 'instruction' does not occur in {outputs_path}: {remedy}")
        for key, theirs in (("output_2", "output"), ("generator_2", "generator")):
            if row[key] != outputs[number][theirs]:
                raise StageError(
                    f"{path}: record {index}: {key!r} is not {theirs!r} in record {number} of {outputs_path}, which has the "
                    f"same instruction: {remedy}"
                )
    if numbers:
        raise StageError(f"{outputs_path}: record {min(numbers.values())}: 'instruction' does not occur in {path}: {remedy}")

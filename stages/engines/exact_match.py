"""The metric exact_match of lm-eval, which would load code for it from the working directory, a folder of data.

Stages import no code from data.
"""

import re
import string
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from stages.runtime.errors import StageError, quote

NAME = "exact_match"


def install() -> None:
    """Replace `evaluate.load`, in this process, by a function that knows NAME only. Call this before importing lm_eval."""
    import evaluate

    evaluate.load = load


def load(name: str, *_: Any, **__: Any) -> Any:
    """Return the metric, in place of `evaluate.load`. Raises StageError for any other, whose code would come from elsewhere."""
    if name != NAME:
        raise StageError(f"lm-eval asks for the metric {quote(name)}, expected {NAME}: reinstall lm-eval 0.4.1 (`make env`)")
    return SimpleNamespace(compute=compute)


def compute(
    predictions: Sequence[str],
    references: Sequence[str],
    regexes_to_ignore: Sequence[str] | None = None,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
) -> dict[str, float]:
    """Compute the share of N predictions that equal their references, N > 0, as Hugging Face's metric of this name does."""
    ignored = str.maketrans("", "", string.punctuation * ignore_punctuation + string.digits * ignore_numbers)

    def normalize(text: str) -> str:
        for regex in regexes_to_ignore or ():
            text = re.sub(regex, "", text)
        return (text.lower() if ignore_case else text).translate(ignored)

    equal = [normalize(prediction) == normalize(text) for prediction, text in zip(predictions, references, strict=True)]
    return {NAME: sum(equal) / len(equal)}

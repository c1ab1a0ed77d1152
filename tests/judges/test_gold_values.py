"""Why the miniature has no length-controlled win rate: docs/method.md has the argument and the values for the policies."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stages.judges import scoring
from stages.miniature import domain

COUNT = 200
NEUTRAL = "Here is what I found."
"""A sentence that the gold rule neither rewards nor punishes, wherever it is within an answer."""
Version = Callable[[str, str], str]
"""Makes a shorter or longer version of a reference output, from it and the sentence in it that answers the question."""


def pad(answer: str, times: int) -> str:
    """Lengthen an answer, after its polite opening if it has one, by sentences that the gold rule ignores."""
    opening = next((text for text in domain.POLITE_OPENINGS if answer.startswith(text)), "")
    return " ".join(filter(None, [opening, *[NEUTRAL] * times, answer.removeprefix(opening).strip()]))


@pytest.fixture(scope="module")
def references() -> list[tuple[str, str, str]]:
    """Prompts with their right answer and a mixed answer of at most 10 words: two neutral sentences keep it within 20."""
    rng = random.Random(0)
    source = domain.draw_prompts(rng, "evaluation")
    drawn = ((prompt, question.right, domain.draw_mixed_answer(question, rng)) for prompt, question in source)
    short = (row for row in drawn if len(row[2].split()) <= 10)
    return [next(short) for _ in range(COUNT)]


def test_up_to_20_words_the_gold_rule_ignores_length(references: list[tuple[str, str, str]]) -> None:
    for prompt, right, output in references:
        assert domain.preference(prompt, pad(output, 2), output) == 0.5
        assert domain.preference(prompt, pad(output, 1), right) == domain.preference(prompt, output, right)
    prompt, right, _ = references[0]
    assert domain.preference(prompt, pad(right, 5), right) < 0.5


def describe(prompts: list[str], references: list[str], outputs: list[str]) -> pd.DataFrame:
    """Make rows of df_gamed.csv, judged by the gold rule. All difficulties are 0: the tests' instructions are equally hard."""
    differences = np.array([len(first) - len(second) for first, second in zip(references, outputs, strict=True)])
    triples = zip(prompts, outputs, references, strict=True)
    return pd.DataFrame(
        {
            "model": "reference_gamed",
            "preference": [domain.preference(*texts) for texts in triples],
            "index": range(len(prompts)),
            "std_delta_len": differences / differences.std(ddof=1),
            "instruction_difficulty": 0.0,
            "not_gamed_baseline": False,
        }
    )


def logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def fit_length_effect(gamed: pd.DataFrame) -> float:
    """Fit the coefficient of tanh(std_delta_len), the only one that is not 0 for these rows, by Newton's method."""
    lengths, wins = np.tanh(gamed["std_delta_len"].to_numpy()), gamed["preference"].to_numpy()
    effect = 0.0
    for _ in range(20):
        fitted = 1 / (1 + np.exp(-effect * lengths))
        effect += float(((wins - fitted) * lengths).sum() / (fitted * (1 - fitted) * lengths**2).sum())
    return effect


def ramble(output: str, _: str) -> str:
    return f"{output} {domain.RAMBLINGS[len(output) % 6]}"


def be_polite(output: str, right: str) -> str:
    return f"{domain.POLITE_OPENINGS[len(output) % 4]} {right} {domain.POLITE_CLOSINGS[len(output) % 3]}"


@pytest.mark.parametrize(("lengthen", "favoured"), [(ramble, True), (be_polite, False)])
def test_length_control_of_a_tie_is_set_by_the_versions_that_it_is_fitted_on(
    lengthen: Version, favoured: bool, references: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    """Every comparison is a tie, and the outputs differ in length alone: nothing but df_gamed.csv can move LC from 50.

    lengthen: makes the verbose versions. favoured: whether length control then favours a model with long outputs.
    """
    prompts, rights, texts = (list(column) for column in zip(*references, strict=True))
    longer = [lengthen(output, right) for output, right in zip(texts, rights, strict=True)]
    gamed = pd.concat([describe(prompts, texts, longer), describe(prompts, texts, rights)])
    gamed.to_csv(tmp_path / "df_gamed.csv", index=False)
    ours = [pad(output, 1 + index % 2) for index, output in enumerate(texts)]
    outputs = [{"instruction": prompt, "output": text, "generator": "ours"} for prompt, text in zip(prompts, ours, strict=True)]
    annotations = [
        row
        | {"index": index, "annotator": "gold", "preference": 2 - domain.preference(prompts[index], texts[index], ours[index])}
        | {"output_1": texts[index], "generator_1": "reference", "output_2": ours[index], "generator_2": "ours"}
        for index, row in enumerate(outputs)
    ]
    metrics = scoring.score_annotations(annotations, outputs, tmp_path)
    assert metrics["win_rate"] == 50
    # tanh is about -1 in each of our rows, so that the model's own coefficient cancels the effect of length: -effect + own = 0.
    assert metrics["length_controlled_winrate"] == pytest.approx(100 * logistic(fit_length_effect(gamed)), abs=2)
    assert (metrics["length_controlled_winrate"] > 55) if favoured else (metrics["length_controlled_winrate"] < 45)

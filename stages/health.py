"""Health of each iteration: what was generated, ranked, cut and dropped, and how training went."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from stages import files, markdown, params, schemas, sppo
from stages.cli import StageError, shown

FIGURES = {
    "prompts": "prompts",
    "contaminated": "prompts in AlpacaEval too",
    "responses": "responses",
    "duplicates": "identical to an earlier response to the prompt",
    "empty": "empty responses",
    "responses_cut": "cut at generate.max_new_tokens",
    "tokens": "tokens generated",
    "length_5": "tokens a response: 5 % quantile",
    "length_50": "median",
    "length_95": "95 % quantile",
    "ranker_prompts_cut": "prompts cut by the ranker",
    "ranker_responses_cut": "responses cut by the ranker",
    "ties": "ties, dropped",
    "pairs_too_long": "pairs dropped as too long",
    "pairs": "pairs trained on",
    "training_prompts_cut": "pairs with the prompt cut for training",
    "training_responses_cut": "winners and losers cut for training",
    "chosen_probability": "P^ of winners: mean",
    "chosen_probability_5": "5 % quantile",
    "chosen_probability_95": "95 % quantile",
    "rejected_probability": "P^ of losers: mean",
    "rejected_probability_5": "5 % quantile",
    "rejected_probability_95": "95 % quantile",
    "steps": "optimizer steps",
    "first_loss": "loss at the first step",
    "theoretical_first_loss": "its expectation where policy and reference agree",
    "last_loss": "loss at the end",
    "gradient_norm": "median gradient norm",
    "clipped_steps": "share of steps with the gradient clipped",
    "chosen_log_ratio": "log-ratio of winners, nats",
    "rejected_log_ratio": "log-ratio of losers, nats",
    "reward_margin": "reward margin",
    "kl": "KL to the reference, nats",
}
"""Metric -> its row in the table."""


def health(iteration: str, data: Path, eta: float, train: params.Train) -> tuple[dict[str, float], pd.DataFrame, pd.DataFrame]:
    """The FIGURES of one iteration, its training log, and the histogram of its pairs' P^.

    Raises StageError where a file of it is missing or not as written.
    """
    responses = files.read_table(data / "responses" / f"{iteration}.parquet", schemas.RESPONSES)
    duplicates = empty = 0
    for batch in responses["responses"].chunks:  # Arrow can compare texts only across all rows
        texts = batch.to_pylist()
        duplicates += sum(len(row) - len(set(row)) for row in texts)
        empty += sum(not text.strip() for row in texts for text in row)
    counts = pc.list_flatten(responses["token_counts"]).to_pandas()
    cut = pc.equal(pc.list_flatten(responses["finish_reasons"]), "length")
    prompts = len(responses)
    del responses
    rankings = files.read_table(data / "rankings" / f"{iteration}.parquet", schemas.RANKINGS)
    rankings = rankings.select(["tie", "prompt_cut", "responses_cut"]).to_pandas()
    pairs = files.read_table(data / "pairs" / f"{iteration}.parquet", schemas.PAIRS)
    pairs = pairs.select([field.name for field in pairs.schema if not pa.types.is_list(field.type)]).to_pandas()
    log = training_log(data / "logs" / f"{iteration}.csv")
    chosen, rejected = pairs["chosen_probability"], pairs["rejected_probability"]
    probabilities = torch.tensor(pd.concat([chosen, rejected]).to_numpy())
    zeros = torch.zeros_like(probabilities)
    end = log.tail(max(1, len(log) // 5)).mean(numeric_only=True)
    return (
        {
            "prompts": prompts,
            "contaminated": contaminated(iteration, data / "split" / "contamination.json"),
            "responses": len(counts),
            "duplicates": duplicates,
            "empty": empty,
            "responses_cut": pc.sum(cut).as_py(),
            "tokens": int(counts.sum()),
            **{f"length_{percent}": float(counts.quantile(percent / 100)) for percent in (5, 50, 95)},
            "ranker_prompts_cut": int(rankings["prompt_cut"].sum()),
            "ranker_responses_cut": int(rankings["responses_cut"].sum()),
            "ties": int(rankings["tie"].sum()),
            "pairs_too_long": len(rankings) - int(rankings["tie"].sum()) - len(pairs),
            "pairs": len(pairs),
            "training_prompts_cut": int((pairs["prompt_cut"] > 0).sum()),
            "training_responses_cut": int((pairs[["chosen_cut", "rejected_cut"]] > 0).sum().sum()),
            "chosen_probability": float(chosen.mean()),
            **{f"chosen_probability_{percent}": float(chosen.quantile(percent / 100)) for percent in (5, 95)},
            "rejected_probability": float(rejected.mean()),
            **{f"rejected_probability_{percent}": float(rejected.quantile(percent / 100)) for percent in (5, 95)},
            "steps": len(log),
            "first_loss": float(log["loss"].iloc[0]),
            "theoretical_first_loss": sppo.loss(train.loss, zeros, zeros, probabilities, eta, train.beta).item(),
            "last_loss": float(end["loss"]),
            "gradient_norm": float(log["gradient_norm"].median()),
            "clipped_steps": float(log["clipped"].mean()),
            "chosen_log_ratio": float(end["chosen_log_ratio"]),
            "rejected_log_ratio": float(end["rejected_log_ratio"]),
            "reward_margin": float(end["chosen_log_ratio"] - end["rejected_log_ratio"]) * (train.beta or 1 / eta),
            "kl": float(end["kl"]),
        },
        log.assign(iteration=iteration),
        histogram(pairs).assign(iteration=iteration),
    )


def training_log(path: Path) -> pd.DataFrame:
    """A log of schemas.LOG_COLUMNS, all of it finite numbers, the steps from 1 on. Raises StageError."""
    try:
        log = pd.read_csv(files.present(path))
    except (ValueError, OSError) as error:
        raise StageError(f"{path}: not a readable CSV file ({error}): make it with `dvc repro`") from error
    if list(log.columns) != schemas.LOG_COLUMNS or log.empty:
        raise StageError(f"{path}: rows of {', '.join(schemas.LOG_COLUMNS)} are wanted: make it with `dvc repro`")
    numbers: pd.DataFrame = log.apply(pd.to_numeric, errors="coerce")
    wrong = ~(numbers.abs() < math.inf) | (log.dtypes == "bool")
    wrong["step"] |= log["step"] != range(1, len(log) + 1)
    if wrong.any(axis=None):
        row, column = (int(index[0]) for index in np.nonzero(wrong))
        value = shown(log.iloc[:, column].tolist()[row])
        raise StageError(f"{path}: row {row}: {schemas.LOG_COLUMNS[column]!r} is {value}: make it with `dvc repro`")
    return numbers


def contaminated(iteration: str, path: Path) -> int:
    """How many of an iteration's prompts AlpacaEval asks too, by split's record."""
    record = files.read_json(path)
    counts = record.get("contaminated") if isinstance(record, dict) else None
    if not isinstance(counts, dict) or not isinstance(counts.get(iteration), int):
        raise StageError(f"{path}: no count of {iteration}'s prompts: make it with `dvc repro`")
    return int(counts[iteration])


def figure(value: float) -> str:
    """A count whole, any other number to four digits."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


BINS = 20


def histogram(pairs: pd.DataFrame) -> pd.DataFrame:
    """How many winners and losers have P^ in each of BINS bins: response, probability (from), upper, responses."""
    edges = [index / BINS for index in range(BINS + 1)]
    parts = []
    for response, column in (("winner", "chosen_probability"), ("loser", "rejected_probability")):
        counts = pd.cut(pairs[column], edges, include_lowest=True).value_counts(sort=False)
        parts.append(
            pd.DataFrame({"response": response, "probability": edges[:-1], "upper": edges[1:], "responses": counts.array})
        )
    return pd.concat(parts)


def page(found: dict[str, dict[str, float]]) -> str:
    """health.md: the FIGURES, a column an iteration."""
    rows = [[label, *[figure(values[name]) for values in found.values()]] for name, label in FIGURES.items()]
    text = (
        "# Health\n\n"
        + markdown.table(["", *found], rows)
        + "\nIn AlpacaEval too: all the words of one of its instructions, or 13 of them in a row, case and punctuation aside "
        "(`split.contamination`). The loss at the first step is of the first global batch, its expectation (for SPPO "
        "η² mean (P^ − ½)²) of all pairs; every first batch was checked against its own. Loss at the end, log-ratios "
        "log π/π_t (summed over a response) and what follows from them: means over the last fifth of the steps. Reward "
        "margin: winner's log-ratio minus loser's, divided by η (times β for DPO and IPO). KL: mean of half the squared "
        "log-ratio, an estimate to second order, though from the best and the worst of K responses only.\n"
    )
    clipped = [name for name, values in found.items() if values["clipped_steps"] == 1]
    if clipped:
        text += (
            f"\n**Every step of {', '.join(clipped)} was clipped** (`train.max_grad_norm`): RMSProp normalises what clipping "
            "left, so the size of η has next to no effect beyond how it weighs P^ against the log-ratio.\n"
        )
    return text

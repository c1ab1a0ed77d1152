"""Health of each iteration: what was generated, ranked, truncated and dropped, and how training went."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from stages.artifacts import files, schemas, tables
from stages.method import sppo
from stages.reporting import inputs, markdown
from stages.runtime.errors import StageError, quote
from stages.runtime.params import Train

METRICS = {
    "prompts": "prompts",
    "contaminated": "prompts that are also in AlpacaEval",
    "responses": "responses",
    "duplicates": "responses identical to an earlier one to the same prompt",
    "empty": "empty responses",
    "responses_cut": "responses cut off at generate.max_new_tokens",
    "tokens": "generated tokens",
    "length_5": "response length in tokens, 5% quantile",
    "length_50": "response length in tokens, median",
    "length_95": "response length in tokens, 95% quantile",
    "ranker_prompts_cut": "prompts truncated by the ranker",
    "ranker_responses_cut": "responses truncated by the ranker",
    "ties": "ties (dropped)",
    "pairs_too_long": "pairs dropped because they are too long",
    "pairs": "training pairs",
    "pairs_used": "training pairs used by a step",
    "training_prompts_cut": "training pairs with a truncated prompt",
    "training_responses_cut": "chosen and rejected responses truncated for training",
    "chosen_probability": "P^ of chosen responses, mean",
    "chosen_probability_5": "P^ of chosen responses, 5% quantile",
    "chosen_probability_95": "P^ of chosen responses, 95% quantile",
    "rejected_probability": "P^ of rejected responses, mean",
    "rejected_probability_5": "P^ of rejected responses, 5% quantile",
    "rejected_probability_95": "P^ of rejected responses, 95% quantile",
    "steps": "optimizer steps",
    "effective_steps": "effective steps",
    "first_loss": "loss at the first step",
    "theoretical_first_loss": "theoretical loss when policy and reference are equal",
    "last_loss": "loss at the end",
    "gradient_norm": "gradient norm, median",
    "clipped_steps": "fraction of steps with clipped gradient",
    "chosen_log_ratio": "log-ratio of chosen responses (nats)",
    "rejected_log_ratio": "log-ratio of rejected responses (nats)",
    "reward_margin": "reward margin",
    "kl": "KL divergence from the reference (nats)",
    "weights_changed": "weights changed by the update after rounding to the checkpoint's precision (share)",
    "update_survived": "share of the update that survives the checkpoint's precision",
}
"""Metric -> its label in the table, in the table's order."""
NOTES = """\
- Also in AlpacaEval: the prompt is an AlpacaEval instruction, or shares 13 consecutive words with one, ignoring case and
  punctuation (`split.contamination`).
- Training pairs used by a step: all but those beyond the last whole global batch or, with `train.stop_epoch` below 1, those
  that training did not reach.
- Effective steps: those with a learning rate above 0. The first step of a linear warm-up has a learning rate of 0.
- Loss at the first step: that of the first global batch. The theoretical loss (for SPPO η² mean (P^ − ½)²) is that of all
  pairs. Training verifies on its first batch that policy and reference are equal.
- Loss at the end, log-ratios log π/π_t (summed over a response), reward margin and KL divergence: means over the last fifth of
  the steps.
- Reward margin: log-ratio of the chosen response minus that of the rejected one, divided by η (for DPO and IPO, times β).
- KL divergence: mean of half the squared log-ratio, a second-order estimate, from only the best and the worst of the K
  responses.
- The update: the difference that training makes to the weights in float32. It survives as far as the checkpoint's precision
  (`train.checkpoint_dtype`) can express it: 1 if nothing is lost, 0 if every weight is rounded back to where it was.
"""
"""The text below the table."""
BINS = 20
"""Bins of the histogram of P^, from 0 to 1."""


@dataclass(frozen=True)
class Health:
    """One iteration's METRICS, its training log, and the histogram of its pairs' P^."""

    metrics: dict[str, float]
    log: pd.DataFrame
    """schemas.LOG_COLUMNS and `iteration`."""
    histogram: pd.DataFrame
    """The columns of `make_histogram` and `iteration`."""


def measure_health(iteration: str, data: Path, eta: float, train: Train) -> Health:
    """Compute the health of an iteration from its files in `data`. Raises StageError if one is missing or invalid."""
    responses = measure_responses(data / "responses" / f"{iteration}.parquet")
    rankings = tables.read(data / "rankings" / f"{iteration}.parquet", schemas.RANKINGS)
    rankings = rankings.select(["tie", "prompt_truncated", "responses_truncated"]).to_pandas()
    pairs = tables.read(data / "pairs" / f"{iteration}.parquet", schemas.PAIRS)
    pairs = pairs.select([field.name for field in pairs.schema if not pa.types.is_list(field.type)]).to_pandas()
    log = inputs.read_training_log(data / "logs" / f"{iteration}.csv")
    update = read_update(data / "logs" / f"{iteration}.json", log)
    ties = int(rankings["tie"].sum())
    metrics = {
        "contaminated": inputs.read_contamination(iteration, data / "split" / "contamination.json"),
        **responses,
        "ranker_prompts_cut": int(rankings["prompt_truncated"].sum()),
        "ranker_responses_cut": int(rankings["responses_truncated"].sum()),
        "ties": ties,
        "pairs_too_long": len(rankings) - ties - len(pairs),
        **measure_pairs(pairs),
        "pairs_used": count_used(len(pairs), len(log), train.global_batch),
        "theoretical_first_loss": theoretical_loss(pairs, eta, train),
        **measure_training(log, eta, train),
        "effective_steps": update["effective_steps"],
        "weights_changed": update["changed"],
        "update_survived": update["survived"],
    }
    return Health(metrics, log.assign(iteration=iteration), make_histogram(pairs).assign(iteration=iteration))


def measure_responses(path: Path) -> dict[str, float]:
    """Compute the metrics of the responses in `path` (schemas.RESPONSES). Raises StageError if it is missing or invalid."""
    responses = tables.read(path, schemas.RESPONSES)
    duplicates = empty = 0
    for batch in responses["responses"].chunks:  # in batches: Arrow cannot compare the texts within a row
        texts = batch.to_pylist()
        duplicates += sum(len(row) - len(set(row)) for row in texts)
        empty += sum(not text.strip() for row in texts for text in row)
    counts = pc.list_flatten(responses["token_counts"]).to_pandas()
    cut = pc.equal(pc.list_flatten(responses["finish_reasons"]), "length")
    return {
        "prompts": len(responses),
        "responses": len(counts),
        "duplicates": duplicates,
        "empty": empty,
        "responses_cut": pc.sum(cut).as_py(),
        "tokens": int(counts.sum()),
        **{f"length_{percent}": float(counts.quantile(percent / 100)) for percent in (5, 50, 95)},
    }


def measure_pairs(pairs: pd.DataFrame) -> dict[str, float]:
    """Compute the metrics of an iteration's pairs (the columns of schemas.PAIRS that are not lists)."""
    metrics: dict[str, float] = {
        "pairs": len(pairs),
        "training_prompts_cut": int((pairs["prompt_tokens_cut"] > 0).sum()),
        "training_responses_cut": int((pairs[["chosen_tokens_cut", "rejected_tokens_cut"]] > 0).sum().sum()),
    }
    for response in ("chosen", "rejected"):
        probabilities = pairs[f"{response}_probability"]
        metrics[f"{response}_probability"] = float(probabilities.mean())
        for percent in (5, 95):
            metrics[f"{response}_probability_{percent}"] = float(probabilities.quantile(percent / 100))
    return metrics


def count_used(pairs: int, steps: int, global_batch: int) -> int:
    """Count the pairs that at least one optimizer step used: every epoch takes only whole global batches from them."""
    return min(steps, pairs // global_batch) * global_batch


def read_update(path: Path, log: pd.DataFrame) -> dict[str, float]:
    """Read train's summary of an update (schemas.UPDATE_KEYS), which must match the training log. Raises StageError."""
    update = files.read_json(path)
    if not isinstance(update, dict) or set(update) != set(schemas.UPDATE_KEYS):
        keys = ", ".join(schemas.UPDATE_KEYS)
        raise StageError(f"{path}: expected a JSON object with exactly the keys {keys}: {inputs.REMEDY}")
    for key, count in (("steps", len(log)), ("effective_steps", int((log["learning_rate"] > 0).sum()))):
        if update[key] != count or isinstance(update[key], bool):
            raise StageError(f"{path}: {key!r} is {quote(update[key])}, but {count} by the training log: {inputs.REMEDY}")
    if not isinstance(update["weights"], int) or isinstance(update["weights"], bool) or update["weights"] < 1:
        raise StageError(f"{path}: 'weights' is {quote(update['weights'])}, expected a positive integer: {inputs.REMEDY}")
    inputs.require_number(update["changed"], f"{path}: 'changed'", 1)
    inputs.require_number(update["survived"], f"{path}: 'survived'", inputs.COUNT_LIMIT)
    return update


def theoretical_loss(pairs: pd.DataFrame, eta: float, train: Train) -> float:
    """Compute the loss of all pairs when policy and reference are equal: for SPPO eta^2 mean((P^ - 1/2)^2) (eq. 4.7)."""
    probabilities = torch.tensor(pd.concat([pairs["chosen_probability"], pairs["rejected_probability"]]).to_numpy())
    zeros = torch.zeros_like(probabilities)
    return sppo.loss(train.loss, zeros, zeros, probabilities, eta, train.beta).item()


def measure_training(log: pd.DataFrame, eta: float, train: Train) -> dict[str, float]:
    """Compute the metrics of a training log. Values "at the end" are means over the last fifth of the steps."""
    end = log.tail(max(1, len(log) // 5)).mean(numeric_only=True)
    return {
        "steps": len(log),
        "first_loss": float(log["loss"].iloc[0]),
        "last_loss": float(end["loss"]),
        "gradient_norm": float(log["gradient_norm"].median()),
        "clipped_steps": float(log["clipped"].mean()),
        "chosen_log_ratio": float(end["chosen_log_ratio"]),
        "rejected_log_ratio": float(end["rejected_log_ratio"]),
        "reward_margin": float(end["chosen_log_ratio"] - end["rejected_log_ratio"]) * (train.beta or 1 / eta),
        "kl": float(end["kl"]),
    }


def make_histogram(pairs: pd.DataFrame) -> pd.DataFrame:
    """Count the chosen and the rejected responses whose P^ is in each of BINS bins.

    Columns: response (chosen or rejected), probability (the bin's lower edge), upper, responses (the count).
    """
    edges = [index / BINS for index in range(BINS + 1)]
    histograms = []
    for response in ("chosen", "rejected"):
        counts = pd.cut(pairs[f"{response}_probability"], edges, include_lowest=True).value_counts(sort=False)
        columns = {"response": response, "probability": edges[:-1], "upper": edges[1:], "responses": counts.array}
        histograms.append(pd.DataFrame(columns))
    return pd.concat(histograms)


def format_value(value: float) -> str:
    """Format a count in full and any other number to four significant digits."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def format_health(metrics: dict[str, dict[str, float]]) -> str:
    """Format health.md: a row per metric, a column per iteration. metrics: iteration -> METRICS."""
    rows = [[label, *[format_value(values[name]) for values in metrics.values()]] for name, label in METRICS.items()]
    text = "# Health\n\n" + markdown.table(["metric", *metrics], rows) + "\n" + NOTES
    clipped = [name for name, values in metrics.items() if values["clipped_steps"] == 1]
    if clipped:
        text += (
            f"\n**The gradient was clipped at every step of {', '.join(clipped)}** (`train.max_grad_norm`). Clipping and "
            "RMSProp remove the gradient's scale, so η has almost no effect other than to weight P^ against the log-ratio.\n"
        )
    return text

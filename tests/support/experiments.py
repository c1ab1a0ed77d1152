"""Made-up artifacts of an experiment with three models, whose figures all differ, for the report to read."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts import files, schemas, tables
from support.figures import TASKS
from support.reports import RECORD

MODELS = ["base", "iter1", "iter2"]
SAMPLES = 3
METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "gsm8k": "exact_match"}


def write_data(data: Path) -> None:
    """Write everything that the report reads of base, iter1 and iter2."""
    chance = np.random.default_rng(0)
    for name in MODELS:
        write_alpaca(data, name, chance)
        write_harness(data, name, chance)
    write_comparison(data, chance)
    for iteration in MODELS[1:]:
        write_iteration(data, iteration, chance)
    counts = {name: int(chance.integers(100)) for name in ("hold-out", *MODELS[1:])}
    files.write_json({"contaminated": counts, "dropped": 0, "instructions": 30}, data / "split/contamination.json")
    write_assets(data)


def write_alpaca(data: Path, model: str, chance: np.random.Generator) -> None:
    """Write 30 answers and their judgements, one of which has no preference."""
    outputs = ["so " * int(chance.integers(1, 40)) + f"says | {model} {index}." for index in range(30)]
    answers = [{"instruction": f"Question *{index}*?", "output": text} for index, text in enumerate(outputs)]
    preferences = chance.uniform(1, 2, len(answers)).tolist()
    preferences[7] = None
    annotations = [row | {"preference": value} for row, value in zip(answers, preferences, strict=True)]
    known = np.array([value for value in preferences if value is not None]) - 1
    metrics = {
        "win_rate": 100 * known.mean(),
        "standard_error": 100 * known.std(ddof=1) / math.sqrt(len(known)),
        "avg_length": sum(map(len, outputs)) // len(outputs),
        "n_total": len(known),
        "judge": "gold",
    }
    files.write_json(answers, data / "answers" / f"{model}.json")
    files.write_json(annotations, data / "alpaca_eval" / model / "annotations.json")
    files.write_json(metrics, data / "alpaca_eval" / model / "metrics.json")


def write_harness(data: Path, model: str, chance: np.random.Generator) -> None:
    """Write the scores of each question, the harness's results and their summary."""
    summary, items = {}, {}
    for task in TASKS:
        metric, kind = METRICS.get(task, "acc"), "get-answer" if task == "gsm8k" else "none"
        sizes = {f"mmlu_{subject:02}": 2 + subject % 5 for subject in range(57)} if task == "mmlu" else {task: 20}
        items[task] = {
            name: (chance.uniform(size=n) if task == "truthfulqa_mc2" else chance.integers(0, 2, n)).astype(float).tolist()
            for name, n in sizes.items()
        }
        values = np.array([np.mean(scores) for scores in items[task].values()])
        errors = np.array([np.std(scores, ddof=1) / math.sqrt(len(scores)) for scores in items[task].values()])
        results = {
            name: {f"{metric},{kind}": value, f"{metric}_stderr,{kind}": error}
            for name, value, error in zip(sizes, values.tolist(), errors.tolist(), strict=True)
        }
        files.write_json({"n": sizes, "results": results}, data / "harness" / model / f"{task}.json")
        summary[task] = {
            "metric": metric,
            "shots": 5,
            "value": 100 * float(values.mean()),
            "standard_error": 100 * float(np.sqrt((errors**2).sum())) / len(errors),
            "n": sum(sizes.values()),
        }
        if task == "mmlu":
            shares = np.array(list(sizes.values())) / sum(sizes.values())
            error = 100 * float(np.linalg.norm(shares * errors))
            summary[task] |= {"weighted": 100 * float(shares @ values), "weighted_standard_error": error}
    files.write_json(summary, data / "harness" / model / "summary.json")
    files.write_json(items, data / "harness" / model / "items.json")


def write_comparison(data: Path, chance: np.random.Generator) -> None:
    rates = chance.uniform(0, 100, (3, 3))
    rates = np.tril(rates, -1) + np.triu(100 - rates.T, 1) + 50 * np.eye(3)
    errors = chance.uniform(1, 5, (3, 3)) * (1 - np.eye(3))
    comparison = {"models": MODELS, "win_rates": rates.tolist(), "standard_errors": errors.tolist(), "n": 200}
    files.write_json(comparison, data / "comparison.json")


def write_iteration(data: Path, iteration: str, chance: np.random.Generator) -> None:
    """Write an iteration's 40 prompts with 3 responses each, their rankings and pairs, and the log of 12 steps."""
    prompts = [f"{iteration}: prompt {index}" for index in range(40)]
    responses = [make_responses(prompt, chance) for prompt in prompts]
    tables.write(responses, schemas.RESPONSES, data / "responses" / f"{iteration}.parquet")
    rankings = [make_ranking(row["prompt_id"], index % 9 == 0, chance) for index, row in enumerate(responses)]
    tables.write(rankings, schemas.RANKINGS, data / "rankings" / f"{iteration}.parquet")
    kept = [row for index, row in enumerate(rankings) if not row["tie"] and index % 7]
    tables.write([make_pair(row, chance) for row in kept], schemas.PAIRS, data / "pairs" / f"{iteration}.parquet")
    lines = [",".join(schemas.LOG_COLUMNS)]
    for step in range(1, 13):
        loss, rate, norm, chosen, rejected, kl = chance.uniform(0.1, 9, 6)
        values = (loss, rate * 1e-6 * (step > 1), norm, int(chance.integers(2)), chosen, -rejected, kl)
        lines.append(",".join([str(step), *(f"{value:.6g}" for value in values)]))
    (data / "logs").mkdir(parents=True, exist_ok=True)
    (data / "logs" / f"{iteration}.csv").write_text("\n".join([*lines, ""]))
    weights = {
        "steps": 12,
        "effective_steps": 11,
        "weights": 1000,
        **dict(zip(("changed", "survived"), chance.uniform(size=2).tolist(), strict=True)),
    }
    files.write_json(weights, data / "logs" / f"{iteration}.json")


def make_responses(prompt: str, chance: np.random.Generator) -> dict[str, Any]:
    """Make a row of schemas.RESPONSES: few different texts, some of them blank, some cut off."""
    counts = chance.integers(1, 60, SAMPLES).tolist()
    first = random.Random(prompt).randrange(2**50)
    return {
        "prompt_id": schemas.prompt_id(prompt),
        "prompt": prompt,
        "templated_prompt": f"<{prompt}>",
        "prompt_token_ids": [1, 2],
        "responses": chance.choice(["yes", "no", " ", "perhaps"], SAMPLES).tolist(),
        "token_ids": [[5] * count for count in counts],
        "token_counts": counts,
        "finish_reasons": chance.choice(["stop", "length"], SAMPLES).tolist(),
        "seeds": [first + sample for sample in range(SAMPLES)],
    }


def make_ranking(prompt_id: str, tie: bool, chance: np.random.Generator) -> dict[str, Any]:
    """Make a row of schemas.RANKINGS from random logits."""
    logits = chance.normal(size=(SAMPLES, SAMPLES)).astype(np.float32).astype(float)
    np.fill_diagonal(logits, 0)
    scores = (logits - logits.T) / 2
    chosen = int(scores.mean(1).argmax())
    return {
        "prompt_id": prompt_id,
        "logits": logits.tolist(),
        "probabilities": (1 / (1 + np.exp(-scores))).mean(1).tolist(),
        "chosen": chosen,
        "rejected": chosen if tie else int(scores.mean(1).argmin()),
        "tie": tie,
        "prompt_truncated": bool(chance.integers(2)),
        "responses_truncated": int(chance.integers(SAMPLES)),
    }


def make_pair(ranking: dict[str, Any], chance: np.random.Generator) -> dict[str, Any]:
    """Make a row of schemas.PAIRS."""
    cut = chance.choice([0, 0, 4], 3).tolist()
    return {
        "prompt_id": ranking["prompt_id"],
        "prompt_token_ids": [1],
        "chosen_token_ids": [5],
        "rejected_token_ids": [6],
        "chosen_probability": ranking["probabilities"][ranking["chosen"]],
        "rejected_probability": ranking["probabilities"][ranking["rejected"]],
        "chosen_reference_logps": -1.5,
        "rejected_reference_logps": -2.5,
        **dict(zip(("prompt_tokens_cut", "chosen_tokens_cut", "rejected_tokens_cut"), cut, strict=True)),
    }


def write_assets(data: Path) -> None:
    """Write assets, and the records of stages."""
    for name in ("models/base", "ranker", "alpaca_eval_set", "harness_sets"):
        (data / name).mkdir(parents=True)
        (data / name / "file").write_text(name)
    (data / "prompts.parquet").write_bytes(b"prompts")
    for name in ("split", "train@iter1"):
        files.write_json(json.loads(json.dumps(RECORD)), data / "records" / f"{name}.json")

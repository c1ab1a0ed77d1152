"""The versioned reports: tables, metrics.json and the data of DVC's plots, from what the stages before have written."""

import argparse
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd

from stages import cli, files, params

BASE = "base"
TASKS = list(params.HarnessAsset.model_fields)
"""The columns of the Open LLM Leaderboard v1, in the published order."""
SAMPLES = 8
"""Prompts in samples.md."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right. Cells are escaped."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *[[escape(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def escape(text: str) -> str:
    """Text as Markdown shows it verbatim within a table cell: no markup, no HTML, no line breaks."""
    for mark in "\\`*_[]#|~":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def read_alpaca(folder: Path) -> dict[str, Any]:
    """metrics.json of evaluate-alpaca, the harness's keys checked."""
    metrics: dict[str, Any] = files.read_json(folder / "metrics.json")
    for key in ("win_rate", "standard_error", "avg_length", "n_total", "judge"):
        if key not in metrics:
            raise cli.StageError(f"{folder / 'metrics.json'} lacks {key!r}: make it with `dvc repro`")
    return metrics


def read_harness(folder: Path) -> dict[str, dict[str, Any]]:
    """summary.json of evaluate-lm, with all six tasks."""
    summary: dict[str, dict[str, Any]] = files.read_json(folder / "summary.json")
    for task in TASKS:
        if task not in summary:
            raise cli.StageError(f"{folder / 'summary.json'} lacks {task!r}: make it with `dvc repro`")
    return summary


def harness_average(summary: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """The plain mean of the six tasks and its standard error, the tasks being independent."""
    value = sum(summary[task]["value"] for task in TASKS) / len(TASKS)
    error = math.sqrt(sum(summary[task]["standard_error"] ** 2 for task in TASKS)) / len(TASKS)
    return value, error


def alpaca_table(alpaca: dict[str, dict[str, Any]]) -> str:
    first = alpaca[BASE]
    rows = [
        [
            name,
            number(metrics.get("length_controlled_winrate")),
            number(metrics["win_rate"]),
            number(metrics["standard_error"]),
            number(metrics["avg_length"], 0),
        ]
        for name, metrics in alpaca.items()
    ]
    lines = [
        "# AlpacaEval 2.0\n",
        table(["model", "LC win rate", "win rate", "standard error", "average length"], rows),
        f"Win rates in percent over {first['n_total']} instructions, judged by `{first['judge']}`; length in characters.",
    ]
    if "length_controlled_absent" in first:
        lines.append(f"No LC win rate: {first['length_controlled_absent']}.")
    if first["judge"] == "gold":
        lines.append("The reference outputs are a second draw of the base policy, so the base itself wins about half.")
    return "\n".join(lines) + "\n"


def harness_table(harness: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = []
    for name, summary in harness.items():
        cells = [f"{summary[task]['value']:.2f} ± {summary[task]['standard_error']:.2f}" for task in TASKS]
        average, error = harness_average(summary)
        rows.append([name, *cells, f"{average:.2f} ± {error:.2f}"])
    shots = ", ".join(f"{task} {harness[BASE][task]['shots']}-shot {harness[BASE][task]['metric']}" for task in TASKS)
    return (
        "# Open LLM Leaderboard v1, lm-evaluation-harness 0.4.1\n\n"
        + table(["model", *TASKS, "average"], rows)
        + f"\nPercent ± standard error: {shots.replace('_', chr(92) + '_')}. "
        + "MMLU is the plain mean over its 57 subjects, as on the leaderboard.\n"
    )


def training(iteration: str, data: Path, eta: float) -> tuple[dict[str, float], pd.DataFrame]:
    """Metrics of one iteration's data and training, and its training log."""
    responses = files.read_table(data / "responses" / f"{iteration}.parquet", files.RESPONSES)
    rankings = files.read_table(data / "rankings" / f"{iteration}.parquet", files.RANKINGS)
    pairs = files.read_table(data / "pairs" / f"{iteration}.parquet", files.PAIRS).to_pandas()
    log = pd.read_csv(files.present(data / "logs" / f"{iteration}.csv"))
    counts = [count for row in responses.column("token_counts").to_pylist() for count in row]
    reasons = [reason for row in responses.column("finish_reasons").to_pylist() for reason in row]
    ties = sum(rankings.column("tie").to_pylist())
    probabilities = pd.concat([pairs["chosen_probability"], pairs["rejected_probability"]])
    last = log.tail(max(1, len(log) // 5))
    return {
        "prompts": responses.num_rows,
        "ties": ties,
        "pairs": len(pairs),
        "pairs_too_long": responses.num_rows - ties - len(pairs),
        "response_tokens": sum(counts) / len(counts),
        "responses_cut": sum(reason == "length" for reason in reasons),
        "chosen_probability": float(pairs["chosen_probability"].mean()),
        "rejected_probability": float(pairs["rejected_probability"].mean()),
        "steps": len(log),
        "theoretical_first_loss": float((eta * (probabilities - 0.5)).pow(2).mean()),
        "first_loss": float(log["loss"].iloc[0]),
        "last_loss": float(last["loss"].mean()),
        "clipped_steps": float(log["clipped"].mean()),
        "chosen_log_ratio": float(last["chosen_log_ratio"].mean()),
        "rejected_log_ratio": float(last["rejected_log_ratio"].mean()),
    }, log.assign(iteration=iteration)


def training_table(metrics: dict[str, dict[str, float]]) -> str:
    names = {
        "pairs": "pairs",
        "ties": "ties",
        "pairs_too_long": "too long",
        "response_tokens": "tokens a response",
        "responses_cut": "responses cut",
        "first_loss": "first loss",
        "theoretical_first_loss": "in theory",
        "last_loss": "last loss",
        "clipped_steps": "clipped steps",
        "chosen_log_ratio": "log-ratio of winners",
        "rejected_log_ratio": "of losers",
    }
    rows = [[name, *[f"{values[key]:.4g}" for key in names]] for name, values in metrics.items()]
    return (
        "# Training\n\n"
        + table(["iteration", *names.values()], rows)
        + "\nFirst loss: of the first global batch; in theory, eta² mean (P^ − ½)² over all pairs. Last loss and log-ratios "
        "(log π/π_t, summed over a response, in nats): means over the last fifth of the steps. Clipped steps: the share whose "
        "gradient norm was above `train.max_grad_norm`; where it is 1, RMSProp normalises what clipping left and eta has next "
        "to no effect.\n"
    )


def samples(answers: dict[str, list[dict[str, Any]]], seed: int) -> str:
    """Answers of all models side by side to instructions drawn by the seed."""
    count = len(answers[BASE])
    drawn = sorted(random.Random(f"{seed}/samples").sample(range(count), min(SAMPLES, count)))
    rows = [[answers[BASE][row]["instruction"], *[outputs[row]["output"] for outputs in answers.values()]] for row in drawn]
    header = ["instruction", *answers]
    return (
        f"# Samples\n\n{len(drawn)} of the {count} AlpacaEval instructions, drawn by the seed, and what each model answers.\n\n"
        + table(header, rows).replace("---:", "---")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    wanted = params.load("seed", "eta", "iterations")
    models = [BASE, *wanted.iterations]
    for folder in ("alpaca_eval", "harness"):
        for stray in sorted({path.name for path in (args.data / folder).iterdir()} - set(models)):
            cli.log.warning("%s is of no model in params.yaml and not reported: remove it", args.data / folder / stray)

    alpaca = {name: read_alpaca(args.data / "alpaca_eval" / name) for name in models}
    harness = {name: read_harness(args.data / "harness" / name) for name in models}
    answers = {name: files.read_records(args.data / "answers" / f"{name}.json", ["instruction", "output"]) for name in models}
    trained = {name: training(name, args.data, wanted.eta) for name in wanted.iterations}

    metrics: dict[str, Any] = {
        "alpaca_eval": {
            name: {
                key: value[key]
                for key in ("length_controlled_winrate", "lc_standard_error", "win_rate", "standard_error", "avg_length")
                if key in value
            }
            for name, value in alpaca.items()
        },
        "open_llm_leaderboard": {
            name: {task: summary[task]["value"] for task in TASKS} | {"average": harness_average(summary)[0]}
            for name, summary in harness.items()
        },
        "training": {name: values for name, (values, _) in trained.items()},
    }
    rates = pd.DataFrame(
        [
            {
                "model": name,
                "win_rate": round(value["win_rate"], 4),
                "lower": round(value["win_rate"] - 1.96 * value["standard_error"], 4),
                "upper": round(value["win_rate"] + 1.96 * value["standard_error"], 4),
                "average_length": value["avg_length"],
            }
            for name, value in alpaca.items()
        ]
    )
    logs = pd.concat([log for _, log in trained.values()])

    args.out.mkdir(parents=True, exist_ok=True)
    pages = {
        "alpaca_eval.md": alpaca_table(alpaca),
        "open_llm_leaderboard.md": harness_table(harness),
        "training.md": training_table({name: values for name, (values, _) in trained.items()}),
        "samples.md": samples(answers, wanted.seed),
        "win_rate.csv": rates.to_csv(index=False),
        "training.csv": logs.to_csv(index=False, float_format="%.6g"),
    }
    for name, text in pages.items():
        with files.replacing(args.out / name) as partial:
            partial.write_text(text)
    files.write_json(rounded(metrics), args.out / "metrics.json")


def rounded(value: Any) -> Any:
    """Numbers to six significant digits, in nested mappings."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    cli.run(main)

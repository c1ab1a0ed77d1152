"""The versioned reports: tables, metrics.json and the data of DVC's plots, from what the stages before have written."""

import argparse
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd

from stages import cli, files, health, markdown, page, params, provenance
from stages.cli import StageError
from stages.markdown import number

TASKS = list(params.HarnessAsset.model_fields)
"""The columns of the Open LLM Leaderboard v1, in the published order."""
ALPACA_METRICS = ["length_controlled_winrate", "lc_standard_error", "win_rate", "standard_error", "avg_length"]
SAMPLES = 8
"""Prompts in samples.md."""
MOST = 1e9
"""Of anything counted: instructions, characters of an answer."""


def figure(value: Any, what: str, highest: float = 100) -> None:
    """Raise StageError where a value is no number in 0 to `highest`. what: file and key."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
        raise StageError(f"{what} is {cli.shown(value)}, not a number from 0 to {highest:g}: make it with `dvc repro`")


def read_alpaca(folder: Path) -> dict[str, Any]:
    """metrics.json of evaluate-alpaca, the keys and figures checked."""
    path = folder / "metrics.json"
    metrics: dict[str, Any] = files.read_json(path)
    for key in ("win_rate", "standard_error", "avg_length", "n_total", "judge"):
        if not isinstance(metrics, dict) or key not in metrics:
            raise StageError(f"{path} lacks {key!r}: make it with `dvc repro`")
    for key in [*ALPACA_METRICS, "n_total"]:
        if key in metrics:
            figure(metrics[key], f"{path}: {key!r}", MOST if key in ("avg_length", "n_total") else 100)
    return metrics


def read_harness(folder: Path) -> dict[str, dict[str, Any]]:
    """summary.json of evaluate-lm, with all six tasks, their keys and figures checked."""
    path = folder / "summary.json"
    summary: dict[str, dict[str, Any]] = files.read_json(path)
    for task in TASKS:
        found = summary.get(task) if isinstance(summary, dict) else None
        for key in ("value", "standard_error", "metric", "shots"):
            if not isinstance(found, dict) or key not in found:
                raise StageError(f"{path} lacks {task}.{key}: make it with `dvc repro`")
        for key in ("value", "standard_error"):
            figure(summary[task][key], f"{path}: {task}.{key}")
    return summary


def read_comparison(path: Path, models: list[str]) -> dict[str, Any]:
    """comparison.json, of these models, its figures checked."""
    comparison: dict[str, Any] = files.read_json(path)
    wanted = {"models", "win_rates", "standard_errors", "n"}
    if not isinstance(comparison, dict) or set(comparison) != wanted or comparison["models"] != models:
        raise StageError(f"{path}: not {', '.join(sorted(wanted))} of {', '.join(models)}: make it with `dvc repro`")
    for key in ("win_rates", "standard_errors"):
        rows = comparison[key]
        lengths = [len(row) if isinstance(row, list) else 0 for row in rows] if isinstance(rows, list) else []
        if lengths != [len(models)] * len(models):
            raise StageError(f"{path}: {key!r} is not {len(models)} x {len(models)}: make it with `dvc repro`")
        for model, row in zip(models, rows, strict=True):
            for other, value in zip(models, row, strict=True):
                figure(value, f"{path}: {key!r} of {model} and {other}")
    figure(comparison["n"], f"{path}: 'n'", MOST)
    return comparison


def read_answers(folder: Path, models: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Model -> its answers, all to the same instructions in the same order."""
    answers = {name: files.read_records(folder / f"{name}.json", ["instruction", "output"]) for name in models}
    first = [row["instruction"] for row in answers[params.BASE]]
    for name, rows in answers.items():
        if [row["instruction"] for row in rows] != first:
            raise StageError(
                f"{folder / name}.json: not the instructions of {params.BASE}.json in their order: answer them again"
            )
    return answers


def harness_figures(summary: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Task, and `average` (plain, of independent tasks) -> value and standard error in percent."""
    figures = {task: (summary[task]["value"], summary[task]["standard_error"]) for task in TASKS}
    mean = sum(value for value, _ in figures.values()) / len(TASKS)
    return figures | {"average": (mean, math.hypot(*[error for _, error in figures.values()]) / len(TASKS))}


def with_errors(figures: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Figures as metrics.json holds them, and beside them their standard errors."""
    errors = {name: error for name, (_, error) in figures.items()}
    return {name: value for name, (value, _) in figures.items()} | {"standard_errors": errors}


def judged(error: float | None, published_error: float | None, difference: float) -> str:
    """Whether a difference is within the 95 % error of both; where no error was published, ours stands for it too."""
    if error is None:
        return "–"
    limit = markdown.INTERVAL * math.hypot(error, error if published_error is None else published_error)
    return "yes" if abs(difference) <= limit else "no"


def alpaca_page(alpaca: dict[str, dict[str, Any]], published: params.Published | None) -> str:
    """alpaca_eval.md: the models' figures, and beside them the published ones where there are any."""
    first = alpaca[params.BASE]
    rows = [
        [
            name,
            number(metrics.get("length_controlled_winrate")),
            number(metrics.get("lc_standard_error")),
            number(metrics["win_rate"]),
            number(metrics["standard_error"]),
            number(metrics["avg_length"], 0),
        ]
        for name, metrics in alpaca.items()
    ]
    header = ["model", "LC win rate", "standard error", "win rate", "standard error", "average length"]
    lines = [
        "# AlpacaEval 2.0\n",
        markdown.table(header, rows),
        f"Win rates in percent over {first['n_total']} instructions, judged by `{first['judge']}`; length in characters.",
    ]
    if "length_controlled_absent" in first:
        lines.append(f"No LC win rate: {first['length_controlled_absent']}.")
    if first["judge"] == "gold":
        lines.append("The reference outputs are a second draw of the base policy, so the base itself wins about half.")
    if published is None:
        lines.append("No figures are published of these models.")
    else:
        lines.append(alpaca_comparison(alpaca, published))
    return "\n".join(lines) + "\n"


def alpaca_comparison(alpaca: dict[str, dict[str, Any]], published: params.Published) -> str:
    rows = []
    for name, theirs in published.alpaca_eval.models.items():
        if name not in alpaca:
            continue
        for label, rate, error in (
            ("LC win rate", "length_controlled_winrate", "lc_standard_error"),
            ("win rate", "win_rate", "standard_error"),
            ("average length", "avg_length", ""),
        ):
            value, reported = alpaca[name].get(rate), getattr(theirs, rate)
            difference = None if value is None or reported is None else value - reported
            within = "–" if difference is None else judged(alpaca[name].get(error), getattr(theirs, error, None), difference)
            rows.append([name, published.models[name], label, number(value), number(reported), number(difference), within])
    header = ["model", "published as", "figure", "ours", "published", "difference", "within error"]
    judge = alpaca[params.BASE]["judge"]
    text = f"\n## Against the published figures\n\n{markdown.table(header, rows)}\nPublished: {published.alpaca_eval.source}. "
    text += "Within error: two-sided, 95 %, of both figures; where no standard error is published, ours stands for theirs."
    if judge != published.alpaca_eval.judge:
        text += (
            f"\n\n**Another judge**: ours are of `{judge}`, the published ones of `{published.alpaca_eval.judge}`. "
            "The differences are those of the judges too."
        )
    return text


def harness_page(harness: dict[str, dict[str, dict[str, Any]]], published: params.Published | None) -> str:
    """open_llm_leaderboard.md: the six tasks and their mean, and beside them the published ones where there are any."""
    rows = []
    for name, summary in harness.items():
        cells = [f"{value:.2f} ± {error:.2f}" for value, error in harness_figures(summary).values()]
        rows.append([name, *cells])
    first = harness[params.BASE]
    shots = ", ".join(f"{task} {first[task]['shots']}-shot {first[task]['metric']}" for task in TASKS)
    text = (
        "# Open LLM Leaderboard v1, lm-evaluation-harness 0.4.1\n\n"
        + markdown.table(["model", *TASKS, "average"], rows)
        + f"\nPercent ± standard error: {markdown.escape(shots)}. "
        + "MMLU is the plain mean over its 57 subjects, as on the leaderboard.\n"
    )
    if published is None or published.open_llm_leaderboard is None:
        return text + "No figures are published of these models.\n"
    rows = []
    for name, theirs in published.open_llm_leaderboard.models.items():
        if name in harness:
            differences = []
            for task, (value, error) in harness_figures(harness[name]).items():
                difference = value - theirs[task]
                outside = judged(error, None, difference) == "no"
                differences.append(f"{difference:+.2f}{' (beyond error)' if outside else ''}")
            rows.append([name, "published", *[number(value) for value in theirs.values()]])
            rows.append([name, "difference", *differences])
    return (
        text
        + "\n## Against the published figures\n\n"
        + markdown.table(["model", "", *TASKS, "average"], rows)
        + f"\nPublished: {published.open_llm_leaderboard.source}. Difference: ours minus published; beyond error: two-sided, "
        "95 %, our standard error standing for theirs, which are not published.\n"
    )


def ranker_page(comparison: dict[str, Any]) -> str:
    """ranker.md: the paper's Fig. 3."""
    models = comparison["models"]
    cells = zip(models, comparison["win_rates"], comparison["standard_errors"], strict=True)
    rows = [
        [
            name,
            *[
                "–" if name == other else f"{rate:.1f} ± {error:.1f}"
                for other, rate, error in zip(models, rates, errors, strict=True)
            ],
        ]
        for name, rates, errors in cells
    ]
    return (
        "# The ranker's view\n\n"
        + markdown.table(["row beats column", *models], rows)
        + "\nMean probability, in percent ± standard error, that the ranker prefers the row's response to the column's, over "
        f"the {comparison['n']} prompts of the hold-out, one response each. The ranker is what training follows: a proxy, not "
        "the target.\n"
    )


def samples(answers: dict[str, list[dict[str, Any]]], seed: int) -> str:
    """Answers of all models side by side to instructions drawn by the seed."""
    first = answers[params.BASE]
    drawn = sorted(random.Random(f"{seed}/samples").sample(range(len(first)), min(SAMPLES, len(first))))
    rows = [[first[row]["instruction"], *[outputs[row]["output"] for outputs in answers.values()]] for row in drawn]
    return (
        f"# Samples\n\n{len(drawn)} of the {len(first)} AlpacaEval instructions, drawn by the seed, and what each model "
        "answers.\n\n" + markdown.table(["instruction", *answers], rows, text=True)
    )


def interval(model: str, name: str, value: float, error: float) -> dict[str, Any]:
    """A row of a plot: a model's value under `name` and the 95 % interval about it."""
    margin = markdown.INTERVAL * error
    figures = {name: value, "lower": value - margin, "upper": value + margin}
    return {"model": model} | {key: round(figure, 4) for key, figure in figures.items()}


def mean_length(outputs: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean length of the answers in characters, as alpaca-eval takes it, and its standard error."""
    lengths = pd.Series([len(row["output"]) for row in outputs])
    return float(lengths.mean()), float(lengths.std(ddof=0)) / math.sqrt(len(lengths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    wanted = params.load("seed", "eta", "iterations", "assets", "generate", "rank", "lengths", "train")
    published = params.published(Path("published.yaml"))
    models = params.models(wanted.iterations)
    for folder in ("alpaca_eval", "harness"):
        for stray in sorted({path.name for path in files.present(args.data / folder).iterdir()} - set(models)):
            cli.log.warning("%s is of no model in params.yaml and not reported: remove it", args.data / folder / stray)

    alpaca = {name: read_alpaca(args.data / "alpaca_eval" / name) for name in models}
    harness = {name: read_harness(args.data / "harness" / name) for name in models}
    answers = read_answers(args.data / "answers", models)
    trained = {name: health.health(name, args.data, wanted.eta, wanted.train) for name in wanted.iterations}
    found = {name: figures for name, (figures, _, _) in trained.items()}
    comparison = read_comparison(args.data / "comparison.json", models)

    rates = pd.DataFrame([interval(name, "win_rate", row["win_rate"], row["standard_error"]) for name, row in alpaca.items()])
    lengths = pd.DataFrame([interval(name, "average_length", *mean_length(outputs)) for name, outputs in answers.items()])
    matrix = pd.DataFrame(
        [
            {"model": name, "opponent": other, "win_rate": round(rate, 2)}
            for name, rates in zip(comparison["models"], comparison["win_rates"], strict=True)
            for other, rate in zip(comparison["models"], rates, strict=True)
        ]
    )
    probabilities = pd.concat([histogram for _, _, histogram in trained.values()])
    logs = pd.concat([log for _, log, _ in trained.values()])
    metrics: dict[str, Any] = {
        "alpaca_eval": {name: {key: value[key] for key in ALPACA_METRICS if key in value} for name, value in alpaca.items()},
        "open_llm_leaderboard": {name: with_errors(harness_figures(summary)) for name, summary in harness.items()},
        "ranker": with_errors(
            {
                name: (rates[0], errors[0])
                for name, rates, errors in zip(
                    comparison["models"], comparison["win_rates"], comparison["standard_errors"], strict=True
                )
            }
        ),
        "training": found,
    }
    pages = {
        "alpaca_eval.md": alpaca_page(alpaca, published),
        "open_llm_leaderboard.md": harness_page(harness, published),
        "ranker.md": ranker_page(comparison),
        "health.md": health.page(found),
        "samples.md": samples(answers, wanted.seed),
        "provenance.md": provenance.page(wanted, args.data, Path("dvc.lock")),
        "win_rate.csv": rates.to_csv(index=False),
        "length.csv": lengths.to_csv(index=False),
        "ranker.csv": matrix.to_csv(index=False),
        "probabilities.csv": probabilities.to_csv(index=False),
        "training.csv": logs.to_csv(index=False, float_format="%.6g"),
    }
    for name, text in pages.items():
        with files.replacing(args.out / name) as partial:
            partial.write_text(text)
    files.write_json(rounded(metrics), args.out / "metrics.json")
    sections = {name.removesuffix(".md").replace("_", "-"): text for name, text in pages.items() if name.endswith(".md")}
    del sections["samples"]  # the page has them all
    rows = [
        {"instruction": row["instruction"], "answers": {name: outputs[index]["output"] for name, outputs in answers.items()}}
        for index, row in enumerate(answers[params.BASE])
    ]
    title = "SPPO: " + ", ".join(f"{name} from {start}" for name, start in wanted.iterations.items())
    with files.replacing(args.out / "index.html") as partial:
        partial.write_text(page.html(title, sections, page.plots(Path("dvc.yaml"), args.out), rows))


def rounded(value: Any) -> Any:
    """Numbers to six significant digits, in nested mappings."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    cli.run(main, record=False)  # data/records is what it reads

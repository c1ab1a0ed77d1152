"""Every figure in reports/, computed from the artifacts in data/ by code that shares nothing with stages/."""

import html
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from ruamel.yaml import YAML

TASKS = ["arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu"]
Z = 1.96
"""Half of a 95 % interval, in standard errors."""
HEALTH = {
    "prompts": "prompts",
    "prompts that are also in AlpacaEval": "contaminated",
    "responses": "responses",
    "responses identical to an earlier one to the same prompt": "duplicates",
    "empty responses": "empty",
    "responses cut off at generate.max_new_tokens": "responses_cut",
    "generated tokens": "tokens",
    "response length in tokens, 5% quantile": "length_5",
    "response length in tokens, median": "length_50",
    "response length in tokens, 95% quantile": "length_95",
    "prompts truncated by the ranker": "ranker_prompts_cut",
    "responses truncated by the ranker": "ranker_responses_cut",
    "ties (dropped)": "ties",
    "pairs dropped because they are too long": "pairs_too_long",
    "training pairs": "pairs",
    "training pairs used by a step": "pairs_used",
    "training pairs with a truncated prompt": "training_prompts_cut",
    "chosen and rejected responses truncated for training": "training_responses_cut",
    "P^ of chosen responses, mean": "chosen_probability",
    "P^ of chosen responses, 5% quantile": "chosen_probability_5",
    "P^ of chosen responses, 95% quantile": "chosen_probability_95",
    "P^ of rejected responses, mean": "rejected_probability",
    "P^ of rejected responses, 5% quantile": "rejected_probability_5",
    "P^ of rejected responses, 95% quantile": "rejected_probability_95",
    "optimizer steps": "steps",
    "effective steps": "effective_steps",
    "loss at the first step": "first_loss",
    "theoretical loss when policy and reference are equal": "theoretical_first_loss",
    "loss at the end": "last_loss",
    "gradient norm, median": "gradient_norm",
    "fraction of steps with clipped gradient": "clipped_steps",
    "log-ratio of chosen responses (nats)": "chosen_log_ratio",
    "log-ratio of rejected responses (nats)": "rejected_log_ratio",
    "reward margin": "reward_margin",
    "KL divergence from the reference (nats)": "kl",
    "weights changed by the update after rounding to the checkpoint's precision (share)": "weights_changed",
    "share of the update that survives the checkpoint's precision": "update_survived",
}
"""Label of a row of health.md -> key in metrics.json."""


class Experiment:
    """The artifacts of one experiment. folder: that of params.yaml, data/ and reports/."""

    def __init__(self, folder: Path) -> None:
        self.data, self.reports = folder / "data", folder / "reports"
        self.params: dict[str, Any] = YAML(typ="safe").load(folder / "params.yaml")
        self.starts: dict[str, str] = self.params["iterations"]
        self.models = ["base", *self.starts]

    def load(self, name: str) -> Any:
        """Load a JSON file below data/."""
        return json.loads((self.data / name).read_text())

    def report(self, name: str) -> Any:
        """Load a JSON file below reports/, or the text of another one."""
        text = (self.reports / name).read_text()
        return json.loads(text) if name.endswith(".json") else text

    def frame(self, name: str) -> pd.DataFrame:
        """Load a Parquet or CSV file below data/."""
        path = self.data / name
        return pd.read_csv(path) if path.suffix == ".csv" else pq.read_table(path).to_pandas()

    def table(self, name: str) -> pd.DataFrame:
        """Load a CSV file below reports/."""
        return pd.read_csv(self.reports / name)

    def preferences(self, model: str) -> np.ndarray:
        """Return the preference for the model in each of its judgements, from 0 to 1, NaN where the judge gave none."""
        rows = self.load(f"alpaca_eval/{model}/annotations.json")
        return np.array([math.nan if row["preference"] is None else row["preference"] - 1 for row in rows])

    def answers(self, model: str) -> list[str]:
        return [row["output"] for row in self.load(f"answers/{model}.json")]


def mean_and_error(values: Any) -> tuple[float, float]:
    """Return the mean and its standard error, NaN left out."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()), float(known.std(ddof=1) / math.sqrt(len(known)))


def alpaca(experiment: Experiment, model: str) -> dict[str, float]:
    """AlpacaEval of one model: percent; characters, rounded down as alpaca-eval does."""
    rate, error = mean_and_error(100 * experiment.preferences(model))
    lengths = [len(text) for text in experiment.answers(model)]
    return {"win_rate": rate, "standard_error": error, "avg_length": sum(lengths) // len(lengths)}


def leaderboard(experiment: Experiment, model: str) -> dict[str, tuple[float, float]]:
    """Task, averages and the weighted mean over MMLU's subjects -> percent and standard error, from the harness's results."""
    scores = {}
    for task in TASKS:
        result = experiment.load(f"harness/{model}/{task}.json")
        metric = {"gsm8k": "exact_match", "arc_challenge": "acc_norm", "hellaswag": "acc_norm"}.get(task, "acc")
        kind = "get-answer" if task == "gsm8k" else "none"
        parts = [result["results"][name] for name in result["n"]]
        values = [100 * part[f"{metric},{kind}"] for part in parts]
        errors = [100 * part[f"{metric}_stderr,{kind}"] for part in parts]
        scores[task] = combine(values, errors)
    weighted = combine(values, errors, list(result["n"].values()))  # of MMLU, the last task
    others = [scores[task] for task in TASKS[:-1]]
    return scores | {
        "average": combine(*zip(*scores.values(), strict=True)),
        "mmlu_weighted": weighted,
        "average_weighted": combine(*zip(*others, weighted, strict=True)),
    }


def combine(values: Any, errors: Any, weights: Any = None) -> tuple[float, float]:
    """Return the weighted mean of independent values and its standard error."""
    shares = np.ones(len(values)) if weights is None else np.array(weights, float)
    shares /= shares.sum()
    return float(shares @ np.array(values)), float(np.linalg.norm(shares * np.array(errors)))


def shorten(values: Any) -> np.ndarray:
    """Round to six digits, as in preferences.csv and harness.csv, from which the paired differences can be reproduced."""
    return np.array([float(f"{value:.6g}") for value in values])


def compare_tasks(experiment: Experiment, model: str, opponent: str) -> dict[str, tuple[float, float]]:
    """Task and `average` -> paired difference in percent points and its standard error, from the score of each question."""
    ours, theirs = (experiment.load(f"harness/{name}/items.json") for name in (model, opponent))
    scores = {}
    for task in TASKS:
        parts = [mean_and_error(100 * (shorten(ours[task][name]) - shorten(theirs[task][name]))) for name in sorted(ours[task])]
        scores[task] = combine(*zip(*parts, strict=True))
    return scores | {"average": combine(*zip(*scores.values(), strict=True))}


def compare_wins(experiment: Experiment, model: str, opponent: str) -> dict[str, float]:
    """Paired difference of win rates in percent points, and how often the judge's preference is higher, lower and equal."""
    differences = shorten(1 + experiment.preferences(model)) - shorten(1 + experiment.preferences(opponent))
    value, error = mean_and_error(100 * differences)
    return {
        "difference": value,
        "standard_error": error,
        "lower": value - Z * error,
        "upper": value + Z * error,
        "wins": int((differences > 0).sum()),
        "losses": int((differences < 0).sum()),
        "ties": int((differences == 0).sum()),
    }


def health(experiment: Experiment, iteration: str) -> dict[str, float]:
    """Health of one iteration, for SPPO's loss."""
    eta, responses = experiment.params["eta"], experiment.frame(f"responses/{iteration}.parquet")
    rankings = experiment.frame(f"rankings/{iteration}.parquet")
    pairs, log = experiment.frame(f"pairs/{iteration}.parquet"), experiment.frame(f"logs/{iteration}.csv")
    batch, update = experiment.params["train"]["global_batch"], experiment.load(f"logs/{iteration}.json")
    texts = responses.explode("responses")[["prompt_id", "responses"]]
    tokens = np.concatenate(responses["token_counts"].to_numpy())
    chosen, rejected = pairs["chosen_probability"].to_numpy(), pairs["rejected_probability"].to_numpy()
    end = log.iloc[-max(1, len(log) // 5) :]
    return {
        "prompts": len(responses),
        "contaminated": experiment.load("split/contamination.json")["contaminated"][iteration],
        "responses": len(texts),
        "duplicates": int(texts.duplicated().sum()),
        "empty": int((texts["responses"].str.strip() == "").sum()),
        "responses_cut": int((np.concatenate(responses["finish_reasons"].to_numpy()) == "length").sum()),
        "tokens": int(tokens.sum()),
        **{f"length_{percent}": np.percentile(tokens, percent) for percent in (5, 50, 95)},
        "ranker_prompts_cut": int(rankings["prompt_truncated"].sum()),
        "ranker_responses_cut": int(rankings["responses_truncated"].sum()),
        "ties": int(rankings["tie"].sum()),
        "pairs_too_long": int((~rankings["tie"] & ~rankings["prompt_id"].isin(pairs["prompt_id"])).sum()),
        "pairs": len(pairs),
        "pairs_used": batch * min(len(log), len(pairs) // batch),
        "training_prompts_cut": int((pairs["prompt_tokens_cut"] > 0).sum()),
        "training_responses_cut": int((pairs["chosen_tokens_cut"] > 0).sum() + (pairs["rejected_tokens_cut"] > 0).sum()),
        "chosen_probability": chosen.mean(),
        "rejected_probability": rejected.mean(),
        **{f"chosen_probability_{percent}": np.percentile(chosen, percent) for percent in (5, 95)},
        **{f"rejected_probability_{percent}": np.percentile(rejected, percent) for percent in (5, 95)},
        "steps": len(log),
        "effective_steps": int((log["learning_rate"] != 0).sum()),
        "first_loss": log["loss"][0],
        "theoretical_first_loss": eta**2 * np.mean((np.concatenate([chosen, rejected]) - 0.5) ** 2),
        "last_loss": end["loss"].mean(),
        "gradient_norm": np.median(log["gradient_norm"]),
        "clipped_steps": (log["clipped"] == 1).sum() / len(log),
        "chosen_log_ratio": end["chosen_log_ratio"].mean(),
        "rejected_log_ratio": end["rejected_log_ratio"].mean(),
        "reward_margin": (end["chosen_log_ratio"] - end["rejected_log_ratio"]).mean() / eta,
        "kl": end["kl"].mean(),
        "weights_changed": update["changed"],
        "update_survived": update["survived"],
    }


def metrics(experiment: Experiment) -> dict[str, Any]:
    """The content of metrics.json."""
    comparison, models = experiment.load("comparison.json"), experiment.models
    wins: dict[str, Any] = {model: alpaca(experiment, model) for model in models}
    tasks: dict[str, Any] = {model: split_errors(leaderboard(experiment, model)) for model in models}
    for model, start in experiment.starts.items():
        for key, opponent in (("vs_base", "base"), ("vs_previous", start)):
            wins[model][key] = compare_wins(experiment, model, opponent)
            tasks[model][key] = {
                task: {"difference": value, "standard_error": error}
                for task, (value, error) in compare_tasks(experiment, model, opponent).items()
            }
    against_base = {
        model: (comparison["win_rates"][index][0], comparison["standard_errors"][index][0])
        for index, model in enumerate(models)
    }
    return {
        "alpaca_eval": wins,
        "open_llm_leaderboard": tasks,
        "ranker": split_errors(against_base),
        "training": {iteration: health(experiment, iteration) for iteration in experiment.starts},
    }


def split_errors(results: dict[str, tuple[float, float]]) -> dict[str, Any]:
    return {name: value for name, (value, _) in results.items()} | {
        "standard_errors": {name: error for name, (_, error) in results.items()}
    }


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings, with their keys joined by slashes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{path}/{key}")
    else:
        yield path, value


def read_tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a Markdown text, as rows of unescaped cells, rules left out."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if not line.startswith("|"):
            tables += [[]] if tables[-1] else []
            continue
        marked = [re.sub(r"<!-- -->|\\(.)", r"\1", cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        cells = [html.unescape(cell).strip() for cell in marked]
        if not all(re.fullmatch(":?-+:?", cell) for cell in cells):
            tables[-1].append(cells)
    return [table for table in tables if table]


def shows(cell: str, *values: float) -> bool:
    """Return whether a cell shows exactly these numbers, each rounded to the digits that it shows."""
    numbers = re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", cell)
    return len(numbers) == len(values) and all(map(rounds_to, numbers, values))


def rounds_to(shown: str, value: float) -> bool:
    """Return whether a number in a table is a value rounded to as many decimals, or to at least four significant digits."""
    mantissa, _, exponent = shown.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    significant = 0.5 * 10 ** (math.floor(math.log10(abs(value))) - 3) if value else 0  # zeros at the end are not shown
    return abs(float(shown) - value) <= max(0.5 * unit, 0 if "." in shown else significant) * 1.001


def check_metrics(experiment: Experiment) -> None:
    """metrics.json has these values and no others, to six digits."""
    shown, expected = dict(flatten(experiment.report("metrics.json"))), dict(flatten(metrics(experiment)))
    assert shown.keys() == expected.keys()
    wrong = {key: (shown[key], value) for key, value in expected.items() if not is_close(shown[key], value)}
    assert not wrong


def is_close(shown: float, value: float) -> bool:
    return shown == value if isinstance(value, int) else abs(shown - value) <= 1e-5 * abs(value) + 1e-9


def check_alpaca_eval(experiment: Experiment) -> None:
    """alpaca_eval.md: win rates, then the paired differences."""
    results, differences = read_tables(experiment.report("alpaca_eval.md"))[:2]
    assert [row[0] for row in results[1:]] == experiment.models
    for model, *lengths_controlled, rate, error, length in results[1:]:
        expected = alpaca(experiment, model)
        assert not lengths_controlled
        assert shows(rate, expected["win_rate"])
        assert shows(error, expected["standard_error"])
        assert shows(length, expected["avg_length"])
    assert [tuple(row[:2]) for row in differences[1:]] == list_comparisons(experiment)
    for model, opponent, difference, error, interval, *counts in differences[1:]:
        expected = compare_wins(experiment, model, opponent)
        assert shows(difference, expected["difference"])
        assert shows(error, expected["standard_error"])
        assert shows(interval, expected["lower"], expected["upper"])
        assert counts == [str(expected[key]) for key in ("wins", "losses", "ties")]


def list_comparisons(experiment: Experiment) -> list[tuple[str, str]]:
    """Return (model, opponent): each iteration against the base and, if that is another, the model it started from."""
    pairs = [(model, opponent) for model, start in experiment.starts.items() for opponent in ("base", start)]
    return list(dict.fromkeys(pairs))


def check_leaderboard(experiment: Experiment) -> None:
    """open_llm_leaderboard.md: scores with their errors, then the paired differences."""
    results, differences = read_tables(experiment.report("open_llm_leaderboard.md"))[:2]
    names = ["mmlu, plain mean", "average", "mmlu, weighted", "average, mmlu weighted"]
    assert results[0] == ["model", *TASKS[:-1], *names]
    assert [row[0] for row in results[1:]] == experiment.models
    for model, *cells in results[1:]:
        expected = leaderboard(experiment, model)
        assert all(shows(cell, *estimate) for cell, estimate in zip(cells, expected.values(), strict=True)), model
    assert differences[0] == ["model", "against", *TASKS[:-1], *names[:2]]
    assert [tuple(row[:2]) for row in differences[1:]] == list_comparisons(experiment)
    for model, opponent, *cells in differences[1:]:
        expected = compare_tasks(experiment, model, opponent)
        assert all(shows(cell, *estimate) for cell, estimate in zip(cells, expected.values(), strict=True)), model


def check_ranker(experiment: Experiment) -> None:
    """ranker.md and ranker.csv: the row's win rate against the column."""
    comparison = experiment.load("comparison.json")
    (table,) = read_tables(experiment.report("ranker.md"))
    assert table[0][1:] == [row[0] for row in table[1:]] == comparison["models"] == experiment.models
    rates, errors = np.array(comparison["win_rates"]), np.array(comparison["standard_errors"])
    for row, (_, *cells) in enumerate(table[1:]):
        for column, cell in enumerate(cells):
            assert cell == "–" if row == column else shows(cell, rates[row, column], errors[row, column])
    matrix = experiment.table("ranker.csv").pivot(index="model", columns="opponent", values="win_rate")
    np.testing.assert_allclose(matrix.loc[experiment.models, experiment.models], rates, atol=0.00501)


def check_health(experiment: Experiment) -> None:
    """health.md has these rows, with a column per iteration."""
    (table,) = read_tables(experiment.report("health.md"))
    assert table[0] == ["metric", *experiment.starts]
    assert [row[0] for row in table[1:]] == list(HEALTH)
    columns = [health(experiment, iteration) for iteration in experiment.starts]
    for label, *cells in table[1:]:
        for cell, column in zip(cells, columns, strict=True):
            value = column[HEALTH[label]]
            assert cell == str(value) if isinstance(value, int) else shows(cell, value), label


def check_plots(experiment: Experiment) -> None:
    """win_rate.csv, length.csv, probabilities.csv and training.csv."""
    rates, lengths = experiment.table("win_rate.csv"), experiment.table("length.csv")
    assert rates["model"].tolist() == lengths["model"].tolist() == experiment.models
    for index, model in enumerate(experiment.models):
        expected = alpaca(experiment, model)
        check_interval(rates.loc[index, "win_rate":], expected["win_rate"], expected["standard_error"])
        characters = mean_and_error([len(text) for text in experiment.answers(model)])
        check_interval(lengths.loc[index, "average_length":], *characters)
    for iteration, bars in experiment.table("probabilities.csv").groupby("iteration"):
        pairs = experiment.frame(f"pairs/{iteration}.parquet")
        assert len(bars) == 40
        for bar in bars.itertuples():
            values = pairs[f"{bar.response}_probability"]
            lowest = values == 0 if bar.probability == 0 else False
            assert bar.responses == (((values > bar.probability) & (values <= bar.upper)) | lowest).sum()
    logs = [experiment.frame(f"logs/{iteration}.csv").assign(iteration=iteration) for iteration in experiment.starts]
    pd.testing.assert_frame_equal(experiment.table("training.csv"), pd.concat(logs, ignore_index=True), rtol=1e-5)


def check_interval(row: Any, value: float, error: float) -> None:
    """Check a value and the bounds of its 95 % interval."""
    np.testing.assert_allclose(row.to_numpy(float), [value, value - Z * error, value + Z * error], atol=5.1e-5)


def check_items(experiment: Experiment) -> None:
    """preferences.csv and harness.csv: every instruction and question, to six digits."""
    preferences = experiment.table("preferences.csv")
    assert preferences.columns.tolist() == ["index", *experiment.models]
    assert preferences["index"].tolist() == list(range(len(preferences)))
    scores = experiment.table("harness.csv")
    assert scores.columns.tolist() == ["task", "subtask", "question", *experiment.models]
    for model in experiment.models:
        np.testing.assert_allclose(preferences[model] - 1, experiment.preferences(model), atol=5.01e-6)
        expected = [
            (task, subtask, question, value)
            for task, subtasks in experiment.load(f"harness/{model}/items.json").items()
            for subtask, values in subtasks.items()
            for question, value in enumerate(values)
        ]
        shown = sorted(scores[["task", "subtask", "question", model]].itertuples(index=False, name=None))
        assert [row[:3] for row in shown] == [row[:3] for row in sorted(expected)]
        np.testing.assert_allclose([row[3] for row in shown], [row[3] for row in sorted(expected)], rtol=1e-5)


def check_answers(experiment: Experiment) -> None:
    """index.html holds all answers, samples.md some of them."""
    page = experiment.report("index.html").partition('id="data">')[2].partition("</script>")[0]
    instructions = [row["instruction"] for row in experiment.load("answers/base.json")]
    outputs = {model: experiment.answers(model) for model in experiment.models}
    shown = json.loads(page)["answers"]
    assert shown["models"] == experiment.models
    assert [row["instruction"] for row in shown["rows"]] == instructions
    assert [row["answers"] for row in shown["rows"]] == [list(texts) for texts in zip(*outputs.values(), strict=True)]
    for place, model in enumerate(experiment.models):
        preferences = np.array([row["preferences"][place] for row in shown["rows"]], float)
        np.testing.assert_allclose(preferences - 1, experiment.preferences(model), atol=6e-6)
    (table,) = read_tables(experiment.report("samples.md"))
    assert table[0] == ["instruction", *experiment.models]
    assert len(table) == 1 + 8
    all_rows = [list(map(collapse, row)) for row in zip(instructions, *outputs.values(), strict=True)]
    places = [all_rows.index(row) for row in table[1:]]
    assert places == sorted(places)


def collapse(text: str) -> str:
    """Return a text as a Markdown table shows it: on one line, with U+FFFD for controls and invisible characters.

    Joiners stay between letters without case, marks and symbols, as in emoji and the scripts of Asia.
    """
    words = " ".join(text.split())
    kinds = ["Zs", *map(unicodedata.category, words), "Zs"]
    joins = [{before, after} <= {"Lo", "Mc", "Mn", "Sk", "So"} for before, after in zip(kinds, kinds[2:], strict=False)]
    hidden = [kind in ("Cc", "Cf", "Cs") for kind in kinds[1:-1]]
    return "".join(
        "\ufffd" if hide and not (join and mark in "\u200c\u200d") else mark
        for mark, hide, join in zip(words, hidden, joins, strict=True)
    )


Check = Callable[[Experiment], None]
CHECKS: list[Check] = [
    check_metrics,
    check_alpaca_eval,
    check_leaderboard,
    check_ranker,
    check_health,
    check_plots,
    check_items,
    check_answers,
]
"""Each takes an experiment and fails if a report does not show what the artifacts say."""

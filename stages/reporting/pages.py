"""The Markdown pages of the evaluations, next to the published results where there are any."""

import random
from collections.abc import Collection
from typing import Any

from stages.reporting import markdown, paired
from stages.reporting.answers import Judged
from stages.reporting.markdown import number
from stages.reporting.paired import BEYOND_ERROR, PUBLISHED_AS, Estimate, Preferences
from stages.reporting.published import TASKS, Published, PublishedAlpacaEvalTable, PublishedHarnessTable, PublishedTable
from stages.runtime.params import BASE

SAMPLES = 8
"""Number of instructions in samples.md."""
NOT_PUBLISHED = "There are no published results for these models."
COMPARISON = "## Comparison with published results"
PAIRED = "## Paired differences"
LABELS = {"mmlu": "mmlu, plain mean", "mmlu_weighted": "mmlu, weighted", "average_weighted": "average, mmlu weighted"}
"""Column of a result whose name does not say enough; the others are labelled by their names."""
MMLU = paired.WEIGHTED
RUN_TO_RUN = (
    "Run-to-run noise is not included: another seed, or another run on GPUs, gives other answers and, where models are "
    "trained, other models. If it has been measured, reports/seeds.md states it."
)

Comparisons = dict[tuple[str, str], Any]
"""(model, opponent) -> the result of comparing them, see `paired`."""


def average_tasks(summary: dict[str, dict[str, Any]]) -> dict[str, Estimate]:
    """Map each task, and the averages of `paired.add_averages`, to its value and standard error in percent."""
    tasks = {task: (summary[task]["value"], summary[task]["standard_error"]) for task in TASKS if task in summary}
    mmlu = summary.get(MMLU)
    return paired.add_averages(tasks, (mmlu["weighted"], mmlu["weighted_standard_error"]) if mmlu else None)


def label_column(column: str) -> str:
    """Return the heading of a column of results: the name of one of `paired.add_averages`, in words."""
    name, of, tasks = column.partition("_of_")
    label = LABELS.get(name, name)
    return f"{label}{', ' if ',' in label else ' '}of {tasks.replace('_', ' ')}" if of else label


def format_estimate(value: float | None, error: float | None, digits: int = 2) -> str:
    """Format a value with its standard error, or without if that is unknown. digits: decimals of both."""
    return number(value, digits) if value is None or error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def format_alpaca_eval(alpaca: dict[str, dict[str, Any]], differences: Comparisons, published: Published | None) -> str:
    """Format alpaca_eval.md.

    alpaca: model -> metrics of evaluate-alpaca. differences: results of `paired.compare_preferences`.
    """
    base = alpaca[BASE]
    lines = [
        "# AlpacaEval 2.0\n",
        format_win_rates(alpaca),
        f"Win rates in percent over {base['n_total']} instructions, judged by {markdown.code(base['judge'])}; average length "
        "in characters.",
        *map(markdown.escape, list_failures(alpaca)),
    ]
    if "length_controlled_absent" in base:
        lines.append(f"No length-controlled (LC) win rate: {markdown.escape(base['length_controlled_absent'])}.")
    if base["judge"] == "gold":
        lines.append(
            "The reference outputs are a second sample from the base policy, so the base policy wins about half the time."
        )
    lines.append(format_differences(differences))
    table = published.alpaca_eval if published else None
    lines.append(compare_alpaca_eval(alpaca, table, published.models) if published and table else NOT_PUBLISHED)
    return "\n".join(lines) + "\n"


def list_gaps(alpaca: dict[str, dict[str, Any]], harness: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """List what could not be judged, or not be asked in full, as sentences of plain text. Arguments: as in Evaluations."""
    return list_failures(alpaca) + list_cuts(harness)


def list_failures(alpaca: dict[str, dict[str, Any]]) -> list[str]:
    """Say in a sentence, if there is any, how many answers the judge gave no preference for. alpaca: model -> metrics."""
    counts = [f"{metrics['n_failed']} of {name}" for name, metrics in alpaca.items() if metrics.get("n_failed")]
    return [f"Answers left out because the judge gave no preference: {', '.join(counts)}."] if counts else []


def list_cuts(harness: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Say in a sentence, if there is any, how many prompts did not fit into a model. harness: model -> task -> summary."""
    counts = [
        f"{row['cut']} of {row['n']} questions of {task} ({name})"
        for name, summary in harness.items()
        for task, row in summary.items()
        if row.get("cut")
    ]
    what = "Prompts that exceed the model's context, so that they have fewer examples than stated"
    return [f"{what}: {', '.join(counts)}."] if counts else []


def format_win_rates(alpaca: dict[str, dict[str, Any]]) -> str:
    """Format the table of win rates and lengths, with LC win rates only if a model has one. alpaca: model -> metrics."""
    controlled = ["length_controlled_winrate", "lc_standard_error"]
    controlled = controlled if any(key in metrics for metrics in alpaca.values() for key in controlled) else []
    rows = [
        [
            name,
            *[number(metrics.get(key)) for key in controlled],
            number(metrics["win_rate"]),
            number(metrics["standard_error"]),
            number(metrics["avg_length"], 0),
        ]
        for name, metrics in alpaca.items()
    ]
    lc_header = ["LC win rate", "standard error"] if controlled else []
    return markdown.table(["model", *lc_header, "win rate", "standard error", "average length"], rows)


def format_data_sets(preferences: dict[str, Preferences], judged: list[Judged]) -> str:
    """Format the section of alpaca_eval.md with the win rates by AlpacaEval's data sets; an empty text if there is only one.

    preferences: model -> preference for each instruction, in the order of `judged`.
    """
    places: dict[str, list[int]] = {}
    for index, item in enumerate(judged):
        places.setdefault(item.data_set, []).append(index)
    if len(places) < 2:
        return ""
    rows = [
        [name, str(len(indices)), *[format_share([values[index] for index in indices]) for values in preferences.values()]]
        for name, indices in sorted(places.items())
    ]
    header = ["data set", "instructions", *preferences]
    return (
        f"\n## Win rates by data set\n\n{markdown.table(header, rows)}\n"
        "Win rate ± standard error in percent over the instructions of each of AlpacaEval's data sets.\n"
    )


def format_share(preferences: Preferences) -> str:
    """Format the win rate that preferences give, and its standard error, or a dash for fewer than two."""
    known = [value for value in preferences if value is not None]
    if len(known) < 2:
        return "–"
    value, error = paired.estimate_mean(known)
    return format_estimate(value - 100, error)


def format_differences(differences: Comparisons) -> str:
    """Format the section of alpaca_eval.md with the paired differences of win rates; an empty text if there are none."""
    if not differences:
        return ""
    rows = [
        [
            name,
            opponent,
            f"{result['difference']:+.2f}",
            number(result["standard_error"]),
            f"{result['lower']:+.2f} to {result['upper']:+.2f}",
            *[str(result[key]) for key in ("wins", "losses", "ties")],
        ]
        for (name, opponent), result in differences.items()
    ]
    header = ["model", "against", "difference", "standard error", "95% interval", "wins", "losses", "ties"]
    text = (
        f"\n{PAIRED}\n\n{markdown.table(header, rows)}\n"
        "Difference of the win rates in percentage points. Both models answered the same instructions, so the standard error "
        "is that of the mean difference between their preferences on the same instruction. A win: the judge's preference for "
        "the model, against the reference output, is higher than its preference for the opponent. The error is that of the "
        f"evaluation: what another sample of instructions would change for these two models. {RUN_TO_RUN}\n"
    )
    omissions = [f"{name} against {opponent}: {result['omitted']}" for (name, opponent), result in differences.items()]
    if any(result["omitted"] for result in differences.values()):
        text += f"Instructions left out because the judge gave no preference for one of the models: {', '.join(omissions)}.\n"
    return text


def compare_alpaca_eval(alpaca: dict[str, dict[str, Any]], published: PublishedAlpacaEvalTable, titles: dict[str, str]) -> str:
    """Format the section of alpaca_eval.md that compares our results with the published ones.

    titles: model -> name of the published model.
    """
    controlled = ("LC win rate", "length_controlled_winrate", "lc_standard_error", 2)
    metrics = [controlled, ("win rate", "win_rate", "standard_error", 2), ("average length", "avg_length", "", 0)]
    if not any("length_controlled_winrate" in values for values in alpaca.values()):
        metrics.sort(key=lambda metric: metric is controlled)  # last, because there is nothing to compare with
    rows = []
    for name, theirs in published.models.items():
        if name not in alpaca:
            continue
        for label, key, error_key, digits in metrics:
            value, error = alpaca[name].get(key), alpaca[name].get(error_key)
            reported, published_error = getattr(theirs, key), getattr(theirs, error_key, None)
            difference = None if value is None or reported is None else value - reported
            beyond = None if difference is None else paired.exceeds_published(difference, error, published_error)
            cells = [format_estimate(value, error, digits), format_estimate(reported, published_error, digits)]
            change = "–" if difference is None else f"{difference:+.{digits}f}"
            rows.append([name, titles[name], label, *cells, change, markdown.WORDS[beyond]])
    header = ["model", "published as", "metric", "ours", "published", "difference", BEYOND_ERROR]
    judge = alpaca[BASE]["judge"]
    text = (
        f"\n{COMPARISON}\n\n{markdown.table(header, rows)}\n{name_sources(published)} "
        f"{explain_error('Average lengths have no stated error.')}"
    )
    if judge != published.judge:
        text += (
            f"\n\n**Different judge**: our results were judged by {markdown.code(judge)}, the published ones by "
            f"{markdown.code(published.judge)}. The differences include those between the judges."
        )
    return text + list_notes(published.notes)


def name_sources(published: PublishedTable) -> str:
    """Format the sentence that names the sources of a published table."""
    others = [
        f"; of {markdown.escape(model)}'s {markdown.code(figure)}: {markdown.escape(source)}"
        for model, sources in published.sources.items()
        for figure, source in sources.items()
    ]
    return f"Source of the published results: {markdown.escape(published.source)}{''.join(others)}."


def list_notes(notes: list[str]) -> str:
    """Format the notes of a published table as a list, or return an empty text."""
    return "\n\n" + "\n".join(f"- {markdown.escape(note)}" for note in notes) if notes else ""


def explain_error(remark: str) -> str:
    """Explain the column BEYOND_ERROR. remark: a sentence about this table."""
    return (
        f"Value ± standard error, where known. {BEYOND_ERROR.capitalize()}: the difference is more than {markdown.INTERVAL} "
        "times its standard error, which combines ours and the published one; where none was published, ours is used in its "
        "place. The published results of single questions are not known, so the two evaluations are taken as independent, "
        "although both may ask the same questions: a difference that is not beyond this error may still be real. "
        f"{remark}{' ' if remark else ''}{RUN_TO_RUN}"
    )


def format_leaderboard(
    harness: dict[str, dict[str, dict[str, Any]]],
    differences: Comparisons,
    published: Published | None,
    answered: Collection[str] = (),
) -> str:
    """Format open_llm_leaderboard.md.

    harness: model -> task -> value, standard_error, metric and shots. differences: (model, opponent) -> task or `average` ->
    paired difference and standard error. answered: models that the harness cannot evaluate, because only their answers exist.
    """
    results = {name: average_tasks(summary) for name, summary in harness.items()}
    rows = [[name, *[format_estimate(*estimate) for estimate in result.values()]] for name, result in results.items()]
    text = (
        "# Open LLM Leaderboard v1, lm-evaluation-harness 0.4.1\n\n"
        + markdown.table(["model", *map(label_column, results[BASE])], rows)
        + f"\n{explain_tasks(harness[BASE])}\n"
        + "".join(f"\n{markdown.escape(sentence)}\n" for sentence in list_cuts(harness))
        + (f"\nNot in the table, because only its answers exist: {', '.join(answered)}.\n" if answered else "")
        + format_task_differences(differences)
    )
    if published is None or published.open_llm_leaderboard is None:
        return f"{text}\n{NOT_PUBLISHED}\n"
    return text + compare_leaderboard(results, published.open_llm_leaderboard)


def explain_tasks(summary: dict[str, dict[str, Any]]) -> str:
    """Say what the columns of the table are. summary: task -> metric and shots."""
    tasks = [task for task in TASKS if task in summary]
    metrics = ", ".join(f"{task} {summary[task]['metric']} ({summary[task]['shots']}-shot)" for task in tasks)
    text = f"Percent ± standard error. Metrics: {markdown.escape(metrics)}."
    if MMLU in tasks:
        text += (
            " MMLU, plain mean: over its 57 subjects, as on the leaderboard; weighted: by the subjects' numbers of questions, "
            "as in lm-evaluation-harness's own `mmlu`. `average` includes the plain mean."
        )
    if len(tasks) < len(TASKS):
        text += (
            f"\n\n**Only {len(tasks)} of the {len(TASKS)} tasks** were run (`evaluate_lm.tasks`), so no average here is "
            "comparable with a published one."
        )
    return text


def format_task_differences(differences: Comparisons) -> str:
    """Format the section of open_llm_leaderboard.md with the paired differences; an empty text if there are none."""
    if not differences:
        return ""
    columns = paired.list_columns(next(iter(differences.values())))
    rows = [
        [name, opponent, *[f"{result[column][0]:+.2f} ± {result[column][1]:.2f}" for column in columns]]
        for (name, opponent), result in differences.items()
    ]
    header = ["model", "against", *map(label_column, columns)]
    return (
        f"\n{PAIRED}\n\n{markdown.table(header, rows)}\n"
        "Difference in percentage points ± standard error. Both models answered the same questions, so the standard error is "
        "that of the mean difference between their scores on the same question; MMLU's combines those of its subjects, and "
        "that of the average those of the tasks. The error is that of the evaluation: what another sample of questions would "
        f"change for these two models. {RUN_TO_RUN}\n"
    )


def compare_leaderboard(results: dict[str, dict[str, Estimate]], published: PublishedHarnessTable) -> str:
    """Format the section of open_llm_leaderboard.md that compares our results with the published ones.

    results: model -> the results of `average_tasks`.
    """
    compared = [column for column in [*TASKS, "average"] if column in results[BASE]]
    columns = {PUBLISHED_AS.get(column, column): column for column in compared}
    plain = [MMLU] if MMLU in compared else []
    rows = []
    for name, theirs in published.models.items():
        if name not in results:
            continue
        ours = results[name]
        differences = [format_difference(ours[column], theirs.get(reported)) for column, reported in columns.items()]
        rows.append([name, "ours", *[format_estimate(*ours[column]) for column in [*columns, *plain]]])
        rows.append([name, "published", *[number(theirs.get(reported)) for reported in columns.values()], *["–"] * len(plain)])
        rows.append([name, "difference", *differences, *["–"] * len(plain)])
    header = ["model", "results", *map(label_column, [*columns, *plain])]
    remark = (
        "The published MMLU is compared with ours weighted by the subjects' numbers of questions, as lm-evaluation-harness "
        "0.4.1 itself does, and the average accordingly. The plain mean over the subjects, which the Open LLM Leaderboard v1 "
        "shows, is beside it."
    )
    return (
        f"\n{COMPARISON}\n\n{markdown.table(header, rows)}\n{name_sources(published)} Difference: "
        f"ours minus published. {explain_error(remark if plain else '')}{list_notes(published.notes)}\n"
    )


def format_difference(ours: Estimate, published: float | None) -> str:
    """Format the difference of our result from a published one, if there is one, and whether it exceeds the error."""
    if published is None:
        return "–"
    difference = ours[0] - published
    beyond = paired.exceeds_published(difference, ours[1], None)
    return f"{difference:+.2f}{f' ({BEYOND_ERROR})' if beyond else ''}"


def format_ranker(comparison: dict[str, Any]) -> str:
    """Format ranker.md, the win-rate matrix of the paper's Fig. 3. comparison: the content of comparison.json."""
    return (
        f"# Win rates according to the ranker\n\n{format_matrix(comparison, 'hold-out prompts')} Training optimises this "
        "ranker's preferences, so these win rates are a proxy, not an independent evaluation.\n"
    )


def format_existing_ranker(name: str, comparison: dict[str, Any]) -> str:
    """Format the section of alpaca_eval.md with a ranker's win-rate matrix. comparison: the content of its comparison.json."""
    return (
        f"\n## Win rates according to {name}\n\n{format_matrix(comparison, 'instructions of AlpacaEval')} A model that was "
        "trained to please this ranker has an advantage, so these win rates are a proxy, not an independent evaluation.\n"
    )


def format_matrix(comparison: dict[str, Any], prompts: str) -> str:
    """Format the table of a comparison.json, and the sentence that explains it. prompts: what the `n` prompts are."""
    models = comparison["models"]
    matrix = zip(models, comparison["win_rates"], comparison["standard_errors"], strict=True)
    rows = [
        [
            name,
            *[
                "–" if name == opponent else format_estimate(rate, error)
                for opponent, rate, error in zip(models, rates, errors, strict=True)
            ],
        ]
        for name, rates, errors in matrix
    ]
    return (
        markdown.table(["row against column", *models], rows)
        + "\nMean probability (percent ± standard error) that the ranker prefers the row model's response to the column "
        f"model's, over the {comparison['n']} {prompts}, with one response per model."
    )


def format_samples(answers: dict[str, list[dict[str, Any]]], seed: int) -> str:
    """Format samples.md: the answers of all models, side by side, to instructions drawn with the seed."""
    base = answers[BASE]
    drawn = sorted(random.Random(f"{seed}/samples").sample(range(len(base)), min(SAMPLES, len(base))))
    rows = [[base[index]["instruction"], *[outputs[index]["output"] for outputs in answers.values()]] for index in drawn]
    return (
        f"# Samples\n\n{len(drawn)} of the {len(base)} AlpacaEval instructions, drawn at random with the seed, and the answers "
        "of each model.\n\n" + markdown.table(["instruction", *answers], rows, text=True)
    )

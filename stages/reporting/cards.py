"""The model cards of the iterations, as the Hugging Face Hub shows them: reports/cards/NAME.md.

The layout is that of the published SPPO cards: one table of linked models per evaluation, and the list of hyperparameters. In
addition, a card states what those leave out: errors, judge, decoding, the base policy's row, deviations, versions and limits.

A card has the same bytes on every machine and at every commit: it is an output in dvc.lock, so it cannot contain the commit or
dvc.lock's hash. `python -m stages.tools publish` fills these in, and turns the links between the cards into links on the Hub.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stages.artifacts import files, harness_sets
from stages.reporting import health, markdown, pages, paired, provenance
from stages.reporting.health import Health
from stages.reporting.inputs import ALPACA_METRICS, Evaluations
from stages.reporting.markdown import number
from stages.reporting.pages import Comparisons
from stages.reporting.published import Hyperparameters, Published
from stages.runtime.errors import StageError
from stages.runtime.params import BASE, MODEL_NAME, Asset, PolicyAsset, Train

TEMPLATE = Path(__file__).with_name("card.md.j2")
FOLDER = "cards"
"""Below reports/."""
HUB = "https://huggingface.co"
OWN_LICENSE = "apache-2.0"
"""The licence of this repository, and so of the miniature's models."""
METHODS = {"sppo": "SPPO", "sppo_hard": "SPPO with 1 and 0 instead of P^", "dpo": "iterative DPO", "ipo": "iterative IPO"}
"""train.loss -> the method's name in a sentence."""
NOT_STATED = "–"

Rows = dict[str, list[tuple[str, float | None]]]
"""Model -> its cells in a table of results: the text, and the value by which the best is found (None: none is)."""


@dataclass(frozen=True)
class Terms:
    """What a licence asks of those who share a model that was trained from another, beside a copy of the licence."""

    page: str
    """Where its text is."""
    notice: str
    """The text of the file NOTICE."""
    prefix: str = ""
    """What the name of the model must begin with."""
    statement: str = ""
    """What to show on the model's page."""


def describe_llama(licence: str, page: str, prefix: str, credit: str) -> Terms:
    """Return the terms of a licence of Llama 3 or later: section 1.b.i has prefix and credit, 1.b.iii the notice.

    page: a part of its address.
    """
    notice = (
        f"{licence} is licensed under the {licence} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
    )
    return Terms(f"https://www.llama.com/{page}/license/", notice, prefix, f"Built with {credit}")


LICENSES = {
    "llama2": Terms(
        "https://www.llama.com/llama2/license/",
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    ),
    "llama3": describe_llama("Meta Llama 3", "llama3", "Llama 3", "Meta Llama 3"),
    "llama3.1": describe_llama("Llama 3.1", "llama3_1", "Llama", "Llama"),
    "llama3.2": describe_llama("Llama 3.2", "llama3_2", "Llama", "Llama"),
    "llama3.3": describe_llama("Llama 3.3", "llama3_3", "Llama", "Llama"),
    "llama4": describe_llama("Llama 4", "llama4", "Llama", "Llama"),
    "gemma": Terms(
        "https://ai.google.dev/gemma/terms",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        statement="This model is a modified version of Gemma. Its use is subject to the restrictions in section 3.2 of the "
        "[Gemma Terms of Use](https://ai.google.dev/gemma/terms).",
    ),
}
"""Licences, as the Hub names them, that ask for more than to be passed on.

Llama 2: section 1.b.iii. Gemma: section 3.1, whose item 1 asks for a notice of the restrictions, item 3 for one of the changes,
and item 4 for the file.
"""


def find_license(policy: PolicyAsset) -> str:
    """Return the licence of the models trained from a policy, as the Hub names it. Raises StageError if it is not stated."""
    if policy.made_here:
        return OWN_LICENSE
    if policy.license is None:
        raise StageError(
            "params.yaml: 'assets.policy.license' is missing, but the models' cards must state it: set it to the licence of "
            "the base model's card, as the Hub names it"
        )
    return policy.license


def format_cards(
    settings: Any,
    published: Published | None,
    evaluations: Evaluations,
    comparisons: tuple[Comparisons, Comparisons],
    training: dict[str, Health],
    data: Path,
) -> dict[str, str]:
    """Format the card of each iteration: name -> Markdown with the Hub's metadata in front.

    settings: the keys that the stage report loads. comparisons: of the preferences and of the scores, as for the pages.
    data: the folder of the other stages' outputs.
    Raises StageError if the licence is missing, or a record or asset is missing or invalid.
    """
    find_license(settings.assets.policy)
    return {
        name: format_card(name, settings, published, evaluations, comparisons, training, data) for name in settings.iterations
    }


def write_cards(cards: dict[str, str], folder: Path) -> None:
    """Write the cards to a folder, and remove those of iterations that params.yaml no longer has.

    Raises StageError if the folder contains anything else.
    """
    with files.replacing(folder) as partial:
        partial.mkdir()
        for name, text in cards.items():
            (partial / f"{name}.md").write_text(text, encoding="utf-8")
        for path in folder.glob("*.md"):
            if re.fullmatch(MODEL_NAME, path.stem):
                path.unlink()


def format_card(
    name: str,
    settings: Any,
    published: Published | None,
    evaluations: Evaluations,
    comparisons: tuple[Comparisons, Comparisons],
    training: dict[str, Health],
    data: Path,
) -> str:
    """Format the card of one iteration; see `format_cards`."""
    from huggingface_hub import ModelCard

    lineage = list_lineage(settings.iterations, name)
    links = link_models(name, settings.iterations, settings.assets.policy)
    wins, tasks = (comparison[name, BASE] for comparison in comparisons)
    update = health.read_update(data / "logs" / f"{name}.json", training[name].log)
    sections = {
        "title": name,
        "license": markdown.escape(find_license(settings.assets.policy)),
        "terms": LICENSES.get(find_license(settings.assets.policy)),
        "method": METHODS[settings.train.loss],
        "lineage": [BASE, *lineage],
        "weights": format_count(update["weights"]),
        "toy": settings.assets.policy.made_here,
        "base": describe_asset(settings.assets.policy, "the miniature's small base policy"),
        "prompts": describe_prompts(settings),
        "ranker": describe_asset(settings.assets.ranker, "the miniature's small ranker"),
        "links": links,
        "settings": settings,
        "alpaca": evaluations.alpaca[name],
        "judge": markdown.code(evaluations.alpaca[name]["judge"]),
        "no_lc": markdown.escape(evaluations.alpaca[name].get("length_controlled_absent", "")),
        "failures": list(map(markdown.escape, pages.list_failures({name: evaluations.alpaca[name]}))),
        "cuts": list(map(markdown.escape, pages.list_cuts({name: evaluations.harness[name]}))),
        "alpaca_table": format_alpaca_eval(evaluations.alpaca, links),
        "gain": f"{wins['difference']:+.2f} ± {wins['standard_error']:.2f}",
        "interval": f"{wins['lower']:+.2f} to {wins['upper']:+.2f}",
        "harness": evaluations.harness[name],
        "leaderboard": paired.LEADERBOARD,
        "harness_table": format_leaderboard(evaluations.harness, links),
        "harness_gain": format_average(tasks),
        "harness_metrics": describe_metrics(evaluations.harness[name]),
        "hyperparameters": list_hyperparameters(collect_hyperparameters(settings)),
        "batch": settings.train.global_batch,
        "further": list_further(settings.train, training[name].metrics),
        "published": markdown.escape(published.models.get(name, "")) if published else "",
        "deviations": format_deviations(settings, published),
        "versions": provenance.format_stages(data / "records", {step: settings.iterations[step] for step in lineage}),
        "assets": provenance.format_assets(settings.assets, data),
        "contaminated": sum(training[step].metrics["contaminated"] for step in lineage),
        "trained": sum(training[step].metrics["prompts"] for step in lineage),
    }
    metadata = make_metadata(name, settings, evaluations)
    return f"{ModelCard.from_template(metadata, template_path=str(TEMPLATE), **sections)}\n"


def list_lineage(iterations: dict[str, str], name: str) -> list[str]:
    """List the iterations that led to a model, from the first to the model itself."""
    start = iterations[name]
    return [*(list_lineage(iterations, start) if start != BASE else []), name]


def link_models(name: str, iterations: dict[str, str], policy: Asset) -> dict[str, str]:
    """Map each model to its name as Markdown, linked to its card or page on the Hub; `name` is this card's."""
    links = {BASE: f"{link_asset(policy)} (base)" if policy.on_hub else BASE}
    links |= {other: f"[{other}]({other}.md)" for other in iterations}
    return links | {name: f"{links[name]} (this model)"}


def link_asset(asset: Asset, folder: str = "") -> str:
    """Format a link to an asset on the Hub. folder: `datasets/` for a data set."""
    return f"[{markdown.escape(asset.repo)}]({HUB}/{folder}{quote(asset.repo)})"


def describe_asset(asset: Asset, made_here: str, folder: str = "") -> str:
    """Name an asset in a sentence: its link on the Hub, `made_here` for the miniature's, or a local directory."""
    if asset.made_here:
        return made_here
    return link_asset(asset, folder) if asset.on_hub else "a model or data set in a local directory"


def describe_prompts(settings: Any) -> str:
    """Say where the prompts come from, and who split them into how many parts."""
    prompts, count = settings.assets.prompts, len(settings.iterations)
    source = describe_asset(prompts, "the miniature's own toy questions", "datasets/")
    parts = "1 part for 1 iteration" if count == 1 else f"{count} parts for {count} iterations"
    assignment = prompts.assignment
    by = f" by {describe_asset(assignment, '', 'datasets/')}" if assignment else ""
    return f"{source}, split into {parts}{by}"


def format_count(weights: float) -> str:
    """Format a number of parameters, such as `8.0B` or `0.88M`."""
    return f"{weights / 1e9:.1f}B" if weights >= 1e9 else f"{weights / 1e6:.3g}M"


def format_alpaca_eval(alpaca: dict[str, dict[str, Any]], links: dict[str, str]) -> str:
    """Format the table of AlpacaEval's results. alpaca: model -> metrics of evaluate-alpaca; links: see `link_models`."""
    rows: Rows = {}
    for name, metrics in alpaca.items():
        rates = [
            (metrics.get(key), metrics.get(error))
            for key, error in (("length_controlled_winrate", "lc_standard_error"), ("win_rate", "standard_error"))
        ]
        cells = [(pages.format_estimate(value, error), value) for value, error in rates]
        rows[name] = [*cells, (number(metrics["avg_length"], 0), None)]
    return format_results(["model", "LC win rate", "win rate", "average length"], rows, links)


def format_leaderboard(harness: dict[str, dict[str, dict[str, Any]]], links: dict[str, str]) -> str:
    """Format the table of the harness's results. harness: model -> summary of evaluate-lm; links: see `link_models`."""
    results = {name: pages.average_tasks(summary) for name, summary in harness.items()}
    rows: Rows = {
        name: [(pages.format_estimate(*estimate), estimate[0]) for estimate in estimates.values()]
        for name, estimates in results.items()
    }
    return format_results(["model", *map(pages.label_column, next(iter(results.values())))], rows, links)


def format_results(header: list[str], rows: Rows, links: dict[str, str]) -> str:
    """Format a table of results, a row per model, with the best value of each column in bold unless all are the same."""
    lines = []
    columns = [
        [None if value is None else round(value, 2) for _, value in column] for column in zip(*rows.values(), strict=True)
    ]
    best = [max((value for value in column if value is not None), default=None) for column in columns]
    best = [value if len(set(column)) > 1 else None for value, column in zip(best, columns, strict=True)]
    for name, cells in rows.items():
        texts = [
            f"**{text}**" if value is not None and round(value, 2) == highest else text
            for (text, value), highest in zip(cells, best, strict=True)
        ]
        lines.append([links[name], *texts])
    return markdown.lay_out(header, lines)


def format_average(differences: dict[str, paired.Estimate]) -> str | None:
    """Format the paired difference of the averages of all tasks; None if only one was run."""
    column = paired.list_columns(differences)[-1]
    return "{:+.2f} ± {:.2f}".format(*differences[column]) if column.startswith("average") else None


def describe_metrics(summary: dict[str, dict[str, Any]]) -> str:
    """Name the metric and the number of few-shot examples of each task."""
    return markdown.escape(", ".join(f"{task} {row['metric']} ({row['shots']}-shot)" for task, row in summary.items()))


def collect_hyperparameters(settings: Any) -> Hyperparameters:
    """Collect this run's hyperparameters under the names of the published cards."""
    train: Train = settings.train
    return Hyperparameters(
        learning_rate=train.learning_rate,
        eta=settings.eta,
        per_device_train_batch_size=train.device_batch,
        gradient_accumulation_steps=train.global_batch // (train.device_batch * train.devices),
        seed=settings.seed,
        distributed_type="deepspeed_zero3",
        num_devices=train.devices,
        optimizer="RMSProp",
        lr_scheduler_type="linear",
        lr_scheduler_warmup_ratio=train.warmup_ratio,
        num_train_epochs=train.epochs,
        stop_epoch=train.stop_epoch,
    )


def format_value(name: str, value: float | str | None) -> str:
    """Format a hyperparameter as the published cards do: `5e-07`, `1000`, `6.0`."""
    if value is None:
        return NOT_STATED
    return (
        str(float(value)) if name in ("num_train_epochs", "stop_epoch") else value if isinstance(value, str) else f"{value:g}"
    )


def list_hyperparameters(values: Hyperparameters) -> str:
    """List the hyperparameters as the published cards do, one per line, the epoch of the stop beside the schedule's epochs."""
    texts = {name: format_value(name, value) for name, value in values.model_dump().items()}
    stop = texts.pop("stop_epoch")
    texts["num_train_epochs"] += f" (stop at epoch={stop})"
    return "\n".join(f"- {name}: {text}" for name, text in texts.items())


def list_further(train: Train, metrics: dict[str, float]) -> str:
    """List the settings of training that the published cards do not state, and its extent. metrics: of Health."""
    adapters = (
        f"rank {train.lora.rank}, alpha {train.lora.alpha}, merged" if train.lora.rank else "none: all weights are trained"
    )
    values = {
        "loss": train.loss if train.beta is None else f"{train.loss}, beta {train.beta:g}",
        "total_train_batch_size": str(train.global_batch),
        "max_grad_norm": f"{train.max_grad_norm:g}" if train.max_grad_norm else "none",
        "adapters (LoRA)": adapters,
        "precision": f"{train.dtype}, with float32 master weights; checkpoint: {train.checkpoint_dtype}",
        "gradient_checkpointing": str(train.gradient_checkpointing).lower(),
        "offload": train.offload,
        "training pairs": f"{metrics['pairs_used']:g} of {metrics['prompts']:g} prompts",
        "optimizer steps": f"{metrics['steps']:g}, of which {metrics['effective_steps']:g} with a learning rate above 0",
    }
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def format_deviations(settings: Any, published: Published | None) -> str:
    """Format the tables of the settings that deviate from the published card, and from the paper or the released code."""
    text = ""
    if published and published.hyperparameters:
        rows = compare_hyperparameters(collect_hyperparameters(settings), published.hyperparameters.values)
        source = markdown.escape(published.hyperparameters.source)
        table = markdown.table(["setting", "this model", "published"], rows, text=True)
        text += f"From the published hyperparameters ({source}){list_or_none(table, rows)}\n"
    rows = [
        [setting, ours, paper, code]
        for setting, _, ours, paper, code in provenance.list_method(settings)
        if deviates(ours, paper) or deviates(ours, code)
    ]
    table = markdown.table(["setting", "this model", "paper", "released code"], rows, text=True)
    return f"{text}From the paper or the released code (a dash: not stated){list_or_none(table, rows)}"


def list_or_none(table: str, rows: list[list[str]]) -> str:
    """Return the end of a sentence that announces a table: the table or, if it has no rows, `none`."""
    return f":\n\n{table}" if rows else ": none.\n"


def compare_hyperparameters(ours: Hyperparameters, theirs: Hyperparameters) -> list[list[str]]:
    """List name, our value and the published one of each hyperparameter that is published and differs."""
    mine = ours.model_dump()
    return [
        [name, format_value(name, mine[name]), format_value(name, value)]
        for name, value in theirs.model_dump().items()
        if value is not None and value != mine[name]
    ]


def deviates(ours: str, stated: str) -> bool:
    """Return whether our value deviates from a stated one in the words of `provenance.list_method`.

    A dash states nothing, a remark in brackets does not count, and `18 or 6, 1` states both `18, 1` and `6, 1`.
    """
    stated = stated.partition(" (")[0]
    first, _, second = stated.partition(" or ")
    rest = second[second.find(",") :] if "," in second else ""
    return stated != NOT_STATED and ours not in (stated, second, first + rest)


def make_metadata(name: str, settings: Any, evaluations: Evaluations) -> Any:
    """Make the metadata in front of a card, a huggingface_hub.ModelCardData, with every result in its model-index."""
    from huggingface_hub import ModelCardData

    policy, prompts = settings.assets.policy, settings.assets.prompts
    more: dict[str, Any] = {"base_model_relation": "finetune"} if policy.on_hub else {}
    return ModelCardData(
        base_model=policy.repo if policy.on_hub else None,
        datasets=[prompts.repo] if prompts.on_hub else None,
        language="en",  # of the prompts in the recipes, and of the evaluations
        library_name="transformers",
        license=find_license(policy),
        model_name=name,
        pipeline_tag="text-generation",
        tags=[re.sub("_hard$", "", settings.train.loss)],
        eval_results=[
            *index_alpaca_eval(evaluations.alpaca[name], settings.assets.alpaca_eval),
            *index_leaderboard(evaluations.harness[name], settings.assets.harness),
        ],
        **more,
    )


def name_data_set(asset: Asset, name: str) -> dict[str, Any]:
    """Return the fields of a model-index that name a data set: its type, the ID on the Hub, and its name for people."""
    if asset.on_hub:
        return {"dataset_type": asset.repo, "dataset_name": name, "dataset_revision": asset.revision}
    kind = "miniature" if asset.made_here else "local"
    return {"dataset_type": kind, "dataset_name": f"{name}, {'toy data' if asset.made_here else 'local data'}"}


def index_alpaca_eval(metrics: dict[str, Any], asset: Asset) -> list[Any]:
    """List AlpacaEval's results as huggingface_hub.EvalResults, in percent and characters, with two decimals."""
    from huggingface_hub import EvalResult

    data_set = name_data_set(asset, "AlpacaEval 2.0")
    return [
        EvalResult(
            task_type="text-generation",
            metric_type=key,
            metric_value=round(metrics[key], 2),
            metric_args={"judge": metrics["judge"]},
            **data_set,
        )
        for key in ALPACA_METRICS
        if key in metrics
    ]


def index_leaderboard(summary: dict[str, dict[str, Any]], assets: Any) -> list[Any]:
    """List the harness's results as huggingface_hub.EvalResults: each column of the table, and its standard error."""
    results = []
    for column, (value, error) in pages.average_tasks(summary).items():
        fields, metric = describe_column(column, summary, assets)
        results += [
            index_result(fields, metric, pages.label_column(column), value),
            index_result(fields, f"{metric}_stderr", f"{pages.label_column(column)}, standard error", error),
        ]
    return results


def index_result(fields: dict[str, Any], metric: str, name: str, value: float) -> Any:
    """Return a result of the harness as a huggingface_hub.EvalResult, with two decimals."""
    from huggingface_hub import EvalResult

    return EvalResult(task_type="text-generation", metric_type=metric, metric_name=name, metric_value=round(value, 2), **fields)


def describe_column(column: str, summary: dict[str, dict[str, Any]], assets: Any) -> tuple[dict[str, Any], str]:
    """Return the fields of a model-index that describe a column of the harness's table, and the name of its metric."""
    task = column.removesuffix("_weighted")
    if task not in summary:  # an average
        used = [getattr(assets, task) for task in summary]
        named = name_data_set(next((asset for asset in used if not asset.on_hub), used[0]), "Open LLM Leaderboard v1")
        return {"dataset_type": "open-llm-leaderboard", "dataset_name": named["dataset_name"]}, column
    data_set = harness_sets.DATA_SETS[task]
    shots = summary[task]["shots"]
    fields = {
        "dataset_config": data_set.configs[0] if len(data_set.configs) == 1 else None,
        "dataset_split": data_set.test,
        "metric_args": {"num_few_shot": shots},
    }
    return name_data_set(getattr(assets, task), f"{task} ({shots}-shot)") | fields, summary[task]["metric"]

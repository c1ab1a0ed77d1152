"""Model cards of a small data folder, for the tests that read or publish them."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stages.artifacts import files, harness_sets
from stages.artifacts.schemas import model_names
from stages.reporting import cards, health, inputs, results
from stages.reporting.published import read_published
from stages.runtime import params
from stages.runtime.paths import ROOT
from support.reports import write_evaluations, write_iteration, write_provenance


def load_settings(recipe: Path, iterations: dict[str, str], **changes: Any) -> SimpleNamespace:
    """Return what the stage report loads from a recipe's params.yaml, with other iterations and changed sections."""
    path = recipe / "params.yaml"
    document = params.validate_unpinned(params.read(path), path)
    sections = {name: getattr(document, name) for name in params.Params.model_fields}
    more = {"iterations": iterations, "tasks": document.evaluate_lm.tasks, "dtype": document.evaluate_lm.dtype}
    return SimpleNamespace(**(sections | more | changes))


def make_cards(folder: Path, recipe: Path = ROOT, *, second: bool = False, **changes: Any) -> dict[str, str]:
    """Return the card of iter1 by the settings of a recipe, from the results of support/reports.py, written to the folder.

    second: whether to add an iter2, which starts from iter1 and has the same results, apart from the contamination.
    """
    data = folder / "data"
    for write in (write_evaluations, write_iteration, write_provenance):
        write(data)
    iterations = {"iter1": "base"}
    if second:
        iterations["iter2"] = "iter1"
        add_iteration(data)
    settings = load_settings(recipe, iterations, **changes)
    evaluations = inputs.read_evaluations(data, model_names(settings.iterations), harness_sets.select_tasks(settings.tasks))
    training = {name: health.measure_health(name, data, settings.eta, settings.train) for name in iterations}
    comparisons = results.compare_models(evaluations, settings.iterations)
    published = read_published(recipe / "published.yaml")
    return cards.format_cards(settings, published, evaluations, comparisons, training, data)


def add_iteration(data: Path) -> None:
    """Copy every file and folder of iter1 to iter2, of whose prompts one is also in AlpacaEval."""
    for path in list(data.rglob("*iter1*")):
        copy = path.with_name(path.name.replace("iter1", "iter2"))
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copyfile(path, copy)
    files.write_json({"contaminated": {"iter1": 7, "iter2": 1}}, data / "split" / "contamination.json")

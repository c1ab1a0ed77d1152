"""The plots of DVC's views."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.runtime.paths import ROOT

Plot = dict[str, Any]
"""A plot's definition as in dvc.yaml: x, y (CSV file -> column), template, title, x_label, y_label."""


def load_plots() -> dict[str, Plot]:
    """Return the plots of stages/tools/plots.yaml: name -> definition."""
    definitions: list[dict[str, Plot]] = YAML(typ="safe").load(ROOT / "stages/tools/plots.yaml")
    return {name: plot for definition in definitions for name, plot in definition.items()}


def name_source(plot: Plot) -> str:
    """Return the name of the CSV file, in the folder of reports, that a plot is drawn from."""
    (source,) = plot["y"]
    return Path(source).name

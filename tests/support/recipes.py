"""The parameters of recipes, without the revisions that `hub --pin` looks up."""

from pathlib import Path

from stages.runtime import params
from stages.runtime.paths import ROOT


def read_recipe(folder: str | Path) -> params.Params:
    """Read the parameters of a recipe that trains. folder: its name in recipes/, or a folder."""
    path = ROOT / "recipes" / folder / "params.yaml"  # an absolute folder stays itself
    return params.validate_unpinned(params.read(path), path)


def change(settings: params.Params, section: str, **values: object) -> params.Params:
    """Return the settings with values of a section replaced."""
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})

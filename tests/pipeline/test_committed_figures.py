"""The committed results of the miniature: SPPO improves the policy, and the metrics are those of the preferences."""

import io
import json

import pandas as pd
import pytest

from stages.reporting import seeds
from stages.runtime import documents
from stages.tools import revisions
from support.committed import read_committed

DOCUMENT = json.loads(read_committed("reports/metrics.json"))
METRICS = DOCUMENT["alpaca_eval"]


@pytest.fixture(scope="module")
def preferences() -> pd.DataFrame:
    """A row per instruction, a column per model."""
    return pd.read_csv(io.StringIO(read_committed("reports/preferences.csv")), index_col="index")


def test_the_last_iteration_is_better_than_the_base_policy(preferences: pd.DataFrame) -> None:
    """By more than four standard errors of the paired difference, both according to the preferences and to metrics.json."""
    difference = preferences["iter3"] - preferences["base"]
    assert difference.mean() > 4 * difference.sem()
    stated = METRICS["iter3"]["vs_base"]
    assert stated["difference"] > 4 * stated["standard_error"] > 0
    assert (stated["difference"], stated["standard_error"]) == pytest.approx(
        (100 * difference.mean(), 100 * difference.sem()), rel=1e-4
    )


def test_the_win_rates_are_those_of_the_preferences(preferences: pd.DataFrame) -> None:
    assert list(preferences) == list(METRICS)
    assert len(preferences) == 805
    for model, metrics in METRICS.items():
        assert metrics["win_rate"] == pytest.approx(100 * (preferences[model].mean() - 1), abs=1e-3)
        assert metrics["standard_error"] == pytest.approx(100 * preferences[model].sem(), abs=1e-3)


def test_the_noise_is_that_of_the_committed_experiment() -> None:
    """One of the runs with different seeds is the committed one: after a change of the results, run `make seeds`."""
    runs = json.loads(read_committed("reports/seeds.json"))
    place = runs["seeds"].index(documents.load_mapping(read_committed("params.yaml").encode(), "params.yaml")["seed"])
    metrics = {".".join(key): value for key, value in revisions.flatten(DOCUMENT).items() if seeds.is_number(value)}
    assert {key: values[place] for key, values in runs["figures"].items()} == metrics
    assert read_committed("reports/seeds.md") == seeds.format_seeds(runs)

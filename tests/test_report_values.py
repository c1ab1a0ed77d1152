"""Every figure of the reports on made-up data of three models, against the oracles of support/figures.py."""

import argparse

import pytest

from stages import report
from stages.reporting import charts
from stages.runtime.paths import ROOT
from support import experiments, figures
from support.running import set_params


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> figures.Experiment:
    """Made-up artifacts of base, iter1 (from base) and iter2 (from iter1), and the reports on them."""
    folder = tmp_path_factory.mktemp("figures")
    set_params(folder, {"iterations": {"iter1": "base", "iter2": "iter1"}})
    experiments.write_data(folder / "data")
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(charts, "bundle_vega", lambda: "")  # takes seconds
        options = ["--data", "data", "--published", str(ROOT / "published.yaml"), "--out", "reports"]
        report.main(parser.parse_args(options))
    return figures.Experiment(folder)


@pytest.mark.parametrize("check", figures.CHECKS, ids=lambda check: check.__name__)
def test_a_report_shows_what_the_artifacts_say(experiment: figures.Experiment, check: figures.Check) -> None:
    check(experiment)

"""Every figure of the reports of a whole run, against the oracles of support/figures.py, which share nothing with stages/."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from support import figures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experiment(smallest: Path) -> figures.Experiment:
    return figures.Experiment(smallest)


@pytest.mark.parametrize("check", figures.CHECKS, ids=lambda check: check.__name__)
def test_a_report_shows_what_the_artifacts_say(experiment: figures.Experiment, check: figures.Check) -> None:
    check(experiment)


def test_provenance_shows_the_hashes_of_the_lock(experiment: figures.Experiment) -> None:
    lock = YAML(typ="safe").load(experiment.data.parent / "dvc.lock")["stages"]
    md5s = {name: lock[f"assets-{name}"]["outs"] for name in ("policy", "ranker", "prompts", "alpaca-eval", "harness")}
    tables = figures.read_tables(experiment.report("provenance.md"))
    (assets,) = [table for table in tables if table[0] == ["asset", "source", "MD5"]]
    shown = {row[0]: row[2] for row in assets[1:]}
    assert shown == {
        name: next(out["md5"] for out in outs if not out["path"].startswith("data/records")) for name, outs in md5s.items()
    }


def test_rankings_follow_from_their_logits(experiment: figures.Experiment) -> None:
    """P^ (section 5.3 of the paper), the chosen and the rejected response, and what of them the pairs hold."""
    scale = experiment.params["rank"]["scale"]
    rankings = experiment.frame("rankings/iter1.parquet").set_index("prompt_id")
    responses = experiment.frame("responses/iter1.parquet").set_index("prompt_id")
    pairs = experiment.frame("pairs/iter1.parquet").set_index("prompt_id")
    for prompt_id, row in rankings.iterrows():
        logits = np.array([list(values) for values in row["logits"]], float)
        wins = [[1 / (1 + math.exp(scale * (logits[j, i] - logits[i, j]))) for j in range(3)] for i in range(3)]
        np.testing.assert_allclose(row["probabilities"], np.mean(wins, 1), atol=1e-9)
        scores = (logits - logits.T).sum(1)
        assert scores[row["chosen"]] == pytest.approx(scores.max(), abs=1e-5)
        if row["tie"]:
            assert prompt_id not in pairs.index
            continue
        assert scores[row["rejected"]] == pytest.approx(scores.min(), abs=1e-5)
        pair, sampled = pairs.loc[prompt_id], responses.loc[prompt_id, "token_ids"]
        for side in ("chosen", "rejected"):
            assert pair[f"{side}_probability"] == row["probabilities"][row[side]]
            assert list(pair[f"{side}_token_ids"]) == list(sampled[row[side]])


def test_reference_logps_are_those_of_the_base_policy(experiment: figures.Experiment) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(experiment.data / "models/base", dtype=torch.float32)
    for row in experiment.frame("pairs/iter1.parquet").head(8).to_dict("records"):
        prompt = list(row["prompt_token_ids"])
        for side in ("chosen", "rejected"):
            response = list(row[f"{side}_token_ids"])
            with torch.no_grad():
                logps = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logps.gather(1, torch.tensor(response)[:, None]).sum().item()
            assert row[f"{side}_reference_logps"] == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_the_harness_means_are_those_of_its_questions(experiment: figures.Experiment) -> None:
    for model in experiment.models:
        items: dict[str, Any] = experiment.load(f"harness/{model}/items.json")
        summary = json.loads((experiment.data / f"harness/{model}/summary.json").read_text())
        for task, subtasks in items.items():
            value, error = figures.combine(
                *zip(*(figures.mean_and_error(100 * np.array(scores)) for scores in subtasks.values()), strict=True)
            )
            assert summary[task]["value"] == pytest.approx(value, abs=1e-6)
            assert summary[task]["standard_error"] == pytest.approx(error, abs=1e-6)

from pathlib import Path
from typing import Any, get_args

import pytest

from stages.artifacts import files
from stages.reporting import provenance
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.reports import RECORD, read_rows, write_provenance


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_provenance(tmp_path)
    return tmp_path


def test_provenance_names_values_hashes_and_circumstances(data: Path) -> None:
    rows = read_rows(provenance.format_provenance(params.validate(ROOT / "params.yaml"), data))
    assert ["P^ from logits", "rank.probability", "pairwise", "pairwise", "aggregate"] in rows
    assert ["ranker", "generated from the seed", files.dvc_md5(data / "ranker")] in rows
    assert ["prompts", "generated from the seed", "20089c178f2add343f04b93047e2f9a0"] in rows
    assert ["split, train@iter1", "8 x a\\_gpu", "fast", "3.11", "alpaca-eval 0.6.6, torch 2.13.0"] in rows
    assert not [row for row in rows if "train@dropped" in row[0]]


def test_every_choice_that_changes_results_is_named_with_its_value(data: Path) -> None:
    settings = params.validate(ROOT / "params.yaml")
    lengths = settings.lengths.model_copy(update={"too_long": "released"})
    rank, train = (
        settings.rank.model_copy(update={"scale": 0.25}),
        settings.train.model_copy(update={"checkpoint_dtype": "bfloat16"}),
    )
    changed = settings.model_copy(update={"lengths": lengths, "rank": rank, "train": train, "numerics": "fast"})
    before, after = (
        {row[1].replace("\\", ""): row[2:] for row in read_rows(provenance.format_method(values))}
        for values in (settings, changed)
    )
    assert before["rank.scale"] == ["0.5", "–", "– (llm-blender: 1)"]
    assert after["rank.scale"][0] == "0.25"
    assert (before["train.checkpoint_dtype"], after["train.checkpoint_dtype"]) == (
        ["float32", "–", "bfloat16"],
        ["bfloat16", "–", "bfloat16"],
    )
    assert (before["numerics"][0], after["numerics"][0]) == ("portable", "fast")
    assert before["lengths.too_long"][0].startswith("drop: ")
    assert after["lengths.too_long"][0] == after["lengths.too_long"][2] != before["lengths.too_long"][0]
    assert after["lengths.too_long"][0].startswith("released: ")
    assert [key for key in before if before[key] != after[key]] == [
        "rank.scale",
        "lengths.too_long",
        "train.checkpoint_dtype",
        "numerics",
    ]


def test_every_rule_for_long_pairs_is_explained() -> None:
    assert list(provenance.TOO_LONG) == list(get_args(params.Lengths.model_fields["too_long"].annotation))
    for rule, text in provenance.TOO_LONG.items():
        assert text.startswith(f"{rule}: ")


@pytest.mark.parametrize("recipe", ["llama-3-8b", "mistral-7b", "gemma-2-9b"])
def test_pinned_assets_are_named_by_repository_and_revision(recipe: str, data: Path) -> None:
    path = ROOT / "recipes" / recipe / "params.yaml"
    settings = params.validate_unpinned(params.read(path), path)
    rows = {row[0]: row for row in read_rows(provenance.format_assets(settings.assets, data))}
    policy, ranker = settings.assets.policy, settings.assets.ranker
    assert rows["policy"][1].replace("\\", "") == f"{policy.repo}@{policy.revision}"
    assert ranker.base
    assert rows["ranker"][1].replace("\\", "") == (
        f"{ranker.repo}@{ranker.revision}, {ranker.base.repo}@{ranker.base.revision}"
    )


def test_a_missing_asset_is_named(data: Path) -> None:
    (data / "prompts.parquet").unlink()
    with pytest.raises(StageError) as error:
        provenance.format_provenance(params.validate(ROOT / "params.yaml"), data)
    assert_message(str(error.value), str(data / "prompts.parquet"), "missing")


@pytest.mark.parametrize(
    "record",
    [
        [],
        {},
        RECORD | {"tools": None},
        RECORD | {"device": {"kind": "a_gpu"}},
        RECORD | {"device": 8},
        {key: RECORD[key] for key in RECORD if key != "numerics"},
    ],
)
def test_an_invalid_record_is_named(record: Any, tmp_path: Path) -> None:
    files.write_json(record, tmp_path / "split.json")
    with pytest.raises(StageError) as error:
        provenance.format_stages(tmp_path, {})
    assert_message(str(error.value), str(tmp_path / "split.json"), "`dvc repro`")


def test_stages_with_different_tools_have_rows_of_their_own(tmp_path: Path) -> None:
    files.write_json(RECORD, tmp_path / "rank@iter1.json")
    files.write_json(RECORD | {"tools": {"torch": "2.12.0"}}, tmp_path / "train@iter1.json")
    rows = read_rows(provenance.format_stages(tmp_path, {"iter1": "base"}))[2:]
    assert [row[0] for row in rows] == ["rank@iter1", "train@iter1"]


def test_stages_with_different_numerics_have_rows_of_their_own(tmp_path: Path) -> None:
    for name, numerics in (("rank@iter1", "portable"), ("split", None), ("train@iter1", "fast")):
        files.write_json(RECORD | {"numerics": numerics}, tmp_path / f"{name}.json")
    rows = read_rows(provenance.format_stages(tmp_path, {"iter1": "base"}))[2:]
    assert [(row[0], row[2]) for row in rows] == [("rank@iter1", "portable"), ("split", "–"), ("train@iter1", "fast")]


def evaluation(**changes: Any) -> params.EvaluationParams:
    """Return the parameters of recipes/miniature-published, without rankers, with changes, all by their keys."""
    document = params.read(ROOT / "recipes/miniature-published/params.yaml") | {"rankers": {}}
    return params.validate_evaluation(document | changes, Path("params.yaml"))


def test_an_evaluation_names_models_answers_settings_and_hashes(data: Path) -> None:
    (data / "models" / "theirs").mkdir()
    (data / "models" / "theirs" / "pointer.json").write_text("{}")
    files.write_json([], data / "answers" / "gpt.json")
    for name in ("answer@theirs", "answer@dropped", "evaluate-alpaca-answers@gpt"):
        files.write_json(RECORD, data / "records" / f"{name}.json")
    models = {"base": {"repo": "./mine"}, "theirs": {"repo": "a/b", "revision": "0" * 40}}
    settings = evaluation(models=models, answers={"gpt": "outputs.json"})
    rows = [[cell.replace("\\", "") for cell in row] for row in read_rows(provenance.format_models_provenance(settings, data))]
    assert ["base", "./mine", files.dvc_md5(data / "models/base")] in rows, "a directory has no revision"
    assert ["theirs", f"a/b@{'0' * 40}", files.dvc_md5(data / "models/theirs")] in rows
    assert ["gpt", "outputs.json", files.dvc_md5(data / "answers/gpt.json")] in rows
    assert ["harness", "generated from the seed", files.dvc_md5(data / "harness_sets")] in rows
    assert ["alpaca-eval", "generated from the seed", files.dvc_md5(data / "alpaca_eval_set")] in rows
    values = dict(row for row in rows if len(row) == 2)
    assert (values["answer.temperature"], values["evaluate_alpaca.judge"], values["evaluate_lm.tasks"]) == (
        "0.9",
        "gold",
        "null",
    )
    (stages,) = [row[0] for row in rows if row[1] == "8 x a_gpu"]
    assert stages == "answer@theirs, evaluate-alpaca-answers@gpt, split"
    assert not [key for key in values if key.startswith("rank.")], "nothing is ranked"


def test_an_evaluation_names_its_rankers_and_their_settings(data: Path) -> None:
    (data / "models/pairrm/PairRM").mkdir(parents=True)
    (data / "models/pairrm/PairRM/pointer.json").write_text("{}")
    for name in ("compare-answers@pairrm", "compare-answers@dropped"):
        files.write_json(RECORD, data / "records" / f"{name}.json")
    ranker = {"repo": "org/PairRM", "revision": "0" * 40, "base": {"repo": "./deberta"}}
    settings = evaluation(models={"base": {"repo": "./mine"}}, rankers={"pairrm": ranker})
    rows = [[cell.replace("\\", "") for cell in row] for row in read_rows(provenance.format_models_provenance(settings, data))]
    assert ["pairrm", f"org/PairRM@{'0' * 40}, ./deberta", files.dvc_md5(data / "models/pairrm")] in rows
    assert ["rank.scale", "0.5"] in rows
    (stages,) = [row[0] for row in rows if row[1] == "8 x a_gpu"]
    assert stages == "compare-answers@pairrm, split"


def test_a_missing_model_is_named(data: Path) -> None:
    with pytest.raises(StageError) as error:
        provenance.format_models_provenance(evaluation(), data)
    assert_message(str(error.value), str(data / "models/iter1"), "missing")

from pathlib import Path
from typing import Any

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
    assert ["split, train@iter1", "8 x a\\_gpu", "3.11.7", "alpaca-eval 0.6.6, torch 2.13.0"] in rows
    assert not [row for row in rows if "train@dropped" in row[0]]


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
    "record", [[], {}, RECORD | {"tools": None}, RECORD | {"device": {"kind": "a_gpu"}}, RECORD | {"device": 8}]
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

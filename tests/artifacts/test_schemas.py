"""Names and patterns of the tables."""

from pathlib import Path

import pytest

from stages.artifacts import schemas


def test_a_prompt_id_is_the_sha_256_of_its_utf_8() -> None:
    assert schemas.prompt_id("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert schemas.prompt_id("é") != schemas.prompt_id("e\u0301"), "no Unicode normalization"


def test_the_base_policy_comes_before_the_iterations() -> None:
    assert schemas.model_names({"iter1": "base", "iter2": "iter1"}) == ["base", "iter1", "iter2"]


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("data/prompts.parquet", schemas.PROMPTS),
        ("data/split/hold-out.parquet", schemas.SPLIT),
        ("data/hold_out/iter1.parquet", schemas.RESPONSES),
        ("data/pairs/iter2.parquet", schemas.PAIRS),
    ],
)
def test_every_table_matches_one_pattern(name: str, schema: object) -> None:
    matching = [known for patterns, known in schemas.ARTIFACTS.items() if any(map(Path(name).match, patterns.split(", ")))]
    assert matching == [schema]


def test_only_a_prompt_s_iteration_may_be_null() -> None:
    nullable = {field.name for schema in schemas.ARTIFACTS.values() for field in schema if field.nullable}
    assert nullable == {"iteration"}

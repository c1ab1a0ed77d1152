from pathlib import Path

import pytest

from stages.reporting.published import TASKS, read_published
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message

ROW = "{arc_challenge: 1, truthfulqa_mc2: 2, winogrande: 3, gsm8k: 4, hellaswag: 5, mmlu: 6, average: 3.5}"
TEXT = (
    "published:\n"
    "  models: {base: Theirs}\n"
    "  alpaca_eval: {source: a paper, judge: a judge, models: {base: {length_controlled_winrate: 1, win_rate: 2}}}\n"
    f"  open_llm_leaderboard: {{source: a paper, models: {{base: {ROW}}}}}\n"
)


@pytest.mark.parametrize("recipe", ["llama-3-8b", "mistral-7b"])
def test_the_published_averages_are_those_of_their_tasks(recipe: str) -> None:
    published = read_published(ROOT / "recipes" / recipe / "published.yaml")
    assert published
    assert published.open_llm_leaderboard
    for results in published.open_llm_leaderboard.models.values():
        assert results["average"] == pytest.approx(sum(results[task] for task in TASKS) / 6, abs=0.0051)


RECIPES = sorted(path for path in ROOT.glob("recipes/*/published.yaml") if read_published(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_the_recipes_say_how_the_published_base_was_sampled(path: Path) -> None:
    published = read_published(path)
    assert published
    assert published.alpaca_eval
    assert any("sampled" in note and "base" in note for note in published.alpaca_eval.notes)


def test_the_recipes_say_that_beam_search_may_have_been_used() -> None:
    published = read_published(ROOT / "recipes" / "llama-3-8b" / "published.yaml")
    assert published
    assert published.alpaca_eval
    assert any("use_beam_search" in note and "0.9" in note for note in published.alpaca_eval.notes)
    assert published.open_llm_leaderboard
    assert "67.1" in published.open_llm_leaderboard.notes[0]


def test_notes_are_read_and_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(TEXT)
    published = read_published(path)
    assert published
    assert published.open_llm_leaderboard
    assert published.alpaca_eval
    assert published.alpaca_eval.notes == published.open_llm_leaderboard.notes == []
    path.write_text(TEXT.replace("judge: a judge, ", "judge: a judge, notes: [One., Two.], "))
    published = read_published(path)
    assert published
    assert published.alpaca_eval
    assert published.alpaca_eval.notes == ["One.", "Two."]


def test_every_figure_and_table_is_optional(tmp_path: Path) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(
        "published:\n  models: {base: Theirs}\n  open_llm_leaderboard:\n    source: a paper\n"
        "    sources: {base: {gsm8k: a blog}}\n    models: {base: {gsm8k: 4, average: 3.5}}\n"
    )
    published = read_published(path)
    assert published
    assert published.alpaca_eval is None
    assert published.open_llm_leaderboard
    assert published.open_llm_leaderboard.models == {"base": {"gsm8k": 4, "average": 3.5}}
    assert published.open_llm_leaderboard.sources == {"base": {"gsm8k": "a blog"}}
    path.write_text(TEXT.replace("{length_controlled_winrate: 1, win_rate: 2}", "{avg_length: 2000}"))
    published = read_published(path)
    assert published
    assert published.alpaca_eval
    assert published.alpaca_eval.models["base"].model_dump(exclude_none=True) == {"avg_length": 2000}


def test_nothing_is_published_about_the_miniature() -> None:
    assert read_published(ROOT / "published.yaml") is None


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("published:\n", "publisht:\n", "publisht"),
        ("win_rate: 2", "win_rate: high", "published.alpaca_eval.models.base.win_rate"),
        ("judge: a judge, ", "", "published.alpaca_eval.judge"),
        ("mmlu: 6, ", "mmul: 6, ", "published.open_llm_leaderboard"),
        ("source: a paper, judge", "source: a paper, sources: {base: {avg_length: x}}, judge", "base.avg_length"),
        ("source: a paper, models", "source: a paper, sources: {iter1: {gsm8k: x}}, models", "iter1.gsm8k"),
        ("arc_challenge: 1, truthfulqa_mc2: 2", "truthfulqa_mc2: 2, arc_challenge: 1", "published.open_llm_leaderboard"),
        ("win_rate: 2", "win_rate: 102", "published.alpaca_eval.models.base.win_rate"),
        ("source: a paper, judge", "source: '', judge", "published.alpaca_eval.source"),
        ("average: 3.5", "average: 3.52", "published.open_llm_leaderboard"),
        ("mmlu: 6, average", "mmlu: 6.2, average", "published.open_llm_leaderboard"),
        ("models: {base: Theirs}", "models: {iter1: Theirs}", "base: in a table"),
        ("judge: a judge, ", "judge: a judge, notes: [''], ", "published.alpaca_eval.notes"),
    ],
)
def test_an_invalid_file_is_rejected_by_key(old: str, new: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(TEXT)
    published = read_published(path)
    assert published
    assert published.models == {"base": "Theirs"}
    assert old in TEXT
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(StageError) as error:
        read_published(path)
    assert_message(str(error.value), str(path), key)

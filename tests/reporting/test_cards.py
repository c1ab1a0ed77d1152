"""A card says what the published cards say, and what they leave out; the Hub's own library reads it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from stages.reporting import cards, inputs, provenance
from stages.reporting.published import TASKS, Hyperparameters, read_published
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.cards import load_settings, make_cards
from support.messages import assert_message
from support.reports import ALPACA, HARNESS, read_rows

LLAMA = ROOT / "recipes/llama-3-8b"
LOCAL = params.PolicyAsset(repo="./policy", license="mit")

PUBLISHED_LIST = """\
- learning_rate: 5e-07
- eta: 1000
- per_device_train_batch_size: 8
- gradient_accumulation_steps: 1
- seed: 42
- distributed_type: deepspeed_zero3
- num_devices: 8
- optimizer: RMSProp
- lr_scheduler_type: linear
- lr_scheduler_warmup_ratio: 0.1
- num_train_epochs: 6.0 (stop at epoch=1.0)
"""
"""The hyperparameters of the published cards of Llama-3-Instruct-8B-SPPO."""


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    """iter1's card by the miniature's settings."""
    return make_cards(tmp_path_factory.mktemp("miniature"))["iter1"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """iter1's card by the settings of the Llama recipe."""
    return make_cards(tmp_path_factory.mktemp("llama"), LLAMA)["iter1"]


def read_metadata(card: str) -> dict[str, Any]:
    """Return the YAML in front of a card, read without huggingface_hub."""
    metadata: dict[str, Any] = YAML(typ="safe").load(re.fullmatch("(?s)---\n(.*?)\n---\n.*", card)[1])  # type: ignore[index]
    return metadata


def read_section(card: str, heading: str) -> str:
    """Return the text below a heading of the second or third level, up to the next one."""
    found = re.search(rf"(?ms)^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", card)
    assert found, heading
    return found[1]


def test_the_metadata_is_what_the_hub_asks_for(card: str, llama: str) -> None:
    ours, theirs = read_metadata(card), read_metadata(llama)
    expected = {"language": "en", "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sppo"]}
    assert {key: value for key, value in ours.items() if key != "model-index"} == expected | {"license": "apache-2.0"}
    assert {key: value for key, value in theirs.items() if key != "model-index"} == expected | {
        "license": "llama3",
        "base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["openbmb/UltraFeedback"],
    }


def test_the_hubs_library_reads_the_card_and_writes_it_unchanged(card: str, llama: str) -> None:
    for text in (card, llama):
        parsed = ModelCard(text)
        assert str(parsed) == text
        assert parsed.data.model_name == "iter1"
        assert all(result.metric_value is not None for result in parsed.data.eval_results)


def test_the_model_index_has_every_figure_with_its_metric_and_data_set(llama: str) -> None:
    [model] = read_metadata(llama)["model-index"]
    found = {
        (result["dataset"]["type"], result["dataset"].get("config"), metric["type"], metric.get("name")): metric["value"]
        for result in model["results"]
        for metric in result["metrics"]
    }
    alpaca = {
        ("tatsu-lab/alpaca_eval", None, key, None): round(value, 2)
        for key, value in ALPACA.items()
        if key not in ("n_total", "judge")
    }
    assets = params.read(LLAMA / "params.yaml")["assets"]["harness"]
    configs = ["ARC-Challenge", "multiple_choice", "winogrande_xl", "main", "default", None]
    tasks: dict[Any, float] = {}
    for task, config in zip(TASKS, configs, strict=True):
        name = "mmlu, plain mean" if task == "mmlu" else task
        tasks[assets[task]["repo"], config, "acc", name] = 50.0
        tasks[assets[task]["repo"], config, "acc_stderr", f"{name}, standard error"] = 1.0
    tasks["cais/mmlu", None, "acc", "mmlu, weighted"] = 52.0
    tasks["cais/mmlu", None, "acc_stderr", "mmlu, weighted, standard error"] = 2.0
    error, weighted_error = round(6**0.5 / 6, 2), round((5 + 4) ** 0.5 / 6, 2)
    averages = {"average": ("average", 50.0, error), "average_weighted": ("average, mmlu weighted", 50.33, weighted_error)}
    for key, (name, value, stderr) in averages.items():
        tasks["open-llm-leaderboard", None, key, name] = value
        tasks["open-llm-leaderboard", None, f"{key}_stderr", f"{name}, standard error"] = stderr
    assert found == alpaca | tasks
    shots = [metric["args"] for result in model["results"][1:-1] for metric in result["metrics"]]
    assert shots == [{"num_few_shot": 5}] * 14
    assert model["results"][0]["metrics"][0]["args"] == {"judge": "gold"}
    assert model["results"][0]["dataset"]["revision"] == "0" * 40


def test_toy_and_local_data_are_not_named_as_data_sets_of_the_hub(card: str) -> None:
    [model] = read_metadata(card)["model-index"]
    names = {result["dataset"]["name"] for result in model["results"]}
    assert {result["dataset"]["type"] for result in model["results"]} == {"miniature", "open-llm-leaderboard"}
    assert names >= {"AlpacaEval 2.0, toy data", "Open LLM Leaderboard v1, toy data", "winogrande (5-shot), toy data"}
    assert all(name.endswith(", toy data") for name in names)
    assert cards.name_data_set(params.Asset(repo="/srv/sets"), "X") == {
        "dataset_type": "local",
        "dataset_name": "X, local data",
    }


def test_the_tables_have_every_model_with_its_errors(card: str, llama: str) -> None:
    rows = read_rows(card)
    assert rows[0] == ["model", "LC win rate", "win rate", "average length"]
    assert rows[2:4] == [
        ["base", "23.00 ± 0.90", "22.65 ± 1.40", "1900"],
        ["[iter1](iter1.md) (this model)", "23.00 ± 0.90", "22.65 ± 1.40", "1900"],
    ]
    assert rows[4] == ["model", *TASKS[:-1], "mmlu, plain mean", "average", "mmlu, weighted", "average, mmlu weighted"]
    assert rows[7][1:] == ["50.00 ± 1.00"] * 6 + ["50.00 ± 0.41", "52.00 ± 2.00", "50.33 ± 0.50"]
    page = "[meta-llama/Meta-Llama-3-8B-Instruct](https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct) (base)"
    assert [row[0] for row in read_rows(llama)[2:4]] == [page, "[iter1](iter1.md) (this model)"]
    assert f"- {page}\n- [iter1](iter1.md) (this model)\n" in llama
    for name in ("AlpacaEval leaderboard](https://tatsu-lab", "lm-evaluation-harness/tree/v0.4.1", "arxiv.org/abs/2405.00675"):
        assert name in llama


def test_each_model_has_its_own_results_in_the_tables_and_in_its_metadata() -> None:
    ours = {"win_rate": 31.125, "standard_error": 1.5, "length_controlled_winrate": 30.75, "lc_standard_error": 0.5}
    alpaca = {
        "base": ALPACA | {"win_rate": 20.5, "standard_error": 1.25, "avg_length": 1700},
        "iter1": ALPACA | ours,
    }
    row = {"standard_error": 1.5, "shots": 5, "metric": "exact_match"}
    harness = {"base": {"gsm8k": row | {"value": 42.5}}, "iter1": {"gsm8k": row | {"value": 41.25}}}
    names = {"base": "base", "iter1": "iter1"}
    assert read_rows(cards.format_alpaca_eval(alpaca, names))[2:] == [
        ["base", "23.00 ± 0.90", "20.50 ± 1.25", "1700"],
        ["iter1", "**30.75 ± 0.50**", "**31.12 ± 1.50**", "1900"],
    ]
    assert read_rows(cards.format_leaderboard(harness, names))[2:] == [
        ["base", "**42.50 ± 1.50**"],
        ["iter1", "41.25 ± 1.50"],
    ]
    evaluations = inputs.Evaluations(alpaca=alpaca, harness=harness, preferences={}, scores={}, answers={})
    indexed = cards.make_metadata("iter1", load_settings(LLAMA, {"iter1": "base"}), evaluations).eval_results
    assert [(result.metric_type, result.metric_value) for result in indexed] == [
        ("length_controlled_winrate", 30.75),
        ("lc_standard_error", 0.5),
        ("win_rate", 31.12),
        ("standard_error", 1.5),
        ("avg_length", 1900),
        ("exact_match", 41.25),
        ("exact_match_stderr", 1.5),
    ]


def test_the_best_of_each_column_is_bold_unless_all_are_the_same() -> None:
    rows: cards.Rows = {
        "base": [("1.00", 1.0), ("–", None), ("2.00 ± 0.1", 2.0), ("9", None)],
        "iter1": [("1.00", 1.001), ("3.00", 3.0), ("1.50 ± 0.1", 1.5), ("8", None)],
        "iter2": [("1.00", 0.999), ("4.00", 4.0), ("2.00 ± 0.2", 2.004), ("7", None)],
    }
    table = cards.format_results(["model", "a", "b", "c", "d"], rows, {name: f"[{name}](x)" for name in rows})
    assert read_rows(table)[2:] == [
        ["[base](x)", "1.00", "–", "**2.00 ± 0.1**", "9"],
        ["[iter1](x)", "1.00", "3.00", "1.50 ± 0.1", "8"],
        ["[iter2](x)", "1.00", "**4.00**", "**2.00 ± 0.2**", "7"],
    ]


def test_the_hyperparameters_are_listed_as_on_the_published_card(card: str, llama: str) -> None:
    assert PUBLISHED_LIST in read_section(llama, "Training hyperparameters")
    listed = read_section(card, "Training hyperparameters")
    for line in ("- learning_rate: 5e-05\n", "- eta: 10\n", "- num_devices: 1\n", "- max_grad_norm: 1\n"):
        assert line in listed
    assert "- optimizer steps: 2, of which 1 with a learning rate above 0\n" in listed


def test_the_published_hyperparameters_are_those_of_the_recipe() -> None:
    """The recipes keep what their published cards state, so that a card of theirs lists no deviation."""
    for recipe in ("llama-3-8b", "mistral-7b", "gemma-2-9b"):
        settings = load_settings(ROOT / "recipes" / recipe, {"iter1": "base"})
        published = read_published(ROOT / "recipes" / recipe / "published.yaml")
        assert published
        assert published.hyperparameters
        ours = cards.collect_hyperparameters(settings)
        assert not cards.compare_hyperparameters(ours, published.hyperparameters.values)


def test_fewer_devices_are_more_accumulation_and_both_deviate_from_the_published_card(tmp_path: Path) -> None:
    train = load_settings(LLAMA, {"iter1": "base"}).train.model_copy(update={"devices": 2, "device_batch": 4})
    card = make_cards(tmp_path, LLAMA, train=train)["iter1"]
    rows = read_rows(read_section(card, "Deviations"))
    assert rows[:5] == [
        ["setting", "this model", "published"],
        ["---"] * 3,
        ["per\\_device\\_train\\_batch\\_size", "4", "8"],
        ["gradient\\_accumulation\\_steps", "8", "1"],
        ["num\\_devices", "2", "8"],
    ]


def test_every_deviation_from_the_paper_is_listed(card: str, llama: str) -> None:
    assert read_rows(read_section(card, "Deviations"))[2:4] == [
        ["step size η", "10", "1000", "1000 (1 / 0.001)"],
        ["P^ from logits", "pairwise", "pairwise", "aggregate"],
    ]
    section = read_section(llama, "Deviations")
    assert "From the published hyperparameters (the model cards): none.\n" in section
    assert [row[0] for row in read_rows(section)[2:]] == [
        "P^ from logits",
        "ranker input",
        "temperature, top-p",
        "epochs of the schedule, stop after",
    ]


@pytest.mark.parametrize(
    ("ours", "stated", "deviates"),
    [
        ("10", "1000 (1 / 0.001)", True),
        ("1000", "1000 (1 / 0.001)", False),
        ("6, 1", "18 or 6, 1", False),
        ("18, 1", "18 or 6, 1", False),
        ("18, 2", "18 or 6, 1", True),
        ("1, 1", "18 or 6, 1", True),
        ("none", "none", False),
        ("1", "none", True),
        ("1", "–", False),
        ("0.5", "– (llm-blender: 1)", False),
    ],
)
def test_what_deviates(ours: str, stated: str, deviates: bool) -> None:
    assert cards.deviates(ours, stated) == deviates


def test_no_setting_of_the_method_deviates_from_itself() -> None:
    for _, _, ours, _, _ in provenance.list_method(load_settings(LLAMA, {"iter1": "base"})):
        assert not cards.deviates(ours, ours)


def test_judge_decoding_versions_limits_and_sources_are_stated(card: str, llama: str) -> None:
    alpaca = read_section(card, "[AlpacaEval leaderboard](https://tatsu-lab.github.io/alpaca_eval/)")
    for part in ("Judge: `gold`, over 805 instructions", "temperature 0.9, top-p 1.0 and at most 72 new tokens"):
        assert part in alpaca
    assert "+0.00 ± 20.00 percentage points (95% interval -39.20 to +39.20)" in alpaca
    harness = read_section(card, "[Open LLM Leaderboard](https://github.com/EleutherAI/lm-evaluation-harness/tree/v0.4.1)")
    assert "in float32" in harness
    assert "winogrande acc (5-shot)" in harness
    versions = read_rows(read_section(card, "Hardware and versions"))
    assert versions[2] == ["split, train@iter1", "8 x a\\_gpu", "fast", "3.11", "alpaca-eval 0.6.6, torch 2.13.0"]
    sources = read_rows(read_section(llama, "How to reproduce it"))
    assert sources[2][:2] == ["policy", "meta-llama/Meta-Llama-3-8B-Instruct@" + "0" * 40]
    assert "7 of the 2 prompts" in read_section(card, "Limits")  # as support/reports.py has it
    assert "wu2024self" in read_section(card, "Citation")


def test_what_it_was_made_from(llama: str, card: str) -> None:
    assert "made by SPPO at iteration 1 (base → iter1)" in llama
    assert "split into 1 part for 1 iteration by [snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset]" in llama
    assert "[openbmb/UltraFeedback](https://huggingface.co/datasets/openbmb/UltraFeedback)" in llama
    assert "a GPT-like language model with 0.001M parameters" in llama
    assert "Its published counterpart is Llama-3-Instruct-8B-SPPO-Iter1." in llama
    assert "It is a toy" in card
    assert "It is a toy" not in llama


def test_a_branch_of_iterations_has_its_own_lineage() -> None:
    iterations = {"iter1": "base", "iter2": "iter1", "other": "iter1", "last": "other"}
    assert cards.list_lineage(iterations, "last") == ["iter1", "other", "last"]
    assert cards.list_lineage(iterations, "iter1") == ["iter1"]


def test_a_later_iteration_is_compared_with_the_base_policy_and_counts_all_prompts_it_saw(tmp_path: Path) -> None:
    """Its scores are those of iter1, so that a comparison with iter1 would have no error."""
    made = make_cards(tmp_path, second=True)
    card = made["iter2"]
    assert "made by SPPO at iteration 2 (base → iter1 → iter2)" in card
    assert "+0.00 ± 20.00 percentage points (95% interval -39.20 to +39.20)" in card
    assert "8 of the 4 prompts" in read_section(card, "Limits")
    assert "split into 2 parts for 2 iterations" in card
    assert "- base\n- [iter1](iter1.md)\n- [iter2](iter2.md) (this model)\n" in card
    assert "train@iter1, train@iter2" in card
    assert "train@iter2" not in made["iter1"]


def test_a_licence_with_conditions_is_linked_and_credited(llama: str, card: str) -> None:
    assert "\n# iter1\n\nBuilt with Meta Llama 3\n" in llama
    assert "- License: [llama3](https://www.llama.com/llama3/license/)\n" in llama
    assert "- License: apache-2.0\n" in card
    assert "Built with" not in card


@pytest.mark.parametrize(
    ("license", "statement"),
    [
        ("llama2", None),
        ("llama3", "Built with Meta Llama 3"),
        ("llama3.1", "Built with Llama"),
        ("llama3.2", "Built with Llama"),
        ("llama3.3", "Built with Llama"),
        ("llama4", "Built with Llama"),
        (
            "gemma",
            "This model is a modified version of Gemma. Its use is subject to the restrictions in section 3.2 of the "
            "[Gemma Terms of Use](https://ai.google.dev/gemma/terms).",
        ),
    ],
)
def test_what_each_licence_asks_to_show(tmp_path: Path, license: str, statement: str | None) -> None:
    assets = load_settings(LLAMA, {"iter1": "base"}).assets
    policy = assets.policy.model_copy(update={"license": license})
    card = make_cards(tmp_path, LLAMA, assets=assets.model_copy(update={"policy": policy}))["iter1"]
    shown = f"{statement}\n\n" if statement else ""
    assert f"\n# iter1\n\n{shown}This model was made by" in card


def test_a_card_without_a_licence_is_not_written(tmp_path: Path) -> None:
    assets = load_settings(LLAMA, {"iter1": "base"}).assets
    policy = assets.policy.model_copy(update={"license": None})
    with pytest.raises(StageError) as error:
        make_cards(tmp_path, LLAMA, assets=assets.model_copy(update={"policy": policy}))
    assert_message(str(error.value), "params.yaml", "assets.policy.license", "missing", "set it to")


def test_a_local_policy_is_not_named_by_its_path(tmp_path: Path) -> None:
    assets = load_settings(LLAMA, {"iter1": "base"}).assets
    text = make_cards(tmp_path, LLAMA, assets=assets.model_copy(update={"policy": LOCAL}))["iter1"]
    metadata = read_metadata(text)
    assert metadata["license"] == "mit"
    assert "base_model" not in metadata
    assert "](https://huggingface.co/./policy" not in text


def test_a_card_is_the_same_wherever_it_is_made(card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_cards(tmp_path / "elsewhere")["iter1"] == card
    assert str(ROOT) not in card


def test_the_folder_holds_the_cards_of_this_run_only(tmp_path: Path) -> None:
    folder = tmp_path / "reports/cards"
    cards.write_cards({"iter1": "1", "iter2": "2"}, folder)
    cards.write_cards({"iter1": "é"}, folder)
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == {"iter1.md": "é"}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StageError) as error:
        cards.write_cards({"iter2": "2"}, folder)
    assert_message(str(error.value), str(folder / "notes.txt"), "move it elsewhere")
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize(
    ("weights", "text"), [(881792, "0.882M"), (134_515_008, "135M"), (1_543_714_304, "1.5B"), (8_030_261_248, "8.0B")]
)
def test_numbers_of_parameters(weights: int, text: str) -> None:
    assert cards.format_count(weights) == text


@given(st.floats(min_value=1e-9, max_value=1e6, allow_subnormal=False))
def test_a_listed_learning_rate_is_the_one_used(value: float) -> None:
    listed = cards.list_hyperparameters(Hyperparameters(learning_rate=value))
    assert float(listed.splitlines()[0].removeprefix("- learning_rate: ")) == pytest.approx(value, rel=1e-5)
    assert "- eta: –\n" in listed


def test_fewer_tasks_have_fewer_columns(tmp_path: Path) -> None:
    tasks = ["winogrande", "gsm8k"]
    summary = {task: HARNESS[task] for task in tasks}
    rows = read_rows(cards.format_leaderboard({"base": summary, "iter1": summary}, {"base": "base", "iter1": "iter1"}))
    assert rows[0][:3] == ["model", *tasks]
    assert not [name for name in rows[0] if name == "average"]
    indexed = cards.index_leaderboard(summary, load_settings(ROOT, {}).assets.harness)
    assert {result.metric_type for result in indexed} >= {"acc", "acc_stderr"}
    assert "average" not in {result.metric_type for result in indexed}
    card = make_cards(tmp_path, tasks=tasks)["iter1"]
    assert "average of 2 tasks" in card
    assert "Only 2 of the leaderboard's 6 tasks were run" in card
    assert "MMLU" not in card


def test_both_means_of_mmlu_are_explained(card: str) -> None:
    assert "MMLU is given as the plain mean over its subjects and as the mean weighted by their numbers of questions" in card
    assert "tasks were run" not in card


HOSTILE = "<img src=x> a|b `c` [d](http://e.f) @name :smile: $x$ \x1b[2J"


def test_text_of_others_makes_no_element_and_is_not_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge's name, a licence, a published model, and the ID of a base model."""
    alpaca = ALPACA | {"judge": HOSTILE, "length_controlled_absent": HOSTILE}
    monkeypatch.setattr("support.reports.ALPACA", alpaca)
    policy = params.PolicyAsset.model_construct(
        repo=f"a/{HOSTILE}", revision="0" * 40, license=HOSTILE, golden=None, miniature=None
    )
    recipe = tmp_path / "recipe"
    shutil.copytree(LLAMA, recipe)
    path = recipe / "published.yaml"
    path.write_text(path.read_text().replace("iter1: Llama-3-Instruct-8B-SPPO-Iter1", f"iter1: {json.dumps(HOSTILE)}"))
    settings = load_settings(LLAMA, {"iter1": "base"})
    assets = settings.assets.model_copy(update={"policy": policy})
    body = make_cards(tmp_path, recipe, assets=assets)["iter1"].partition("\n---\n")[2]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    outside = re.sub("<code>.*?</code>", "", html)
    assert html.count("<code>&lt;img src=x") == 2, "the judge"
    assert not re.search("<img|<em>|[^0-9a-z]@name|:smile:|[$]x[$]|\x1b", outside)
    assert not [link for link in re.findall('href="(.*?)"', outside) if link.startswith("http://")]


def test_what_was_not_judged_or_cut_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str) -> None:
    monkeypatch.setattr("support.reports.ALPACA", ALPACA | {"n_failed": 3})
    monkeypatch.setattr("support.reports.HARNESS", HARNESS | {"gsm8k": HARNESS["gsm8k"] | {"cut": 5, "n": 1319}})
    changed = make_cards(tmp_path)["iter1"]
    for sentence in ("no preference: 3 of iter1.", "5 of 1319 questions of gsm8k (iter1)."):
        assert sentence in changed
        assert sentence not in card

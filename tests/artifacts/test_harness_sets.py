"""The data sets are laid out as the stock tasks of lm-eval read them, and real ones are checked when they are read."""

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.artifacts import harness_sets
from stages.artifacts.harness_sets import DATA_SETS
from stages.miniature.harness import make_rows
from stages.runtime.errors import StageError
from stages.runtime.params import EvaluationAsset
from support.messages import assert_message

STOCK = next((Path(sys.prefix).parent / "harness" / "lib").glob("python*/site-packages/lm_eval/tasks"))
YAML = {
    "arc_challenge": "arc/arc_easy.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc1.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mmlu": "mmlu/default/_default_template_yaml",
}


@pytest.mark.parametrize("task", DATA_SETS)
def test_folders_configurations_and_splits_are_those_of_the_stock_tasks(task: str) -> None:
    stock = dict(re.findall(r"(?m)^\"?(\w+)\"?: \"?([\w/]+)", (STOCK / YAML[task]).read_text()))
    data_set = DATA_SETS[task]
    assert stock["dataset_path"] == data_set.folder
    assert stock.get("test_split", "null").replace("null", stock.get("validation_split", "")) == data_set.test
    if data_set.few_shot:
        assert stock.get("fewshot_split", stock.get("training_split")) == data_set.few_shot[0]
    if task == "mmlu":
        assert sorted(path.stem for path in (STOCK / "mmlu/default").glob("mmlu_*.yaml")) == [
            f"mmlu_{subject}" for subject in data_set.configs
        ]
        assert len(data_set.configs) == 57
    else:
        name = "ARC-Challenge" if task == "arc_challenge" else stock["dataset_name"].replace("null", "default")
        assert data_set.configs == [name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which the test also has its Hugging Face caches."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_written_is_read_again(folder: Path) -> None:
    rows = [{"question": f"né {index}\u2028?", "answer": f"#### {index}", "n": [index]} for index in range(6)]
    configs = {"main": {"train": rows[:5], "test": rows[1:]}}
    harness_sets.write_data_set(DATA_SETS["gsm8k"], configs, folder)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "gsm8k/README.md",
        "gsm8k/main/test.jsonl",
        "gsm8k/main/train.jsonl",
    ]
    assert [json.loads(line) for line in (folder / "gsm8k/main/train.jsonl").open(encoding="utf-8")] == rows[:5]
    assert harness_sets.read_rows("gsm8k", EvaluationAsset(repo="./gsm8k")) == configs


def test_each_subject_of_mmlu_is_read_from_its_own_configuration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dataclasses.replace(DATA_SETS["mmlu"], configs=["anatomy", "virology"])
    monkeypatch.setitem(DATA_SETS, "mmlu", few)
    rows = make_rows("mmlu", 5, 3)
    harness_sets.write_data_set(few, rows, folder)
    assert harness_sets.read_rows("mmlu", EvaluationAsset(repo="./hails/mmlu_no_train")) == rows


README = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: train.parquet}
  - {split: test, path: test.parquet}
---
"""


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ({"question": ["a"] * 5}, ["split train", "gsm8k requires column 'answer'"]),
        ({"other": ["a"] * 5}, ["split train", "gsm8k requires column 'answer', 'question'"]),
        ({"question": ["a"] * 2, "answer": ["#### 1"] * 2}, ["split train", "2 rows", "gsm8k requires at least 5"]),
    ],
)
def test_a_missing_column_or_too_few_rows_are_rejected(folder: Path, rows: dict[str, Any], parts: list[str]) -> None:
    (folder / "source").mkdir()
    (folder / "source/README.md").write_text(README)
    for split in ("train", "test"):
        pq.write_table(pa.table(rows), folder / "source" / f"{split}.parquet")
    with pytest.raises(StageError) as error:
        harness_sets.read_rows("gsm8k", EvaluationAsset(repo="./source"))
    assert_message(str(error.value), "./source, configuration main", *parts, "assets.harness.gsm8k in params.yaml")


@pytest.mark.parametrize(
    ("split", "odd", "fault"),
    [("train", "five", "'five'"), ("test", None, "None"), ("test", "#### none", "'#### none'")],
)
def test_an_odd_value_is_refused_by_row_until_it_is_corrected(folder: Path, split: str, odd: str | None, fault: str) -> None:
    rows = [{"question": f"{index}?", "answer": f"#### {index}"} for index in range(6)]
    splits = {"train": copy.deepcopy(rows), "test": copy.deepcopy(rows)}
    splits[split][4]["answer"] = odd  # type: ignore[assignment]
    harness_sets.write_data_set(DATA_SETS["gsm8k"], {"main": splits}, folder / "source")
    asset = EvaluationAsset(repo="./source/gsm8k")
    with pytest.raises(StageError) as error:
        harness_sets.read_rows("gsm8k", asset)
    parts = (
        f"./source/gsm8k, configuration main, split {split}: row 4: 'answer' is {fault}",
        "correct the data set",
        "params.yaml",
    )
    assert_message(str(error.value), *parts)
    path = folder / "source/gsm8k/main" / f"{split}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[4] = json.dumps(rows[4])
    path.write_text("\n".join(lines), encoding="utf-8")
    assert harness_sets.read_rows("gsm8k", asset) == {"main": {"train": rows, "test": rows}}


@pytest.fixture
def stored(folder: Path) -> Path:
    """The folder of two data sets, as assets-harness writes them, below `data`."""
    for task in ("gsm8k", "mmlu"):
        harness_sets.write_data_set(DATA_SETS[task], make_rows(task, 3, 4), Path("data/sets"))
    return Path("data/sets")


def test_data_sets_pass_as_they_are_written(stored: Path) -> None:
    harness_sets.check_data_sets(stored, ["gsm8k", "mmlu"])


def edit_line(content: bytes, index: int, line: bytes) -> bytes:
    lines = content.splitlines()
    return b"\n".join([*lines[:index], line, *lines[index + 1 :], b""])


@pytest.mark.parametrize(
    ("name", "damage", "part"),
    [
        ("gsm8k/main/test.jsonl", lambda content: b"", "0 rows"),
        ("gsm8k/main/train.jsonl", lambda content: b"\n".join(content.splitlines()[:4]), "4 rows"),
        ("gsm8k/main/test.jsonl", lambda content: content[:-5], "row 3: not valid JSON"),
        ("gsm8k/main/test.jsonl", lambda content: content + bytes(512), "row 4: not valid JSON"),
        ("gsm8k/main/train.jsonl", lambda content: edit_line(content, 2, b"[" * 100_000), "row 2: not valid JSON"),
        (
            "gsm8k/main/test.jsonl",
            lambda content: edit_line(content, 1, b"[1]"),
            "row 1: not an object with 'answer', 'question'",
        ),
        (
            "gsm8k/main/test.jsonl",
            lambda content: edit_line(content, 3, b'{"question": "?"}'),
            "row 3: not an object with 'answer'",
        ),
        ("gsm8k/main/test.jsonl", lambda content: content.replace(b"####", b"####?"), "row 0: 'answer' is "),
        ("gsm8k/README.md", lambda content: content[:-9], "not as assets-harness wrote it"),
        ("hails/mmlu_no_train/world_religions/dev.jsonl", lambda content: b"", "0 rows"),
    ],
)
def test_a_damaged_file_is_refused_by_name(name: str, damage: Callable[[bytes], bytes], part: str, stored: Path) -> None:
    path = stored / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StageError) as error:
        harness_sets.check_data_sets(stored, ["gsm8k", "mmlu"])
    assert str(error.value).startswith(f"{path}: {part}")
    assert_message(str(error.value), "`dvc repro`")
    harness_sets.check_data_sets(stored, ["mmlu" if name.startswith("gsm8k") else "gsm8k"])


@pytest.mark.parametrize("name", ["gsm8k/README.md", "hails/mmlu_no_train/anatomy/test.jsonl"])
def test_a_missing_file_is_refused_by_name(name: str, stored: Path) -> None:
    (stored / name).unlink()
    with pytest.raises(StageError) as error:
        harness_sets.check_data_sets(stored, ["gsm8k", "mmlu"])
    assert_message(str(error.value), f"{stored / name} is missing", "`dvc repro`")


def test_one_value_of_another_type_is_refused_by_column(folder: Path) -> None:
    """`datasets` reads such a column as JSON, in which the texts of numbers become numbers."""
    row = {"sentence": "_ smiled.", "option1": "a", "option2": "b", "answer": "1"}
    splits = {split: [dict(row) for _ in range(7)] for split in ("train", "validation")}
    splits["train"][5]["answer"] = 2  # type: ignore[assignment]
    harness_sets.write_data_set(DATA_SETS["winogrande"], {"winogrande_xl": splits}, folder / "source")
    with pytest.raises(StageError) as error:
        harness_sets.read_rows("winogrande", EvaluationAsset(repo="./source/winogrande"))
    assert_message(str(error.value), "split train: column 'answer' has values of several types", "give all one")


def test_the_metric_is_where_the_stage_looks_for_it(folder: Path) -> None:
    harness_sets.write_exact_match(folder)
    assert (folder / "exact_match" / "exact_match.py").read_text() == harness_sets.EXACT_MATCH
    compile(harness_sets.EXACT_MATCH, "exact_match.py", "exec")

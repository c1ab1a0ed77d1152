import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import domain
from stages.assets import harness
from stages.cli import StageError

STOCK = next((Path(sys.prefix).parent / "harness" / "lib").glob("python*/site-packages/lm_eval/tasks"))
YAML = {
    "arc_challenge": "arc/arc_easy.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc1.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mmlu": "mmlu/default/_default_template_yaml",
}
SCHEMAS: dict[str, dict[str, Any]] = {  # as the Hub's data viewer shows them
    "arc_challenge": {"id": str, "question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str},
    "truthfulqa_mc2": {
        "question": str,
        "mc1_targets": {"choices": [str], "labels": [int]},
        "mc2_targets": {"choices": [str], "labels": [int]},
    },
    "winogrande": {"sentence": str, "option1": str, "option2": str, "answer": str},
    "gsm8k": {"question": str, "answer": str},
    "hellaswag": {
        "ind": int,
        "activity_label": str,
        "ctx_a": str,
        "ctx_b": str,
        "ctx": str,
        "endings": [str],
        "source_id": str,
        "split": str,
        "split_type": str,
        "label": str,
    },
    "mmlu": {"question": str, "subject": str, "choices": [str], "answer": int},
}
TASKS = list(SCHEMAS)
seeds = st.integers(0, 10**6)


def _schema(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _schema(part) for key, part in value.items()}
    if isinstance(value, list):
        assert len({type(part) for part in value}) == 1
        return [type(value[0])]
    return type(value)


def _rows(task: str, seed: int, count: int = 12) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Few-shot rows and test rows of the task's first configuration."""
    splits = next(iter(harness.make_rows(task, seed, count).values()))
    test = splits.pop(harness.DATA_SETS[task].test)
    return next(iter(splits.values()), []), test


def _question(row: dict[str, Any]) -> str:
    return str(row.get("question") or row.get("ctx") or row.get("sentence"))


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_real_schema(task: str) -> None:
    few, test = _rows(task, 1)
    for row in [*few, *test]:
        assert _schema(row) == SCHEMAS[task]
    assert harness.DATA_SETS[task].columns <= set(SCHEMAS[task])


@pytest.mark.parametrize("task", TASKS)
def test_folders_configurations_and_splits_are_those_of_the_stock_tasks(task: str) -> None:
    stock = dict(re.findall(r"(?m)^\"?(\w+)\"?: \"?([\w/]+)", (STOCK / YAML[task]).read_text()))
    data_set = harness.DATA_SETS[task]
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


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_no_two_rows_share_a_question(task: str, seed: int) -> None:
    few, test = _rows(task, seed)
    questions = [_question(row) for row in [*few, *test]]
    assert len(set(questions)) == len(questions)
    assert len(test) == 12
    assert len(few) >= (harness.DATA_SETS[task].few_shot or ("", 0))[1]


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_the_rows(task: str) -> None:
    assert _rows(task, 1) == _rows(task, 1)
    assert _rows(task, 1) != _rows(task, 2)


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_one_choice_is_right(seed: int) -> None:
    draw = random.Random(0)
    right = {asked.text: asked for asked in (domain.question(draw) for _ in range(20000))}
    for row in _rows("hellaswag", seed)[1]:
        assert [domain.is_right(row["ctx"], ending) for ending in row["endings"]].index(True) == int(row["label"])
        assert sum(domain.is_right(row["ctx"], ending) for ending in row["endings"]) == len(set(row["endings"])) - 3 == 1
    for row in _rows("truthfulqa_mc2", seed)[1]:
        for targets in (row["mc1_targets"], row["mc2_targets"]):
            assert [int(domain.is_right(row["question"], choice)) for choice in targets["choices"]] == targets["labels"]
            assert targets["labels"] == sorted(targets["labels"], reverse=True), "mc2 splits at the first 0"
    arc = [(row["question"], row["choices"]["text"], "ABCD".index(row["answerKey"])) for row in _rows("arc_challenge", seed)[1]]
    mmlu = [(row["question"], row["choices"], row["answer"]) for row in _rows("mmlu", seed)[1]]
    for question, choices, answer in arc + mmlu:
        asked = right[question]
        sentences = [asked.right.replace(asked.right_value, choice) for choice in choices]
        assert len(set(choices)) == 4
        assert [domain.is_right(question, sentence) for sentence in sentences] == [n == answer for n in range(4)]


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_one_option_fills_the_blank(seed: int) -> None:
    forms = ["the opposite of {}", "What does a {} eat", "Where does a {} live", "What colour is a {}", "Name three {}."]
    for row in _rows("winogrande", seed)[1]:
        right = [
            any(domain.is_right(form.format(option), row["sentence"].replace("_", option)) for form in forms)
            for option in (row["option1"], row["option2"])
        ]
        assert right == [row["answer"] == "1", row["answer"] == "2"]


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_the_sums_are_right(seed: int) -> None:
    for row in _rows("gsm8k", seed)[1]:
        total = sum(int(number) for number in re.findall(r"\d+", row["question"]))
        assert row["answer"].endswith(f"\n#### {total}")
        for left, right, result in re.findall(r"<<(\d+)\+(\d+)=(\d+)>>", row["answer"]):
            assert int(left) + int(right) == int(result)


@pytest.mark.parametrize("task", TASKS)
def test_more_questions_than_the_domain_has_are_refused(task: str) -> None:
    with pytest.raises(StageError, match=f"assets.harness.{task}.count"):
        harness.make_rows(task, 1, 10**5)
    with pytest.raises(StageError, match="standard error"):
        harness.make_rows(task, 1, 1)


def _stage(run: Any, folder: Path, assets: dict[str, Any], out: str) -> Any:
    (folder / "params.yaml").write_text(json.dumps({"seed": 5, "assets": {"harness": assets}}))
    return run("-m", "stages.assets.harness", out)


MADE = {task: {"repo": "miniature", "count": 3} for task in TASKS}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_local_data_sets_are_written_as_they_are(run: Any, tmp_path: Path) -> None:
    assert _stage(run, tmp_path, MADE, "made").returncode == 0
    repos = {task: {"repo": str(tmp_path / "made" / harness.DATA_SETS[task].folder)} for task in TASKS}
    done = _stage(run, tmp_path, MADE | repos | {"mmlu": MADE["mmlu"]}, "read")
    assert done.returncode == 0, done.stderr
    assert _bytes(tmp_path / "read") == _bytes(tmp_path / "made")


@pytest.mark.slow
def test_mmlu_is_read_by_subject(run: Any, tmp_path: Path) -> None:
    assert _stage(run, tmp_path, MADE, "made").returncode == 0
    local = {"mmlu": {"repo": str(tmp_path / "made" / "hails/mmlu_no_train")}}
    done = _stage(run, tmp_path, MADE | local, "read")
    assert done.returncode == 0, done.stderr
    assert _bytes(tmp_path / "read") == _bytes(tmp_path / "made")


def test_a_missing_column_or_too_few_rows_is_one_line(run: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    readme = "---\nconfigs:\n- config_name: main\n  data_files:\n"
    readme += "  - {split: train, path: train.parquet}\n  - {split: test, path: test.parquet}\n---\n"
    (source / "README.md").write_text(readme)
    for rows, message in [
        ({"question": ["a"] * 5}, "gsm8k needs column 'answer'"),
        ({"question": ["a"] * 2, "answer": ["#### 1"] * 2}, "configuration main, split train: 2 rows, and gsm8k needs 5"),
    ]:
        for split in ("train", "test"):
            pq.write_table(pa.table(rows), source / f"{split}.parquet")
        done = _stage(run, tmp_path, MADE | {"gsm8k": {"repo": str(source)}}, "out")
        assert done.returncode == 1
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        assert len(errors) == 1
        assert message in errors[0]
        assert str(source) in errors[0]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()

"""The six data sets of the Open LLM Leaderboard, stored so that the unmodified lm-eval 0.4.1 reads them offline.

The stock tasks load `allenai/ai2_arc`, `gsm8k` and so on by name. If the working directory contains a folder of that name,
`datasets` reads that folder instead of the Hub, so each folder here is named after its data set.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts import files, harness_rules, hub
from stages.runtime.errors import StageError, quote
from stages.runtime.params import EvaluationAsset

Row = dict[str, Any]
Splits = dict[str, list[Row]]
"""Split -> rows."""

_subjects = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
    professional_law professional_medicine professional_psychology public_relations security_studies sociology
    us_foreign_policy virology world_religions
"""
SUBJECTS = _subjects.split()
"""The subjects of MMLU, each of which is a configuration of its data set."""


@dataclass(frozen=True)
class DataSet:
    """A data set's name and the parts of it that the stock task reads."""

    folder: str
    configs: list[str]
    few_shot: tuple[str, int] | None
    """Split that few-shot examples come from, and how many rows lm-eval 0.4.1 draws (one extra if the task names no split)."""
    test: str
    columns: set[str]

    @property
    def splits(self) -> list[str]:
        return [*([self.few_shot[0]] if self.few_shot else []), self.test]


DATA_SETS = {
    "arc_challenge": DataSet("allenai/ai2_arc", ["ARC-Challenge"], ("train", 25), "test", {"question", "choices", "answerKey"}),
    "truthfulqa_mc2": DataSet("truthful_qa", ["multiple_choice"], None, "validation", {"question", "mc2_targets"}),
    "winogrande": DataSet(
        "winogrande", ["winogrande_xl"], ("train", 6), "validation", {"sentence", "option1", "option2", "answer"}
    ),
    "gsm8k": DataSet("gsm8k", ["main"], ("train", 5), "test", {"question", "answer"}),
    "hellaswag": DataSet(
        "hellaswag", ["default"], ("train", 11), "validation", {"activity_label", "ctx_a", "ctx_b", "endings", "label"}
    ),
    "mmlu": DataSet("hails/mmlu_no_train", SUBJECTS, ("dev", 5), "test", {"question", "choices", "answer"}),
}
"""Task -> data set."""

CODE = (".py", ".pyc", ".so")
"""Endings of files that Python imports."""
EXACT_MATCH_PATH = Path("exact_match", "exact_match.py")
EXACT_MATCH = '''"""The share of predictions equal to their references: what lm-eval loads as `evaluate.load("exact_match")`."""

import re
import string

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=features)

    def _compute(
        self,
        predictions,
        references,
        regexes_to_ignore=None,
        ignore_case=False,
        ignore_punctuation=False,
        ignore_numbers=False,
    ):
        ignored = string.punctuation * ignore_punctuation + string.digits * ignore_numbers

        def plain(text):
            for regex in regexes_to_ignore or []:
                text = re.sub(regex, "", text)
            text = text.lower() if ignore_case else text
            return text.translate(str.maketrans("", "", ignored))

        equal = [plain(a) == plain(b) for a, b in zip(predictions, references)]
        return {"exact_match": sum(equal) / len(equal)}
'''


def select_tasks(tasks: Sequence[str] | None) -> list[str]:
    """Return the tasks that `evaluate_lm.tasks` selects, in the order of the published tables. None: all of DATA_SETS."""
    return list(DATA_SETS if tasks is None else tasks)


def read_rows(task: str, asset: EvaluationAsset) -> dict[str, Splits]:
    """Read a data set from the Hub or a local directory: config -> split -> rows, for the splits that the task reads.

    Raises StageError if a column that the task needs is missing, if there are too few rows, or for the first row that the task
    cannot use.
    """
    data_set = DATA_SETS[task]
    return {
        config: {split: _read_split(task, asset, config, split) for split in data_set.splits} for config in data_set.configs
    }


def _read_split(task: str, asset: EvaluationAsset, config: str, split: str) -> list[Row]:
    data_set = DATA_SETS[task]
    rows = hub.load_rows(asset, None if config == "default" else config, split)
    place = f"{asset.repo}, configuration {config}, split {split}"
    remedy = f"set assets.harness.{task} in params.yaml to a data set in the format of {data_set.folder}"
    if missing := sorted(data_set.columns - set(rows.column_names)):
        raise StageError(f"{place}: {task} requires column {', '.join(map(repr, missing))}: {remedy}")
    if mixed := [column for column in sorted(data_set.columns) if "Json(" in str(rows.features[column])]:
        # `datasets` then reads "1" as 1, so that the rows that differ cannot be told from the others.
        raise StageError(
            f"{place}: column {', '.join(map(repr, mixed))} has values of several types: give all one, or {remedy}"
        )
    read = [dict(row) for row in rows]
    if described := _describe_fault(task, split, read):
        raise StageError(f"{place}: {described}: correct the data set, or {remedy}")
    return read


def _describe_fault(task: str, split: str, rows: list[Row]) -> str | None:
    """Describe what keeps the task from using a split: too few rows, or the first fault of one; return None without any."""
    few_shot = DATA_SETS[task].few_shot
    required = few_shot[1] if few_shot and split == few_shot[0] else 2
    if len(rows) < required:
        return f"{len(rows)} rows, but {task} requires at least {required}"
    for index, row in enumerate(rows):
        if fault := harness_rules.find_fault(task, row):
            return f"row {index}: {quote(fault[0])} {fault[1]}"
    return None


def write_data_set(data_set: DataSet, configs: dict[str, Splits], root: Path) -> None:
    """Write a data set's rows, config -> split -> rows, to its folder below `root`.

    The folder holds a JSON Lines file per config and split, and a README.md that tells `datasets` where each split is.
    """
    folder = root / data_set.folder
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True)
        for split, rows in splits.items():
            text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
            (folder / config / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_describe_files(data_set), encoding="utf-8")


def _describe_files(data_set: DataSet) -> str:
    """Return the README.md of a data set's folder."""
    lines = ["---", "configs:"]
    for config in data_set.configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in data_set.splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    return "\n".join([*lines, "---", ""])


def check_data_sets(root: Path, tasks: Sequence[str]) -> None:
    """Check the data sets of some tasks in the folder from assets-harness, before a model is loaded for them.

    Raises StageError for the first file that is missing or damaged: a README.md that is not as `write_data_set` wrote it, or a
    split with a line that is not JSON, too few rows, or a row that the task cannot use.
    """
    for task in tasks:
        data_set = DATA_SETS[task]
        path = root / data_set.folder / "README.md"
        if files.require(path).read_bytes() != _describe_files(data_set).encode():
            raise StageError(f"{path}: not as assets-harness wrote it: {files.suggest_remedy(path)}")
        for config in data_set.configs:
            for split in data_set.splits:
                _check_file(task, split, root / data_set.folder / config / f"{split}.jsonl")


def _check_file(task: str, split: str, path: Path) -> None:
    rows = []
    for index, line in enumerate(files.require(path).read_bytes().splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StageError(f"{path}: row {index}: not valid JSON ({error}): {files.suggest_remedy(path)}") from error
        if not isinstance(row, dict) or not DATA_SETS[task].columns <= row.keys():
            required = ", ".join(map(repr, sorted(DATA_SETS[task].columns)))
            raise StageError(f"{path}: row {index}: not an object with {required}: {files.suggest_remedy(path)}")
        rows.append(row)
    if described := _describe_fault(task, split, rows):
        raise StageError(f"{path}: {described}: {files.suggest_remedy(path)}")


def write_exact_match(root: Path) -> None:
    """Write the metric exact_match, which a stock lm-eval, started in `root`, loads on import and would otherwise download.

    The stages do not import it: they use stages/engines/exact_match.py.
    """
    path = root / EXACT_MATCH_PATH
    path.parent.mkdir()
    path.write_text(EXACT_MATCH, encoding="utf-8")


def refuse_code(root: Path) -> None:
    """Raise StageError if there is code below `root`, other than that of `write_exact_match`: `datasets` could run it."""
    for path in sorted(root.rglob("*")):
        if path.suffix in CODE and path.relative_to(root) != EXACT_MATCH_PATH:
            raise StageError(f"{path}: code among the data sets, which is never run: remove it")

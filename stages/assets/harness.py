"""The six data sets of the Open LLM Leaderboard, laid out so that the unmodified lm-eval 0.4.1 reads them offline.

The stock tasks load `allenai/ai2_arc`, `gsm8k`, .. by name, and such a name is a folder where the working directory has one.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import cli, domain, files, params
from stages.assets import hub
from stages.cli import StageError
from stages.params import EvaluationAsset

Row = dict[str, Any]

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


@dataclass(frozen=True)
class DataSet:
    """One data set: what the stock task names, and what it reads of it."""

    folder: str
    configs: list[str]
    few_shot: tuple[str, int] | None
    """The split that few-shot examples are drawn from, and how many rows 0.4.1 draws (one more where it names no split)."""
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


# The miniature's rows. A maker draws one question and returns its text, which no other row may share, and the row.


def _arc(draw: random.Random) -> tuple[str, Row]:
    asked = domain.question(draw)
    values, right = _choices(asked, draw)
    labels = list("ABCD")
    row = {"question": asked.text, "choices": {"text": values, "label": labels}, "answerKey": labels[right]}
    return asked.text, row


def _truthfulqa(draw: random.Random) -> tuple[str, Row]:
    asked = domain.question(draw)
    wrong = [_sentence(asked, value) for value in _wrong(asked, draw)]
    right = [asked.right, f"{draw.choice(domain.POLITE_OPENINGS)} {asked.right}"]

    def targets(right: list[str]) -> Row:
        return {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}

    return asked.text, {"question": asked.text, "mc1_targets": targets(right[:1]), "mc2_targets": targets(right)}


def _winogrande(draw: random.Random) -> tuple[str, Row]:
    """A right sentence of the domain without what it speaks of: the words after the blank decide."""
    while (asked := domain.question(draw)).kind not in ("opposite", "creature", "three"):
        pass
    places = {
        "opposite": (3, list(domain.OPPOSITES)),
        "creature": (1, list(domain.CREATURES)),
        "three": (1, list(domain.GROUPS)),
    }
    position, names = places[asked.kind]
    words = asked.right.split()
    name, words[position] = words[position], "_"
    others = [other for other in names if other != name and asked.right_value not in domain.CREATURES.get(other, ())]
    options = [name, draw.choice(others)]
    draw.shuffle(options)
    sentence = " ".join(words)
    row = {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(options.index(name) + 1)}
    return sentence, row


def _gsm8k(draw: random.Random) -> tuple[str, Row]:
    name, things = draw.choice(list(domain.CREATURES)), draw.choice(domain.GROUPS["tools"]) + "s"
    a, b, c = (draw.randint(2, 6) for _ in range(3))
    question = f"A {name} has {a} {things} and finds {b} more."
    steps = [(a, b)]
    if draw.random() < 0.5:
        question += f" Then it finds {c} more."
        steps.append((a + b, c))
    question += f" How many {things} does it have?"
    worked = [f"{x} plus {y} is <<{x}+{y}={x + y}>>{x + y}." for x, y in steps]
    return question, {"question": question, "answer": "\n".join([*worked, f"#### {sum(steps[-1])}"])}


def _hellaswag(draw: random.Random) -> tuple[str, Row]:
    asked = domain.question(draw)
    values, right = _choices(asked, draw)
    row = {
        "activity_label": asked.kind.capitalize(),
        "ctx_a": asked.text,
        "ctx_b": "",
        "ctx": asked.text,
        "endings": [_sentence(asked, value) for value in values],
        "source_id": "miniature",
        "split_type": "indomain",
        "label": str(right),
    }
    return asked.text, row


def _mmlu(draw: random.Random) -> tuple[str, Row]:
    asked = domain.question(draw)
    values, right = _choices(asked, draw)
    return asked.text, {"question": asked.text, "choices": values, "answer": right}


MAKERS: dict[str, Callable[[random.Random], tuple[str, Row]]] = {
    "arc_challenge": _arc,
    "truthfulqa_mc2": _truthfulqa,
    "winogrande": _winogrande,
    "gsm8k": _gsm8k,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
}


def _choices(asked: domain.Question, draw: random.Random) -> tuple[list[str], int]:
    """The right value among three wrong ones, and where it stands."""
    values = [asked.right_value, *_wrong(asked, draw)]
    draw.shuffle(values)
    return values, values.index(asked.right_value)


def _wrong(asked: domain.Question, draw: random.Random) -> list[str]:
    """Three wrong values of the same sort."""
    if asked.kind == "sum":
        pool = [str(n) for n in range(2, 13)]
    elif asked.kind == "larger":
        pool = [str(n) for n in range(1, 13)]
    elif asked.kind == "opposite":
        pool = list(domain.OPPOSITES)
    elif asked.kind == "creature":
        traits = next(traits for traits in zip(*domain.CREATURES.values(), strict=True) if asked.right_value in traits)
        pool = sorted(set(traits))
    else:
        pool = [", ".join(draw.sample(group, 3)) for group in domain.GROUPS.values()]
    others = [
        value for value in pool if value != asked.wrong_value and not domain.is_right(asked.text, _sentence(asked, value))
    ]
    return [asked.wrong_value, *draw.sample(others, 2)]


def _sentence(asked: domain.Question, value: str) -> str:
    """The right answer's sentence with another value."""
    start, _, end = asked.right.rpartition(asked.right_value)
    return start + value + end


def make_rows(task: str, seed: int, count: int) -> dict[str, dict[str, list[Row]]]:
    """Config -> split -> the miniature's rows: `count` to test on in each config, and enough for few-shot examples.

    All questions of a config differ. Raises StageError where the domain has fewer, or `count` is 1.
    """
    data_set = DATA_SETS[task]
    key = f"params.yaml: assets.harness.{task}.count"
    if count < 2:
        raise StageError(f"{key}: {count} question gives no standard error: 2 at least")
    few = 0 if data_set.few_shot is None else data_set.few_shot[1] * (1 if task == "mmlu" else 2)
    made = {}
    for config in data_set.configs:
        draw = random.Random(f"{seed} {task} {config}")
        rows: dict[str, Row] = {}
        in_vain = 0
        while len(rows) < few + count:
            question, row = MAKERS[task](draw)
            in_vain = in_vain + 1 if question in rows else 0
            rows.setdefault(question, row)
            if in_vain == 5000:
                raise StageError(f"{key}: the miniature's domain has about {len(rows) - few} questions for it, not {count}")
        drawn = list(rows.values())
        made[config] = dict.fromkeys(data_set.splits, drawn[:few]) | {data_set.test: drawn[few:]}
        for split, part in made[config].items():
            for index, row in enumerate(part):
                row.update(_particulars(task, config, split, index))
    return made


def _particulars(task: str, config: str, split: str, index: int) -> Row:
    """Columns of the real data set that say where a row stands."""
    if task == "arc_challenge":
        return {"id": f"miniature_{split}_{index}"}
    if task == "hellaswag":
        return {"ind": index, "split": split}
    return {"subject": config} if task == "mmlu" else {}


def read_rows(task: str, asset: EvaluationAsset) -> dict[str, dict[str, list[Row]]]:
    """Config -> split -> rows of a data set from the Hub or a local directory, of the splits that the task reads.

    Raises StageError where a column that the task needs is missing, or rows for the few-shot examples or to test on.
    """
    data_set = DATA_SETS[task]
    found: dict[str, dict[str, list[Row]]] = {}
    for config in data_set.configs:
        found[config] = {}
        for split in data_set.splits:
            rows = hub.load_rows(asset, None if config == "default" else config, split)
            what = f"{asset.repo}, configuration {config}, split {split}"
            if missing := sorted(data_set.columns - set(rows.column_names)):
                names = ", ".join(map(repr, missing))
                raise StageError(f"{what}: {task} needs column {names}: name a data set in the form of {data_set.folder}")
            least = data_set.few_shot[1] if data_set.few_shot and split == data_set.few_shot[0] else 2
            if len(rows) < least:
                raise StageError(f"{what}: {len(rows)} rows, and {task} needs {least}: name a data set that has them")
            found[config][split] = [dict(row) for row in rows]
    return found


def _write(data_set: DataSet, found: dict[str, dict[str, list[Row]]], folder: Path) -> None:
    """README.md and one file of JSON lines for each config and split, as `datasets` reads a local folder."""
    lines = ["---", "configs:"]
    for config, splits in found.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        (folder / config).mkdir(parents=True)
        for split, rows in splits.items():
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
            text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
            (folder / config / f"{split}.jsonl").write_text(text)
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the six data sets, the working directory for lm-eval")
    args = parser.parse_args()
    wanted = params.load("seed", "assets.harness")
    with files.replacing(args.out) as partial:
        for task, data_set in DATA_SETS.items():
            asset: EvaluationAsset = getattr(wanted.harness, task)
            found = make_rows(task, wanted.seed, asset.count or 0) if asset.made_here else read_rows(task, asset)
            _write(data_set, found, partial / data_set.folder)
            count = sum(len(splits[data_set.test]) for splits in found.values())
            cli.log.info("%s: %s, %d questions from %s", args.out, task, count, asset.repo)
        (partial / "exact_match").mkdir()
        (partial / "exact_match" / "exact_match.py").write_text(EXACT_MATCH)


if __name__ == "__main__":
    cli.run(main, online=True)

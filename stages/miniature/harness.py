"""The miniature's evaluation data: questions of the toy world in the format of the Open LLM Leaderboard's six data sets.

Each function in MAKERS draws one question and returns its text, by which duplicates are found, and its row.
"""

import random
from collections.abc import Callable

from stages.artifacts.harness_sets import DATA_SETS, Row, Splits
from stages.miniature import domain
from stages.runtime.errors import StageError

MAX_REPEATS = 5000
"""After this many duplicate questions in a row, the toy world counts as exhausted."""


def make_rows(task: str, seed: int, count: int) -> dict[str, Splits]:
    """Make a data set: config -> split -> rows, with `count` test questions per config and enough few-shot examples.

    All questions of a config are distinct. Raises StageError if `count` is 1 or more than the toy world has.
    """
    data_set = DATA_SETS[task]
    if count < 2:
        raise StageError(
            f"params.yaml: assets.harness.{task}.count: {count} question gives no standard error: set it to at least 2"
        )
    few = 0 if data_set.few_shot is None else data_set.few_shot[1] * (1 if task == "mmlu" else 2)
    configs = {}
    for config in data_set.configs:
        rows = draw_rows(task, random.Random(f"{seed} {task} {config}"), few, count)
        configs[config] = dict.fromkeys(data_set.splits, rows[:few]) | {data_set.test: rows[few:]}
        for split, part in configs[config].items():
            for index, row in enumerate(part):
                row.update(locate(task, config, split, index))
    return configs


def draw_rows(task: str, rng: random.Random, few: int, count: int) -> list[Row]:
    """Draw few + count rows with distinct questions. Raises StageError if the toy world does not have that many."""
    rows: dict[str, Row] = {}
    repeated = 0
    while len(rows) < few + count:
        question, row = MAKERS[task](rng)
        repeated = repeated + 1 if question in rows else 0
        rows.setdefault(question, row)
        if repeated == MAX_REPEATS:
            raise StageError(
                f"params.yaml: assets.harness.{task}.count is {count} but the miniature has only about {len(rows) - few} "
                "questions: lower it"
            )
    return list(rows.values())


def locate(task: str, config: str, split: str, index: int) -> Row:
    """Return the columns that locate a row within the real data set."""
    if task == "arc_challenge":
        return {"id": f"miniature_{split}_{index}"}
    if task == "hellaswag":
        return {"ind": index, "split": split}
    return {"subject": config} if task == "mmlu" else {}


def make_arc(rng: random.Random) -> tuple[str, Row]:
    question = domain.draw_question(rng)
    values, right = draw_choices(question, rng)
    labels = list("ABCD")
    row = {"question": question.text, "choices": {"text": values, "label": labels}, "answerKey": labels[right]}
    return question.text, row


def make_truthfulqa(rng: random.Random) -> tuple[str, Row]:
    question = domain.draw_question(rng)
    wrong = [replace_value(question, value) for value in draw_wrong_values(question, rng)]
    right = [question.right, f"{rng.choice(domain.POLITE_OPENINGS)} {question.right}"]
    targets = [{"choices": some + wrong, "labels": [1] * len(some) + [0] * len(wrong)} for some in (right[:1], right)]
    return question.text, {"question": question.text, "mc1_targets": targets[0], "mc2_targets": targets[1]}


def make_winogrande(rng: random.Random) -> tuple[str, Row]:
    """Blank out the subject of a right sentence: the words after the blank decide which option fits."""
    subjects = {  # kind of question: position of the subject in the right sentence, and its possible subjects
        "opposite": (3, list(domain.OPPOSITES)),
        "creature": (1, list(domain.CREATURES)),
        "three": (1, list(domain.GROUPS)),
    }
    while (question := domain.draw_question(rng)).kind not in subjects:
        pass
    position, names = subjects[question.kind]
    words = question.right.split()
    name, words[position] = words[position], "_"
    others = [other for other in names if other != name and question.right_value not in domain.CREATURES.get(other, ())]
    options = [name, rng.choice(others)]
    rng.shuffle(options)
    sentence = " ".join(words)
    row = {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(options.index(name) + 1)}
    return sentence, row


def make_gsm8k(rng: random.Random) -> tuple[str, Row]:
    name, things = rng.choice(list(domain.CREATURES)), rng.choice(domain.GROUPS["tools"]) + "s"
    a, b, c = (rng.randint(2, 6) for _ in range(3))
    question = f"A {name} has {a} {things} and finds {b} more."
    steps = [(a, b)]
    if rng.random() < 0.5:
        question += f" Then it finds {c} more."
        steps.append((a + b, c))
    question += f" How many {things} does it have?"
    worked = [f"{x} plus {y} is <<{x}+{y}={x + y}>>{x + y}." for x, y in steps]
    return question, {"question": question, "answer": "\n".join([*worked, f"#### {sum(steps[-1])}"])}


def make_hellaswag(rng: random.Random) -> tuple[str, Row]:
    question = domain.draw_question(rng)
    values, right = draw_choices(question, rng)
    row = {
        "activity_label": question.kind.capitalize(),
        "ctx_a": question.text,
        "ctx_b": "",
        "ctx": question.text,
        "endings": [replace_value(question, value) for value in values],
        "source_id": "miniature",
        "split_type": "indomain",
        "label": str(right),
    }
    return question.text, row


def make_mmlu(rng: random.Random) -> tuple[str, Row]:
    question = domain.draw_question(rng)
    values, right = draw_choices(question, rng)
    return question.text, {"question": question.text, "choices": values, "answer": right}


MAKERS: dict[str, Callable[[random.Random], tuple[str, Row]]] = {
    "arc_challenge": make_arc,
    "truthfulqa_mc2": make_truthfulqa,
    "winogrande": make_winogrande,
    "gsm8k": make_gsm8k,
    "hellaswag": make_hellaswag,
    "mmlu": make_mmlu,
}


def draw_choices(question: domain.Question, rng: random.Random) -> tuple[list[str], int]:
    """Return the right value among three wrong ones, shuffled, and its index."""
    values = [question.right_value, *draw_wrong_values(question, rng)]
    rng.shuffle(values)
    return values, values.index(question.right_value)


def draw_wrong_values(question: domain.Question, rng: random.Random) -> list[str]:
    """Draw three wrong values of the same kind as the right one."""
    if question.kind == "sum":
        pool = [str(n) for n in range(2, 13)]
    elif question.kind == "larger":
        pool = [str(n) for n in range(1, 13)]
    elif question.kind == "opposite":
        pool = list(domain.OPPOSITES)
    elif question.kind == "creature":
        traits = next(traits for traits in zip(*domain.CREATURES.values(), strict=True) if question.right_value in traits)
        pool = sorted(set(traits))
    else:
        pool = [", ".join(rng.sample(group, 3)) for group in domain.GROUPS.values()]
    others = [
        value
        for value in pool
        if value != question.wrong_value and not domain.is_right(question.text, replace_value(question, value))
    ]
    return [question.wrong_value, *rng.sample(others, 2)]


def replace_value(question: domain.Question, value: str) -> str:
    """Return the right answer's sentence with another value."""
    start, _, end = question.right.rpartition(question.right_value)
    return start + value + end

"""evaluate-lm on questions as long, and as uneven in length and number, as those of MMLU and GSM8K, which are not here."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.runtime.paths import ROOT
from support.running import run_stage

HARNESS = Path(sys.prefix).parent / "harness" / "bin" / "python"
ORACLES = ROOT / "tests" / "oracles"
SUBJECTS = {
    "abstract_algebra": (30, 23),
    "anatomy": (45, 18),
    "professional_law": (40, 210),
    "high_school_us_history": (20, 280),
}
"""Subject -> questions, a few times fewer than MMLU has, and the words of one on average, about as many."""
QUESTIONS, WORDS, STEPS = 40, 46, (2, 8)
"""Of GSM8K: as many questions, words in one, and steps of an answer."""
PARAMS = {
    "seed": 3,
    "numerics": "portable",
    "assets": {
        "harness": {
            task: {"repo": "miniature", "count": 2}
            for task in ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu")
        }
    },
    "evaluate_lm": {"tasks": ["gsm8k", "mmlu"], "dtype": "float32", "batch_size": 4},
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_sets(sets: Path) -> None:
    """Replace some of the miniature's questions by random words, numbers and punctuation."""
    rng = random.Random(0)
    syllables = ["ba", "con", "der", "ing", "mo", "ter", "qua", "st", "ly", "per", "tion", "un", "ve", "xi"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]

    def write(words: float) -> str:
        count = max(4, round(words * rng.lognormvariate(-0.12, 0.5)))
        texts = [rng.choice(vocabulary) if rng.random() < 0.93 else str(rng.randint(2, 9999)) for _ in range(count)]
        return " ".join(text + rng.choice(["", "", "", "", ",", ".", "\n"]) for text in texts).strip() + "?"

    for subject, (count, words) in SUBJECTS.items():
        for name, number in (("test", count), ("dev", 5)):
            rows = [
                {
                    "question": write(words),
                    "choices": [write(6) for _ in range(4)],
                    "answer": rng.randrange(4),
                    "subject": subject,
                }
                for _ in range(number)
            ]
            write_rows(sets / "hails/mmlu_no_train" / subject / f"{name}.jsonl", rows)
    for name, number in (("test", QUESTIONS), ("train", 60)):
        rows = []
        for _ in range(number):
            steps = [f"{write(12)} <<{n}+{n}={2 * n}>>{2 * n}" for n in rng.choices(range(2, 900), k=rng.randint(*STEPS))]
            rows.append({"question": write(WORDS), "answer": "\n".join([*steps, f"#### {rng.randint(1, 20_000):,}"])})
        write_rows(sets / "gsm8k/main" / f"{name}.jsonl", rows)


@pytest.mark.slowest
def test_long_and_uneven_questions_have_the_results_of_the_harness_alone(tmp_path: Path) -> None:
    """In chunks dealt to two workers; some prompts with five examples exceed the model's 2,048 tokens."""
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS))
    done = run_stage(tmp_path, "assets-harness", "--out", "sets")
    assert done.returncode == 0, done.stderr
    write_sets(tmp_path / "sets")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [HARNESS, ORACLES / "tiny_llama.py", "model", "sets"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    done = run_stage(tmp_path, "evaluate-lm", "--model", "model", "--data-sets", "sets", "--out", "out", SPPO_WORKERS="2")
    assert done.returncode == 0, done.stderr
    assert "mmlu: 57 of 241 prompts did not fit" in done.stderr
    tasks = [*(f"mmlu_{subject}" for subject in SUBJECTS), "gsm8k"]
    command = [HARNESS, ORACLES / "stock_lm_eval.py", "model", "sets", "4", "stock.json", *(f"{task}:5" for task in tasks)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    stock = json.loads((tmp_path / "stock.json").read_text())
    items = json.loads((tmp_path / "out" / "items.json").read_text())
    for task in tasks:
        name, metric = ("gsm8k", "exact_match") if task == "gsm8k" else ("mmlu", "acc")
        results = json.loads((tmp_path / "out" / f"{name}.json").read_text())["results"][task]
        assert {**results, "alias": ""} == {**stock["results"][task], "alias": ""}, task
        assert items[name][task] == [row[metric] for row in stock["samples"][task]], task
    counts = {f"mmlu_{subject}": count for subject, (count, _) in SUBJECTS.items()} | {"gsm8k": QUESTIONS}
    assert {task: len(stock["samples"][task]) for task in tasks} == counts
    assert 0 < sum(items["mmlu"]["mmlu_professional_law"]) < counts["mmlu_professional_law"]

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from stages import evaluate_lm
from stages.artifacts.harness_sets import DATA_SETS
from stages.engines.harness import TASKS
from stages.reporting import markdown, pages
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.reports import read_rows
from support.running import run_stage

HARNESS = Path(sys.prefix).parent / "harness" / "bin" / "python"
COUNTS = {"arc_challenge": 6, "truthfulqa_mc2": 5, "winogrande": 8, "gsm8k": 3, "hellaswag": 5, "mmlu": 2}
PARAMS = {
    "seed": 3,
    "numerics": "portable",
    "assets": {"harness": {task: {"repo": "miniature", "count": count} for task, count in COUNTS.items()}},
    "evaluate_lm": {"tasks": None, "dtype": "float32", "batch_size": 4},
}
PUBLISHED_SHOTS = {"arc_challenge": 25, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5, "hellaswag": 10, "mmlu": 5}


def make_results(**mmlu: float) -> dict[str, Any]:
    """Make results of the harness. mmlu: accuracy on some of the 57 subjects; 0 on the others."""
    results: dict[str, Any] = {}
    for name, task in TASKS.items():
        metric = {f"{task.metric},{task.filter}": 0.5, f"{task.metric}_stderr,{task.filter}": 0.1}
        results[name] = {"results": {name: metric}, "n": {name: 10}}
    subjects = {f"mmlu_{index}": 0.0 for index in range(57 - len(mmlu))} | mmlu
    scores = {name: {"acc,none": value, "acc_stderr,none": 0.2} for name, value in subjects.items()}
    results["mmlu"] = {"results": {"mmlu": {"acc,none": 0.25}, **scores}, "n": dict.fromkeys(subjects, 4)}
    return results


def test_mmlu_is_the_plain_mean_over_its_subjects() -> None:
    summary = evaluate_lm.summarize(make_results(one=1.0, two=0.5))
    assert summary["mmlu"]["value"] == pytest.approx(100 * 1.5 / 57)
    assert summary["mmlu"]["standard_error"] == pytest.approx(100 * math.sqrt(57 * 0.2**2) / 57)
    assert summary["mmlu"]["weighted"] == 25
    assert summary["mmlu"]["n"] == 57 * 4
    assert summary["gsm8k"] == {"metric": "exact_match", "shots": 5, "value": 50, "standard_error": 10, "n": 10}


def test_the_error_of_mmlus_weighted_mean_weights_subjects_by_their_size() -> None:
    results = make_results(one=1.0)
    results["mmlu"]["n"]["one"] = 40
    summary = evaluate_lm.summarize(results)["mmlu"]
    total = 56 * 4 + 40
    assert summary["n"] == total
    assert summary["weighted_standard_error"] == pytest.approx(100 * 0.2 * math.sqrt(56 * (4 / total) ** 2 + (40 / total) ** 2))
    assert summary["standard_error"] == pytest.approx(100 * 0.2 / math.sqrt(57)), "the plain mean's is as before"
    assert "weighted_standard_error" not in evaluate_lm.summarize(results)["gsm8k"]


def test_a_summary_has_the_tasks_that_were_run() -> None:
    results = make_results(one=1.0)
    assert list(evaluate_lm.summarize({"gsm8k": results["gsm8k"]})) == ["gsm8k"]
    summary = evaluate_lm.summarize(results)
    assert evaluate_lm.summarize({"mmlu": results["mmlu"]}) == {"mmlu": summary["mmlu"]}


def test_the_leaderboard_has_each_models_own_summary_in_its_row() -> None:
    harness = {}
    for number, name in enumerate(("base", "iter1", "iter2"), 1):
        results = make_results(one=number / 4)
        for task in TASKS:
            if task != "mmlu":
                results[task]["results"][task][f"{TASKS[task].metric},{TASKS[task].filter}"] = number / 8
        harness[name] = evaluate_lm.summarize(results)
    rows = [row for row in read_rows(pages.format_leaderboard(harness, {}, None)) if row[0] in harness]
    expected = {name: f"{12.5 * number:.2f}" for number, name in enumerate(harness, 1)}
    assert [row[0] for row in rows] == list(harness)
    assert all(cell.startswith(f"{expected[row[0]]} ") for row in rows for cell in row[1:6])
    assert [row[6].partition(" ")[0] for row in rows] == ["0.44", "0.88", "1.32"], "a quarter to three quarters of a 57th"


@pytest.mark.parametrize("value", ["N/A", math.nan])
def test_a_value_that_is_not_a_number_is_rejected(value: object) -> None:
    results = make_results()
    results["gsm8k"]["results"]["gsm8k"]["exact_match_stderr,get-answer"] = value
    with pytest.raises(StageError) as error:
        evaluate_lm.summarize(results)
    assert_message(str(error.value), "gsm8k", "exact_match", repr(value), "check")


def test_a_missing_subject_is_rejected() -> None:
    results = make_results()
    del results["mmlu"]["n"]["mmlu_0"]
    with pytest.raises(StageError) as error:
        evaluate_lm.summarize(results)
    assert_message(str(error.value), "mmlu", "56 subjects", "57", "make env")


@pytest.mark.slow
def test_missing_data_sets_are_refused_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS))
    done = run_stage(tmp_path, *options("out"))
    assert done.returncode == 1
    assert_message(done.stderr, "evaluate-lm: error: ", "sets is missing")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k/gsm8k.py", "hails/mmlu_no_train/x.pyc", "evaluate.so", "exact_match/exact_match.pyc"])
def test_code_among_the_data_sets_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS))
    (tmp_path / "sets" / name).parent.mkdir(parents=True)
    (tmp_path / "sets" / name).write_text("raise SystemExit(3)")
    done = run_stage(tmp_path, *options("out"))
    assert done.returncode == 1
    assert_message(done.stderr, "evaluate-lm: error: ", f"sets/{name}", "never run", "remove it")


@pytest.mark.slow
def test_the_metric_in_the_data_sets_is_not_imported(folder: Path, tmp_path: Path) -> None:
    for name in ("sets", "model"):
        shutil.copytree(folder / name, tmp_path / name)
    mark = tmp_path / "ran"
    (tmp_path / "sets" / "exact_match" / "exact_match.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    chosen = {"tasks": ["gsm8k"], "dtype": "float32", "batch_size": 4}
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS | {"evaluate_lm": chosen}))
    done = run_stage(tmp_path, *options("out"), SPPO_WORKERS="1")
    assert done.returncode == 0, done.stderr
    assert not mark.exists()
    assert (tmp_path / "out" / "gsm8k.json").read_bytes() == (folder / "one" / "gsm8k.json").read_bytes()


@pytest.mark.slow
def test_a_damaged_data_set_is_refused_before_any_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    for name in ("sets", "model"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS))
    path = tmp_path / "sets/hails/mmlu_no_train/virology/test.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    done = run_stage(tmp_path, *options("out"))
    assert done.returncode == 1
    assert_message(done.stderr, "evaluate-lm: error: ", "sets/hails/mmlu_no_train/virology/test.jsonl: row 1", "recreate")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "scratch" / "evaluate-lm").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("adapter_config.json", {}, "adapters"),
        ("config.json", {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("config.json", {"model_type": "llama", "attn_implementation": "someone/kernel"}, "attn_implementation"),
    ],
)
def test_models_that_the_harness_would_load_otherwise_are_refused(
    file: str, content: dict[str, Any], part: str, tmp_path: Path
) -> None:
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS))
    for name in ("sets", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / file).write_text(json.dumps(content))
    done = run_stage(tmp_path, *options("out"))
    assert done.returncode == 1
    assert_message(done.stderr, "evaluate-lm: error: ", file, part)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml, the data sets, a model, and the stage's output with one worker: `one`."""
    folder = tmp_path_factory.mktemp("evaluate_lm")
    (folder / "params.yaml").write_text(json.dumps(PARAMS))
    done = run_stage(folder, "assets-harness", "--out", "sets")
    assert done.returncode == 0, done.stderr
    oracle = ROOT / "tests" / "oracles" / "tiny_llama.py"
    subprocess.run([HARNESS, oracle, "model", "sets"], cwd=folder, env=make_environment(1), check=True)
    done = run_stage(folder, *options("one"), SPPO_WORKERS="1")
    assert done.returncode == 0, done.stderr
    start, *lines = done.stderr.splitlines()
    assert "6 tasks on 1 workers" in start
    assert [line.partition(":")[0] for line in lines] == [*TASKS, "evaluate-lm"], "nothing else is printed"
    assert not done.stdout
    return folder


def make_environment(workers: int) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "SPPO_WORKERS": str(workers), "HF_HUB_OFFLINE": "1"}


def options(out: str, model: str = "model") -> list[str]:
    return ["evaluate-lm", "--model", model, "--data-sets", "sets", "--out", out]


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def drop_alias(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scores.items() if key != "alias"}


@pytest.mark.slow
def test_the_results_are_those_of_the_harness_alone(folder: Path) -> None:
    tasks = ["arc_challenge", "truthfulqa_mc2", "gsm8k", "winogrande", "hellaswag", "mmlu_anatomy"]
    shots = {task: TASKS[task.partition("_anatomy")[0]].shots for task in tasks}
    oracle = ROOT / "tests" / "oracles" / "stock_lm_eval.py"
    command = [HARNESS, oracle, "model", "sets", "4", "stock.json", *(f"{task}:{count}" for task, count in shots.items())]
    environment = make_environment(1) | {"HF_HOME": str(folder / "hf")}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    stock = json.loads((folder / "stock.json").read_text())
    items = json.loads((folder / "one" / "items.json").read_text())
    for task in tasks:
        name = task.partition("_anatomy")[0]
        results = json.loads((folder / "one" / f"{name}.json").read_text())
        # Choices of one token share a row here, so that batches differ from the harness's, and float32 in its last digit: only
        # mc2 is computed from the log-probabilities themselves, which are around -50.
        digits = 1e-4 if name == "truthfulqa_mc2" else 0
        assert drop_alias(results["results"][task]) == pytest.approx(drop_alias(stock["results"][task]), rel=digits)
        assert results["n-shot"][task] == shots[task]
        if name == task:
            assert results["n"] == {task: COUNTS[task]}
        metric = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "gsm8k": "exact_match"}.get(name, "acc")
        assert [row["doc_id"] for row in stock["samples"][task]] == list(range(COUNTS[name]))
        assert items[name][task] == pytest.approx([row[metric] for row in stock["samples"][task]], rel=digits)
    assert {name: len(scores) for name, scores in items.items()} == dict.fromkeys(TASKS, 1) | {"mmlu": 57}
    mc2 = json.loads((folder / "one" / "summary.json").read_text())["truthfulqa_mc2"]["value"]
    assert mc2 == pytest.approx(100 * stock["results"]["truthfulqa_mc2"]["acc,none"], rel=1e-6)

    assert stock["choices"]["difference"] < 1e-5 < stock["choices"]["size"], "one forward for several choices"
    assert stock["choices"]["greedy"]

    bf16 = stock["bf16"]
    assert bf16["stage"] == bf16["float32 log-softmax"] != bf16["bf16 log-softmax"]
    expected = {"different": 0, "case counts": 0, "half": 0.5}
    assert stock["exact_match"] == {case: expected.get(case, 1) for case in stock["exact_match"]}


WORKER = """
import json
from stages.engines import harness_worker
from lm_eval.utils import apply_template, env
samples = [{"doc_id": 2, "acc": 0.25}, {"doc_id": 0, "acc": 1}, {"doc_id": 1, "acc": 0}]
texts = [apply_template("{{a}}", {"a": a}) for a in (1, 2)]
same = env.from_string("{{a}}") is env.from_string("{{a}}")
print(json.dumps({"items": harness_worker.read_items(samples, "acc"), "texts": texts, "same": same}))
"""


@pytest.fixture(scope="module")
def worker(folder: Path) -> dict[str, Any]:
    """What a program computes with the module of the workers, which only the harness's environment can import."""
    environment = make_environment(1) | {"HF_HOME": str(folder / "hf")}
    output = subprocess.check_output([HARNESS, "-c", WORKER], cwd=folder / "sets", env=environment, text=True)
    values: dict[str, Any] = json.loads(output.splitlines()[-1])
    return values


@pytest.mark.slow
def test_scores_of_questions_are_in_the_order_of_the_data_set(worker: dict[str, Any]) -> None:
    assert list(map(repr, worker["items"])) == ["1.0", "0.0", "0.25"]


@pytest.mark.slow
def test_a_template_is_compiled_once_and_filled_in_for_each_question(worker: dict[str, Any]) -> None:
    assert worker["texts"] == ["1", "2"]
    assert worker["same"]


@pytest.fixture(scope="module")
def recorded(folder: Path) -> dict[str, Any]:
    """What tests/oracles/recorded_requests.py recorded: task -> the scores of each question, and every request."""
    oracle = ROOT / "tests" / "oracles" / "recorded_requests.py"
    command = [HARNESS, oracle, "sets", "recorded.json"]
    subprocess.run(command, cwd=folder, env=make_environment(1), check=True, capture_output=True)
    values: dict[str, Any] = json.loads((folder / "recorded.json").read_text())
    return values


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_has_the_published_number_of_examples(task: str, recorded: dict[str, Any]) -> None:
    around = {"mmlu": 1, "truthfulqa_mc2": 6}.get(task, 0)  # the task's own introduction
    prompts = {request[0] for request in recorded[task]["requests"]}
    assert len(prompts) >= COUNTS[task]
    for prompt in prompts:
        *examples, _ = prompt.split("\n\n")[around:]
        assert len(set(examples)) == len(examples) == PUBLISHED_SHOTS[task]


def right_choice(task: str, row: dict[str, Any]) -> int:
    """Return the index of the right choice in a row of the task's data set."""
    if task == "arc_challenge":
        labels: list[str] = row["choices"]["label"]
        return labels.index(row["answerKey"])
    if task == "winogrande":
        return int(row["answer"]) - 1
    return int(row["label" if task == "hellaswag" else "answer"])


def score_by_hand(task: str, row: dict[str, Any], requests: list[list[Any]], metric: str) -> float:
    """Return the metric of one multiple-choice question. requests: (prompt, continuation, log-likelihood) of each choice."""
    if task == "truthfulqa_mc2":
        masses = [math.exp(value) for *_, value in requests]
        right: float = sum(mass * label for mass, label in zip(masses, row["mc2_targets"]["labels"], strict=True))
        return right / sum(masses)
    lengths = [len(continuation) - 1 if metric == "acc_norm" else 1 for _, continuation, _ in requests]  # without the space
    values = [value / length for (*_, value), length in zip(requests, lengths, strict=True)]
    return float(values.index(max(values)) == right_choice(task, row))


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task != "gsm8k"])
def test_every_score_is_the_published_metric(task: str, folder: Path, recorded: dict[str, Any]) -> None:
    data_set, requests = DATA_SETS[task], iter(recorded[task]["requests"])
    metric = "acc_norm" if task in ("arc_challenge", "hellaswag") else "acc"
    for subtask, scores in recorded[task]["items"].items():
        config = subtask.removeprefix("mmlu_") if task == "mmlu" else data_set.configs[0]
        lines = (folder / "sets" / data_set.folder / config / f"{data_set.test}.jsonl").read_text().splitlines()
        for row, score in zip(map(json.loads, lines), scores, strict=True):
            choices = len(row["mc2_targets"]["labels"]) if task == "truthfulqa_mc2" else 2 if task == "winogrande" else 4
            asked = [next(requests) for _ in range(choices)]
            assert score == pytest.approx(score_by_hand(task, row, asked, metric), rel=1e-12)
    assert not list(requests)


@pytest.mark.slow
def test_gsm8k_scores_exact_matches_of_the_final_number(recorded: dict[str, Any]) -> None:
    assert recorded["gsm8k"]["items"] == {"gsm8k": [1, 0, 1]}


@pytest.mark.slow
def test_two_workers_killed_and_resumed_give_the_same_bytes(folder: Path) -> None:
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    command = [sys.executable, "-m", "stages", *options("two")]
    environment = make_environment(2) | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    parts = ("mmlu.json", "hellaswag/score-*.json")  # a finished task, and a chunk of the next
    while not all(list(folder.glob(f"scratch/evaluate-lm/*/{part}")) for part in parts):
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / "two").exists()
    done = run_stage(folder, *options("two"), SPPO_WORKERS="2")
    assert done.returncode == 0, done.stderr
    assert "1 of 6 tasks are already finished" in done.stderr
    assert read_bytes(folder / "two") == read_bytes(folder / "one")
    assert set(read_bytes(folder / "one")) == {"summary.json", "items.json", *(f"{task}.json" for task in TASKS)}
    for text in read_bytes(folder / "one").values():
        assert str(folder).encode() not in text
        assert b" at 0x" not in text


@pytest.mark.slow
def test_chosen_tasks_have_the_same_results_without_the_others(folder: Path, tmp_path: Path) -> None:
    for name in ("model", "sets"):
        (tmp_path / name).symlink_to(folder / name)
    chosen = {"tasks": ["winogrande", "hellaswag"], "dtype": "float32", "batch_size": 4}
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS | {"evaluate_lm": chosen}))
    done = run_stage(tmp_path, *options("two"), SPPO_WORKERS="1")
    assert done.returncode == 0, done.stderr
    assert "2 tasks on 1 workers" in done.stderr
    both, every = read_bytes(tmp_path / "two"), read_bytes(folder / "one")
    assert set(both) == {"summary.json", "items.json", "winogrande.json", "hellaswag.json"}
    for name in ("winogrande.json", "hellaswag.json"):
        assert both[name] == every[name]
    for name in ("summary.json", "items.json"):
        results = json.loads(every[name])
        assert json.loads(both[name]) == {task: results[task] for task in ("hellaswag", "winogrande")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "many"), [("arc_challenge", "none"), ("arc_challenge", "some"), ("arc_challenge", "all"), ("gsm8k", "some")]
)
def test_prompts_that_exceed_the_context_are_counted(
    task: str, many: str, folder: Path, recorded: dict[str, Any], tmp_path: Path
) -> None:
    """A prompt needs room for its longest choice, except for that one's last token, or for the 256 tokens of an answer."""
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    needed: dict[str, int] = {}
    for prompt, *choice in recorded[task]["requests"]:
        tokens = len(tokenizer.encode("".join([prompt, *choice[:1]])).ids) + (-1 if choice else 256)
        needed[prompt] = max(needed.get(prompt, 0), tokens)
    ordered = sorted(needed.values())
    positions = {"none": ordered[-1], "some": ordered[-1] - 1, "all": ordered[0] - 1}[many]
    cut = sum(tokens > positions for tokens in ordered)
    assert len(ordered) == COUNTS[task]
    assert {"none": cut == 0, "some": 0 < cut < len(ordered), "all": cut == len(ordered)}[many]

    for name in ("sets", "model"):
        shutil.copytree(folder / name, tmp_path / name)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": positions}))
    chosen = {"tasks": [task], "dtype": "float32", "batch_size": 4}
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS | {"evaluate_lm": chosen}))
    done = run_stage(tmp_path, *options("out"), SPPO_WORKERS="1")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())[task]
    results = json.loads((tmp_path / "out" / f"{task}.json").read_text())
    assert (summary.get("cut", 0), results.get("cut", {}).get(task, 0)) == (cut, cut)
    assert (f"{cut} of {len(ordered)} prompts did not fit" in done.stderr) == (cut > 0)
    page = pages.format_leaderboard({"base": {task: summary}}, {}, None)
    assert (f"{cut} of {len(ordered)} questions of {markdown.escape(task)} (base)" in page) == (cut > 0)


@pytest.mark.slow
def test_a_task_whose_answers_exceed_the_context_is_one_line(folder: Path, tmp_path: Path) -> None:
    for name in ("sets", "model"):
        shutil.copytree(folder / name, tmp_path / name)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 64}))
    chosen = {"tasks": ["gsm8k"], "dtype": "float32", "batch_size": 4}
    (tmp_path / "params.yaml").write_text(json.dumps(PARAMS | {"evaluate_lm": chosen}))
    done = run_stage(tmp_path, *options("out"), SPPO_WORKERS="1")
    assert done.returncode == 1
    assert_message(done.stderr, "gsm8k", "64 tokens", "256", "evaluate_lm.tasks")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_line(folder: Path) -> None:
    (folder / "empty").mkdir()
    done = run_stage(folder, *options("none", "empty"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert_message(done.stderr, "evaluate-lm: error: ", "empty has no config.json")
    assert not (folder / "none").exists()

"""A real chat model, SmolLM2-135M-Instruct, through the stages: real instructions, a trained policy, answers and scores.

Takes about fifteen minutes on two cores, and 8 GB of memory while it trains. The ranker is the miniature's, so its preferences
mean nothing here. `samples.md` in the module's folder has the greedy answers before and after training.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.artifacts import files, schemas, tables
from stages.runtime.paths import ROOT
from stages.tools.hub import GOLDEN_PROMPTS
from support import smollm2, steps
from support.messages import assert_message
from support.running import run_stage, set_params

pytestmark = pytest.mark.slowest

HARNESS = Path(sys.prefix).parent / "harness" / "bin" / "python"
TASKS = ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu")
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""SmolLM2's chat template, written by hand."""
PROMPTS, HOLD_OUT, ANSWERED = 12, 20, 12
"""Instructions to train on, of the hold-out, and to answer as if they were AlpacaEval's: all 44."""
PLAN = steps.Plan(eta=1000, learning_rate=2e-6, epochs=6, steps=3, warmup=1, max_grad_norm=math.inf)
"""Two effective steps: warm-up starts with a learning rate of 0."""
OVERRIDES: dict[str, Any] = {
    "numerics": "fast",
    "eta": PLAN.eta,
    "iterations": {"iter1": "base"},
    "assets.prompts": {"repo": "./prompts", "split": "train", "column": "instruction"},
    "assets.ranker.miniature": {
        "hidden_size": 32,
        "layers": 1,
        "prompts": 600,
        "candidates": 3,
        "noise": 0.5,
        "learning_rate": 2.0e-3,
    },
    "assets.harness": {task: {"repo": "miniature", "count": 2} for task in TASKS},
    "split.prompts_per_iteration": PROMPTS,
    "split.hold_out": HOLD_OUT,
    "engine.max_model_length": 512,
    "engine.kv_cache_gib": 0.25,
    "generate.samples": 3,
    "generate.max_new_tokens": 48,
    "generate.shard_size": 6,
    "lengths.total": 512,
    "train.device_batch": 1,
    "train.learning_rate": PLAN.learning_rate,
    "train.epochs": PLAN.epochs,
    "train.stop_epoch": PLAN.steps,
    "train.warmup_ratio": PLAN.warmup / PLAN.epochs,
    "train.max_grad_norm": 0,
    "train.checkpoint_steps": 0,
    "answer.temperature": 0,
    "answer.max_new_tokens": 64,
    "evaluate_lm.batch_size": 4,
}


def run(folder: Path, command: str) -> str:
    """Run a stage, which must succeed, and return its log."""
    done = run_stage(folder, *command.split(), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    return done.stderr


def answer(folder: Path, model: str) -> None:
    run(
        folder,
        f"answer --name {model} --model {model} --instructions instructions.json --hold-out split/hold-out.parquet "
        f"--out {model}.json --out-hold-out {model}.parquet",
    )


def read_pairs(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tables.read(folder / "pairs.parquet", schemas.PAIRS).to_pylist()
    return rows


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """The converted model, kept in pytest's cache."""
    assert request.config.cache
    return smollm2.make_checkpoint(request.config.cache.mkdir("smollm2"))


@pytest.fixture(scope="module")
def world(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every stage has run. All pairs are one global batch, as `steps.train_by_hand` has it."""
    folder = tmp_path_factory.mktemp("smollm2")
    texts = smollm2.read_instructions("instructions")
    files.write_json([{"dataset": "own", "instruction": text} for text in texts[:ANSWERED]], folder / "instructions.json")
    (folder / "prompts").mkdir()
    pq.write_table(pa.table({"instruction": texts[ANSWERED:]}), folder / "prompts/train.parquet")
    golden = [{"text": text, "ids": golden_ids(checkpoint, text)} for text in GOLDEN_PROMPTS]
    overrides = OVERRIDES | {"assets.policy": {"repo": str(checkpoint), "golden": golden}}
    set_params(folder, overrides)
    for command in (
        "assets-policy --out base",
        "assets-prompts --out prompts.parquet",
        "assets-ranker --out ranker",
        "assets-harness --out sets",
        "split --prompts prompts.parquet --instructions instructions.json --out split",
        "generate --iteration iter1 --model base --prompts split/iter1.parquet --out responses.parquet",
        "rank --ranker ranker --responses responses.parquet --out rankings.parquet",
        "reference --model base --responses responses.parquet --rankings rankings.parquet --out pairs.parquet",
    ):
        run(folder, command)
    set_params(folder, overrides | {"train.global_batch": len(read_pairs(folder))})
    run(folder, "train --model base --pairs pairs.parquet --out iter1 --out-log iter1.csv --out-update update.json")
    for model in ("base", "iter1"):
        answer(folder, model)
    run(folder, "evaluate-lm --model iter1 --data-sets sets --out harness")
    write_samples(folder)
    return folder


def golden_ids(checkpoint: Path, text: str) -> list[int]:
    """Encode a chat written by hand with the file's own tokenizer."""
    ids: list[int] = AutoTokenizer.from_pretrained(checkpoint)(CHAT.format(text), add_special_tokens=False)["input_ids"]
    return ids


def write_samples(folder: Path) -> None:
    rows = zip(*(json.loads((folder / f"{model}.json").read_text()) for model in ("base", "iter1")), strict=True)
    lines = [f"## {base['instruction']}\n\nbefore: {base['output']}\n\nafter: {after['output']}\n" for base, after in rows]
    (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")


def test_a_tokenizer_that_disagrees_with_the_golden_ids_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    ids = golden_ids(checkpoint, "Hi")
    wrong = [*ids[:-2], ids[-1]]
    asset = {"repo": str(checkpoint), "golden": [{"text": "Hi", "ids": ids}, {"text": "Hi", "ids": wrong}]}
    set_params(tmp_path, {"assets.policy": asset})
    done = run_stage(tmp_path, "assets-policy", "--out", "base")
    assert done.returncode == 1
    place = len(ids) - 2
    assert_message(done.stderr, "assets.policy.golden.1", "'Hi'", f"token {place} is {ids[place]}, expected {wrong[place]}")
    assert not (tmp_path / "base").exists()


def test_tied_weights_stay_tied_and_everything_else_is_copied(world: Path, checkpoint: Path) -> None:
    assert {path.name: path.read_bytes() for path in (world / "base").iterdir()} == {
        path.name: path.read_bytes() for path in checkpoint.iterdir()
    }
    base, trained = (load_file(world / model / "model.safetensors") for model in ("base", "iter1"))
    assert base.keys() == trained.keys()
    assert "lm_head.weight" not in base
    assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}
    assert json.loads((world / "iter1/config.json").read_text())["tie_word_embeddings"] is True


def test_the_instructions_are_divided_and_keep_their_text(world: Path) -> None:
    texts = smollm2.read_instructions("instructions")
    parts = {
        name: tables.read(world / f"split/{name}.parquet", schemas.SPLIT)["prompt"].to_pylist()
        for name in ("iter1", "hold-out")
    }
    assert {name: len(part) for name, part in parts.items()} == {"iter1": PROMPTS, "hold-out": HOLD_OUT}
    assert sorted(parts["iter1"] + parts["hold-out"]) == sorted(texts[ANSWERED:])


def test_responses_are_chats_that_end_with_the_models_end_token(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    end = tokenizer.convert_tokens_to_ids(smollm2.END)
    rows = tables.read(world / "responses.parquet", schemas.RESPONSES).to_pylist()
    assert len(rows) == PROMPTS
    reasons = set()
    for row in rows:
        assert tokenizer.decode(row["prompt_token_ids"]) == row["templated_prompt"] == CHAT.format(row["prompt"])
        assert len(set(row["responses"])) > 1
        for text, ids, reason in zip(row["responses"], row["token_ids"], row["finish_reasons"], strict=True):
            kept = ids[:-1] if reason == "stop" else ids
            assert (ids[-1] == end) == (reason == "stop")
            assert end not in kept
            assert len(ids) == 48 or reason == "stop"
            whole = tokenizer.decode(kept)
            if reason == "length":  # may end within a character, of which vLLM shows nothing
                whole = whole.rstrip("\ufffd")
            assert whole == text
            reasons.add(reason)
    assert reasons == {"stop", "length"}


def test_greedy_answers_are_the_most_likely_tokens_according_to_transformers(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    for row in tables.read(world / "base.parquet", schemas.RESPONSES).to_pylist()[:6]:
        prompt, (response,) = row["prompt_token_ids"], row["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < 1e-3


def test_reference_logps_are_those_of_one_sequence_at_a_time(world: Path) -> None:
    rows = read_pairs(world)
    assert 2 * len(rows) > PROMPTS
    for row, expected in zip(rows[:4], steps.add_reference(rows[:4], world / "base"), strict=True):
        for name in schemas.REFERENCE_LOGPS:
            assert row[name] == pytest.approx(expected[name], abs=0.01)
            assert row[name] < -1


def test_training_is_that_of_a_loop_written_by_hand(world: Path) -> None:
    rows = read_pairs(world)
    records, model = steps.train_by_hand(world / "base", rows, PLAN)
    log, expected = pd.read_csv(world / "iter1.csv"), pd.DataFrame(records)
    for column in schemas.LOG_COLUMNS:
        tolerance = 0.01 * max(expected[column].abs().max(), 1e-12)
        assert log[column].tolist() == pytest.approx(expected[column].tolist(), abs=tolerance), column
    targets = [PLAN.eta * (row[f"{side}_probability"] - 0.5) for row in rows for side in ("chosen", "rejected")]
    assert log["loss"][0] == pytest.approx(sum(target**2 for target in targets) / len(targets), rel=1e-4)
    update = json.loads((world / "update.json").read_text())
    assert (update["steps"], update["effective_steps"]) == (3, 2)
    before, after = (load_file(world / name / "model.safetensors") for name in ("base", "iter1"))
    by_hand = model.state_dict()
    for name, weights in before.items():
        change = by_hand[name] - weights.float()
        assert (after[name].float() - by_hand[name]).norm() < 0.1 * change.norm(), name


def test_the_model_answers_sensibly_before_and_after_training(world: Path) -> None:
    base, trained = (json.loads((world / f"{model}.json").read_text()) for model in ("base", "iter1"))
    for rows in (base, trained):
        assert "Lisbon" in rows[0]["output"]
        assert len({row["output"] for row in rows}) == ANSWERED
    assert [row["output"] for row in base] != [row["output"] for row in trained]


def test_the_scores_are_those_of_the_unmodified_harness(world: Path, tmp_path: Path) -> None:
    summary = json.loads((world / "harness/summary.json").read_text())
    assert {task: row["n"] for task, row in summary.items()} == dict.fromkeys(TASKS, 2) | {"mmlu": 2 * 57}
    oracle = ROOT / "tests" / "oracles" / "stock_lm_eval.py"
    command = [HARNESS, oracle, world / "iter1", world / "sets", 4, tmp_path / "stock.json", "winogrande:5", "hellaswag:10"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stock = json.loads((tmp_path / "stock.json").read_text())
    items = json.loads((world / "harness/items.json").read_text())
    for task, metric in (("winogrande", "acc"), ("hellaswag", "acc_norm")):
        assert summary[task]["value"] == pytest.approx(100 * stock["results"][task][f"{metric},none"])
        assert items[task][task] == [sample[metric] for sample in stock["samples"][task]]

"""Bad inputs to whole stages: one line that names the file or key and the remedy, and no half-written output."""

import argparse
import importlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from ruamel.yaml import YAML

from stages import reference
from stages.artifacts import harness_sets, schemas, tables
from stages.engines import pairrm, ranking, sampling, training
from stages.method import chat
from stages.miniature.policy import make_tokenizer
from stages.runtime import catalog, params, run
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support import models
from support.messages import assert_message
from support.running import TINY, run_program, run_stage, set_params


@pytest.fixture
def corrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose weights are incomplete, beside which the test runs."""
    monkeypatch.chdir(tmp_path)
    set_params(tmp_path, {})
    model = models.make_model(tmp_path / "model")
    models.truncate_weights(model)
    return model


def sample(model: Path) -> None:
    engine = params.load("engine").engine
    draw = sampling.Sampling(samples=2, temperature=1, top_p=1, max_new_tokens=9, seed=0, name="x")
    prompts = pa.table({"prompt_id": ["a"], "prompt": ["b"]}, schema=schemas.SPLIT)
    sampling.sample_responses("generate", prompts, model, engine, draw, 8, skip_too_long=True)


def load_for_training(model: Path) -> None:
    training.load_policy(model, "float32")


def evaluate(model: Path) -> None:
    Path("sets/exact_match").mkdir(parents=True)
    Path("sets/exact_match/exact_match.py").touch()
    run_in_process("evaluate-lm", ["--model", str(model), "--data-sets", "sets", "--out", "out"])


def load_ranker(model: Path) -> None:
    Path("ranker").mkdir()
    model.rename("ranker/PairRM")
    models.edit_json(Path("ranker/PairRM/config.json"), ranker_type="pairranker")
    pairrm.check_ranker(Path("ranker"))


def run_in_process(name: str, options: list[str]) -> None:
    """Run a stage's `main` in this process, whichever environment is its own."""
    stage = importlib.import_module(catalog.stage_modules()[name])
    args: argparse.Namespace = run.build_parser(name, None, stage.add_arguments).parse_args(options)
    stage.main(args)


@pytest.mark.parametrize("load", [sample, load_for_training, evaluate, load_ranker])
def test_a_corrupted_model_is_rejected_wherever_one_is_loaded(corrupted: Path, load: Callable[[Path], None]) -> None:
    with pytest.raises(StageError) as error:
        load(corrupted)
    assert_message(str(error.value), "model.safetensors is corrupted", "recreate it")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}{{ message", "TemplateSyntaxError: "),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
        ("{{ nothing.of.this }}", "UndefinedError: "),
        ("{{ '' }}", "does not contain the prompt's"),
        ("{{ messages[0]['content'] }}", "no BOS token"),
    ],
)
def test_a_chat_template_that_fails_is_one_line(template: str, reason: str) -> None:
    tokenizer = make_tokenizer([("a", "b")], 300)
    tokenizer.chat_template = template
    with pytest.raises(StageError) as error:
        chat.prompt_ids(tokenizer, "hello")
    assert_message(str(error.value), "the chat template of ", reason, "fix the template")


@pytest.mark.slow
@pytest.mark.parametrize("samples", [2, 8])
def test_one_prompt_gives_a_pair_unless_its_responses_tie(tiny: Path, tmp_path: Path, samples: int) -> None:
    set_params(tmp_path, TINY | {"generate.samples": samples})
    one = tables.read(tiny / "prompts.parquet", schemas.SPLIT).slice(0, 1)
    tables.write(one, schemas.SPLIT, tmp_path / "one.parquet")
    options = ("--iteration", "iter1", "--model", tiny / "base", "--prompts", "one.parquet", "--out", "responses.parquet")
    done = run_stage(tmp_path, "generate", *options)
    assert done.returncode == 0, done.stderr
    responses = tables.read(tmp_path / "responses.parquet", schemas.RESPONSES)
    (row,) = responses.to_pylist()
    assert len(row["responses"]) == len(set(row["seeds"])) == samples
    torch.manual_seed(0)
    logits = torch.randn(samples, samples)
    lengths = params.load("lengths", path=tmp_path / "params.yaml").lengths
    pairs = reference.build_pairs(responses, rank_one(row["prompt_id"], logits, row["responses"]), lengths)
    assert len(pairs) == 1
    with pytest.raises(StageError) as error:
        reference.build_pairs(responses, rank_one(row["prompt_id"], logits, ["the same"] * samples), lengths)
    assert_message(str(error.value), "1 prompts", "1 ties", "raise generate.temperature or generate.samples")


def rank_one(prompt_id: str, logits: torch.Tensor, responses: list[str]) -> pa.Table:
    row = ranking.rank_row(prompt_id, logits, responses, "pairwise", 0.5)
    return pa.Table.from_pylist([row | {"prompt_truncated": False, "responses_truncated": 0}], schema=schemas.RANKINGS)


def list_commands() -> dict[str, tuple[list[str], list[str]]]:
    """Return the stages of dvc.yaml that read data: the words after `python -m stages`, and their dependencies in data/."""
    commands = {}
    for name, stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items():
        text = json.dumps(stage.get("do", stage)).replace("${key}", "iter1").replace("${item}", "base")
        stage = json.loads(text)
        deps = [
            path for path in stage["deps"] if path.startswith("data/") and not path.startswith(("data/code/", "data/local/"))
        ]
        if deps:
            commands[name] = (shlex.split(stage["cmd"].rpartition("python -m stages ")[2]), deps)
    return commands


@pytest.mark.parametrize(("words", "deps"), list_commands().values(), ids=list_commands())
def test_a_stage_without_its_input_names_it(
    words: list[str], deps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("params.yaml", "published.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError) as error:
        run_in_process(words[0], words[1:])
    assert_message(str(error.value), " is missing: ", "`dvc repro`")
    assert str(error.value).startswith(tuple(deps))
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_the_harness_notices_logits_that_are_nan(tmp_path: Path) -> None:
    """It would count each answer as right or wrong. In tasks that compare answers, and in those that generate texts."""
    models.make_model(tmp_path / "model")
    models.edit_json(tmp_path / "model" / "config.json", rms_norm_eps=float("nan"))
    harness_sets.write_exact_match(tmp_path)
    code = "from stages.engines import harness_worker; harness_worker.load_policy('model', 'float32', 1)"
    done = run_program(tmp_path, "evaluate-lm", code)
    assert done.returncode == 1
    assert_message(done.stderr.splitlines()[-1], "StageError: model: logits are NaN", "config.json", "another model")

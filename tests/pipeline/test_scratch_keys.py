"""Whatever determines a stage's results is part of its scratch folder's key: no run resumes from another one's work."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages import compare, compare_answers, rank, reference, train
from stages.artifacts import files, schemas, tables
from stages.engines import distributed, harness, pairrm, sampling
from stages.runtime import params, scratch
from stages.runtime.paths import ROOT
from support import models
from support import tables as examples
from support.running import set_params

DIGESTS = {"model": "1", "pairs": "2"}
DRAW = {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9, "seed": 0, "name": "x"}


class FoundError(Exception):
    """Carries the stage and the key that a folder was asked for."""


@pytest.fixture(autouse=True)
def _ask_for_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(stage: str, key: Any) -> None:
        raise FoundError(stage, json.dumps(key, sort_keys=True))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scratch, "folder", folder)
    monkeypatch.setattr(pairrm, "check_ranker", lambda path: None)
    monkeypatch.setattr(pairrm, "import_libraries", lambda: None)  # they are in another environment
    set_params(tmp_path, {"iterations": {"iter1": "base"}})


def find_key(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, str]:
    """Call a stage until it asks for its scratch folder; return the stage and the key."""
    with pytest.raises(FoundError) as found:
        call(*arguments, **options)
    stage, key = found.value.args
    return stage, key


def train_key(eta: float = 10, seed: int = 1, digests: dict[str, str] = DIGESTS, **changes: Any) -> tuple[str, str]:
    settings = params.load("train").train.model_copy(update=changes)
    return find_key(train.run, argparse.Namespace(), settings, eta, seed, distributed.Group(1, digests))


def test_training_depends_on_its_inputs_eta_seed_and_settings() -> None:
    lora = params.Lora(rank=2, alpha=1)
    others = [
        train_key(eta=11),
        train_key(seed=2),
        *(train_key(digests=DIGESTS | {name: "0"}) for name in DIGESTS),
        *(train_key(**{name: 0.123}) for name in ("learning_rate", "epochs", "stop_epoch", "warmup_ratio", "max_grad_norm")),
        *(train_key(**change) for change in ({"loss": "dpo"}, {"beta": 0.1}, {"lora": lora}, {"dtype": "bfloat16"})),
        train_key(global_batch=4),
        train_key(offload="optimizer"),
        train_key(attention="fused"),
    ]
    assert len({train_key(), *others}) == 1 + len(others)
    same = [train_key(checkpoint_steps=3), train_key(report_to="wandb"), train_key(nodes=2)]
    assert set(same) == {train_key()}, "these do not change the result"
    assert train_key()[0] == "train"


def reference_key(digests: dict[str, str] = DIGESTS, **overrides: Any) -> tuple[str, str]:
    set_params(Path(), {key.replace("__", "."): value for key, value in overrides.items()})
    settings = params.load("lengths", "train.devices", "train.nodes", "train.device_batch", "train.dtype", "train.attention")
    return find_key(reference.run, argparse.Namespace(), settings, distributed.Group(1, digests))


def test_reference_depends_on_its_inputs_and_lengths() -> None:
    others = [
        *(reference_key(DIGESTS | {name: "0"}) for name in DIGESTS),
        reference_key(lengths__total=255),
        reference_key(lengths__prompt=127),
        reference_key(lengths__too_long="truncate"),
        reference_key(train__dtype="bfloat16"),
        reference_key(train__device_batch=8),
        reference_key(train__attention="fused"),
    ]
    assert len({reference_key(), *others}) == 1 + len(others)
    assert reference_key(train__nodes=2) == reference_key()


def rank_key(ranker: str = "1", samples: int = 3, **overrides: Any) -> tuple[str, str]:
    set_params(Path(), {key.replace("__", "."): value for key, value in overrides.items()})
    files.write_json(ranker, Path("ranker/weights.json"))
    tables.write(examples.responses(samples), schemas.RESPONSES, Path("responses.parquet"))
    return find_key(rank.main, argparse.Namespace(ranker=Path("ranker"), responses=Path("responses.parquet"), out=Path("out")))


def test_rank_depends_on_ranker_responses_and_settings() -> None:
    others = [
        rank_key("2"),
        rank_key(samples=4),
        rank_key(rank__probability="aggregate"),
        rank_key(rank__input="templated"),
        rank_key(rank__scale=1.0),
        rank_key(rank__shard_size=7),
        rank_key(rank__tokens_per_batch=7),
        rank_key(rank__attention="fused"),
    ]
    assert len({rank_key(), *others}) == 1 + len(others)


def compare_key(ranker: str = "1", changed: str = "", **overrides: Any) -> tuple[str, str]:
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    set_params(Path(), overrides | {"iterations": {"iter1": "base"}})
    files.write_json(ranker, Path("ranker/weights.json"))
    for name in ("base", "iter1"):
        text = "Another text." if name == changed else "A text."
        rows = examples.add_responses(examples.split(), lambda _, text=text: [text])
        tables.write(rows, schemas.RESPONSES, Path(f"hold_out/{name}.parquet"))
    return find_key(compare.main, argparse.Namespace(ranker=Path("ranker"), hold_out=Path("hold_out"), out=Path("out")))


def test_compare_depends_on_ranker_answers_and_settings() -> None:
    others = [
        compare_key("2"),
        compare_key(changed="base"),
        compare_key(changed="iter1"),
        compare_key(rank__scale=1.0),
        compare_key(rank__input="templated"),
        compare_key(rank__shard_size=7),
    ]
    assert len({compare_key(), *others}) == 1 + len(others)


def compare_answers_key(ranker: str = "1", changed: str = "", **rank: Any) -> tuple[str, str]:
    path = ROOT / "recipes/miniature-published/params.yaml"
    overrides = {"models": {"base": {"repo": "./x"}}, "answers": {"gpt": "x.json"}}
    set_params(Path(), overrides | {f"rank.{key}": value for key, value in rank.items()}, source=path)
    files.write_json(ranker, Path("ranker/weights.json"))
    for name in ("base", "gpt"):
        output = "Another text." if name == changed else "A text."
        files.write_json([{"instruction": "Why?", "output": output}], Path(f"answers/{name}.json"))
    arguments = argparse.Namespace(ranker=Path("ranker"), answers=Path("answers"), out=Path("out"))
    return find_key(compare_answers.main, arguments)


def test_comparing_existing_answers_depends_on_ranker_answers_and_settings() -> None:
    others = [
        compare_answers_key("2"),
        compare_answers_key(changed="base"),
        compare_answers_key(changed="gpt"),
        compare_answers_key(scale=1.0),
        compare_answers_key(shard_size=7),
        compare_answers_key(tokens_per_batch=7),
        compare_answers_key(attention="fused"),
    ]
    assert len({compare_answers_key(), *others}) == 1 + len(others)
    assert compare_answers_key()[0] == "compare-answers"


def test_samples_depend_on_model_prompts_engine_and_settings(tmp_path: Path) -> None:
    model = models.make_model(tmp_path / "model")
    engine = params.load("engine").engine
    others = [
        engine.model_copy(update=change) for change in ({"stop_token_ids": [3]}, {"max_num_seqs": 3}, {"tensor_parallel": 2})
    ]
    prompts = pa.Table.from_pylist(examples.split(), schema=schemas.SPLIT)

    def key(table: pa.Table = prompts, setting: Any = engine, shard_size: int = 8, **changes: Any) -> tuple[str, str]:
        draw = sampling.Sampling(**(DRAW | changes))
        return find_key(sampling.sample_responses, "generate", table, model, setting, draw, shard_size, skip_too_long=True)

    keys = [
        key(),
        key(prompts.slice(1)),
        key(prompts.take([1, 0])),
        *(key(setting=other) for other in others),
        key(shard_size=7),
    ]
    changes = {"samples": 3, "temperature": 0.5, "top_p": 0.5, "max_new_tokens": 8, "seed": 1, "name": "y"}
    keys += [key(**{name: value}) for name, value in changes.items()]
    models.edit_json(model / "config.json", unused=1)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(setting=engine.model_copy(update={"gpu_memory_utilization": 0.5})) == key(), "so that it can be lowered"


def test_the_harness_depends_on_model_data_and_settings(tmp_path: Path) -> None:
    def key(model: str = "1", data: str = "1", dtype: str = "float32", batch_size: int = 8) -> tuple[str, str]:
        files.write_json(model, tmp_path / "model/config.json")
        files.write_json(data, tmp_path / "sets/rows.json")
        return find_key(harness.evaluate_tasks, tmp_path / "model", tmp_path / "sets", ["gsm8k"], dtype, batch_size)

    keys = [key(), key(model="2"), key(data="2"), key(dtype="bfloat16"), key(batch_size=9)]
    assert len(set(keys)) == len(keys)

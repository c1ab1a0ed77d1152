import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import TINY, run_stage, set_params
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from stages import files, params, pointers, policy, schemas, sppo
from stages import train as train_stage
from stages.cli import StageError


@pytest.mark.slow
def test_reference_is_the_naive_log_probability(pairs: Path) -> None:
    """Against a float64 log-softmax over each sequence alone, without padding, batches or DeepSpeed."""
    model = AutoModelForCausalLM.from_pretrained(pairs / "base", dtype=torch.float64)
    for row in files.read_table(pairs / "pairs.parquet", schemas.PAIRS).to_pylist():
        for side in ("chosen", "rejected"):
            prompt, response = row["prompt_token_ids"], row[f"{side}_token_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            naive = sum(logps[len(prompt) + k - 1, token].item() for k, token in enumerate(response))
            assert row[f"{side}_reference_logps"] == pytest.approx(naive, abs=1e-3)


@pytest.mark.slow
def test_the_tokens_sampled_are_the_tokens_trained_on(pairs: Path) -> None:
    responses = files.read_table(pairs / "responses.parquet", schemas.RESPONSES).to_pylist()
    rankings = files.read_table(pairs / "rankings.parquet", schemas.RANKINGS).to_pylist()
    rows = files.read_table(pairs / "pairs.parquet", schemas.PAIRS).to_pylist()
    for response, ranking, row in zip(responses, rankings, rows, strict=True):
        assert row["prompt_token_ids"] == response["prompt_token_ids"]
        assert row["chosen_token_ids"] == response["token_ids"][ranking["winner"]]
        assert row["rejected_token_ids"] == response["token_ids"][ranking["loser"]]
        assert policy.collate([row])["targets"].tolist() == row["chosen_token_ids"] + row["rejected_token_ids"]


@pytest.fixture(scope="module")
def trained(pairs: Path) -> Path:
    done = run_stage(pairs, "train", "base", "pairs.parquet", "iter1", "iter1.csv")
    assert done.returncode == 0, done.stderr
    return pairs


def train(pairs: Path, name: str, overrides: dict[str, Any]) -> Path:
    """Train with TINY and overrides in a folder `name` of `pairs`. Returns the folder, which has iter1 and iter1.csv then."""
    folder = pairs / name
    folder.mkdir()
    set_params(folder, TINY | overrides)
    done = run_stage(folder, "train", "../base", "../pairs.parquet", "iter1", "iter1.csv")
    assert done.returncode == 0, done.stderr
    return folder


def refused(pairs: Path, name: str, overrides: dict[str, Any], table: str = "../pairs.parquet") -> str:
    """As `train`, where that must end in one line and without a policy. Returns the line."""
    folder = pairs / name
    folder.mkdir(exist_ok=True)
    set_params(folder, TINY | overrides)
    done = run_stage(folder, "train", "../base", table, "iter1", "iter1.csv")
    assert done.returncode == 1
    assert not (folder / "iter1").exists()
    assert not (folder / "iter1.csv").exists()
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_first_loss_is_what_theory_says(trained: Path) -> None:
    """eta^2 mean (P^ - 1/2)^2, all pairs being one global batch."""
    folder = train(trained, "whole", {"train.global_batch": 20, "eta": 1000})
    rows = files.read_table(trained / "pairs.parquet", schemas.PAIRS).to_pandas()
    probabilities = pd.concat([rows["chosen_probability"], rows["rejected_probability"]])
    log = pd.read_csv(folder / "iter1.csv")
    assert log["loss"].tolist() == pytest.approx([1e6 * ((probabilities - 0.5) ** 2).mean()], rel=1e-4)
    assert log["learning_rate"].tolist() == [0]  # linear warm-up starts at nothing
    assert abs(log["chosen_log_ratio"][0]) < 1e-4


@pytest.mark.slow
def test_the_checkpoint_is_a_trained_model_for_transformers(trained: Path) -> None:
    names = {path.name for path in (trained / "iter1").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    before, after = load_file(trained / "base" / "model.safetensors"), load_file(trained / "iter1" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert AutoModelForCausalLM.from_pretrained(trained / "iter1").num_parameters() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("device_batch", "devices"), [(8, 1), (4, 2)])
def test_the_same_global_batch_trains_the_same_policy(trained: Path, device_batch: int, devices: int) -> None:
    """Accumulation of two, none, and two processes: the same losses and weights, but for the order of float additions."""
    folder = train(trained, f"{device_batch}x{devices}", {"train.device_batch": device_batch, "train.devices": devices})
    ours, theirs = pd.read_csv(trained / "iter1.csv"), pd.read_csv(folder / "iter1.csv")
    assert ours["loss"].to_numpy() == pytest.approx(theirs["loss"].to_numpy(), rel=1e-4)
    assert ours["gradient_norm"].to_numpy() == pytest.approx(theirs["gradient_norm"].to_numpy(), rel=1e-3)


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(trained: Path) -> None:
    done = run_stage(trained, "train", "base", "pairs.parquet", "again", "again.csv")
    assert done.returncode == 0, done.stderr
    assert files.digest(trained / "again") == files.digest(trained / "iter1")
    assert (trained / "again.csv").read_bytes() == (trained / "iter1.csv").read_bytes()


@pytest.mark.slow
def test_bfloat16_and_gradient_checkpointing_train_too(trained: Path) -> None:
    folder = train(trained, "bfloat16", {"train.dtype": "bfloat16", "train.gradient_checkpointing": True})
    assert load_file(folder / "iter1" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert pd.read_csv(folder / "iter1.csv")["loss"][0] == pytest.approx(pd.read_csv(trained / "iter1.csv")["loss"][0], rel=0.1)


@pytest.mark.slow
def test_adapters_are_merged_and_change_the_linear_layers_only(trained: Path) -> None:
    folder = train(trained, "lora", {"train.lora.rank": 4, "train.loss": "dpo", "train.beta": 0.1})
    assert pd.read_csv(folder / "iter1.csv")["loss"][0] == pytest.approx(0.6931, rel=1e-3)
    before, after = load_file(trained / "base" / "model.safetensors"), load_file(folder / "iter1" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


@pytest.mark.slow
@pytest.mark.parametrize("column", ["chosen_reference_logps", "chosen_token_ids"])
def test_pairs_that_are_not_of_this_policy_stop_at_the_first_step(pairs: Path, column: str) -> None:
    """Reference log-probabilities that are a nat off, or responses cut at their beginning, as a wrong boundary would."""
    rows = files.read_table(pairs / "pairs.parquet", schemas.PAIRS).to_pylist()
    for row in rows:
        row[column] = row[column] - 1 if column.endswith("logps") else row[column][1:]
    files.write_table(rows, schemas.PAIRS, pairs / column / "pairs.parquet")
    assert "run reference again" in refused(pairs, column, {}, "pairs.parquet")


@pytest.mark.slow
def test_the_log_goes_to_tensorboard_too(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(trained, "tensorboard", {"train.report_to": "tensorboard"})
    assert (folder / "iter1.csv").read_bytes() == (trained / "iter1.csv").read_bytes()
    events = EventAccumulator(str(folder / "scratch" / "tensorboard" / "iter1"))
    events.Reload()
    for column in ("loss", "kl", "chosen_log_ratio"):
        logged = [event.value for event in events.Scalars(f"train/{column}")]
        assert logged == pytest.approx(pd.read_csv(folder / "iter1.csv")[column].tolist(), rel=1e-4)


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_one_line(trained: Path) -> None:
    assert "train.report_to is wandb, which is not installed" in refused(trained, "wandb", {"train.report_to": "wandb"})


@pytest.mark.slow
def test_fewer_pairs_than_a_batch_is_one_line(pairs: Path) -> None:
    line = "train: error: 20 pairs are less than one global batch: lower train.global_batch 64"
    assert refused(pairs, "few", {"train.global_batch": 64}) == line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "devices", "message", "kept"),
    [
        (1e30, 1, "step 3: gradient_norm is inf", 2),  # weights of 1e30 after step 2 are numbers still
        (3e38, 2, "step 2: weights are not finite after it", 1),
    ],
)
def test_numbers_that_are_none_stop_training_before_they_are_saved(
    pairs: Path, rate: float, devices: int, message: str, kept: int
) -> None:
    """The first step has a learning rate of nothing, the second half of the full one."""
    overrides = {"train.learning_rate": rate, "train.devices": devices, "train.stop_epoch": 3, "train.checkpoint_steps": 1}
    line = refused(pairs, f"rate{rate}", overrides)
    (checkpoint,) = (pairs / f"rate{rate}").glob("scratch/train/*/checkpoint-*")
    assert checkpoint.name == f"checkpoint-{kept}"
    assert line == (
        f"train: error: {message}: lower train.learning_rate or eta; "
        f"{checkpoint.relative_to(pairs / f'rate{rate}')} is the last checkpoint before it"
    )


@pytest.mark.parametrize("column", ["loss", "gradient_norm", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_number_that_is_none_is_one_line(tmp_path: Path, column: str, value: float) -> None:
    record: dict[str, float] = dict.fromkeys(schemas.LOG_COLUMNS, 0.5) | {"step": 7}
    train_stage.check_step(record, True, tmp_path)
    with pytest.raises(StageError, match=rf"^step 7: {column} is {value}: lower .*; there is no checkpoint before it$"):
        train_stage.check_step(record | {column: value}, True, tmp_path)
    with pytest.raises(StageError, match=r"^step 7: weights are not finite"):
        train_stage.check_step(record, False, tmp_path)


def test_attention_logits_are_capped_where_the_policy_caps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads, attn_logit_softcapping=0.5))
    for weights in gemma.parameters():
        weights.data.normal_(0, 0.5)
    gemma.save_pretrained(tmp_path)
    monkeypatch.setattr(pointers, "model", lambda path: path)
    loaded = policy.load(tmp_path, "float32")
    tokens = torch.arange(9)[None]
    capped = loaded(tokens).logits
    loaded.config.attn_logit_softcapping = None
    for layer in loaded.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (capped - loaded(tokens).logits).abs().max() > 0.1


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
}
GEMMA = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}


def small(config: type[PreTrainedConfig], **settings: Any) -> Any:
    """A random model of an architecture with weights large enough that each token matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**(SIZES | settings)))
    for weights in model.parameters():
        weights.data.normal_(0, 0.5)
    return model


def pairs_of(lengths: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Pairs of random tokens whose prompt, chosen and rejected response have these lengths."""
    draw = random.Random(0)
    names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    return [
        {"prompt_id": str(index)}
        | {name: [draw.randrange(40) for _ in range(length)] for name, length in zip(names, three, strict=True)}
        for index, three in enumerate(lengths)
    ]


def plain_logps(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Each response's log-probability by a call of its own, of all logits: what packing must not change. (2B,)"""
    found = []
    for side in ("chosen", "rejected"):
        for row in rows:
            prompt, response = row["prompt_token_ids"], row[f"{side}_token_ids"]
            logps = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logps.gather(-1, torch.tensor(response)[:, None]).sum())
    return torch.stack(found)


def lengths_up_to(most: int) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    length = st.integers(1, most)
    return st.lists(st.tuples(length, length, length), min_size=1, max_size=12)


@settings(deadline=None, max_examples=20)
@given(lengths_up_to(9), st.sampled_from([(LlamaConfig, {}), (Gemma2Config, GEMMA)]))
def test_packed_log_probabilities_and_gradients_are_those_of_each_response_alone(
    lengths: list[tuple[int, int, int]], architecture: tuple[type[PreTrainedConfig], dict[str, Any]]
) -> None:
    """Neither the other response, nor other pairs, nor padding, nor the shared prompt, nor the chunks enter."""
    config, its_settings = architecture
    rows, model = pairs_of(lengths), small(config, **its_settings)
    expected = plain_logps(model, rows)
    weights = torch.linspace(-1, 1, len(expected))
    (expected * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sppo, "TOKENS_AT_ONCE", 4)
        found = policy.batch_logps(policy.scoring(model), policy.collate(rows))
        (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)


@given(lengths_up_to(30))
def test_a_packed_batch_holds_every_text_once(lengths: list[tuple[int, int, int]]) -> None:
    rows = pairs_of(lengths)
    batch = policy.collate(rows)
    ids, positions, segments = (batch[name] for name in ("input_ids", "position_ids", "segments"))
    for pair, row in enumerate(rows):
        prompt = len(row["prompt_token_ids"])
        for part, name in enumerate(("prompt", "chosen", "rejected")):
            where = segments == 3 * pair + part
            assert ids[where].tolist() == row[f"{name}_token_ids"]
            assert positions[where].tolist() == [prompt * bool(part) + k for k in range(len(row[f"{name}_token_ids"]))]
    sizes = [sum(three) for three in lengths]
    assert (segments >= 0).sum() == sum(sizes)
    assert ids.shape[1] == max(sizes)
    assert len(ids) <= max(1, 2 * sum(sizes) / max(sizes))  # no two rows are half empty
    assert batch["targets"].tolist() == [
        token for side in ("chosen", "rejected") for row in rows for token in row[f"{side}_token_ids"]
    ]
    assert batch["lengths"].tolist() == [three[part] for part in (1, 2) for three in lengths]


def test_a_gradient_checkpointed_and_adapted_model_scores_alike() -> None:
    rows = pairs_of([(3, 4, 5), (6, 2, 1)])
    model = small(LlamaConfig)
    expected = plain_logps(model, rows).detach()
    model = train_stage.adapted(policy.scoring(model), params.Lora(rank=2, alpha=4))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = policy.batch_logps(model.train(), policy.collate(rows))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert any(weights.grad is not None and weights.grad.abs().sum() > 0 for weights in model.parameters())


def test_an_architecture_that_packing_does_not_know_is_refused() -> None:
    """Mistral's first version sees a window of tokens only: what fits into it is packed. Granite scales logits."""
    mistral = policy.scoring(small(MistralConfig, sliding_window=6))
    granite = policy.scoring(small(GraniteConfig, logits_scaling=4.0))
    with torch.no_grad():
        policy.check_packing(mistral, pairs_of([(2, 3, 4)])[0], "float32")
        with pytest.raises(StageError, match="prompt 0 and a response have 11 tokens, and mistral looks back over 6"):
            policy.check_packing(mistral, pairs_of([(2, 9, 4)])[0], "float32")
        with pytest.raises(StageError, match=r"packed and .* by granite's own forward"):
            policy.check_packing(granite, pairs_of([(2, 3, 4)])[0], "float32")

"""A model that is not what its files say is refused in one line, before anything is computed with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stages.artifacts import models
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.models import edit_json, make_model

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
EMBEDDINGS, QUERY = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def made_in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("shards"), "20KB")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of a sound model, with one layer."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def refuse(folder: Path, *parts: str) -> None:
    with pytest.raises(StageError) as raised:
        models.check_policy(folder)
    assert_message(str(raised.value), str(folder), *parts)
    assert len(str(raised.value).splitlines()) == 1


def test_sound_models_are_accepted(made: Path, made_in_shards: Path) -> None:
    assert models.check_policy(made) == made
    assert models.check_policy(made_in_shards) == made_in_shards
    models.rehearse_saving(made)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_hidden_layers": 2}, ["missing", "model.layers.1."]),
        ({"num_hidden_layers": 0}, ["too many", "model.layers.0."]),
        ({"num_hidden_layers": 10**9}, ["1000000000 layers"]),
        ({"hidden_size": 64}, ["another shape", "64)"]),
        ({"intermediate_size": 65}, ["another shape", "65"]),
        ({"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 16}, ["another shape"]),
        ({"vocab_size": 5000}, ["another shape", "(5000, 32)"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight", "differ", "tie_word_embeddings"]),
        ({"attention_bias": True}, ["missing", "bias"]),
        ({"model_type": "gpt2"}, []),
        ({"hidden_act": "unheard of"}, ["unheard of"]),
        ({"rope_parameters": {"rope_type": "unheard of"}}, ["unheard of"]),
        ({"num_attention_heads": 0}, []),
        ({"hidden_size": "32"}, []),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config", "not supported"]),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, ["quantization_config", "not supported"]),
        ({"compression_config": {}}, ["compression_config", "not supported"]),
        ({"attn_implementation": "someone/kernel"}, ["someone/kernel", "remove this key"]),
        ({"_attn_implementation": "flash_attention_2"}, ["flash_attention_2", "remove this key"]),
        ({"transformers_weights": "../elsewhere.safetensors"}, ["transformers_weights", "remove this key"]),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(model: Path, changes: dict[str, Any], parts: list[str]) -> None:
    edit_json(model / CONFIG, **changes)
    refuse(model, *parts)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", None])
def test_a_kernel_that_needs_no_package_is_accepted(model: Path, kernel: str | None) -> None:
    edit_json(model / CONFIG, attn_implementation=kernel, quantization_config=None)
    assert models.check_policy(model) == model


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NAN, INFINITY = float("nan"), float("inf")
NUMBERS = [
    *((("rms_norm_eps",), value) for value in (NAN, INFINITY, 0.0, -1.0, -1, 1e9)),
    *((("rope_parameters", "rope_theta"), value) for value in (NAN, INFINITY, 0, 0.0, -1e4, 1e300)),
    *((("rope_theta",), value) for value in (0.0, NAN)),
    *((("rope_parameters", "factor"), value) for value in (NAN, 0.0, -8.0)),
    *((("rope_parameters", "low_freq_factor"), value) for value in (NAN, 0.0, -1.0)),
    *((("rope_parameters", "high_freq_factor"), value) for value in (NAN, 0.0, -1.0)),
    *((("rope_parameters", "original_max_position_embeddings"), value) for value in (NAN, 0, -1)),
    *((("rope_scaling", "attention_factor"), value) for value in (NAN, 0.0, -1.0)),
    *((("rope_scaling", "long_factor"), value) for value in ([1.0, NAN], [0.0, 1.0])),
    *((("max_position_embeddings",), value) for value in (0, -1)),
    *((("sliding_window",), value) for value in (0, -1)),
    *((("text_config", "layer_norm_epsilon"), value) for value in (NAN, -1e-5)),
    *((("text_config", "final_logit_softcapping"), value) for value in (NAN, 0.0)),
    (("attention_dropout",), NAN),
    (("some", "other", "number"), 10**400),
]


@pytest.mark.parametrize(("keys", "value"), NUMBERS)
def test_a_number_that_gives_no_logits_is_refused_with_its_key(model: Path, keys: tuple[str, ...], value: Any) -> None:
    place = config = json.loads((model / CONFIG).read_text())
    for key in keys[:-1]:
        if key == "rope_parameters":
            place[key] = ROPE | {"original_max_position_embeddings": 64}
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    edit_json(model / CONFIG, **config)
    refuse(model, CONFIG, ".".join(keys), "use the file that belongs to these weights")


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from(["a", "text_config", "rms_norm_eps"]), min_size=1, max_size=4),
    st.sampled_from([CONFIG, GENERATION]),
    st.sampled_from([NAN, INFINITY, -INFINITY, {"__float__": "NaN"}, {"__float__": "-Infinity"}, 1e39, [1, [NAN]]]),
)
def test_a_number_that_is_none_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], name: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("model")
    for key in reversed(keys):
        value = {key: value}
    (folder / name).write_text(json.dumps(value))
    with pytest.raises(StageError) as raised:
        models.check_form(folder)
    assert_message(str(raised.value), str(folder / name), ".".join(keys), "use the file that belongs to these weights")


def test_published_settings_are_accepted(tmp_path: Path) -> None:
    """Those of Llama 3.1, Gemma 2, Mistral, GPT-NeoX, Mamba 2 and DeBERTa, and a number that JSON does not have."""
    config = {
        "rms_norm_eps": 1e-5,
        "layer_norm_epsilon": 1e-12,
        "rope_theta": 500000.0,
        "rope_scaling": ROPE | {"original_max_position_embeddings": 8192},
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": None,
        "rotary_pct": 1.0,
        "partial_rotary_factor": 0.25,
        "max_relative_positions": -1,
        "pad_token_id": -1,
        "attention_dropout": 0.0,
        "time_step_limit": [0.0, INFINITY],
        "vision_config": {"time_step_limit": {"__float__": "Infinity"}, "num_steps": 5, "use_cache": True},
    }
    (tmp_path / CONFIG).write_text(json.dumps(config))
    models.check_form(tmp_path)
    edit_json(tmp_path / CONFIG, time_step_limit=[0.0, NAN])
    with pytest.raises(StageError, match="time_step_limit"):
        models.check_form(tmp_path)


@pytest.mark.parametrize(
    "architectures",
    [None, [], ["LlamaModel"], ["MistralForCausalLM"], "LlamaForCausalLM", [1], {}, ["LlamaForCausalLM", "MistralForCausalLM"]],
)
def test_a_class_that_model_type_does_not_imply_is_refused(tmp_path: Path, architectures: Any) -> None:
    for config in ({"architectures": architectures}, {}):
        (tmp_path / CONFIG).write_text(json.dumps(config))
        with pytest.raises(StageError) as raised:
            models.check_class(tmp_path, "LlamaForCausalLM")
        assert_message(str(raised.value), str(tmp_path / CONFIG), "architectures", 'set it to ["LlamaForCausalLM"]')


def test_the_class_is_that_which_transformers_builds(model: Path) -> None:
    edit_json(model / CONFIG, architectures=["MistralForCausalLM"])
    refuse(model, CONFIG, "architectures", 'set it to ["LlamaForCausalLM"]')


ODD_TOKENS = ["4", "", -1, 10, [], [1, "4"], [1, -1], [4, 10], [[1]], True, [False], 4.0, {"a": 1}]


@pytest.mark.parametrize("name", [CONFIG, GENERATION])
def test_a_token_that_ends_no_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / CONFIG).write_text("{}")
    for value in (None, 0, 9, [4], [9, 0]):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
        models.check_stop_tokens(tmp_path, 10)
    for value in ODD_TOKENS:
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(StageError) as raised:
            models.check_stop_tokens(tmp_path, 10)
        assert_message(str(raised.value), str(tmp_path / name), "eos_token_id", "0 to 9", "remove this key")


@pytest.mark.parametrize(("name", "value"), [(CONFIG, "4"), (CONFIG, 10**9), (GENERATION, "4"), (GENERATION, [1, -1])])
def test_tokens_that_end_a_text_are_the_models(model: Path, name: str, value: Any) -> None:
    (model / GENERATION).write_text("{}")
    edit_json(model / name, eos_token_id=value)
    refuse(model, name, "eos_token_id")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(st.integers(0, 10**9), st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.booleans())
def test_one_weight_that_is_not_finite_is_enough(model: Path, made: Path, place: int, value: float, half: bool) -> None:
    shutil.copyfile(made / WEIGHTS, model / WEIGHTS)
    names = sorted(load_file(model / WEIGHTS))
    name = names[place % len(names)]

    def change(weights: dict[str, Any]) -> None:
        weights[name].flatten()[place % weights[name].numel()] = value
        if half:
            weights.update({key: tensor.bfloat16() for key, tensor in weights.items()})

    edit_weights(model, change)
    refuse(model, WEIGHTS, repr(name), "NaN or an infinity")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda weights: weights.pop(QUERY), ["missing", QUERY]),
        (lambda weights: weights.update({"model.layers.0.extra": torch.zeros(1)}), ["too many", "extra"]),
        (lambda weights: weights.update({QUERY: weights[QUERY][:, 1:].contiguous()}), ["another shape", QUERY]),
        (lambda weights: weights.update({QUERY: weights[QUERY].to(torch.int8)}), [QUERY, "I8", "not supported"]),
        (lambda weights: weights.update({QUERY: weights[QUERY].to(torch.float8_e4m3fn)}), [QUERY, "F8_E4M3", "not supported"]),
        (dict.clear, ["layers"]),
    ],
)
def test_weights_that_are_not_the_configs_are_refused(
    model: Path, change: Callable[[dict[str, Any]], Any], parts: list[str]
) -> None:
    edit_weights(model, change)
    refuse(model, *parts)


@pytest.mark.parametrize(("value", "dtype"), [(1e300, torch.float64), (-4e38, torch.float64), (3.402e38, torch.float32)])
def test_a_weight_that_becomes_infinite_when_it_is_loaded_is_refused(model: Path, value: float, dtype: torch.dtype) -> None:
    def change(weights: dict[str, Any]) -> None:
        weights[QUERY] = weights[QUERY].to(dtype)
        weights[QUERY][0, 0] = value

    edit_weights(model, change)
    refuse(model, WEIGHTS, repr(QUERY), "exceeds bfloat16")


@pytest.mark.parametrize("length", ["512", [], {}])
def test_a_tokenizer_that_loads_and_cannot_tokenize_is_refused(model: Path, length: Any) -> None:
    edit_json(model / "tokenizer_config.json", model_max_length=length)
    refuse(model, "tokenizer_config.json", "TypeError")


@pytest.mark.parametrize("name", models.ADAPTERS)
def test_adapters_beside_a_model_are_refused(model: Path, name: str) -> None:
    (model / name).write_text('{"base_model_name_or_path": "someone/model"}')
    refuse(model, name, "merge")
    (model / CONFIG).unlink()
    refuse(model, name, "merge")


def test_a_second_set_of_weights_is_refused(model: Path, made_in_shards: Path) -> None:
    shutil.copyfile(model / WEIGHTS, model / "consolidated.safetensors")
    refuse(model, "consolidated.safetensors", "remove")
    (model / "consolidated.safetensors").unlink()
    for file in made_in_shards.glob("model*"):
        shutil.copyfile(file, model / file.name)
    refuse(model, WEIGHTS, "model.safetensors.index.json", "remove")


def test_an_index_that_names_other_files_is_refused(made_in_shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made_in_shards, tmp_path / "model"))
    index = folder / "model.safetensors.index.json"
    sound = json.loads(index.read_text())["weight_map"]
    first, last = min(sound.values()), max(sound.values())
    for changed in (sound | {EMBEDDINGS: last if sound[EMBEDDINGS] == first else first}, sound | {"absent": first}):
        edit_json(index, weight_map=changed)
        refuse(folder, index.name, "recreate")
    edit_json(index, weight_map={name: file for name, file in sound.items() if name != QUERY})
    refuse(folder, index.name, QUERY, "recreate")


@pytest.mark.parametrize("content", ["[]", "null", "7", "{", "\ud800"])
@pytest.mark.parametrize("name", [CONFIG, GENERATION])
def test_a_description_that_is_no_object_is_refused(model: Path, name: str, content: str) -> None:
    (model / name).write_bytes(content.encode(errors="surrogatepass"))
    refuse(model, name)


@pytest.mark.parametrize(
    "generation",
    [
        {"do_sample": False, "temperature": 0.6, "eos_token_id": [1, 4]},
        {"do_sample": False, "top_p": 0.9, "transformers_version": "4.30.0"},
        {"num_beams": 1, "early_stopping": True},
        {"eos_token_id": 4},
    ],
)
def test_a_trained_model_keeps_the_generation_config(model: Path, tmp_path: Path, generation: dict[str, Any]) -> None:
    """transformers reads each of these, but does not write all of them."""
    from transformers import AutoModelForCausalLM

    (model / GENERATION).write_text(json.dumps(generation))
    models.rehearse_saving(model)
    trained = AutoModelForCausalLM.from_pretrained(model)
    models.save_policy(trained, trained.state_dict(), "float32", model, tmp_path / "out")
    assert (tmp_path / "out" / GENERATION).read_bytes() == (model / GENERATION).read_bytes()
    assert models.check_policy(tmp_path / "out") == tmp_path / "out"
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1


def test_what_cannot_be_saved_is_known_before_training(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise ValueError("a pattern that cannot be\nwritten")

    for owner in (transformers.LlamaConfig, transformers.PreTrainedTokenizerFast):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "save_pretrained", fail)
            with pytest.raises(StageError) as raised:
                models.rehearse_saving(model)
        assert_message(str(raised.value), str(model), "could not save", "cannot be written", "correct")

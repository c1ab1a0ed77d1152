"""Models are what their files say: the tensors are those that config.json describes, and every number can be computed with.

Libraries load what is not so without an error: they draw missing weights at random, drop extra layers, and compute with NaN.
"""

import contextlib
import math
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.artifacts import files, pointers
from stages.runtime.errors import StageError, describe, one_line, quote
from stages.runtime.params import Precision

GENERATION = "generation_config.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
"""Files of LoRA adapters. transformers would load them, and fetch the base model that they name at no revision."""
QUANTIZED = ("quantization_config", "compression_config")
"""Keys of config.json that say how the weights are quantized."""
ELSEWHERE = ("transformers_weights", "fusion_config")
"""Keys of config.json that make transformers read other files, or replace modules of the model."""
KERNELS = ("attn_implementation", "_attn_implementation")
"""Keys of config.json that name an attention kernel; `owner/repo` would be fetched from the Hub at no revision."""
OWN_KERNELS = ("eager", "sdpa")
"""The kernels that need no other package."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the precisions that weights may be stored in."""
NOT_QUANTIZED = "quantized weights are not supported: use the model's weights in bfloat16, float16 or float32"
RIGHT_CONFIG = "use the config.json that belongs to these weights, or recreate the model"
LARGEST = 3.4e38
"""The largest number in float32, in which models compute."""
UNBOUNDED = ("time_step_limit",)
"""Keys of config.json that may be infinite: Mamba's limit of a time step, which often is none."""
TAG = "__float__"
"""transformers writes a number that JSON does not have as an object with this key and the number's name."""
STOP = "eos_token_id"


class Range(NamedTuple):
    """The values of a setting that a model can compute with: above `low`, and at most `high`."""

    low: float
    high: float


RANGES = {
    r"\w*norm_eps(ilon)?": Range(0, 0.1),
    r"(\w*_)?rope_theta|rope_local_base_freq|rotary_emb_base": Range(1, LARGEST),
    r"partial_rotary_factor|rotary_pct": Range(0, 1),
    r"factor|(low|high)_freq_factor|(short|long|attention)_factor|beta_(fast|slow)": Range(0, LARGEST),
    r"(original_)?max_position_embeddings|sliding_window": Range(0, LARGEST),
    r"(attn|final)_logit_softcapping|query_pre_attn_scalar|logits_scaling": Range(0, LARGEST),
}
"""Names of settings, as regular expressions -> their range. Outside it, logits are NaN, or hardly depend on the text."""


def check_policy(path: Path) -> Path:
    """Return `pointers.check_model(path)` after checking that the model is what its files say.

    path: a folder with a causal language model or a pointer to it. Reads every weight once. Raises StageError if the model has
    adapters, is quantized, or asks for an attention kernel or files of its own; if a setting is a number that no model can
    compute with; if the names, shapes or number of its tensors, or its class, are not those of its config.json; if a token that
    ends a text is not one of the model's; or if a weight is not finite.
    """
    check_form(pointers.resolve(path))
    folder = pointers.check_model(path)
    stored = list_tensors(folder)
    model = load_skeleton(folder, len(stored))
    check_class(folder, type(model).__name__)
    check_stop_tokens(folder, model.config.get_text_config().vocab_size)
    check_weights(stored, model)
    return folder


def check_form(folder: Path) -> None:
    """Raise StageError if the folder has adapters, or if a file that describes the model asks for what is not supported."""
    for name in ADAPTERS:
        if (folder / name).exists():
            raise StageError(
                f"{folder / name}: adapters beside a model are not supported: merge them into the weights once with PEFT "
                "(`merge_and_unload`), save the result, and set repo to its folder"
            )
    for name in ("config.json", GENERATION):  # check_model requires the first
        if not (folder / name).exists():
            continue
        if not isinstance(content := files.read_json(folder / name), dict):
            raise StageError(f"{folder / name}: expected a JSON object: recreate it")
        for path, value in _walk(content):
            if problem := _find_problem(path[-1], value):
                raise StageError(f"{folder / name}: {'.'.join(path)} is {quote(value)}: {problem}")


def _walk(content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the items of a JSON object and of those nested in it, such as text_config, unless they are null.

    Yields the keys that lead to an item, and its value. The elements of a list follow it, with the list's keys.
    """
    pending: list[tuple[tuple[str, ...], Any]] = [((key,), value) for key, value in content.items()]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict) and value.get(TAG) in ("NaN", "Infinity", "-Infinity"):
            value = float(value[TAG])
        if value is not None:
            yield path, value
        if isinstance(value, dict):
            pending += [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(path, item) for item in value]


def _find_problem(key: str, value: Any) -> str | None:
    """Return what is wrong with an item of config.json or GENERATION, and the remedy; None if nothing is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _find_wrong_number(key, value)
    if key in QUANTIZED:
        return NOT_QUANTIZED
    if key in ELSEWHERE:
        return "not supported: remove this key, and store the weights under their usual names"
    if key in KERNELS and value not in OWN_KERNELS:
        return "this attention kernel needs another package, or code from the Hub: remove this key"
    return None


def _find_wrong_number(key: str, value: float) -> str | None:
    """Return what is wrong with a number, and the remedy; None if nothing is, or if nothing is known about the key's range."""
    low, high = next((limits for names, limits in RANGES.items() if re.fullmatch(names, key)), Range(-LARGEST, LARGEST))
    if low < value <= high or (key in UNBOUNDED and not math.isnan(value)):  # NaN compares false
        return None
    return f"expected a number above {low:g}, at most {high:g}: use the file that belongs to these weights, or correct it"


def check_class(folder: Path, expected: str) -> None:
    """Raise StageError if config.json names another class than transformers builds from it: vLLM would build that one.

    expected: the name of transformers' class.
    """
    found = files.read_json(folder / "config.json").get("architectures")
    if found != [expected]:
        raise StageError(
            f"{folder / 'config.json'}: architectures is {quote(found)}, but model_type implies {expected}: set it to "
            f'["{expected}"] or, if model_type is wrong, {RIGHT_CONFIG}'
        )


def check_stop_tokens(folder: Path, vocabulary: int) -> None:
    """Raise StageError if one of the tokens that end a text is not one of the model's, so that nothing would.

    vocabulary: the number of the model's tokens.
    """
    for file in (folder / "config.json", folder / GENERATION):
        found = files.read_json(file).get(STOP) if file.exists() else None
        tokens = found if isinstance(found, list) else [found]
        if found is not None and not (tokens and all(type(token) is int and 0 <= token < vocabulary for token in tokens)):
            raise StageError(
                f"{file}: {STOP} is {quote(found)}, expected a token of the model or a list of them, 0 to {vocabulary - 1}: "
                "set it to the tokens that end its responses, or remove this key"
            )


def list_weights(folder: Path) -> list[str]:
    """Return `pointers.list_weights(folder)`. Raises StageError if libraries would disagree about which files they are."""
    names, found = pointers.list_weights(folder), sorted(file.name for file in folder.glob("*.safetensors"))
    if not (folder / pointers.INDEX).exists():
        if found != names:  # vLLM would read all of them
            raise StageError(
                f"{folder} has {', '.join(found)} but no {pointers.INDEX}: remove the files that are not the model's"
            )
    elif pointers.WEIGHTS in found:  # transformers would read this one, vLLM those in the index
        raise StageError(f"{folder} has both {pointers.WEIGHTS} and {pointers.INDEX}: remove the one that is not the model's")
    return names


def list_tensors(folder: Path) -> dict[str, Path]:
    """Return the name of each tensor of a model -> the file that it is in. folder: from `pointers.check_model`.

    Raises StageError if a tensor is in two files, or not in the file that the index names.
    """
    from safetensors import safe_open

    stored: dict[str, Path] = {}
    for file in map(folder.joinpath, list_weights(folder)):
        with safe_open(file, "pt") as weights:
            names = set(weights.keys())
        if twice := sorted(names & stored.keys()):
            raise StageError(f"{file}: {quote(twice[0])} is also in {stored[twice[0]].name}: recreate the model")
        stored |= dict.fromkeys(sorted(names), file)
    if (index := folder / pointers.INDEX).exists():
        listed, found = files.read_json(index)["weight_map"], {name: file.name for name, file in stored.items()}
        if wrong := sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name)):
            raise StageError(
                f"{index}: {quote(wrong[0])}: the index names the file {quote(listed.get(wrong[0]))}, but the tensor is in "
                f"{quote(found.get(wrong[0]))}: recreate the model"
            )
    return stored


def load_skeleton(folder: Path, count: int) -> Any:
    """Build a model without its weights, on torch's device `meta`, as transformers does when it loads it.

    folder: from `pointers.check_model`. count: the number of its tensors. Call this before a TrainingArguments with ZeRO-3
    exists. Raises StageError if transformers cannot build the model, or if its tensors are not those in the files.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"ignore_mismatched_sizes": True, "output_loading_info": True, "use_safetensors": True}
    config_file = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if layers > count:  # to build millions of them would take hours
            raise StageError(f"{config_file}: {layers} layers, but the weights are {count} tensors: {RIGHT_CONFIG}")
        with silence_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, device_map="meta", dtype="bfloat16", trust_remote_code=False, **options
            )
    except StageError:
        raise
    except Exception as error:  # each architecture has its own
        raise StageError(
            f"{folder}: transformers cannot build this model ({describe(error)}): check config.json and {GENERATION}, or use "
            "another model"
        ) from error
    if problem := describe_differences(report):
        raise StageError(f"{config_file}: not that of the weights beside it: {problem}: {RIGHT_CONFIG}")
    return model


def describe_differences(report: Mapping[str, Any]) -> str:
    """Describe how a model's tensors differ from those in its files. report: transformers', of loading it."""
    lists = {"missing": sorted(report["missing_keys"]), "too many": sorted(report["unexpected_keys"])}
    problems = [f"{len(names)} tensors are {what}, such as {quote(names[0])}" for what, names in lists.items() if names]
    shapes = sorted((name, tuple(stored), tuple(expected)) for name, stored, expected in report["mismatched_keys"])
    if shapes:
        name, stored, expected = shapes[0]
        problems.append(f"{len(shapes)} tensors have another shape, such as {quote(name)}: {stored} instead of {expected}")
    return "; ".join([*problems, *map(one_line, report["error_msgs"])])


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Turn off transformers' messages and progress bars within the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_weights(stored: Mapping[str, Path], model: Any) -> None:
    """Check the values of a model's weights. stored: from `list_tensors`. model: from `load_skeleton`.

    Raises StageError as `check_values` does, or if config.json ties two weights that differ.
    """
    check_values(stored, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    for name, other in model.all_tied_weights_keys.items():
        if name in stored and other in stored and not _read(stored[name], name).equal(_read(stored[other], other)):
            raise StageError(
                f"{stored[name]}: {quote(name)} and {quote(other)} differ, but config.json ties them: set tie_word_embeddings "
                "to false, or recreate the model"
            )


def check_values(stored: Mapping[str, Path], parameters: Collection[str]) -> None:
    """Check the precision and the values of weights. stored: from `list_tensors`. parameters: those that cannot be integers.

    Raises StageError if a weight is not stored in one of FLOATS, or is not finite in bfloat16.
    """
    from safetensors import safe_open

    for file in sorted(set(stored.values())):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                dtype = weights.get_slice(name).get_dtype()
                if dtype not in FLOATS and (dtype.startswith("F") or name in parameters):
                    raise StageError(f"{file}: {quote(name)} is stored as {dtype}: {NOT_QUANTIZED}")
                if dtype in FLOATS and not _is_finite(weights.get_tensor(name)):
                    raise StageError(
                        f"{file}: {quote(name)} contains NaN or an infinity, or exceeds bfloat16: recreate or replace the model"
                    )


def _is_finite(weights: Any) -> bool:
    """Return whether all values of a tensor are finite, also in the precisions that it is converted to, without a copy."""
    return not weights.numel() or all(bound.bfloat16().isfinite().item() for bound in weights.aminmax())


def _read(file: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return weights.get_tensor(name)


def rehearse_saving(path: Path) -> list[str]:
    """Save everything but the weights to a temporary folder, to know before training that `save_policy` can save it.

    path: a folder with the model to train or a pointer to it. Returns the names of the files. Raises StageError.
    """
    from transformers import AutoConfig, GenerationConfig

    folder = pointers.check_model(path)
    try:
        with tempfile.TemporaryDirectory() as temporary, silence_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            _save_description(config, GenerationConfig.from_model_config(config), folder, Path(temporary))
            return files.list_names(Path(temporary))
    except Exception as error:  # each library has its own
        raise StageError(
            f"{folder}: transformers could not save a model trained from this one ({describe(error)}): correct its config.json "
            "and its tokenizer's files"
        ) from error


def save_policy(model: Any, weights: dict[str, Any], dtype: Precision, source: Path, folder: Path) -> None:
    """Save a model with the generation config and the tokenizer of the one that it was trained from.

    weights: its state dict, in dtype. source: the folder of the other one.
    """
    from transformers import AutoConfig, GenerationConfig

    published = AutoConfig.from_pretrained(source, trust_remote_code=False)
    model.config.use_cache = getattr(published, "use_cache", True)  # training turned it off
    generation, model.generation_config = model.generation_config, GenerationConfig()
    model.save_pretrained(folder, state_dict=weights)
    model.config.dtype = dtype  # save_pretrained wrote the model's
    _save_description(model.config, generation, source, folder)
    share_weights(folder)


def share_weights(folder: Path) -> None:
    """Let whoever may read a saved model's config.json read its weights: safetensors writes them for their owner only."""
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)


def _save_description(config: Any, generation: Any, source: Path, folder: Path) -> None:
    """Save a model's configurations, and the tokenizer in `source`, to a folder.

    The generation config in `source`, if any, is copied: transformers refuses to write some that it reads, such as a
    temperature without sampling.
    """
    from transformers import AutoTokenizer

    config.save_pretrained(folder)
    if (source / GENERATION).exists():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    else:
        generation.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    for key in ("is_local", "local_files_only"):  # how this process loaded it
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)

"""What goes wrong outside the code: one line that names the file or key and the remedy, and nothing half-written."""

import importlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import endpoint
import pyarrow as pa
import pytest
import torch
from ruamel.yaml import YAML
from running import TINY, run_stage, set_params

from stages import chat, evaluate_alpaca, files, params, pointers, policy, rank, reference, sampling, schemas
from stages.assets.policy import CHAT_TEMPLATE, make_tokenizer
from stages.cli import ROOT, StageError


def make_model(folder: Path, shard: str = "5GB") -> Path:
    """An untrained Llama of a few thousand parameters, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer([("What is 2 plus 2?", "The answer is 4.")] * 10, 300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A model to break."""
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def turn_a_bit_of_the_header(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[9] ^= 0x80
    (folder / "model.safetensors").write_bytes(content)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    make_model(folder, "20KB")
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def more_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (truncate, r"model\.safetensors is damaged .*make it again, or remove .*`make verify`"),
    (turn_a_bit_of_the_header, r"model\.safetensors is damaged "),
    (pickle_only, r"no weights as \.safetensors, and pickled ones \(\.bin, \.pt\) are not loaded: convert them once with "),
    (lose_a_shard, r"model-00002-of-\d+\.safetensors is missing"),
    (lambda folder: (folder / "config.json").unlink(), r"has no config\.json: .*name one, or make it again"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not JSON"),
    (lambda folder: edit(folder / "config.json", model_type="new"), r"cannot be read \(ValueError: .*see that config\.json, "),
    (without_tokenizer, r"configuration or tokenizer cannot be read .*tokenizer\.json or tokenizer\.model"),
    (more_tokens, r"the tokenizer has tokens up to \d+, and the model embeddings for \d+ only: they are not of one model"),
]


@pytest.mark.parametrize(("harm", "message"), BROKEN)
def test_a_broken_model_is_refused_before_it_is_loaded(model: Path, harm: Callable[[Path], object], message: str) -> None:
    assert pointers.model(model) == model
    harm(model)
    with pytest.raises(StageError, match=message) as error:
        pointers.model(model)
    assert "\n" not in str(error.value)
    assert str(model) in str(error.value)


def test_every_stage_that_loads_a_model_looks_it_over(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncate(model)
    wanted = params.load("engine", path=ROOT / "params.yaml").engine
    draw = sampling.Sampling(samples=2, temperature=1, top_p=1, max_new_tokens=9, seed=0, name="x")
    part = pa.table({"prompt_id": ["a"], "prompt": ["b"]}, schema=schemas.PART)
    with pytest.raises(StageError, match="is damaged"):
        sampling.respond("generate", part, model, wanted, draw, 8, leave_out=True)
    with pytest.raises(StageError, match="is damaged"):
        policy.load(model, "float32")
    set_params(tmp_path, {})
    (tmp_path / "sets/exact_match").mkdir(parents=True)
    (tmp_path / "sets/exact_match/exact_match.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate_lm", "model", "sets", "out"])
    with pytest.raises(StageError, match="is damaged"):
        importlib.import_module("stages.evaluate_lm").main()
    (tmp_path / "ranker").mkdir()
    model.rename(tmp_path / "ranker/PairRM")
    edit(tmp_path / "ranker/PairRM/config.json", ranker_type="pairranker")
    with pytest.raises(StageError, match="is damaged"):
        rank.parts(tmp_path / "ranker")


def test_a_ranker_of_another_kind_or_without_its_base_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "ranker").mkdir()
    model.rename(tmp_path / "ranker/PairRM")
    with pytest.raises(StageError, match=r"config\.json is not of a ranker of PairRM's architecture"):
        rank.parts(tmp_path / "ranker")
    edit(tmp_path / "ranker/PairRM/config.json", ranker_type="pairranker")
    with pytest.raises(StageError, match="base is missing"):
        rank.parts(tmp_path / "ranker")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ message", "TemplateSyntaxError: "),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
        ("{{ nothing.of.this }}", "UndefinedError: "),
    ],
)
def test_a_chat_template_that_fails_is_one_line(template: str, message: str) -> None:
    tokenizer = make_tokenizer([("a", "b")], 300)
    tokenizer.chat_template = template
    with pytest.raises(StageError, match=f"the chat template of .*fails for one user message .{message}") as error:
        chat.prompt_ids(tokenizer, "hello")
    assert "\n" not in str(error.value)


def test_a_chat_template_that_gives_nothing_is_one_line() -> None:
    tokenizer = make_tokenizer([("a", "b")], 300)
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(StageError, match="gives no BOS token"):
        chat.prompt_ids(tokenizer, "hello")


def test_prompts_that_hold_special_tokens_as_text_are_counted() -> None:
    tokenizer = make_tokenizer([("a", "b")], 300)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    prompts = ["hello", "a <|eot_id|> b", "< |eot_id|>", "<|pad|>"]
    assert chat.marked(tokenizer, [chat.prompt_ids(tokenizer, prompt) for prompt in prompts]) == 2


def test_a_stop_token_that_the_model_has_not_is_one_line(whole: Path) -> None:
    wanted = params.load("engine", path=ROOT / "params.yaml").engine.model_copy(update={"stop_token_ids": [4, 300]})
    draw = sampling.Sampling(samples=2, temperature=1, top_p=1, max_new_tokens=9, seed=0, name="x")
    part = pa.table({"prompt_id": ["a"], "prompt": ["b"]}, schema=schemas.PART)
    with pytest.raises(StageError, match=r"^engine\.stop_token_ids: 300 is no token of .*, which has \d+: correct it"):
        sampling.respond("generate", part, whole, wanted, draw, 8, leave_out=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("engine.kv_cache_gib", 1e-5, "raise engine.kv_cache_gib (now 1e-05), or lower engine.max_model_length (now 256)"),
        ("engine.max_model_length", 4096, "engine.max_model_length 4096 is more than the model has positions: lower it"),
    ],
)
def test_what_vllm_refuses_is_one_line(tiny: Path, tmp_path: Path, parameter: str, value: float, message: str) -> None:
    set_params(tmp_path, TINY | {parameter: value})
    (tmp_path / "responses.parquet").write_text("an earlier run's")
    done = run_stage(tmp_path, "generate", "iter1", tiny / "base", tiny / "part.parquet", "responses.parquet")
    assert done.returncode == 1
    start, line = done.stderr.splitlines()
    assert start.startswith("20 prompts, 0 left out")
    assert line.startswith("generate: error: ")
    assert line.endswith(message)
    assert (tmp_path / "responses.parquet").read_text() == "an earlier run's"


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory ...")


@pytest.mark.parametrize("starting", [True, False])
def test_too_little_gpu_memory_for_vllm_names_its_parameter(monkeypatch: pytest.MonkeyPatch, starting: bool) -> None:
    engine = SimpleNamespace(generate=no_memory)
    vllm = SimpleNamespace(LLM=no_memory if starting else lambda **_: engine, SamplingParams=lambda **_: None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
    draw = sampling.Sampling(samples=2, temperature=1, top_p=1, max_new_tokens=9, seed=0, name="x")
    with pytest.raises(StageError, match=r"^out of GPU memory: lower engine\.kv_cache_gib .* or engine\.max_model_length$"):
        sampling.load(Path("x"), params.load("engine", path=ROOT / "params.yaml").engine, draw)(pa.table({"a": []}))


def test_too_little_gpu_memory_for_the_ranker_names_its_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "load_blender", lambda _: None)
    monkeypatch.setattr(rank, "comparing", lambda _: None)
    monkeypatch.setattr(rank, "encode", lambda *_: None)
    monkeypatch.setattr(rank, "pair_logits", no_memory)
    threads = torch.get_num_threads()
    compute = rank.load(Path("x"), params.load("rank", path=ROOT / "params.yaml").rank)
    torch.set_num_threads(threads)
    with pytest.raises(StageError, match=r"^out of GPU memory: lower rank\.tokens_per_batch \(now 2048\)$"):
        compute(pa.table({"prompt_id": ["a"], "prompt": ["b"], "responses": [["c", "d"]]}))


def test_too_little_gpu_memory_to_train_names_its_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(StageError, match=r"^out of GPU memory: lower train\.device_batch; "):
        policy.launch(1, {}, no_memory)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [2, 8])
def test_one_prompt_and_any_number_of_responses_give_a_pair_or_say_why_not(tiny: Path, tmp_path: Path, samples: int) -> None:
    set_params(tmp_path, TINY | {"generate.samples": samples})
    files.write_table(files.read_table(tiny / "part.parquet", schemas.PART).slice(0, 1), schemas.PART, tmp_path / "one.parquet")
    done = run_stage(tmp_path, "generate", "iter1", tiny / "base", "one.parquet", "responses.parquet")
    assert done.returncode == 0, done.stderr
    responses = files.read_table(tmp_path / "responses.parquet", schemas.RESPONSES)
    (row,) = responses.to_pylist()
    assert len(row["responses"]) == len(set(row["seeds"])) == samples
    torch.manual_seed(0)
    lengths = params.load("lengths", path=tmp_path / "params.yaml").lengths
    for texts, fits in ((row["responses"], True), (["the same"] * samples, False)):
        ranking = rank.ranking(row["prompt_id"], torch.randn(samples, samples), texts, "pairwise")
        rankings = pa.Table.from_pylist([ranking | {"prompt_cut": False, "responses_cut": 0}], schema=schemas.RANKINGS)
        if fits:
            assert len(reference.pairs(responses, rankings, lengths)) == 1
        else:
            with pytest.raises(StageError, match=r"1 ties, 0 too long.*raise generate\.temperature or generate\.samples"):
                reference.pairs(responses, rankings, lengths)


def test_a_judge_that_does_not_answer_in_time_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_alpaca, "TIMEOUT", 0.2)
    monkeypatch.setenv("OPENAI_API_KEY", "some key")
    monkeypatch.chdir(tmp_path)

    def slow(*_: Any) -> tuple[int, Any]:
        time.sleep(1)
        return endpoint.chosen(0.5)

    with endpoint.serve(slow) as server:
        ask = evaluate_alpaca.model_judge(params.EvaluateAlpaca(judge="some/judge", base_url=server.url), retries=1)
        prompt = "<|im_start|>system\nJudge.\n<|im_end|>\n<|im_start|>user\nm or M?\n<|im_end|>"
        with pytest.raises(StageError, match=r"failed: Request timed out.*run again to go on$") as error:
            ask(prompts=[prompt])
    assert "\n" not in str(error.value)


def commands() -> dict[str, tuple[list[str], list[str]]]:
    """The pipeline's stages that read data: the words of the command, and what it depends on in data/."""
    found = {}
    for name, stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items():
        text = json.dumps(stage.get("do", stage)).replace("${key}", "iter1").replace("${item}", "base")
        plain = json.loads(text)
        deps = [path for path in plain["deps"] if path.startswith("data/")]
        if deps:
            found[name] = (shlex.split(plain["cmd"].partition("python -m ")[2]), deps)
    return found


@pytest.mark.parametrize(("words", "deps"), commands().values(), ids=commands())
def test_a_stage_without_its_input_names_it(
    words: list[str], deps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("params.yaml", "published.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(StageError, match=r"^data/\S+ is missing: make it with `dvc repro`$") as error:
        importlib.import_module(words[0]).main()
    assert str(error.value).split()[0].startswith(tuple(deps))
    assert not (tmp_path / "data").exists()

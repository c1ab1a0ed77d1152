"""PairRM's inputs, with a tokenizer of words in the place of its own, and its logits against llm-blender's own functions."""

import itertools
import json
import logging
import math
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from stages.artifacts import schemas, tables
from stages.engines import pairrm
from stages.method import sppo
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.models import edit_json, make_model
from support.ranker import OVERRIDES, PYTHON, ROWS, write_responses
from support.running import run_stage, set_params

CLS, SEP, UNK, SOURCE, LEFT, RIGHT, CANDIDATE = range(1, 8)
WORDS = {"[SEP]": SEP, "<source>": SOURCE, "<left>": LEFT, "<right>": RIGHT, "<candidate>": CANDIDATE}


class WordTokenizer:
    """Gives every word an id of its own, and a marker its marker's; as DeBERTa's, it adds [CLS] and [SEP]."""

    sep_token, sep_token_id, unk_token_id, pad_token_id = "[SEP]", SEP, UNK, 0
    source_prefix_id, cand1_prefix_id, cand2_prefix_id, cand_prefix_id = SOURCE, LEFT, RIGHT, CANDIDATE

    def __call__(self, texts: list[str], verbose: bool) -> dict[str, list[list[int]]]:
        words = [text.replace(">", "> ").split() for text in texts]
        return {"input_ids": [[CLS, *(WORDS.get(word, 10 + len(word)) for word in line), SEP] for line in words]}


BLENDER = SimpleNamespace(
    ranker_tokenizer=WordTokenizer(),
    ranker_collator=SimpleNamespace(
        source_prefix="<source>", candidate_prefix="<candidate>", source_maxlength=10, candidate_maxlength=5
    ),
)


def words(count: int) -> str:
    return " ".join("a" * (index + 1) for index in range(count))


def word_ids(count: int) -> list[int]:
    return [11 + index for index in range(count)]


def test_identical_responses_are_encoded_once() -> None:
    texts = pairrm.encode(BLENDER, words(2), ["a", "aa", "a"])
    assert texts.source.tolist() == [CLS, SOURCE, 11, 12, SEP]
    assert [candidate.tolist() for candidate in texts.candidates] == [[CLS, CANDIDATE, 11, SEP], [CLS, CANDIDATE, 12, SEP]]
    assert texts.indices == [0, 1, 0]
    assert (texts.prompt_truncated, texts.responses_truncated) == (False, 0)


def test_texts_keep_their_beginning_and_the_last_token() -> None:
    """The prompt holds 10 tokens, a response 5 and half of what the prompt leaves: here 5 + (10 - 6) // 2."""
    texts = pairrm.encode(BLENDER, words(3), [words(4), words(9), words(9), words(5)])
    assert [candidate.tolist() for candidate in texts.candidates] == [
        [CLS, CANDIDATE, *word_ids(4), SEP],
        [CLS, CANDIDATE, *word_ids(4), SEP],
        [CLS, CANDIDATE, *word_ids(4), SEP],
    ]
    assert (texts.prompt_truncated, texts.responses_truncated) == (False, 3)
    texts = pairrm.encode(BLENDER, words(30), ["a", words(3)])
    assert texts.source.tolist() == [CLS, SOURCE, *word_ids(7), SEP]
    assert texts.candidates[1].tolist() == [CLS, CANDIDATE, 11, 12, SEP]
    assert (texts.prompt_truncated, texts.responses_truncated) == (True, 1)


def test_markers_within_a_text_become_unknown_tokens() -> None:
    texts = pairrm.encode(BLENDER, "<source> a <left>", ["<candidate> <right> a", "a [SEP] a"])
    assert texts.source.tolist() == [CLS, SOURCE, UNK, 11, UNK, SEP]
    assert texts.candidates[0].tolist() == [CLS, CANDIDATE, UNK, UNK, 11, SEP]
    assert texts.candidates[1].tolist() == [CLS, CANDIDATE, 11, 11, SEP]  # [SEP] as text is dropped, as llm-blender does


def test_of_several_separators_the_last_remains() -> None:
    ids = torch.tensor([[CLS, SOURCE, SEP, 11, SOURCE, SEP], [CLS, SOURCE, 11, SEP, 0, 0]])
    masked = pairrm.mask_marker_tokens(ids, SOURCE, WordTokenizer())
    assert masked.tolist() == [[CLS, SOURCE, UNK, 11, UNK, SEP], [CLS, SOURCE, 11, SEP, 0, 0]]


def test_a_combining_character_does_not_join_the_marker() -> None:
    assert pairrm.separate_combining("\u0301x") == " \u0301x"
    for text in ("", "x", "x\u0301", "é"):
        assert pairrm.separate_combining(text) == text


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = pairrm.pad([torch.tensor([1, 5, 2]), torch.tensor([1])], WordTokenizer())
    assert ids.tolist() == [[1, 5, 2], [1, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def encoded(lengths: list[int], indices: list[int]) -> pairrm.EncodedTexts:
    """A prompt and candidates of so many tokens, each of its own id."""
    source, *candidates = (torch.full((length,), 10 + index) for index, length in enumerate(lengths))
    return pairrm.EncodedTexts(source, candidates, indices, False, 0)


PROMPTS = st.lists(
    st.integers(1, 4).flatmap(
        lambda distinct: st.builds(
            encoded,
            st.lists(st.integers(1, 30), min_size=distinct + 1, max_size=distinct + 1),
            st.lists(st.integers(0, distinct - 1), min_size=2, max_size=5),
        )
    ),
    max_size=4,
)


@given(PROMPTS, st.integers(1, 300))
def test_every_ordered_pair_is_scored_once_in_batches_that_fit(
    prompts: list[pairrm.EncodedTexts], tokens_per_batch: int
) -> None:
    batches: list[list[pairrm.Triple]] = []

    def forward(batch: list[pairrm.Triple]) -> torch.Tensor:
        """A logit that tells which of the candidates are on the left and on the right."""
        batches.append(batch)
        return torch.tensor([100.0 * float(left[0]) + float(right[0]) for _, left, right in batch])

    logits = pairrm.pair_logits(forward, prompts, tokens_per_batch)
    for matrix, texts in zip(logits, prompts, strict=True):
        assert matrix.dtype == torch.float32
        for (i, one), (j, other) in itertools.product(enumerate(texts.indices), repeat=2):
            assert matrix[i, j] == (0 if one == other else 100 * (11 + one) + 11 + other)
    count = sum(len(texts.candidates) * (len(texts.candidates) - 1) for texts in prompts)
    assert sum(len(batch) for batch in batches) == count
    for batch in batches:
        longest = max(sum(len(text) for text in triple) for triple in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens_per_batch


class OwnRanker(torch.nn.Module):
    """In the place of llm-blender's: a logit of a triple is the scaled difference of its responses' last tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float16))
        self.seen: list[list[torch.Tensor]] = []

    def _forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(list(inputs[::2]))
        left, right = (ids[:, 2].to(self.weight.dtype) for ids in (inputs[2], inputs[4]))
        return {"logits": self.weight * (left - right) / 7}


def make_blender() -> Any:
    tokenizer = WordTokenizer()
    vars(tokenizer).update(vocab_size=500, cls_token_id=CLS)
    collator = SimpleNamespace(source_maxlength=100, candidate_maxlength=50)
    config = SimpleNamespace(device="cpu")
    return SimpleNamespace(ranker_tokenizer=tokenizer, ranker_collator=collator, ranker=OwnRanker(), ranker_config=config)


def compute_errors(triples: list[pairrm.Triple]) -> tuple[torch.Tensor, torch.Tensor]:
    """OwnRanker's exact logits of triples, and the errors of half precision."""
    weight = float(torch.tensor(0.1, dtype=torch.float16))
    pairs = [[int(text[2]) for text in triple[1:]] for triple in triples]
    exact = torch.tensor([weight * (left - right) / 7 for left, right in pairs], dtype=torch.float64)
    halves = torch.tensor([left - right for left, right in pairs], dtype=torch.float16) * torch.tensor(0.1, dtype=torch.float16)
    return exact, (halves / 7).double() - exact


@pytest.mark.parametrize(
    ("times", "added", "accepted"), [(3.9, 0, True), (0, 9e-4, True), (4, 2e-3, False), (0, math.nan, False)]
)
def test_a_forward_pass_may_err_as_half_precision_does(times: float, added: float, accepted: bool) -> None:
    """Four times as much and 0.001, against llm-blender's forward pass in float32; the weights stay as they are."""
    blender, sizes = make_blender(), []

    def forward(triples: list[pairrm.Triple]) -> torch.Tensor:
        sizes.append((len(triples), max(sum(map(len, triple)) for triple in triples)))
        exact, errors = compute_errors(triples)
        assert errors.square().mean().sqrt() > 1e-5
        return exact + times * errors + (added if times == 0 else added * errors.sign())

    if accepted:
        pairrm.check_parity(blender, forward)
    else:
        with pytest.raises(StageError) as error:
            pairrm.check_parity(blender, forward)
        assert_message(str(error.value), "fused attention", "other logits", "set rank.attention to plain")
    assert sizes == [(12, 200), (2, 12), (1, 200)]  # alone and short, too
    assert blender.ranker.weight.dtype == torch.float16
    assert blender.ranker.weight == torch.tensor(0.1, dtype=torch.float16)


def test_what_a_compiler_raises_is_one_line_and_lack_of_memory_stays() -> None:
    def fail(error: Exception) -> pairrm.Forward:
        def forward(_: list[pairrm.Triple]) -> torch.Tensor:
            raise error

        return forward

    with pytest.raises(StageError) as caught:
        pairrm.check_parity(make_blender(), fail(NotImplementedError("no compiler\nwas found")))
    assert_message(str(caught.value), "no compiler was found", "set rank.attention to plain")
    with pytest.raises(torch.OutOfMemoryError):
        pairrm.check_parity(make_blender(), fail(torch.OutOfMemoryError("no memory")))


def test_the_check_has_texts_of_all_lengths_with_one_marker_each() -> None:
    triples = pairrm.sample_triples(make_blender())
    lengths = [[len(text) for text in triple] for triple in triples]
    assert [4, 4, 4] in lengths
    assert [100, 50, 50] in lengths
    assert len({sum(each) for each in lengths}) == len(triples) / 2
    for (text, left, right), (again, other, first) in zip(triples[::2], triples[1::2], strict=True):
        assert text is again
        assert (left is first, right is other) == (True, True)
        for ids, marker in ((text, SOURCE), (left, CANDIDATE), (right, CANDIDATE)):
            assert ids[:2].tolist() == [CLS, marker]
            assert [position for position, token in enumerate(ids.tolist()) if token in WORDS.values()] == [1, len(ids) - 1]


@pytest.mark.parametrize(
    ("device", "attention", "supported", "fusable", "expected"),
    [
        ("cpu", "fused", True, True, {}),
        ("cpu", "plain", True, False, {}),
        ("cpu", "fused", False, False, None),
        ("cuda", "fused", True, True, {"fused": True}),
        ("cuda", "plain", True, True, None),
    ],
)
def test_the_forward_pass_is_that_of_the_device_and_the_parameter(
    monkeypatch: pytest.MonkeyPatch, device: str, attention: str, supported: bool, fusable: bool, expected: Any
) -> None:
    """A fused one is checked before it is used."""
    checked: list[Any] = []
    monkeypatch.setattr(pairrm.deberta, "is_supported", lambda _: supported)
    monkeypatch.setattr(pairrm.deberta, "is_fusable", lambda _: fusable)
    monkeypatch.setattr(pairrm.deberta, "project_distances", lambda _: "distances")
    monkeypatch.setattr(pairrm, "check_parity", lambda *arguments: checked.append(arguments))
    blender = SimpleNamespace(ranker=SimpleNamespace(pretrained_model=None), ranker_config=SimpleNamespace(device=device))
    forward: Any = pairrm.select_forward(blender, attention)
    if expected is None:
        assert (forward.func, forward.args) == (pairrm.run_llm_blender, (blender,))
    else:
        assert (forward.func, forward.args, forward.keywords) == (pairrm.run_deberta, (blender, "distances"), expected)
    assert checked == ([(blender, forward)] if device == "cuda" and attention == "fused" else [])


def test_a_ranker_that_the_kernel_does_not_support_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairrm.deberta, "is_fusable", lambda _: False)
    blender = SimpleNamespace(ranker=SimpleNamespace(pretrained_model=None), ranker_config=SimpleNamespace(device="cuda"))
    with pytest.raises(StageError) as error:
        pairrm.select_forward(blender, "fused")
    assert_message(str(error.value), "rank.attention", "fused does not support this ranker", "set rank.attention to plain")


def test_replaced_attributes_are_restored() -> None:
    module = ModuleType("module")
    module.kept = 1  # type: ignore[attr-defined]

    def fail() -> None:
        with pairrm.replace_attributes(module, kept=2, added=3):
            assert (module.kept, module.added) == (2, 3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module.kept == 1
    assert not hasattr(module, "added")


def test_importing_llm_blender_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    import transformers.utils.hub

    logging.disable(logging.DEBUG)
    try:
        with pairrm.import_llm_blender():
            assert transformers.utils.hub.TRANSFORMERS_CACHE
            logging.getLogger().warning("hidden")
            print("hidden")
        assert logging.root.manager.disable == logging.DEBUG
    finally:
        logging.disable(logging.NOTSET)
    assert not hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE")
    assert "hidden" not in "".join(capsys.readouterr())


def make_folder(folder: Path, **config: Any) -> Path:
    """Make a ranker's folder with PairRM alone, and return the path of its weights."""
    (folder / "PairRM").mkdir()
    (folder / "PairRM" / "config.json").write_text(json.dumps(config))
    weights = folder / "PairRM" / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, weights)
    return weights


def test_corrupted_weights_of_a_ranker_are_rejected(tmp_path: Path) -> None:
    weights = make_folder(tmp_path, ranker_type="pairranker")
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(StageError) as error:
        pairrm.check_ranker(tmp_path)
    assert_message(str(error.value), "model.safetensors", "corrupted")


def test_a_ranker_of_another_kind_or_without_its_base_is_rejected(tmp_path: Path) -> None:
    make_folder(tmp_path, ranker_type="another")
    with pytest.raises(StageError) as error:
        pairrm.check_ranker(tmp_path)
    assert_message(str(error.value), "PairRM/config.json", "'ranker_type'", "assets.ranker")
    (tmp_path / "PairRM" / "config.json").write_text(json.dumps({"ranker_type": "pairranker"}))
    with pytest.raises(StageError) as error:
        pairrm.check_ranker(tmp_path)
    assert_message(str(error.value), str(tmp_path / "base"), "missing")


def make_ranker(folder: Path) -> Path:
    """Make a ranker's folder that can be checked, if not loaded, and return the path of its weights."""
    weights = make_folder(folder, ranker_type="pairranker", source_maxlength=10)
    make_model(folder / "base")
    pairrm.check_ranker(folder)
    return weights


def refuse(folder: Path, *parts: str) -> None:
    with pytest.raises(StageError) as error:
        pairrm.check_ranker(folder)
    assert_message(str(error.value), *parts)


def test_weights_of_a_ranker_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """llm-blender would convert integers and 8-bit numbers to floating-point numbers without a word."""
    weights = make_ranker(tmp_path)
    for value in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            save_file({"head": torch.zeros(2), "layer": torch.tensor([[0, value]], dtype=dtype)}, weights)
            refuse(tmp_path, str(weights), "'layer'", "NaN or an infinity")
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2):
        save_file({"head": torch.zeros(2), "layer": torch.zeros(2).to(dtype)}, weights)
        refuse(tmp_path, str(weights), "'layer'", "not supported")


def test_settings_of_a_ranker_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    make_ranker(tmp_path)
    for folder, key, value in (("base", "layer_norm_eps", -1e-7), ("base", "some", math.nan), ("PairRM", "drop_out", math.nan)):
        config = tmp_path / folder / "config.json"
        before = config.read_text()
        edit_json(config, **{key: value})
        refuse(tmp_path, str(config), key)
        config.write_text(before)
    pairrm.check_ranker(tmp_path)


def test_a_ranker_in_several_files_or_none_of_an_index_is_refused(tmp_path: Path) -> None:
    weights = make_ranker(tmp_path)
    index = weights.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"weight": "shard.safetensors"}}))
    refuse(tmp_path, "shard.safetensors", "missing")
    shutil.copyfile(weights, weights.with_name("shard.safetensors"))
    refuse(tmp_path, index.name, "remove")
    weights.unlink()
    refuse(tmp_path, str(index), "save", "model.safetensors", "remove the index")
    index.unlink()
    weights.with_name("shard.safetensors").rename(weights)
    pairrm.check_ranker(tmp_path)


@pytest.mark.slow
def test_logits_and_scores_are_llm_blenders_own(ranker: Path, tmp_path: Path) -> None:
    """Those of `rank` with one prompt per batch, and of `compare` for every ordered pair."""
    set_params(tmp_path, OVERRIDES)
    responses = write_responses(ROWS, tmp_path / "responses.parquet")
    options = ("--ranker", ranker, "--responses", responses, "--out", "rankings.parquet")
    done = run_stage(tmp_path, "rank", *options, SPPO_WORKERS="1")
    assert done.returncode == 0, done.stderr
    oracle = [PYTHON, ROOT / "tests/oracles/blender_scores.py", ranker, responses, tmp_path / "oracle.json"]
    subprocess.run([*map(str, oracle)], check=True, capture_output=True)
    expected: dict[str, Any] = json.loads((tmp_path / "oracle.json").read_text())
    rows = tables.read(tmp_path / "rankings.parquet", schemas.RANKINGS).to_pylist()
    for row, scores, logits in zip(rows, expected["scores"], expected["logits"], strict=True):
        actual = torch.tensor(row["logits"])
        torch.testing.assert_close((actual - actual.T).mean(-1), torch.tensor(scores), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(actual, torch.tensor(logits), atol=1e-5, rtol=1e-5)
        pairwise = sppo.pairwise_scores(actual.double(), 0.5)
        assert row["probabilities"] == pytest.approx(sppo.win_probabilities(pairwise).tolist())
        assert (row["chosen"], row["rejected"]) == tuple(int(index) for index in sppo.choose_pair(pairwise))
        assert not row["tie"]
        assert actual.diagonal().tolist() == [0.0] * 3

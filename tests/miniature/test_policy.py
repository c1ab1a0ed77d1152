import random

import pytest

from stages.method.chat import prompt_ids
from stages.miniature import policy
from stages.runtime.params import MiniaturePolicy

EXAMPLES = [("What is 1 plus 2?", "The answer is 3."), ("Name three tools.", "Three tools are saw, rake, spade. So long!")] * 40
SIZE = MiniaturePolicy(hidden_size=32, layers=1, vocabulary=300, right_answers=1, mixed_answers=1, learning_rate=1e-3)


def test_the_tokenizer_round_trips_any_text_and_has_llama_3_s_chat_template() -> None:
    tokenizer = policy.make_tokenizer(EXAMPLES, 300)
    assert len(tokenizer) <= 300
    for text in ("Name three tools.", "né \x00 日本語"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(prompt_ids(tokenizer, " Hi ")) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_only_the_answer_s_tokens_are_trained_on() -> None:
    tokenizer = policy.make_tokenizer(EXAMPLES, 300)
    batches = policy.make_batches(tokenizer, EXAMPLES, random.Random(0))
    assert sorted(map(len, batches)) == [16, 32, 32]
    answers = {answer for _, answer in EXAMPLES}
    for ids, labels in (row for batch in batches for row in batch):
        start = labels.count(policy.IGNORED)
        assert ids[start:] == labels[start:]
        assert ids[:start] != labels[:start] == [policy.IGNORED] * start
        assert tokenizer.decode(ids[start:]).removesuffix("<|eot_id|>") in answers
        assert ids[-1] == tokenizer.eos_token_id


def test_batches_hold_examples_of_similar_lengths() -> None:
    tokenizer = policy.make_tokenizer(EXAMPLES, 300)
    lengths = [[len(ids) for ids, _ in batch] for batch in policy.make_batches(tokenizer, EXAMPLES, random.Random(0))]
    lengths.sort()
    assert [length for batch in lengths for length in batch] == sorted(length for batch in lengths for length in batch)


def test_the_learning_rate_warms_up_and_decays_to_five_percent() -> None:
    schedule = policy.make_schedule(1000)
    assert [schedule(0), schedule(24)] == [pytest.approx(0.02), pytest.approx(0.5 * 0.976)]
    assert schedule(500) == pytest.approx(0.5)
    assert schedule(999) == 0.05


def test_the_model_stops_at_both_end_tokens() -> None:
    tokenizer = policy.make_tokenizer(EXAMPLES, 300)
    model = policy.build_model(SIZE, tokenizer)
    ends = tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert ends == ["<|end_of_text|>", "<|eot_id|>"]
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

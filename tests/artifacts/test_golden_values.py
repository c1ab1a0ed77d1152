"""Token IDs of prompts, compared with the encoders of the models' makers: Meta's ChatFormat and Mistral's mistral-common.

The tokenizers are made from the makers' own files, in the format of the Hub's tokenizer.json and with the Hub's chat templates;
whether a pinned repository has the same ones, its golden token IDs show (assets.policy.golden). Two differences are expected:

- Llama 3's template on the Hub trims the prompt, and so did the code that Meta released with the model
  (meta-llama/llama3, llama/tokenizer.py). The package llama-models does not.
- Text that spells a special token is encoded as that token, as by vLLM, transformers and the released code. The makers' own
  encoders treat it as any other text.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts.golden import check_golden
from stages.method import chat
from stages.runtime.errors import StageError
from stages.runtime.params import GoldenChat
from stages.tools.hub import GOLDEN_PROMPTS
from support.messages import assert_message
from support.models import edit_json
from support.smollm2 import read_instructions

pytestmark = pytest.mark.slow

LLAMA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Of Mistral-7B-Instruct-v0.1 and v0.2; that of v0.3 has no space before [/INST]."""
TEXTS = [*read_instructions("instructions"), *read_instructions("hostile"), *GOLDEN_PROMPTS]

Encode = Callable[[str], list[int]]


class Llama:
    """Llama 3's tokenizer, as on the Hub and by Meta."""

    def __init__(self, folder: Path) -> None:
        from llama_models.llama3 import tokenizer as meta
        from llama_models.llama3.chat_format import ChatFormat
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter

        self.meta = meta.Tokenizer.get_instance()
        self.format = ChatFormat(self.meta)
        file = Path(meta.__file__).parent / "tokenizer.model"
        self.special = list(self.meta.special_tokens)
        backend = TikTokenConverter(str(file), self.meta.pat_str, extra_special_tokens=self.special).converted()
        made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
        made.chat_template = LLAMA_TEMPLATE
        made.save_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def by_meta(self, prompt: str) -> list[int]:
        from llama_models.datatypes import RawMessage

        tokens: list[int] = self.format.encode_dialog_prompt([RawMessage(role="user", content=prompt)]).tokens
        return tokens

    def by_meta_with_special_tokens(self, prompt: str) -> list[int]:
        """Encode as `by_meta`, but text that spells a special token as that token."""
        head, tail = self.by_meta("")[:5], self.by_meta("")[5:]
        return head + self.meta.encode(prompt, bos=False, eos=False, allowed_special="all") + tail


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama(tmp_path_factory.mktemp("llama-3"))


def test_llama_3_encodes_prompts_as_meta_does(llama: Llama) -> None:
    ids = {text: chat.prompt_ids(llama.tokenizer, text) for text in TEXTS}
    differ = [text for text in TEXTS if ids[text] != llama.by_meta(text)]
    trimmed = [text for text in TEXTS if text != text.strip()]
    special = [text for text in TEXTS if any(token in text for token in llama.special)]
    assert differ == [text for text in TEXTS if text in trimmed or text in special]
    assert trimmed
    assert special
    for text in TEXTS:
        assert ids[text] == llama.by_meta_with_special_tokens(text.strip()), repr(text)


def test_llama_3_encodes_any_text_as_meta_does(llama: Llama) -> None:
    @given(st.text(st.characters(codec="utf-8"), max_size=40))
    def compare(text: str) -> None:
        assert chat.prompt_ids(llama.tokenizer, text) == llama.by_meta_with_special_tokens(text.strip())

    compare()


class Mistral:
    """A tokenizer of Mistral, as on the Hub and by Mistral's own package.

    version: v1, that of Mistral-7B-Instruct-v0.1 and v0.2, or v3, that of v0.3.
    """

    def __init__(self, folder: Path, version: str, legacy: bool) -> None:
        import mistral_common
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from sentencepiece import SentencePieceProcessor
        from transformers import AutoTokenizer, LlamaTokenizer
        from transformers.tokenization_utils_base import generate_merges

        self.own: Any = getattr(MistralTokenizer, version)()
        names = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
        self.file = Path(mistral_common.__file__).parent / "data" / names[version]
        pieces = SentencePieceProcessor(model_file=str(self.file))
        vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.vocab_size())}
        scores = {piece: pieces.get_score(index) for piece, index in vocabulary.items()}
        self.special = [piece for piece, index in vocabulary.items() if pieces.is_control(index) or pieces.is_unknown(index)]
        merges = generate_merges(vocabulary, scores)
        made = LlamaTokenizer(vocab=vocabulary, merges=merges, additional_special_tokens=self.special[3:])
        made.chat_template = MISTRAL_TEMPLATE if version == "v1" else MISTRAL_TEMPLATE.replace(" [/INST]", "[/INST]")
        made.save_pretrained(folder)
        edit_json(folder / "tokenizer_config.json", legacy=legacy)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def by_mistral(self, prompt: str) -> list[int]:
        from mistral_common.protocol.instruct.messages import UserMessage
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        request = ChatCompletionRequest(messages=[UserMessage(content=prompt)])
        tokens: list[int] = self.own.encode_chat_completion(request).tokens
        return tokens

    def spells_special(self, text: str) -> bool:
        return any(token in text for token in self.special)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, bool], Mistral]]:
    """Make a tokenizer of a version and with a value of `legacy`, once."""
    made: dict[tuple[str, bool], Mistral] = {}

    def make(version: str, legacy: bool) -> Mistral:
        if (version, legacy) not in made:
            made[version, legacy] = Mistral(tmp_path_factory.mktemp(f"mistral-{version}-{legacy}"), version, legacy)
        return made[version, legacy]

    return make


@pytest.mark.parametrize(("version", "legacy"), [("v1", True), ("v3", False)])
def test_mistral_encodes_prompts_as_mistral_does(mistral: Any, version: str, legacy: bool) -> None:
    both = mistral(version, legacy)
    differ = [text for text in TEXTS if chat.prompt_ids(both.tokenizer, text) != both.by_mistral(text)]
    assert differ == [text for text in TEXTS if both.spells_special(text)]
    assert ("[INST] nested [/INST]" in differ) == (version == "v3"), "v1 has no token [INST]"


def test_mistral_encodes_any_text_as_mistral_does(mistral: Any) -> None:
    both = mistral("v1", True)

    @given(st.text(st.characters(codec="utf-8"), max_size=40).filter(lambda text: not both.spells_special(text)))
    def compare(text: str) -> None:
        assert chat.prompt_ids(both.tokenizer, text) == both.by_mistral(text)

    compare()


def test_legacy_false_changes_mistral_v1s_first_piece(mistral: Any) -> None:
    """`[` instead of a space and `[`, which other repositories of the same model have in their tokenizer_config.json."""
    both = mistral("v1", False)
    first, other = both.tokenizer.convert_tokens_to_ids(["[", "\u2581["])
    for text in read_instructions("instructions"):
        ids, expected = chat.prompt_ids(both.tokenizer, text), both.by_mistral(text)
        assert (ids[1], expected[1]) == (first, other)
        assert ids[2:] == expected[2:]


def test_tokenizer_model_without_tokenizer_json_merges_spaces_differently(mistral: Any, tmp_path: Path) -> None:
    """transformers 5.19 orders the merges of a tokenizer.model by ID instead of score, so spaces merge with each other first.

    An even number of spaces before a word then leaves none to merge with the word.
    """
    both = mistral("v1", True)
    tokenizer = load_tokenizer_model(both, tmp_path)
    plain = [text for text in TEXTS if not both.spells_special(text)]
    differ = [text for text in plain if chat.prompt_ids(tokenizer, text) != both.by_mistral(text)]
    assert differ == [text for text in plain if re.search("(?<! )(?:  )+(?! )", f"[INST] {text} [/INST]")]
    assert len(differ) > 3


def load_tokenizer_model(both: Mistral, folder: Path) -> Any:
    from transformers import AutoTokenizer

    shutil.copyfile(both.file, folder / "tokenizer.model")
    values = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": MISTRAL_TEMPLATE}))
    return AutoTokenizer.from_pretrained(folder)


def test_golden_prompts_tell_these_tokenizers_and_templates_apart(mistral: Any, llama: Llama, tmp_path: Path) -> None:
    golden = [GoldenChat(text=text, ids=chat.prompt_ids(mistral("v1", True).tokenizer, text)) for text in GOLDEN_PROMPTS]
    check_golden(mistral("v1", True).tokenizer, golden, "assets.policy.golden")
    for other in (mistral("v1", False), mistral("v3", False), llama):
        with pytest.raises(StageError) as error:
            check_golden(other.tokenizer, golden, "assets.policy.golden")
        assert_message(str(error.value), "params.yaml", "assets.policy.golden.0", "token")
    with pytest.raises(StageError) as error:
        check_golden(load_tokenizer_model(mistral("v1", True), tmp_path), golden, "assets.policy.golden")
    assert_message(str(error.value), "assets.policy.golden.1", repr(GOLDEN_PROMPTS[1]))

    golden = [GoldenChat(text=text, ids=chat.prompt_ids(llama.tokenizer, text)) for text in GOLDEN_PROMPTS]
    llama.tokenizer.chat_template = LLAMA_TEMPLATE.replace(" | trim", "")
    try:
        with pytest.raises(StageError) as error:
            check_golden(llama.tokenizer, golden, "assets.policy.golden")
    finally:
        llama.tokenizer.chat_template = LLAMA_TEMPLATE
    assert_message(str(error.value), "assets.policy.golden.1", repr(GOLDEN_PROMPTS[1]))

"""Chat templates and token boundaries, for generate, reference, train and answer alike.

A prompt's tokens end where the assistant's first token is to be sampled; a response's tokens are the sampled ones,
with the end token when the model finished and without it when it was cut. They are never decoded and encoded again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.cli import StageError, reason

Lengths = npt.NDArray[np.integer[Any]]
"""Numbers of tokens."""


def prompt_text(tokenizer: Any, prompt: str) -> str:
    """One user message and the assistant's header in the chat template of a transformers tokenizer.

    Raises StageError where there is no template, or where it fails.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise StageError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: use a chat model")
    messages = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        raise StageError(
            f"the chat template of {tokenizer.name_or_path} fails for one user message ({reason(error)}): mend it there, or "
            "use another chat model"
        ) from error
    return text


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of `prompt_text`. Raises StageError where there is no template, or as `text_ids` does."""
    return text_ids(tokenizer, prompt_text(tokenizer, prompt))


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that `prompt_text` gave, with exactly one BOS where the tokenizer has one.

    Raises StageError where the template gives no BOS or several.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and (ids[:1] != [bos] or ids[1:2] == [bos]):
        found = "no BOS token" if ids[:1] != [bos] else "more than one BOS token"
        raise StageError(f"the chat template of {tokenizer.name_or_path} gives {found}: it must give exactly one")
    return ids


def marked(tokenizer: Any, prompts: Sequence[Sequence[int]]) -> int:
    """How many prompts, by the ids of `prompt_ids`, hold special tokens besides the template's.

    A prompt's text that reads like one becomes one, `<|eot_id|>` for example, in vLLM's and transformers' tokenization of
    chats and so in the released code.
    """
    special = set(tokenizer.all_special_ids) | {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = sum(token in special for token in prompt_ids(tokenizer, "x"))
    return sum(sum(token in special for token in ids) > own for ids in prompts)


def fit(prompts: Lengths, responses: Lengths, *, longest_prompt: int, longest: int) -> tuple[Lengths, Lengths]:
    """How many of their tokens training holds: the last ones of prompts, (N,), the first ones of their responses, (K, N).

    Of a prompt longest_prompt, of each response as many as fit into `longest` together with it.
    """
    kept = np.minimum(prompts, longest_prompt)
    return kept, np.minimum(responses, longest - kept)

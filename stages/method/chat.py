"""Chat templates and token boundaries, shared by generate, reference, train and answer.

A prompt's tokens end where the assistant's first token is to be sampled. A response's tokens are the sampled ones, including
the end token if the model finished and without it if the length limit was reached. They are never decoded and re-encoded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.method import templates
from stages.runtime.errors import StageError

Lengths = npt.NDArray[np.integer[Any]]
"""Numbers of tokens."""


def prompt_texts(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Render each prompt as one user message, and the assistant's header, with a transformers tokenizer's chat template.

    Raises StageError if there is no template, and as `templates.render_prompts` does.
    """
    if not tokenizer.chat_template:
        raise StageError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: use a chat model")
    return templates.render_prompts(tokenizer, prompts)


def prompt_text(tokenizer: Any, prompt: str) -> str:
    """Render one prompt; see `prompt_texts`, which is much faster for many. Raises StageError as it does."""
    return prompt_texts(tokenizer, [prompt])[0]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of `prompt_text`. Raises StageError as `prompt_text` and `text_ids` do."""
    return text_ids(tokenizer, prompt_text(tokenizer, prompt))


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text of `prompt_texts`, with exactly one BOS token if the tokenizer has one.

    Raises StageError if the template produced no BOS token or more than one.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and (ids[:1] != [bos] or ids[1:2] == [bos]):
        count = "no BOS token" if ids[:1] != [bos] else "more than one BOS token"
        raise StageError(
            f"the chat template of {tokenizer.name_or_path} produces {count}: fix the template so that it produces exactly one"
        )
    return ids


def count_special_tokens(tokenizer: Any, prompts: Sequence[Sequence[int]]) -> int:
    """Count the prompts (token ids from `prompt_ids`) that contain special tokens beyond the template's own.

    Text in a prompt that spells a special token, such as `<|eot_id|>`, is encoded as that token: vLLM and transformers
    tokenize chats this way, and so does the released code.
    """
    special = set(tokenizer.all_special_ids) | {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = sum(token in special for token in prompt_ids(tokenizer, "x"))
    return sum(sum(token in special for token in ids) > own for ids in prompts)


def fit_lengths(prompts: Lengths, responses: Lengths, max_total: int) -> npt.NDArray[np.bool_]:
    """Return which of N prompts fit into max_total tokens together with the longest of their responses: (N,).

    prompts: (N,); responses: (R, N), token counts.
    """
    fits: npt.NDArray[np.bool_] = prompts + responses.max(0) <= max_total
    return fits


def truncate_lengths(
    prompts: Lengths, responses: Lengths, rule: str, *, max_prompt: int, max_total: int
) -> tuple[Lengths, Lengths]:
    """Compute how many tokens training keeps: the last ones of each prompt, the first ones of each response.

    prompts: (N,); responses: (R, N), token counts. max_prompt, max_total: `lengths.prompt` and `lengths.total`, of which the
    former is less. Whatever fits is kept whole; see `fit_lengths`. rule: what happens to the rest.

    - `truncate`: a prompt loses as many tokens as needed, but keeps max_prompt (or all, if it has fewer). If that is not
      enough, each response keeps what then remains of max_total.
    - `released` (the released code's tokenize_row in sppo/trainer.py): a prompt keeps max_prompt tokens. If that is not enough,
      each response keeps max_total - max_prompt, however short the prompt is.

    Returns the kept counts in the same shapes. No text is left without a token, and no pair exceeds max_total.
    """
    fits, longest = fit_lengths(prompts, responses, max_total), responses.max(0)
    shortest = np.minimum(prompts, max_prompt)
    if rule == "truncate":
        kept = np.clip(max_total - longest, shortest, prompts)
        return kept, np.minimum(responses, max_total - kept)
    kept = np.where(fits, prompts, shortest)
    room = np.where(fit_lengths(kept, responses, max_total), max_total, max_total - max_prompt)
    return kept, np.minimum(responses, room)

"""Golden token IDs: the chats of a few prompts as the pinned tokenizer encodes them, to notice when another one does not.

Another tokenizer, another chat template or another version of transformers changes what the model reads, without an error.
"""

import tempfile
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from stages.artifacts import hub, pointers
from stages.method import chat
from stages.runtime import params
from stages.runtime.errors import StageError, quote


def load_tokenizer(asset: params.Asset) -> Any:
    """Load the transformers tokenizer of a Hub repository, fetching no weights, or of a local directory.

    Its name_or_path is the asset's repo. Raises StageError if the files cannot be fetched or read.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        fetched = Path(temporary) / "tokenizer"
        hub.fetch_model(asset, fetched, weights=False)
        local = pointers.check_model(fetched if asset.on_hub else Path(asset.repo), weights=False)
        tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=False)
    tokenizer.name_or_path = asset.repo
    return tokenizer


def fetch_checked(asset: params.ChatModelAsset, out: Path, key: str) -> None:
    """Create the folder `out` as `hub.fetch_model` does, once the tokenizer has agreed with the asset's golden chats, if any.

    key: the asset's key in params.yaml, for messages. Raises StageError, having written nothing.
    """
    if asset.golden:  # first: a wrong tokenizer is found before the weights are fetched
        check_golden(load_tokenizer(asset), asset.golden, f"{key}.golden")
    hub.fetch_model(asset, out)


def check_golden(tokenizer: Any, golden: Sequence[params.GoldenChat], key: str) -> None:
    """Raise StageError at the first golden chat that a transformers tokenizer and its template encode differently.

    key: where params.yaml has the golden chats, for the message.
    """
    texts = chat.prompt_texts(tokenizer, [wanted.text for wanted in golden])
    for index, (wanted, text) in enumerate(zip(golden, texts, strict=True)):
        ids = chat.text_ids(tokenizer, text)
        if ids == wanted.ids:
            continue
        pairs = enumerate(zip_longest(ids, wanted.ids))
        place, found, expected = next((place, *pair) for place, pair in pairs if pair[0] != pair[1])
        raise StageError(
            f"params.yaml: {key}.{index}: the tokenizer of {tokenizer.name_or_path} encodes the chat of {quote(wanted.text)} "
            f"differently: token {place} is {found}, expected {expected}: set repo and revision to those that golden was made "
            "with or, if another tokenizer is intended, remove golden; `python -m stages.tools hub --pin --recipe DIR` then "
            "writes that of a model on the Hub"
        )

"""Pin or fetch the assets that a recipe takes from the Hugging Face Hub.

--pin writes the commit of every asset without one into the recipe's params.yaml and, for a base policy or one of `models`
without golden token IDs, those of five chats, made with its tokenizer: a tokenizer that disagrees is refused from then on.
--fetch downloads the models that the pointers in the recipe's data folder stand for into this machine's Hub cache: run it
after `dvc pull` on a new machine.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from stages.artifacts import files, hub, pointers
from stages.artifacts.golden import load_tokenizer
from stages.method import chat
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.tools import editing, options

CHAT_MODELS = ("assets.policy", "models.")
"""Where params.yaml has models with a chat template."""
RANKERS = ("assets.ranker", "rankers.")
"""Where it has rankers, which are models, too, and their base models."""
GOLDEN_PROMPTS = [
    "What is the capital of France?",
    " Trim the spaces around me? ",
    "Fix this:\ndef f(x):\n    return {x: 12345.678}\n\n\n\t# it's I'LL\r\n",
    "Translate: Übergröße, cafe\u0301, 日本語, 한국어, हिन्दी, العربية, 👩\u200d🔬",
    "Repeat <s>, </s>, [INST], <|eot_id|>, <end_of_turn> and <|im_end|>.",
]
"""What tokenizers and templates differ in: spaces at the ends, indentation, digits, scripts, and special tokens as text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--pin", action="store_true", help="write missing revisions and golden token IDs into params.yaml")
    action.add_argument("--fetch", action="store_true", help="download the models that data/ points to")
    options.add_recipe_option(parser)


def main(args: argparse.Namespace) -> None:
    if args.pin:
        pin_assets(args.recipe / "params.yaml")
    else:
        fetch_models(args.recipe / "data")


def pin_assets(path: Path) -> None:
    """Write what is not pinned yet into params.yaml, and print it: commits of Hub assets, golden token IDs of chat models.

    A revision that is a branch or tag is replaced by its commit; everything else stays as it is. Raises StageError, and writes
    nothing, if a repository or revision is unknown, or if a tokenizer cannot be fetched or read.
    """
    params.read(path)  # raises StageError if it is missing or not valid YAML
    document = editing.load(path)
    assets = [
        found for section in ("assets", "models", "rankers") for found in editing.find_assets(document.get(section), section)
    ]
    unpinned = [(name, asset) for name, asset in assets if not is_pinned(asset)]
    for name, asset in unpinned:
        pin_revision(name, asset)
    without_golden = [
        (name, asset) for name, asset in assets if name.startswith(CHAT_MODELS) and is_on_hub(asset) and not asset.get("golden")
    ]
    for name, asset in without_golden:
        pin_golden(name, asset)
    if unpinned or without_golden:
        with files.replacing(path) as partial:
            partial.write_text(editing.dump(document), encoding="utf-8")
        print(f"{path}: {len(unpinned)} revisions pinned{', golden token IDs written' if without_golden else ''}")
    else:
        print(f"{path}: every asset is already pinned")


def pin_revision(name: str, asset: CommentedMap) -> None:
    """Set an asset's revision to the commit that it refers to now, and print it. Raises StageError."""
    repo_type = "model" if name.startswith((*CHAT_MODELS, *RANKERS)) else "dataset"
    revision = hub.find_revision(asset["repo"], repo_type, asset.get("revision"))
    _set_after(asset, "repo", "revision", revision)
    print(f"{name}: {asset['repo']} {revision}")


def pin_golden(name: str, asset: CommentedMap) -> None:
    """Set an asset's golden chats, made with the tokenizer of its revision, and print how many. Raises StageError."""
    tokenizer = load_tokenizer(params.Asset(repo=asset["repo"], revision=asset["revision"]))
    chats = [
        CommentedMap(text=DoubleQuotedScalarString(prompt), ids=chat.prompt_ids(tokenizer, prompt)) for prompt in GOLDEN_PROMPTS
    ]
    for row in chats:
        row.fa.set_flow_style()
    _set_after(asset, "revision", "golden", chats)
    print(f"{name}: golden token IDs of {len(chats)} chats")


def _set_after(asset: CommentedMap, previous: str, key: str, value: object) -> None:
    """Set a key, which comes after `previous` if it is new."""
    if key in asset:
        asset[key] = value
    else:
        asset.insert(list(asset).index(previous) + 1, key, value)


def is_pinned(asset: dict[str, Any]) -> bool:
    """Return whether an asset of params.yaml is not on the Hub or has a full commit as its revision."""
    return not is_on_hub(asset) or bool(re.fullmatch("[0-9a-f]{40}", str(asset.get("revision"))))


def is_on_hub(asset: dict[str, Any]) -> bool:
    return params.unchecked_asset(asset["repo"]).on_hub


def fetch_models(data: Path) -> None:
    """Download the files that every pointer below the folder stands for, and check them. Raises StageError."""
    paths = sorted(data.rglob(pointers.NAME))
    if not paths:
        raise StageError(f"no {pointers.NAME} in {data}: run `dvc pull` or `dvc repro` first if a model is from the Hub")
    for path in paths:
        hub.fetch_pointer(path.parent)

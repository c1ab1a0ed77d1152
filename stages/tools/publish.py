"""Upload a trained model and its card to the Hugging Face Hub.

python -m stages.tools publish ITERATION --to ORG/NAME [--recipe DIR] [--yes]

Without --yes, it only lists the files and shows the card. The experiment must be complete and committed, because the card names
the commit, and the base model's licence must allow sharing. All files arrive in one commit on the Hub. If an upload is
interrupted, the same command resumes: files that have arrived are not sent again.
"""

import argparse
import hashlib
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.artifacts import files, hub, pointers
from stages.reporting import cards
from stages.runtime import params
from stages.runtime.errors import StageError, one_line
from stages.runtime.paths import ROOT
from stages.tools import attest, git, options, revisions, sync

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
LICENSE_FILES = ["LICENSE*", "USE_POLICY*", "NOTICE*", "Notice*"]
"""Files of the base model's repository that go with its weights, and so with those trained from them.

Sections that ask for a copy of the licence: 4(a) of Apache-2.0 (4(d): of NOTICE), 1.b.i of the Llama licences, 3.1 of Gemma's.
"""
UNCLEAR = ("other", "unknown")
"""Licences, as the Hub names them, that do not say whether a model trained from another may be shared."""
WEIGHTS = (".safetensors", pointers.INDEX)

Contents = dict[str, Path | bytes]
"""File name in the repository on the Hub -> its content."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("iteration", metavar="ITERATION", help="the model, by the name of its iteration in params.yaml")
    parser.add_argument("--to", required=True, metavar="ORG/NAME", help="the repository on the Hub; it is created if need be")
    parser.add_argument("--yes", action="store_true", help="upload, instead of listing the files and showing the card")
    options.add_recipe_option(parser)


def main(args: argparse.Namespace) -> None:
    """Print the files with their sizes, and the card; with --yes, upload them and print the address of the commit."""
    contents = collect(args.iteration, args.to, args.recipe)
    print(list_contents(contents))
    print(contents["README.md"].decode())  # type: ignore[union-attr]
    if args.yes:
        print(upload(args.to, contents))
    else:
        print(f"Nothing was uploaded: add --yes to upload these {len(contents)} files to {args.to}.")


def collect(iteration: str, to: str, folder: Path) -> Contents:
    """Collect what to upload: the checkpoint, its card, and the files that the licence asks for.

    to: ORG/NAME. folder: that of the experiment's dvc.yaml. Raises StageError unless the experiment is complete, committed and
    intact, and the licence allows sharing the model under this name.
    """
    settings = params.validate(folder / "params.yaml")
    if iteration not in settings.iterations:
        known = ", ".join(settings.iterations)
        raise StageError(f"{iteration!r} is not an iteration in {folder / 'params.yaml'}: use one of {known}")
    owner, _, name = to.partition("/")
    if not NAME.fullmatch(owner) or not NAME.fullmatch(name):
        raise StageError(f"--to {to}: expected ORG/NAME, such as my-name/Llama-3-8B-SPPO-Iter1")
    license_files = list_license_files(settings.assets.policy, name, folder)
    require_committed(folder)
    run = revisions.read_revision(revisions.WORKSPACE, folder)
    attest.require_complete(folder, run)
    stages = run.stages or {}
    checkpoint = require_intact(folder, f"data/models/{iteration}", stages)
    card = require_intact(folder, f"reports/{cards.FOLDER}", stages) / f"{iteration}.md"
    model = pointers.check_model(checkpoint)
    names = name_models(name, iteration, list(settings.iterations))
    text = card.read_text(encoding="utf-8")
    origin = describe_origin(folder, revisions.find_hash(stages, f"data/models/{iteration}"))
    contents: Contents = {path.name: path for path in sorted(model.iterdir())}
    return {"README.md": finish_card(text, iteration, owner, names, origin).encode()} | contents | license_files


def list_license_files(policy: params.PolicyAsset, name: str, folder: Path) -> Contents:
    """Return the files that must accompany a model trained from the policy: those of the base model, and a notice.

    name: the model's on the Hub. folder: that local assets are relative to. Raises StageError if the licence is missing, does
    not allow sharing the model under this name, or must accompany it but is not there.
    """
    license = cards.find_license(policy)
    key = f"{folder / 'params.yaml'}: 'assets.policy.license' is {license!r}"
    require_shareable(license, name, f"models trained from {policy.repo}", key)
    if policy.made_here:
        return {"LICENSE": ROOT / "LICENSE"}
    source = policy if policy.on_hub else policy.model_copy(update={"repo": str(folder / policy.repo)})
    contents: Contents = {path.name: path for path in hub.fetch_texts(source, LICENSE_FILES)}
    terms = cards.LICENSES.get(license)
    if not any(file.startswith("LICENSE") for file in contents):
        text = ROOT / "LICENSE" if license == cards.OWN_LICENSE else folder / f"LICENSE.{license}"
        if text.exists():
            contents["LICENSE"] = text
        elif terms:
            raise StageError(
                f"{key}, a licence that must accompany the model, but {policy.repo} has no file LICENSE: save the text of "
                f"{terms.page} as {text}, and commit it"
            )
    return contents | ({"NOTICE": f"{terms.notice}\n".encode()} if terms else {})


def require_shareable(license: str, name: str, models: str, key: str) -> None:
    """Raise StageError unless a licence allows sharing trained models, and the model's name is as it asks for.

    CC licences with ND: section 2(a)(1)(B) lets nobody share adapted material. models, key: for the message.
    """
    terms = cards.LICENSES.get(license)
    if "-nd-" in license:
        raise StageError(f"{key}, which does not allow sharing {models}: train from another model")
    if license in UNCLEAR:
        raise StageError(f"{key}, which does not say whether {models} may be shared: train from another model")
    if terms and not normalize(name).startswith(normalize(terms.prefix)):
        raise StageError(f"{key}, so the model's name must begin with {terms.prefix!r}, unlike {name!r}: change --to")


def normalize(name: str) -> str:
    """Return the letters and digits of a name, in lower case."""
    return re.sub("[^a-z0-9]", "", name.lower())


def require_committed(folder: Path) -> None:
    """Raise StageError if a file in the repository differs from HEAD, or is neither tracked nor ignored by Git."""
    changed = git.run_git(folder, "status", "--porcelain", "--untracked-files=all").splitlines()
    if changed:
        raise StageError(
            f"{len(changed)} files differ from HEAD, first {changed[0][3:]}, but the card names the commit: commit them, or "
            "restore them with `git restore`"
        )


def require_intact(folder: Path, out: str, stages: dict[str, Any]) -> Path:
    """Return the path of an output in dvc.lock. Raises StageError if it is missing, or its content is not the one there."""
    path = files.require(folder / out)
    if files.dvc_md5(path) != revisions.find_hash(stages, out):
        raise StageError(
            f"{path} differs from {folder / revisions.LOCK}: `python -m stages.tools verify` says how to restore it; "
            "if it finds no fault, remove the files there that DVC ignores, such as __pycache__: they would be uploaded"
        )
    return path


def name_models(name: str, iteration: str, iterations: list[str]) -> dict[str, str]:
    """Map each iteration to the name of its repository on the Hub, as far as the name of this one implies the others'.

    If it contains the iteration's name, in any case, the others' have theirs in its place: `SPPO-Iter1` implies `SPPO-Iter2`.
    """
    match = re.search(rf"{re.escape(iteration)}(?![0-9])", name, re.IGNORECASE)
    if not match:
        return {iteration: name}
    others = {other: other.capitalize() if match[0][0].isupper() else other for other in iterations}
    return {other: name[: match.start()] + text + name[match.end() :] for other, text in others.items()} | {iteration: name}


def finish_card(text: str, iteration: str, owner: str, names: dict[str, str], origin: str) -> str:
    """Complete a card of reports/cards for the Hub: the model's name, links between the models, and the commit.

    names: iteration -> name on the Hub, below `owner`; an iteration without one is not linked. origin: the text to show instead
    of how to find the commit.
    """
    from huggingface_hub import ModelCard

    def link(match: re.Match[str]) -> str:
        other = names.get(match[1])
        return f"[{other}]({cards.HUB}/{owner}/{other})" if other else match[1]

    card = ModelCard(text)
    card.data["model_name"] = names[iteration]
    body = card.text.replace(f"# {iteration}\n", f"# {names[iteration]}\n", 1)
    body = re.sub(rf"\[({params.MODEL_NAME})\]\(\1\.md\)", link, body)
    card.text = sync.replace_block(body, "commit", origin, Path("reports", cards.FOLDER, f"{iteration}.md"))
    return str(card)


def describe_origin(folder: Path, md5: str | None) -> str:
    """Describe for a card where a model comes from, and how to make it again. md5: its hash in dvc.lock."""
    commit, address = git.head(folder), find_address(folder)
    place = folder.resolve().relative_to(git.root(folder).resolve())
    lock = hashlib.sha256((folder / revisions.LOCK).read_bytes()).hexdigest()
    clone = f"git clone {shlex.quote(address)} sppo && cd sppo\n" if address else ""
    return f"""\
This model was made by the pipeline `{place / "dvc.yaml"}` at commit `{commit}`{f" of {address}" if address else ""}. The \
SHA-256 of `{place / revisions.LOCK}` there is `{lock}`, and the MD5 of this model in it is `{md5}`.

```bash
{clone}git checkout {commit}
make env && source .venv/main/bin/activate
dvc repro {shlex.quote(str(place / "dvc.yaml"))}
```"""


def find_address(folder: Path) -> str | None:
    """Return the https address of Git's remote `origin`, without user name and password; None if it has none."""
    if "origin" not in git.run_git(folder, "remote").splitlines():
        return None
    url = git.run_git(folder, "remote", "get-url", "origin")
    if url.startswith(("http://", "https://")):
        parts = urlsplit(url)
        address = parts.netloc.rpartition("@")[2] + parts.path
    elif match := re.fullmatch(r"(?:ssh://)?[^@/]+@([^/:]+)[:/](.+)", url):
        address = f"{match[1]}/{match[2]}"
    else:
        return None
    return f"https://{address.removesuffix('.git')}"


def list_contents(contents: Contents) -> str:
    """List the size in bytes and the name of each file, and the total."""
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in contents.items()}
    rows = [*((size, name) for name, size in sizes.items()), (sum(sizes.values()), "in total")]
    return "\n".join(f"{size:>18,}  {name}" for size, name in rows)


def upload(to: str, contents: Contents) -> str:
    """Upload the files in one commit, which also removes weights that are not among them. Returns the commit's address.

    The repository `to` is created unless it exists. Raises StageError if the Hub refuses the card or the upload fails.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    operations: list[Any] = [CommitOperationAdd(name, data) for name, data in contents.items()]
    try:
        api.create_repo(to, exist_ok=True)
        present = api.list_repo_files(to)
        operations += [CommitOperationDelete(name) for name in present if name.endswith(WEIGHTS) and name not in contents]
        return str(api.create_commit(to, operations, commit_message="Upload the model and its card").commit_url)
    except Exception as error:  # huggingface_hub's exceptions, and those of the HTTP client below it
        # A RuntimeError names the file of a request that failed; its cause says why.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        message = one_line(hub.hide_token(str(cause)))
        if isinstance(error, ValueError) and "metadata" in message:
            remedy = "correct assets.policy.license in params.yaml, then run `dvc repro` and commit"
            raise StageError(f"{to}: the Hub refuses the card ({message}): {remedy}") from error
        raise StageError(
            f"{to}: the upload failed ({type(cause).__name__}: {message}): check the network and, with `hf auth login`, that "
            "your token may write there, then run the same command again to resume"
        ) from error

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import params, pointers
from stages.assets import hub
from stages.cli import ROOT, StageError
from stages.params import Asset

MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "modeling_model.py": b"raise SystemExit",
    "original/params.json": b"{}",
}
TOKEN = "hf_aSecretOfThisTest"
WANTED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}

README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train.parquet}
  - {split: test, path: data/test.parquet}
---
"""


def _parquet(**columns: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def _script(repo: str, revision: str, call: str) -> str:
    """Python that calls into hub with `asset`, printing the result or the StageError."""
    return (
        "from pathlib import Path\nfrom stages import cli, params, pointers\nfrom stages.assets import hub\ncli.quiet(True)\n"
        f"asset = params.Asset(repo={repo!r}, revision={revision!r})\n"
        f"try:\n    print({call})\nexcept cli.StageError as error:\n    print('error:', error)\n"
    )


def test_a_hub_model_becomes_a_pointer_to_data_only(fake_hub, run, tmp_path) -> None:
    fake_hub.repos["models/some/model"] = MODEL
    revision = fake_hub.commit("models/some/model")
    fetch = _script("some/model", revision, "hub.fetch_model(asset, Path('data/policy'))")
    done = run("-c", fetch, endpoint=fake_hub.endpoint)
    assert done.stdout == "None\n", done.stderr
    assert [path.name for path in (tmp_path / "data" / "policy").iterdir()] == [pointers.NAME]
    text = (tmp_path / "data" / "policy" / pointers.NAME).read_text()
    pointer = json.loads(text)
    assert (pointer["repo"], pointer["revision"], pointer["repo_type"]) == ("some/model", revision, "model")
    assert pointer["files"] == {
        name: {"size": len(MODEL[name]), "sha256": hashlib.sha256(MODEL[name]).hexdigest()} for name in WANTED
    }
    resolve = "import sys; from pathlib import Path; from stages import pointers; print(pointers.resolve(Path('data/policy')))"
    snapshot = Path(run("-c", resolve).stdout.strip())  # nobody answers: resolving asks no network
    assert {path.name for path in snapshot.rglob("*") if path.is_file()} == WANTED
    assert (snapshot / "model.safetensors").read_bytes() == b"weights"
    assert not any(path.endswith((".bin", ".py")) for path in fake_hub.asked)

    (tmp_path / "data" / "policy" / pointers.NAME).unlink()
    run("-c", fetch, endpoint=fake_hub.endpoint)
    assert (tmp_path / "data" / "policy" / pointers.NAME).read_text() == text


def test_what_a_pointer_stands_for_is_fetched_again_on_another_machine(fake_hub, run, tmp_path) -> None:
    fake_hub.repos["models/some/model"] = MODEL
    revision = fake_hub.commit("models/some/model")
    files = {"model.safetensors": {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    pointer = {"repo": "some/model", "revision": revision, "repo_type": "model", "files": files}
    _write(tmp_path / "recipe/data/policy", {pointers.NAME: json.dumps(pointer).encode()})
    done = run("-m", "stages.assets", "--fetch", "recipe", endpoint=fake_hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert {path.rpartition("/")[2] for path in fake_hub.asked if "/resolve/" in path} == {"model.safetensors"}

    files["model.safetensors"]["sha256"] = "0" * 64
    _write(tmp_path / "recipe/data/policy", {pointers.NAME: json.dumps(pointer).encode()})
    done = run("-m", "stages.assets", "--fetch", "recipe", endpoint=fake_hub.endpoint)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("assets: error: ")
    assert "is not the file that recipe/data/policy/pointer.json names: remove it, fetch again" in done.stderr


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"}, "some/pickled has no weights as .safetensors"),
        ("nothing", {"README.md": b""}, "some/nothing has no config.json"),
        ("absent", None, "some/absent at {revision}: not on the Hub, or not for you"),
        ("moved", MODEL, "some/moved at {revision}: the repository has no such revision"),
    ],
)
def test_a_hub_model_that_cannot_be_had_is_said(fake_hub, run, tmp_path, name, contents, message) -> None:
    if contents is not None:
        fake_hub.repos[f"models/some/{name}"] = contents
    revision = "a" * 40 if name == "moved" else fake_hub.commit(f"models/some/{name}")
    done = run("-c", _script(f"some/{name}", revision, "hub.fetch_model(asset, Path('out'))"), endpoint=fake_hub.endpoint)
    assert done.stdout.startswith(f"error: {message.format(revision=revision)}"), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_download_is_found(fake_hub, run, tmp_path) -> None:
    fake_hub.repos["models/some/model"] = MODEL
    fetch = _script("some/model", fake_hub.commit("models/some/model"), "hub.fetch_model(asset, Path('out'))")
    run("-c", fetch, endpoint=fake_hub.endpoint)
    blob = next((tmp_path / "hf").rglob("model.safetensors")).resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"damaged")
    assert "model.safetensors is damaged" in run("-c", fetch, endpoint=fake_hub.endpoint).stdout


def test_hub_rows_come_at_their_revision_and_by_their_split(fake_hub, run) -> None:
    parquet = {
        "data/train.parquet": _parquet(instruction=["What?", "Why?"]),
        "data/test.parquet": _parquet(instruction=["Who?"]),
    }
    fake_hub.repos["datasets/some/rows"] = {"README.md": README.encode(), **parquet}
    revision = fake_hub.commit("datasets/some/rows")
    script = _script("some/rows", revision, "hub.load_rows(asset, None, 'train')['instruction'][:]")
    assert run("-c", script, endpoint=fake_hub.endpoint).stdout == "['What?', 'Why?']\n"
    script = _script("some/rows", revision, "hub.load_rows(asset, None, 'dev')")
    expected = "error: some/rows has no split 'dev': it has train, test; name one of them in params.yaml\n"
    assert run("-c", script, endpoint=fake_hub.endpoint).stdout == expected
    script = _script("some/rows", revision, "hub.fetch_file(asset, 'data/test.parquet').read_bytes()[:4]")
    assert run("-c", script, endpoint=fake_hub.endpoint).stdout == "b'PAR1'\n"
    script = _script("some/rows", revision, "hub.fetch_file(asset, 'none.json')")
    assert run("-c", script, endpoint=fake_hub.endpoint).stdout.startswith("error: none.json of some/rows at ")


def test_a_hub_out_of_reach_is_said_in_one_line(run) -> None:
    done = run("-c", _script("some/rows", "a" * 40, "hub.find_revision('some/rows', 'dataset', None)"))
    assert done.stdout.startswith("error: the revision of some/rows: cannot be had (ConnectError: ")
    assert done.stdout.endswith("): check the network, and https://huggingface.co/datasets/some/rows\n")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    parquet = {"data/train.parquet": _parquet(a=[1, 2]), "data/test.parquet": _parquet(a=[3])}
    return _write(tmp_path / "rows", {"README.md": README.encode(), **parquet})


def test_local_rows_are_those_on_disk_now(rows: Path) -> None:
    asset = Asset(repo=str(rows))
    assert hub.load_rows(asset, None, "train")["a"][:] == [1, 2]
    assert hub.load_rows(Asset(repo="./rows"), "default", "test")["a"][:] == [3]
    (rows / "data/train.parquet").write_bytes(_parquet(a=[4]))
    assert hub.load_rows(asset, None, "train")["a"][:] == [4]


def test_local_jsonl_needs_no_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "plain", {"train.jsonl": b'{"a": "x"}\n'})
    assert hub.load_rows(Asset(repo="./plain"), None, "train")["a"][:] == ["x"]


@pytest.mark.parametrize(
    ("asset", "config", "split", "message"),
    [
        ("./rows", None, "dev", r"\./rows has no split 'dev': it has train, test; name one of them"),
        ("./rows", "other", "train", r"split 'train' of \./rows, configuration other: .*Available: \['default'\]"),
        ("./none", None, "train", r"\./none is no directory"),
    ],
)
def test_local_rows_that_are_not_there_are_named(rows: Path, asset: str, config: str | None, split: str, message: str) -> None:
    with pytest.raises(StageError, match=message) as error:
        hub.load_rows(Asset(repo=asset), config, split)
    assert "\n" not in str(error.value)


def test_a_loading_script_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "scripted", {"scripted.py": b"open('ran', 'w')\n"})
    with pytest.raises(StageError, match=r"split 'train' of \./scripted"):
        hub.load_rows(Asset(repo="./scripted"), None, "train")
    assert not (tmp_path / "ran").exists()


def test_a_local_model_is_copied_without_pickles_and_code(tmp_path: Path) -> None:
    source = _write(tmp_path / "model", MODEL)
    hub.fetch_model(Asset(repo=str(source)), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == WANTED
    hub.fetch_model(Asset(repo=str(source)), tmp_path / "out", weights=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == WANTED - {"model.safetensors"}
    assert pointers.resolve(tmp_path / "out") == tmp_path / "out"


def test_a_local_model_with_pickles_only_is_refused(tmp_path: Path) -> None:
    source = _write(tmp_path / "model", {name: MODEL[name] for name in ("config.json", "pytorch_model.bin")})
    with pytest.raises(StageError, match=r"has no weights as \.safetensors.*convert them once"):
        hub.fetch_model(Asset(repo=str(source)), tmp_path / "out")
    hub.fetch_model(Asset(repo=str(source)), tmp_path / "base", weights=False)
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["config.json"]


def test_a_local_file_is_taken_where_it_lies(tmp_path: Path) -> None:
    asset = Asset(repo=str(_write(tmp_path / "rows", {"eval.json": b"[]"})))
    assert hub.fetch_file(asset, "eval.json") == tmp_path / "rows" / "eval.json"
    with pytest.raises(StageError, match=r"none\.json is missing: put it there"):
        hub.fetch_file(asset, "none.json")


def _pin(fake_hub, run, tmp_path: Path, text: str):
    (tmp_path / "recipe").mkdir(exist_ok=True)
    (tmp_path / "recipe" / "params.yaml").write_text(text)
    return run("-m", "stages.assets", "--pin", "recipe", endpoint=fake_hub.endpoint)


def test_pinning_writes_the_missing_revisions_and_nothing_else(fake_hub, run, tmp_path) -> None:
    text = (ROOT / "recipes" / "llama-3-8b" / "params.yaml").read_text()
    repos = {
        "ranker": "models/llm-blender/PairRM",
        "prompts.parts": "datasets/snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset",
        "alpaca_eval": "datasets/tatsu-lab/alpaca_eval",
        "harness.arc_challenge": "datasets/allenai/ai2_arc",
        "harness.truthfulqa_mc2": "datasets/truthfulqa/truthful_qa",
        "harness.winogrande": "datasets/allenai/winogrande",
        "harness.gsm8k": "datasets/openai/gsm8k",
        "harness.hellaswag": "datasets/Rowan/hellaswag",
        "harness.mmlu": "datasets/cais/mmlu",
    }
    fake_hub.repos.update({repo: {} for repo in repos.values()})
    done = _pin(fake_hub, run, tmp_path, text)
    assert done.returncode == 0, done.stderr
    lines = [f"assets.{name}: {repo.partition('/')[2]} {fake_hub.commit(repo)}" for name, repo in repos.items()]
    assert done.stdout.splitlines() == [*lines, "recipe/params.yaml: 9 pinned"]

    pinned = (tmp_path / "recipe" / "params.yaml").read_text()
    changed = [(old, new) for old, new in zip(text.splitlines(), pinned.splitlines(), strict=True) if old != new]
    assert len(changed) == 9
    for (old, new), repo in zip(changed, repos.values(), strict=True):
        assert new.split() == old.replace("null", fake_hub.commit(repo)).split()
    assert params.validate(tmp_path / "recipe" / "params.yaml").assets.ranker.revision == fake_hub.commit(repos["ranker"])

    fake_hub.asked.clear()
    assert _pin(fake_hub, run, tmp_path, pinned).stdout == "recipe/params.yaml: every asset is pinned already\n"
    assert fake_hub.asked == []


def test_pinning_adds_an_absent_revision_and_leaves_local_assets(fake_hub, run, tmp_path) -> None:
    fake_hub.repos["datasets/some/rows"] = {}
    text = "# head\nassets:\n  policy: {repo: ./here}\n  prompts:  # tail\n    repo: some/rows\n    split: train\neta: null\n"
    assert _pin(fake_hub, run, tmp_path, text).returncode == 0
    revision = f"    revision: {fake_hub.commit('datasets/some/rows')}\n"
    assert (tmp_path / "recipe" / "params.yaml").read_text() == text.replace("    split", f"{revision}    split")


def test_pinning_an_unknown_asset_writes_nothing(fake_hub, run, tmp_path) -> None:
    fake_hub.repos["models/some/model"] = {}
    text = "assets:\n  policy: {repo: some/model, revision: null}\n  prompts: {repo: no/where}\n"
    done = _pin(fake_hub, run, tmp_path, text)
    assert done.returncode == 1
    assert done.stderr.startswith("assets: error: the revision of no/where: not on the Hub")
    assert (tmp_path / "recipe" / "params.yaml").read_text() == text


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", "some/model at {revision}: accept its licence at https://huggingface.co/some/model, then `hf auth "),
        (403, "GatedRepo", "some/model at {revision}: accept its licence at https://huggingface.co/some/model, then `hf auth "),
        (401, "RepoNotFound", "some/model at {revision}: not on the Hub, or not for you: correct repo in params.yaml, or `hf "),
        (400, "", "some/model at {revision}: cannot be had ("),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(fake_hub, run, tmp_path, status, code, message) -> None:
    """Even where the server quotes the token in its message."""
    fake_hub.answer = lambda path: (status, {"X-Error-Code": code, "X-Error-Message": f"no {' '.join(fake_hub.keys)}"}, b"{}")
    revision = fake_hub.commit("models/some/model")
    script = f"import os\nos.environ['HF_TOKEN'] = {TOKEN!r}\n"
    script += _script("some/model", revision, "hub.fetch_model(asset, Path('out'))")
    done = run("-c", script, endpoint=fake_hub.endpoint)
    assert done.stdout.startswith(f"error: {message.format(revision=revision)}"), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert f"Bearer {TOKEN}" in fake_hub.keys
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not (tmp_path / "out").exists()


def test_a_download_that_breaks_off_is_one_line(fake_hub, run, tmp_path) -> None:
    fake_hub.repos["models/some/model"] = MODEL
    whole = fake_hub.answer

    def broken(path: str) -> tuple[int, dict[str, str], bytes]:
        status, headers, body = whole(path)
        return (
            (status, headers | {"Content-Length": "7"}, body[:3]) if path.endswith("safetensors") else (status, headers, body)
        )

    fake_hub.answer = broken
    script = _script("some/model", fake_hub.commit("models/some/model"), "hub.fetch_model(asset, Path('out'))")
    done = run("-c", script, endpoint=fake_hub.endpoint)
    assert done.stdout.startswith("error: some/model at "), done.stdout + done.stderr
    assert ": check the network, and https://huggingface.co/some/model" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "out").exists()
    fake_hub.answer = whole
    assert run("-c", script, endpoint=fake_hub.endpoint).stdout == "None\n"


def test_a_listing_leads_nowhere_out_of_the_snapshot(fake_hub, run, tmp_path) -> None:
    fake_hub.repos["models/some/model"] = MODEL | {"../../../evil.json": b"{}", "/tmp/evil.json": b"{}"}
    script = _script("some/model", fake_hub.commit("models/some/model"), "hub.fetch_model(asset, Path('out'))")
    done = run("-c", script, endpoint=fake_hub.endpoint)
    assert done.stdout == "None\n", done.stdout + done.stderr
    assert not list(tmp_path.rglob("evil.json"))
    assert not any("evil" in path for path in fake_hub.asked)

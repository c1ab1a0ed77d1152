"""Models and data sets from a Hub or a local directory: only data is fetched, and every failure is one line with a remedy."""

import functools
import hashlib
import io
import json
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts import hub, pointers
from stages.runtime.errors import StageError
from stages.runtime.params import Asset
from support.hub import FakeHub, Response, Run
from support.messages import assert_message

pytestmark = pytest.mark.slow

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
FETCHED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
TOKEN = "hf_aSecretOfThisTest"

README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train.parquet}
  - {split: test, path: data/test.parquet}
---
"""


def make_parquet(**columns: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_script(repo: str, revision: str, call: str) -> str:
    """Return Python that evaluates `call`, an expression of `hub` and `asset`, and prints the result or the StageError."""
    return (
        "from pathlib import Path\nfrom stages.artifacts import hub\nfrom stages.runtime import errors, logs, params\n"
        f"logs.setup_logging(online=True)\nasset = params.Asset(repo={repo!r}, revision={revision!r})\n"
        f"try:\n    print({call})\nexcept errors.StageError as error:\n    print('error:', error)\n"
    )


FETCH = "hub.fetch_model(asset, Path('out'))"


def test_a_hub_model_becomes_a_pointer_to_data_only(fake_hub: FakeHub, run: Run, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = MODEL
    revision = fake_hub.commit("models/some/model")
    fetch = make_script("some/model", revision, "hub.fetch_model(asset, Path('data/policy'))")
    done = run("-c", fetch, endpoint=fake_hub.endpoint)
    assert done.stdout == "None\n", done.stderr
    assert [path.name for path in (tmp_path / "data" / "policy").iterdir()] == [pointers.NAME]
    text = (tmp_path / "data" / "policy" / pointers.NAME).read_text()
    pointer = json.loads(text)
    assert (pointer["repo"], pointer["revision"], pointer["repo_type"]) == ("some/model", revision, "model")
    assert pointer["files"] == {
        name: {"size": len(MODEL[name]), "sha256": hashlib.sha256(MODEL[name]).hexdigest()} for name in FETCHED
    }
    resolve = "from pathlib import Path; from stages.artifacts import pointers; print(pointers.resolve(Path('data/policy')))"
    snapshot = Path(run("-c", resolve).stdout.strip())  # without a Hub: resolving does not use the network
    assert {path.name for path in snapshot.rglob("*") if path.is_file()} == FETCHED
    assert (snapshot / "model.safetensors").read_bytes() == b"weights"
    assert not any(path.endswith((".bin", ".py")) for path in fake_hub.requested)

    (tmp_path / "data" / "policy" / pointers.NAME).unlink()
    run("-c", fetch, endpoint=fake_hub.endpoint)
    assert (tmp_path / "data" / "policy" / pointers.NAME).read_text() == text


def test_a_pointer_s_files_are_fetched_and_checked_on_another_machine(fake_hub: FakeHub, run: Run, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = MODEL
    revision = fake_hub.commit("models/some/model")
    files = {"model.safetensors": {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    pointer = {"repo": "some/model", "revision": revision, "repo_type": "model", "files": files}
    write(tmp_path / "policy", {pointers.NAME: json.dumps(pointer).encode()})
    fetch = make_script("some/model", revision, "hub.fetch_pointer(Path('policy'))")
    done = run("-c", fetch, endpoint=fake_hub.endpoint)
    assert done.stdout == "None\n", done.stderr
    assert {path.rpartition("/")[2] for path in fake_hub.requested if "/resolve/" in path} == {"model.safetensors"}

    files["model.safetensors"]["sha256"] = "0" * 64
    write(tmp_path / "policy", {pointers.NAME: json.dumps(pointer).encode()})
    done = run("-c", fetch, endpoint=fake_hub.endpoint)
    assert_message(done.stdout, "error: ", "model.safetensors", "policy/pointer.json", "remove it, then fetch again")


@pytest.mark.parametrize(
    ("name", "contents", "parts"),
    [
        ("pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"}, ["no weights", ".safetensors", "convert them once"]),
        ("nothing", {"README.md": b""}, ["no config.json"]),
        ("absent", None, ["{revision}", "not on the Hub", "`hf auth login`"]),
        ("moved", MODEL, ["{revision}", "no such revision", "https://huggingface.co/some/moved/commits/main"]),
    ],
)
def test_a_hub_model_that_cannot_be_fetched_is_one_line(
    fake_hub: FakeHub, run: Run, tmp_path: Path, name: str, contents: dict[str, bytes] | None, parts: list[str]
) -> None:
    if contents is not None:
        fake_hub.repos[f"models/some/{name}"] = contents
    revision = "a" * 40 if name == "moved" else fake_hub.commit(f"models/some/{name}")
    done = run("-c", make_script(f"some/{name}", revision, FETCH), endpoint=fake_hub.endpoint)
    assert_message(done.stdout, f"error: some/{name}", *[part.format(revision=revision) for part in parts])
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_corrupted_download_is_detected(fake_hub: FakeHub, run: Run, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = MODEL
    fetch = make_script("some/model", fake_hub.commit("models/some/model"), FETCH)
    run("-c", fetch, endpoint=fake_hub.endpoint)
    blob = next((tmp_path / "hf").rglob("model.safetensors")).resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"changed")
    message = run("-c", fetch, endpoint=fake_hub.endpoint).stdout
    assert_message(message, "model.safetensors is corrupted", f"remove {blob}", "fetch it again")


def test_hub_rows_come_from_their_revision_and_split(fake_hub: FakeHub, run: Run) -> None:
    parquet = {
        "data/train.parquet": make_parquet(instruction=["What?", "Why?"]),
        "data/test.parquet": make_parquet(instruction=["Who?"]),
    }
    fake_hub.repos["datasets/some/rows"] = {"README.md": README.encode(), **parquet}
    revision = fake_hub.commit("datasets/some/rows")
    script = make_script("some/rows", revision, "hub.load_rows(asset, None, 'train')['instruction'][:]")
    assert run("-c", script, endpoint=fake_hub.endpoint).stdout == "['What?', 'Why?']\n"
    script = make_script("some/rows", revision, "hub.load_rows(asset, None, 'dev')")
    message = run("-c", script, endpoint=fake_hub.endpoint).stdout
    assert_message(message, "error: some/rows", "'dev'", "train, test", "params.yaml")
    script = make_script("some/rows", revision, "hub.fetch_file(asset, 'data/test.parquet').read_bytes()[:4]")
    assert run("-c", script, endpoint=fake_hub.endpoint).stdout == "b'PAR1'\n"
    script = make_script("some/rows", revision, "hub.fetch_file(asset, 'none.json')")
    assert_message(run("-c", script, endpoint=fake_hub.endpoint).stdout, "error: none.json of some/rows at ")


def test_a_branch_is_looked_up(fake_hub: FakeHub, run: Run) -> None:
    fake_hub.repos["datasets/some/rows"] = {}
    script = make_script("some/rows", "a" * 40, "hub.find_revision('some/rows', 'dataset', None)")
    assert run("-c", script, endpoint=fake_hub.endpoint).stdout == f"{fake_hub.commit('datasets/some/rows')}\n"


def test_an_unreachable_hub_is_one_line(run: Run) -> None:
    done = run("-c", make_script("some/rows", "a" * 40, "hub.find_revision('some/rows', 'dataset', None)"))
    assert_message(done.stdout, "error: the revision of some/rows: ", "ConnectError", "check the network")
    assert done.stdout.endswith(" https://huggingface.co/datasets/some/rows\n")
    assert done.stdout.count("\n") == 1


def test_a_folder_named_like_a_hub_data_set_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "some/rows", {"train.jsonl": b'{"a": "local"}\n'})
    with pytest.raises(StageError) as error:
        hub.load_rows(Asset(repo="some/rows", revision="0" * 40), None, "train")
    assert_message(str(error.value), "some/rows in params.yaml", f"{tmp_path}/some/rows exists", "set repo to ./some/rows")


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("train.jsonl", b'{"a": 1}\n{"a":', "JSON"),
        ("train.csv", b'a\n"x\n', "EOF inside string"),
        ("train.parquet", b"x", "Parquet"),
        ("README.md", b"---\nconfigs: [{config_name: default}]\n---\n", "data file"),
    ],
)
def test_the_cause_is_named(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    write(tmp_path / "broken", {name: content})
    with pytest.raises(StageError) as error:
        hub.load_rows(Asset(repo=str(tmp_path / "broken")), None, "train")
    assert_message(str(error.value), "broken: cannot be fetched", cause, "check its files")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in a local directory, beside which the test runs."""
    monkeypatch.chdir(tmp_path)
    parquet = {"data/train.parquet": make_parquet(a=[1, 2]), "data/test.parquet": make_parquet(a=[3])}
    return write(tmp_path / "rows", {"README.md": README.encode(), **parquet})


def test_local_rows_are_those_on_disk_now(rows: Path) -> None:
    asset = Asset(repo=str(rows))
    assert hub.load_rows(asset, None, "train")["a"][:] == [1, 2]
    assert hub.load_rows(Asset(repo="./rows"), "default", "test")["a"][:] == [3]
    (rows / "data/train.parquet").write_bytes(make_parquet(a=[4]))
    assert hub.load_rows(asset, None, "train")["a"][:] == [4]


@pytest.mark.parametrize("path", ["../victim.parquet", "/etc/passwd", "http://127.0.0.1:9/x.parquet"])
def test_local_rows_outside_the_data_set_are_refused(rows: Path, path: str) -> None:
    (rows / "README.md").write_text(README.replace("data/train.parquet", path), encoding="utf-8")
    with pytest.raises(StageError) as error:
        hub.load_rows(Asset(repo="./rows"), None, "test")
    assert_message(str(error.value), "rows/README.md: configs: ", path, "put the file there")


def test_local_jsonl_needs_no_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "plain", {"train.jsonl": b'{"a": "x"}\n'})
    assert hub.load_rows(Asset(repo="./plain"), None, "train")["a"][:] == ["x"]


@pytest.mark.parametrize(
    ("repo", "config", "split", "parts"),
    [
        ("./rows", None, "dev", ["./rows", "'dev'", "train, test", "params.yaml"]),
        ("./rows", "other", "train", ["./rows", "'train'", "configuration other", "Available: ['default']", "check its files"]),
        ("./none", None, "train", ["./none", "not a directory", "correct repo in params.yaml"]),
    ],
)
def test_missing_local_rows_are_named(rows: Path, repo: str, config: str | None, split: str, parts: list[str]) -> None:
    with pytest.raises(StageError) as error:
        hub.load_rows(Asset(repo=repo), config, split)
    assert_message(str(error.value), *parts)


def test_a_loading_script_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "scripted", {"scripted.py": b"open('ran', 'w')\n"})
    with pytest.raises(StageError) as error:
        hub.load_rows(Asset(repo="./scripted"), None, "train")
    assert_message(str(error.value), "./scripted", "'train'")
    assert not (tmp_path / "ran").exists()


def test_a_local_model_is_copied_without_pickles_and_code(tmp_path: Path) -> None:
    source = write(tmp_path / "model", MODEL)
    hub.fetch_model(Asset(repo=str(source)), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FETCHED
    hub.fetch_model(Asset(repo=str(source)), tmp_path / "base", weights=False)
    assert {path.name for path in (tmp_path / "base").iterdir()} == FETCHED - {"model.safetensors"}
    assert pointers.resolve(tmp_path / "out") == tmp_path / "out"


def test_a_local_model_with_only_pickled_weights_is_rejected(tmp_path: Path) -> None:
    source = write(tmp_path / "model", {name: MODEL[name] for name in ("config.json", "pytorch_model.bin")})
    with pytest.raises(StageError) as error:
        hub.fetch_model(Asset(repo=str(source)), tmp_path / "out")
    assert_message(str(error.value), str(source), ".safetensors", "convert them once")
    hub.fetch_model(Asset(repo=str(source)), tmp_path / "base", weights=False)
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["config.json"]


def test_the_texts_of_a_model_are_fetched_at_its_revision_or_found_in_a_directory(
    fake_hub: FakeHub, run: Run, tmp_path: Path
) -> None:
    repo = "models/some/model"
    fake_hub.repos[repo] = MODEL | {"LICENSE.txt": b"terms", "original/LICENSE": b"other terms"}
    program = f"""
from stages.artifacts import hub
from stages.runtime.params import Asset
paths = hub.fetch_texts(Asset(repo="some/model", revision="{fake_hub.commit(repo)}"), ["LICENSE*", "NOTICE*"])
print(*[path.read_text() for path in paths])
"""
    done = run("-c", program, endpoint=fake_hub.endpoint)
    assert done.stdout == "terms\n", done.stderr
    for name in ("LICENSE", "NOTICE.md", "README.md"):
        (tmp_path / name).write_text(name)
    asset = Asset(repo=str(tmp_path))
    assert hub.fetch_texts(asset, ["LICENSE*", "NOTICE*"]) == [tmp_path / "LICENSE", tmp_path / "NOTICE.md"]
    assert hub.fetch_texts(asset, ["USE_POLICY*"]) == []


def test_a_local_file_is_used_where_it_lies(tmp_path: Path) -> None:
    asset = Asset(repo=str(write(tmp_path / "rows", {"eval.json": b"[]"})))
    assert hub.fetch_file(asset, "eval.json") == tmp_path / "rows" / "eval.json"
    with pytest.raises(StageError) as error:
        hub.fetch_file(asset, "none.json")
    assert_message(str(error.value), f"{tmp_path}/rows/none.json is missing", "put it there")


def refuse(fake_hub: FakeHub, status: int, code: str, path: str) -> Response:
    """Refuse every request, and quote the request's token in the message."""
    return status, {"X-Error-Code": code, "X-Error-Message": f"no {' '.join(fake_hub.keys)}"}, b"{}"


@pytest.mark.parametrize(
    ("status", "code", "parts"),
    [
        (401, "GatedRepo", ["license", "https://huggingface.co/some/model", "`hf auth login`"]),
        (403, "GatedRepo", ["license", "https://huggingface.co/some/model", "`hf auth login`"]),
        (401, "RepoNotFound", ["not on the Hub", "correct repo in params.yaml", "`hf auth login`"]),
        (400, "", ["cannot be fetched", "https://huggingface.co/some/model"]),
    ],
)
def test_a_refusal_by_the_hub_is_one_line_without_the_token(
    fake_hub: FakeHub, run: Run, tmp_path: Path, status: int, code: str, parts: list[str]
) -> None:
    fake_hub.respond = functools.partial(refuse, fake_hub, status, code)
    revision = fake_hub.commit("models/some/model")
    script = f"import os\nos.environ['HF_TOKEN'] = {TOKEN!r}\n" + make_script("some/model", revision, FETCH)
    done = run("-c", script, endpoint=fake_hub.endpoint)
    assert_message(done.stdout, f"error: some/model at {revision}: ", *parts)
    assert done.stdout.count("\n") == 1
    assert f"Bearer {TOKEN}" in fake_hub.keys
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not (tmp_path / "out").exists()


def break_off(fake_hub: FakeHub, path: str) -> Response:
    """Send only the first three bytes of the weights."""
    status, headers, body = fake_hub.serve_path(path)
    if path.endswith("safetensors"):
        return status, headers | {"Content-Length": "7"}, body[:3]
    return status, headers, body


def test_an_interrupted_download_is_one_line_and_can_be_repeated(fake_hub: FakeHub, run: Run, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = MODEL
    fake_hub.respond = functools.partial(break_off, fake_hub)
    script = make_script("some/model", fake_hub.commit("models/some/model"), FETCH)
    done = run("-c", script, endpoint=fake_hub.endpoint)
    assert_message(done.stdout, "error: some/model at ", "check the network", "https://huggingface.co/some/model")
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "out").exists()
    fake_hub.respond = fake_hub.serve_path
    assert run("-c", script, endpoint=fake_hub.endpoint).stdout == "None\n"


def test_file_names_cannot_lead_out_of_the_snapshot(fake_hub: FakeHub, run: Run, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = MODEL | {"../../../evil.json": b"{}", "/tmp/evil.json": b"{}"}
    script = make_script("some/model", fake_hub.commit("models/some/model"), FETCH)
    done = run("-c", script, endpoint=fake_hub.endpoint)
    assert done.stdout == "None\n", done.stdout + done.stderr
    assert not list(tmp_path.rglob("evil.json"))
    assert not any("evil" in path for path in fake_hub.requested)


@given(st.text("a b'$`\"", min_size=1, max_size=8).map("./{}".format))
def test_a_missing_directory_is_named_and_quoted_for_the_shell(repo: str) -> None:
    with pytest.raises(StageError) as error:
        hub.fetch_texts(Asset(repo=repo), ["*"])
    assert_message(str(error.value), repo, "params.yaml", f"`git add {shlex.quote(repo)}`", "absolute path")

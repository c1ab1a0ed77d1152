"""Faults planted in a small pipeline are named, and gone after the commands in the line are run."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.cli import main as dvc
from dvc.fs import localfs
from dvc.ignore import DvcIgnoreFilter
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages.artifacts import files, schemas, tables
from stages.artifacts.files import remove
from stages.runtime.errors import StageError
from stages.runtime.fingerprint import fingerprint
from stages.runtime.paths import ROOT
from stages.tools import repository, verify
from support.hub import run_python
from support.messages import assert_message

DVC_YAML = """
stages:
  code: {cmd: cp report.json data/code/report.json, deps: [report.json], outs: [data/code/report.json]}
  assets-prompts: {cmd: cp prompts data/prompts.parquet, deps: [prompts], outs: [data/prompts.parquet]}
  train: {cmd: cp -r model data/model, deps: [model], outs: [data/model]}
  report:
    cmd: python -m stages report --data data --published published.yaml --out reports
    deps: [data/code/report.json, .dvc/plots, published.yaml, data/model]
    params: [eta]
    outs: [reports/metrics.json: {cache: false}, reports/index.html]
"""
MAIN_PY = """
import pathlib, sys
name, _, data, _, published, _, out = sys.argv[1:]
assert name == "report"
inputs = ["params.yaml", published, "undeclared", pathlib.Path(data) / "model/weights"]
text = "".join(pathlib.Path(path).read_text() for path in inputs)
pathlib.Path(out).mkdir(exist_ok=True)
for name in ("metrics.json", "index.html"):
    (pathlib.Path(out) / name).write_text(text)
"""
"""The launcher of a project whose report stage copies its inputs."""
PROMPTS, MODEL, WEIGHTS = Path("data/prompts.parquet"), Path("data/model"), Path("data/model/weights")
METRICS = Path("reports/metrics.json")
CACHE = Path(".dvc/cache/files/md5")
IGNORED = (ROOT / ".dvcignore").read_text(encoding="utf-8")
FORCE = "`dvc repro --force --single-item {}`"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that ran: a Parquet file, a folder, and reports by a launcher of its own."""
    folder = tmp_path_factory.mktemp("origin")
    for name, text in {
        "dvc.yaml": DVC_YAML,
        "params.yaml": "eta: 10\n",
        "published.yaml": "published: null\n",
        "undeclared": "",
        "report.json": json.dumps(fingerprint("report")),
        "stages/__init__.py": "",
        "stages/__main__.py": MAIN_PY,
        "model/weights": "0.5 0.25",
        "model/tokenizer/vocabulary": "a b c",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    row = {"prompt_id": schemas.prompt_id("Why?"), "prompt": "Why?", "iteration": None}
    tables.write([row], schemas.PROMPTS, folder / "prompts")
    (folder / "data/code").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        for command in ("init --no-scm", "config core.analytics false", "config cache.type copy"):
            assert dvc([*command.split(), "-q"]) == 0
        Path(".dvc/plots").mkdir()
        Path(".dvc/plots/matrix.json").write_text("{}", encoding="utf-8")
        assert dvc(["repro", "-q"]) == 0
    return folder


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Change to the folder; DVC's stages find Python and leave no bytecode."""
    patch.chdir(folder)
    patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    patch.setenv("PYTHONDONTWRITEBYTECODE", "1")


@pytest.fixture
def pipeline(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to plant faults in, in which DVC has hashed everything, as the working directory."""
    folder = tmp_path / "pipeline"
    shutil.copytree(origin, folder, symlinks=True)
    enter(folder, monkeypatch)
    assert dvc(["status", "-q"]) == 0
    return folder


def run_verify(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run the tool in a folder with a `stages` of its own. -P: the tool is this repository's, the report stage the folder's."""
    command = [sys.executable, "-P", "-m", "stages.tools", "verify"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def find_faults() -> list[str]:
    return verify.verify(Path())[0]


def locate(path: Path) -> Path:
    """Return the place in the cache of an intact file or folder of the workspace."""
    return CACHE / (md5 := files.dvc_md5(path))[:2] / md5[2:]


def corrupt(path: Path) -> None:
    """Change one byte, and leave the file write-protected, as DVC leaves the files in its cache."""
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    path.chmod(0o444)


def run_remedy(line: str) -> None:
    """Run the commands in a fault's line. There is no remote: in place of `dvc pull`, its alternative."""
    for command in re.findall("`(.*?)`", line):
        words = shlex.split(command)
        if words[0] == "rm":
            subprocess.run(words, check=True)
        elif words[:2] != ["dvc", "pull"]:
            assert dvc([*words[1:], "-q"]) == 0


@pytest.mark.slow
def test_an_intact_pipeline_has_no_faults_and_is_left_alone(pipeline: Path) -> None:
    def read_all() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file() and ".dvc/tmp" not in str(path)}

    before = read_all()
    done = run_verify(pipeline)
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = [Path("data/code/report.json"), PROMPTS, *filter(Path.is_file, MODEL.rglob("*")), *Path("reports").rglob("*")]
    assert_message(
        done.stdout,
        "no faults: 5 artifacts",
        "the reports regenerated",
        "6 files (1 with schemas)",
        f"{sum(path.stat().st_size for path in outputs):,} bytes",
    )
    assert read_all() == before


RECREATE_PROMPTS = FORCE.format("assets-prompts")
RECREATE_MODEL = FORCE.format("train")
Harm = tuple[Callable[[Path], None], Path] | None
HARM: list[tuple[Harm, Harm, str]] = [
    (None, (corrupt, PROMPTS), f"{PROMPTS}: corrupted in W, intact in C: `rm -rf {PROMPTS}`, then `dvc checkout {PROMPTS}`"),
    (None, (remove, PROMPTS), f"{PROMPTS}: missing in W, intact in C: `dvc checkout {PROMPTS}`"),
    (None, (corrupt, WEIGHTS), f"{WEIGHTS}: corrupted in W, intact in C: `rm -rf {WEIGHTS}`, then `dvc checkout {MODEL}`"),
    (None, (remove, WEIGHTS), f"{WEIGHTS}: missing in W, intact in C: `dvc checkout {MODEL}`"),
    (None, (remove, MODEL), f"{MODEL}: missing in W, intact in C: `dvc checkout {MODEL}`"),
    (
        (corrupt, PROMPTS),
        None,
        f"{PROMPTS}: intact in W, corrupted in C: `rm -rf PLACE`, then `dvc pull {PROMPTS}` or {RECREATE_PROMPTS}",
    ),
    ((remove, PROMPTS), None, f"{PROMPTS}: intact in W, missing in C: `dvc pull {PROMPTS}` or {RECREATE_PROMPTS}"),
    ((remove, PROMPTS), (remove, PROMPTS), f"{PROMPTS}: missing in W and in C: `dvc pull {PROMPTS}` or {RECREATE_PROMPTS}"),
    (
        (corrupt, WEIGHTS),
        (corrupt, WEIGHTS),
        f"{WEIGHTS}: corrupted in W and in C: `rm -rf {WEIGHTS} PLACE`, then `dvc pull {MODEL}` or {RECREATE_MODEL}",
    ),
    ((remove, WEIGHTS), (remove, MODEL), f"{WEIGHTS}: missing in W and in C: `dvc pull {MODEL}` or {RECREATE_MODEL}"),
    (
        (corrupt, MODEL),
        None,
        f"{MODEL}: intact in W, corrupted in C: `rm -rf PLACE`, then `dvc pull {MODEL}` or {RECREATE_MODEL}",
    ),
    ((remove, MODEL), (remove, MODEL), f"{MODEL}: missing in W and in C: `dvc pull {MODEL}` or {RECREATE_MODEL}"),
    (
        (remove, MODEL),
        (corrupt, WEIGHTS),
        f"{MODEL}: corrupted in W, missing in C: `rm -rf {MODEL}`, then `dvc pull {MODEL}` or {RECREATE_MODEL}",
    ),
    (None, (corrupt, METRICS), f"{METRICS}: corrupted in W: {FORCE.format('report')}"),
    (None, (remove, METRICS), f"{METRICS}: missing in W: {FORCE.format('report')}"),
]
"""What is done to a path's file or listing in the cache, and to the path in the workspace; then the line that names it, where W
is the workspace, C DVC's cache and PLACE the path's place in it."""


@pytest.mark.slow
@pytest.mark.parametrize(("there", "here", "expected"), HARM, ids=[line.partition(": `")[0] for *_, line in HARM])
def test_a_fault_is_one_line_and_its_remedy_repairs_it(there: Harm, here: Harm, expected: str, pipeline: Path) -> None:
    if there:
        harm, path = there
        place = locate(path)
        harm(place)
        expected = expected.replace("PLACE", str(pipeline / place))
    if here:
        harm, path = here
        harm(path)
    (line,) = find_faults()
    stage = {PROMPTS: "assets-prompts", METRICS: "report"}.get(Path(expected.partition(":")[0]), "train")
    assert line == f"{stage}: " + expected.replace("in W", "in the workspace").replace("in C", "in DVC's cache")
    run_remedy(line)
    assert find_faults() == []


@pytest.mark.slow
def test_what_dvc_trusts_is_found(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DVC checks out a file that was corrupted under its write protection in the cache, and then calls it up to date."""
    corrupt(locate(WEIGHTS))
    remove(WEIGHTS)
    assert dvc(["checkout", "-q"]) == 0
    capsys.readouterr()
    assert dvc(["status"]) == 0
    assert "up to date" in capsys.readouterr().out
    (line,) = find_faults()
    assert_message(line, "train: ", str(WEIGHTS), "corrupted in the workspace and in DVC's cache")
    run_remedy(line)
    assert find_faults() == []


def test_a_link_into_the_cache_is_corrupted_with_it(pipeline: Path) -> None:
    dvc(["config", "cache.type", "hardlink", "-q"])
    dvc(["checkout", "--relink", "-q"])
    assert PROMPTS.stat().st_ino == locate(PROMPTS).stat().st_ino
    corrupt(PROMPTS)
    (line,) = find_faults()
    assert_message(line, "assets-prompts: ", str(PROMPTS), "corrupted in the workspace and in DVC's cache")
    run_remedy(line)
    assert find_faults() == []


@pytest.mark.slow
def test_a_remote_repairs_what_both_lost(pipeline: Path, tmp_path: Path) -> None:
    for command in (f"remote add -d shared {tmp_path / 'remote'}", "push"):
        assert dvc([*command.split(), "-q"]) == 0
    corrupt(locate(WEIGHTS))
    corrupt(WEIGHTS)
    (line,) = find_faults()
    removal, pull, _ = re.findall("`(.*?)`", line)
    subprocess.run(shlex.split(removal), check=True)
    assert dvc([*shlex.split(pull)[1:], "-q"]) == 0
    assert find_faults() == []


def test_a_path_with_spaces_is_quoted_for_the_shell(pipeline: Path) -> None:
    (pipeline / "my recipe").mkdir()
    recipe = Path("my recipe")
    (recipe / "dvc.yaml").write_text("stages: {train: {cmd: echo 1 > model, outs: [model]}}\n")
    assert dvc(["repro", "-q", str(recipe / "dvc.yaml")]) == 0
    corrupt(recipe / "model")
    (line,) = verify.verify(recipe)[0]
    assert "`rm -rf 'my recipe/model'`" in line
    run_remedy(line)
    assert verify.verify(recipe)[0] == []


def write_lock(change: Callable[[dict[str, Any]], object]) -> None:
    """Change the stages of dvc.lock."""
    lock = YAML(typ="safe").load(Path("dvc.lock"))
    change(lock["stages"])
    with Path("dvc.lock").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(lock, file)


def list_tree(folder: Path) -> dict[str, bytes | None]:
    """Return the paths below a folder, without those below .dvc/tmp, and the content of each file."""
    paths = [path for path in sorted(folder.rglob("*")) if ".dvc/tmp" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


ELSEWHERE = ["../victim", "/etc/passwd", "..", ".", "data/../../victim", "a\0b", "../pipeline/dvc.yaml"]


def assert_refused(pipeline: Path, *parts: str) -> None:
    """Assert that the tool says so in one line and writes nothing, in the pipeline or beside it."""
    before = list_tree(pipeline.parent)
    with pytest.raises(StageError) as error:
        verify.verify(Path())
    assert_message(str(error.value), *parts)
    assert list_tree(pipeline.parent) == before


@pytest.mark.parametrize("path", ELSEWHERE)
def test_an_output_elsewhere_is_refused_and_nothing_is_written(path: str, pipeline: Path) -> None:
    write_lock(lambda stages: stages["train"]["outs"][0].update(path=path))
    assert_refused(pipeline, "dvc.lock: stage train: ", repr(path)[:20], "restore dvc.lock with Git")


@given(st.lists(st.sampled_from(["a", "..", ".", "", "data"]), min_size=1, max_size=5).map("/".join))
def test_no_output_of_a_lock_leads_out_of_its_folder(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    lock = {"stages": {"x": {"outs": [{"path": path, "md5": "0" * 32}]}}}
    (folder / "dvc.lock").write_text(json.dumps(lock), encoding="utf-8")
    try:
        verify.read_lock(folder / "dvc.lock")
    except StageError as error:
        assert_message(str(error), str(folder / "dvc.lock"), "restore dvc.lock with Git" if path else "paths")
    else:
        assert folder in Path(os.path.normpath(folder / path)).parents


@pytest.mark.parametrize(
    "change",
    [
        {"md5": "../../../victim"},
        {"md5": "0" * 31},
        {"md5": "/" * 32},
        {"md5": None},
        {"md5": 5},
        {"nfiles": "many"},
        {"nfiles": None},
        {"path": 5},
        {"path": ["a"]},
    ],
)
def test_an_odd_entry_of_an_output_is_refused(change: dict[str, Any], pipeline: Path) -> None:
    write_lock(lambda stages: stages["train"]["outs"][0].update(change))
    assert_refused(pipeline, "dvc.lock", "train")


@pytest.mark.parametrize("inner", ["data/model/weights", "data/model", "data/prompts.parquet/x"])
def test_an_output_in_another_is_refused(inner: str, pipeline: Path) -> None:
    entry = {"path": inner, "md5": "0" * 32}
    if inner == "data/model":
        write_lock(lambda stages: stages["report"]["outs"].append({"path": "data", "md5": f"{'0' * 32}.dir"}))
    else:
        write_lock(lambda stages: stages["report"]["outs"].append(entry))
    assert_refused(pipeline, "dvc.lock: stage ", "in another output")


@pytest.mark.parametrize(
    "change", [{"relpath": "../../../victim"}, {"relpath": "/victim"}, {"md5": "../x"}, {"md5": None}, {"md5": 5}]
)
def test_a_listing_that_leads_elsewhere_is_refused(change: dict[str, Any], pipeline: Path) -> None:
    """With a hash that is right: whoever wrote the lock wrote the listing too."""
    entries = json.loads(locate(MODEL).read_text(encoding="utf-8"))
    text = json.dumps([entries[0] | change, *entries[1:]])
    md5 = hashlib.md5(text.encode()).hexdigest()
    place = CACHE / md5[:2] / f"{md5[2:]}.dir"
    place.parent.mkdir(exist_ok=True)
    place.write_text(text, encoding="utf-8")
    write_lock(lambda stages: stages["train"]["outs"][0].update(md5=f"{md5}.dir"))
    assert_refused(pipeline, str(place), "is not a file with an MD5 below the folder")


@pytest.mark.parametrize("text", ["", "{}", "[5]", "null", '[{"relpath": "a"}]', "[" * 10**5])
def test_a_listing_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "listing.dir").write_text(text, encoding="utf-8")
    if text == "{}":
        assert verify.read_listing(tmp_path / "listing.dir") == {}
        return
    with pytest.raises(StageError) as error:
        verify.read_listing(tmp_path / "listing.dir")
    assert_message(str(error.value), f"{tmp_path / 'listing.dir'}: not a listing", "remove it")


def test_reports_are_not_written_through_a_link(pipeline: Path) -> None:
    """A lock that makes the report depend on the reports themselves: they are not linked into the temporary folder."""
    write_lock(lambda stages: stages["report"]["deps"].append({"path": "reports", "md5": f"{'0' * 32}.dir"}))
    before = list_tree(pipeline)
    Path("undeclared").write_text("another", encoding="utf-8")
    verify.verify(Path())
    assert list_tree(pipeline) == before | {"undeclared": b"another"}


@pytest.mark.parametrize(
    ("harm", "word"), [(lambda path: path.write_text("others"), "has changed since"), (remove, "is missing")]
)
@pytest.mark.parametrize(("path", "stage"), [("prompts", "assets-prompts"), ("model/tokenizer/vocabulary", "train")])
def test_an_input_that_no_stage_writes_is_checked(
    harm: Callable[[Path], object], word: str, path: str, stage: str, pipeline: Path
) -> None:
    """A local asset, for example: `dvc repro` would run its stage again."""
    harm(Path(path))
    (line,) = find_faults()
    word = word if path == "prompts" else "has changed since"
    assert line == f"{stage}: the input {path.partition('/')[0]} {word}: restore it, or run `dvc repro`"


@pytest.mark.parametrize("name", ["prompts", "ranker.base", "models.mine"])
def test_a_local_asset_behind_a_link_is_checked(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.jsonl").write_text("{}")
    (tmp_path / "data/local").mkdir(parents=True)
    path = f"data/local/{name}"
    stages = {
        "assets-local": {"outs": [{"path": "data/local", "md5": "0" * 32 + ".dir"}]},
        "assets-x": {"deps": [{"path": path, "md5": files.dvc_md5(tmp_path / "mine")}]},
    }

    (tmp_path / ".dvcignore").write_text(IGNORED)
    ignore = DvcIgnoreFilter(localfs, str(tmp_path))

    def check() -> list[str]:
        return verify.check_inputs(tmp_path, stages, verify.Cache(tmp_path / "cache", ignore))

    assert check() == [], "the folder of links, an artifact, is reported as missing"
    (tmp_path / path).symlink_to("../../mine")
    assert check() == []
    write_ignored(tmp_path / "mine")
    assert check() == []
    (tmp_path / "mine/a.jsonl").write_text("[]")
    (line,) = check()
    assert_message(line, "assets-x", path, "has changed since", "dvc repro")
    shutil.rmtree(tmp_path / "mine")
    (line,) = check()
    assert_message(line, "assets-x", path, "is missing", "dvc repro")


@pytest.mark.parametrize("document", [{}, {"stages": None}, {"stages": []}, {"stages": {"a": None, "b": {"outs": None}}}])
def test_an_odd_pipeline_has_no_uncached_outputs(document: dict[str, Any]) -> None:
    assert verify.find_uncached(document) == set()


def write_ignored(folder: Path) -> None:
    """Write files that IGNORED names, in the folder and below."""
    for name in ("__pycache__/a.txt", "inner/__pycache__/a.pyc", "inner/.a.jsonl.partial", ".b.partial/a.jsonl", "a.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")


def test_the_md5_of_a_folder_is_what_dvc_records(pipeline: Path) -> None:
    Path(".dvcignore").write_text(IGNORED, encoding="utf-8")
    write_ignored(Path("model"))
    Path("model/partial").write_text("", encoding="utf-8")
    Path("model/.git").mkdir()
    Path("model/.git/config").write_text("", encoding="utf-8")
    assert dvc(["repro", "-q", "train"]) == 0
    recorded = {dep["path"]: dep["md5"] for dep in verify.read_lock(Path("dvc.lock"))["train"]["deps"]}
    with repository.open_repository(Path()) as repo:
        assert repository.hash_path(Path("model"), repo.dvcignore) == recorded["model"]
        assert repository.hash_path(Path("model/weights"), repo.dvcignore) == files.dvc_md5(Path("model/weights"))


def test_what_dvc_ignores_is_no_fault(pipeline: Path) -> None:
    Path(".dvcignore").write_text(IGNORED, encoding="utf-8")
    write_ignored(Path("model"))
    write_ignored(MODEL)
    assert find_faults() == []
    (MODEL / "inner/b.jsonl").write_text("", encoding="utf-8")
    (line,) = find_faults()
    assert_message(line, "train: ", str(MODEL / "inner/b.jsonl"), "does not belong", "remove it")


def test_a_file_that_does_not_belong_is_named(pipeline: Path) -> None:
    (MODEL / "stray").write_text("")
    (line,) = find_faults()
    assert_message(line, "train: ", str(MODEL / "stray"), "does not belong", "remove it")


def test_a_file_with_another_schema_is_named_although_its_hash_is_right(pipeline: Path) -> None:
    tables.write([{"prompt_id": schemas.prompt_id("Why?"), "prompt": "Why?"}], schemas.SPLIT, Path("prompts"))
    assert dvc(["repro", "-q"]) == 0
    (line,) = find_faults()
    assert_message(line, "assets-prompts: ", str(PROMPTS), "missing column 'iteration'", RECREATE_PROMPTS)
    assert "create it" not in line, "the remedy of a missing file"


@pytest.mark.slow
def test_a_prompt_in_two_splits_is_named(pipeline: Path) -> None:
    def write_split(name: str, *prompts: str) -> None:
        rows = [{"prompt_id": schemas.prompt_id(prompt), "prompt": prompt} for prompt in prompts]
        tables.write(rows, schemas.SPLIT, Path("splits") / f"{name}.parquet")

    write_split("hold-out", "Why?", "Who?")
    write_split("iter1", "What?", "When?")
    stage = "  split: {cmd: cp -r splits data/split, deps: [splits], outs: [data/split]}\n"
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text(encoding="utf-8") + stage, encoding="utf-8")
    assert dvc(["repro", "-q"]) == 0
    assert find_faults() == []
    write_split("iter1", "What?", "Who?")
    assert dvc(["repro", "-q"]) == 0
    (line,) = find_faults()
    first, second = Path("data/split/hold-out.parquet"), Path("data/split/iter1.parquet")
    assert_message(line, f"split: {second}: 1 of its prompts", str(first), FORCE.format("split"))


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("params.yaml", "eta: 20\n", "changed since: eta in params.yaml: `dvc repro`"),
        ("published.yaml", "published: {}\n", "changed since: published.yaml: `dvc repro`"),
        ("undeclared", "another", FORCE.format("report")),
    ],
)
def test_a_report_that_differs_when_regenerated_is_named(name: str, text: str, remedy: str, pipeline: Path) -> None:
    Path(name).write_text(text, encoding="utf-8")
    reports = ("reports/index.html", "reports/metrics.json")
    assert find_faults() == [f"report: {report}: differs when regenerated: {remedy}" for report in reports]


def test_code_that_changed_since_is_named(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {**fingerprint("report"), "stages/report.py": "0" * 64, "stages/reporting/added.py": "1" * 64}
    monkeypatch.setattr(repository, "fingerprint", lambda stage: now)
    assert find_faults() == [], "the reports are the same"
    Path("stages/__main__.py").write_text(MAIN_PY.replace("write_text(text)", "write_text('')"), encoding="utf-8")
    for line in find_faults():
        assert_message(line, "changed since: stages/report.py, stages/reporting/added.py: `dvc repro`")


@pytest.mark.slow
def test_every_byte_that_a_pointer_stands_for_is_checked(tmp_path: Path) -> None:
    """The size of a corrupted file may be right."""
    contents, revision = {"config.json": b"{}", "model.safetensors": b"weights"}, "0123456789" * 4
    snapshot = tmp_path / "hf/hub/models--some--model/snapshots" / revision
    snapshot.mkdir(parents=True)
    for name, data in contents.items():
        (snapshot / name).write_bytes(data)
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    pointer = {"repo": "some/model", "revision": revision, "repo_type": "model", "files": entries}
    files.write_json(pointer, tmp_path / "my recipe/policy/pointer.json")
    code = (
        "from pathlib import Path; from stages.tools import verify\n"
        "print(*verify.check_pointer(Path('my recipe/policy'), Path('my recipe')), sep='\\n')"
    )
    assert run_python(tmp_path, "-c", code).stdout == "\n"
    weights = snapshot / "model.safetensors"
    weights.write_bytes(b"Weights")
    fault = run_python(tmp_path, "-c", code).stdout
    assert_message(fault, f"my recipe/policy: {weights} is corrupted: `rm {weights}`", "hub --fetch --recipe 'my recipe'`")
    weights.unlink()
    assert_message(run_python(tmp_path, "-c", code).stdout, "model.safetensors", "hub --fetch")


def test_reports_that_cannot_be_regenerated_are_one_fault(pipeline: Path) -> None:
    Path("undeclared").unlink()
    (line,) = find_faults()
    assert_message(line, "report: ", "cannot be regenerated", "FileNotFoundError", FORCE.format("report"))


def test_reports_are_not_regenerated_without_intact_inputs(pipeline: Path) -> None:
    remove(locate(WEIGHTS))
    remove(WEIGHTS)
    lines, summary = verify.verify(Path())
    assert len(lines) == 1
    assert "the reports not regenerated" in summary


def test_a_recipe_is_addressed_as_by_dvc(pipeline: Path) -> None:
    recipe = Path("recipes/own")
    recipe.mkdir(parents=True)
    (recipe / "dvc.yaml").write_text("stages: {train: {cmd: echo 1 > model, outs: [model]}}\n")
    assert dvc(["repro", "-q", str(recipe / "dvc.yaml")]) == 0
    lines, summary = verify.verify(recipe)
    assert lines == []
    assert_message(summary, "1 artifact, no reports among them, 1 file (0 with schemas), 2 bytes")
    remove(locate(recipe / "model"))
    remove(recipe / "model")
    (line,) = verify.verify(recipe)[0]
    assert_message(
        line,
        "train: recipes/own/model: missing in the workspace and in DVC's cache",
        "`dvc pull recipes/own/model`",
        FORCE.format("recipes/own/dvc.yaml:train"),
    )
    run_remedy(line)
    assert verify.verify(recipe)[0] == []


@pytest.mark.slow
def test_faults_end_in_exit_code_1_and_a_missing_lock_in_one_line(pipeline: Path, tmp_path: Path) -> None:
    remove(PROMPTS)
    done = run_verify(pipeline)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert_message(
        line, f"assets-prompts: {PROMPTS}: missing in the workspace, intact in DVC's cache: `dvc checkout {PROMPTS}`"
    )
    assert done.stderr.startswith("1 fault: 5 artifacts, ")
    with pytest.raises(StageError) as error:
        verify.verify(tmp_path)
    assert_message(str(error.value), "dvc.lock is missing", "dvc repro")

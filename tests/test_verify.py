"""Faults planted in a small pipeline are named, and gone when the commands that the line names were run."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from dvc.cli import main as dvc

from stages import files, schemas, verify
from stages.cli import ROOT, StageError
from stages.files import remove

DVC_YAML = """
stages:
  assets-prompts: {cmd: cp prompts data/prompts.parquet, deps: [prompts], outs: [data/prompts.parquet]}
  train: {cmd: cp -r model data/model, deps: [model], outs: [data/model]}
  report:
    cmd: python -m stages.report data reports
    deps: [stages/report.py, .dvc/plots, data/model]
    params: [eta]
    outs: [reports/metrics.json: {cache: false}, reports/index.html]
"""
REPORT_PY = """
import pathlib, sys
data, out = map(pathlib.Path, sys.argv[1:])
text = pathlib.Path("params.yaml").read_text() + (data / "model/weights").read_text() + pathlib.Path("undeclared").read_text()
out.mkdir(exist_ok=True)
for name in ("metrics.json", "index.html"):
    (out / name).write_text(text)
"""
PROMPTS, MODEL, WEIGHTS = Path("data/prompts.parquet"), Path("data/model"), Path("data/model/weights")
METRICS = Path("reports/metrics.json")
CACHE = Path(".dvc/cache/files/md5")
FORCE = "`dvc repro --force --single-item {}`"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that ran: a Parquet file, a folder, and reports by a `stages.report` of its own."""
    folder = tmp_path_factory.mktemp("origin")
    for name, text in {
        "dvc.yaml": DVC_YAML,
        "params.yaml": "eta: 10\n",
        "undeclared": "",
        "stages/__init__.py": "",
        "stages/report.py": REPORT_PY,
        "model/weights": "0.5 0.25",
        "model/tokenizer/vocabulary": "a b c",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    row = {"prompt_id": schemas.prompt_id("Why?"), "prompt": "Why?", "part": None}
    files.write_table(pa.Table.from_pylist([row], schema=schemas.PROMPTS), schemas.PROMPTS, folder / "prompts")
    (folder / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        for command in ("init --no-scm", "config core.analytics false", "config cache.type copy"):
            assert dvc([*command.split(), "-q"]) == 0
        Path(".dvc/plots").mkdir()
        Path(".dvc/plots/matrix.json").write_text("{}")
        assert dvc(["repro", "-q"]) == 0
    return folder


@pytest.fixture
def pipeline(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to harm, in which DVC has hashed everything, as the working directory."""
    folder = tmp_path / "pipeline"
    shutil.copytree(origin, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert dvc(["status", "-q"]) == 0
    return folder


def faults() -> list[str]:
    return verify.verify(Path())[0]


def cached(path: Path) -> Path:
    """The place in the cache of a file or folder of the unharmed workspace."""
    verify._known.clear()
    hashed = verify.md5(path)
    return CACHE / hashed[:2] / hashed[2:]


def change(path: Path) -> None:
    """Change a byte, and leave it write-protected, as DVC leaves the files in its cache."""
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    path.chmod(0o444)


def run(line: str) -> None:
    """The commands of a fault's line; of `dvc pull` or another the other, since there is no remote."""
    for command in re.findall("`(.*?)`", line):
        words = command.split()
        if words[0] == "rm":
            subprocess.run(words, check=True)
        elif words[:2] != ["dvc", "pull"]:
            assert dvc([*words[1:], "-q"]) == 0


def test_an_unharmed_pipeline_has_no_faults_and_is_left_alone(
    pipeline: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file() and ".dvc/tmp" not in str(path)}

    before = contents()
    monkeypatch.setattr("sys.argv", ["verify"])
    with pytest.raises(SystemExit) as exit_:
        verify.main()
    said = capsys.readouterr().out
    assert not exit_.value.code
    size = sum(path.stat().st_size for path in [PROMPTS, *verify.files_in(MODEL), *verify.files_in(Path("reports"))])
    assert said.startswith(f"no faults: 4 artifacts, the reports made again, 5 files (1 with schemas), {size:,} bytes, ")
    assert contents() == before


AGAIN = FORCE.format("assets-prompts")
TRAIN = FORCE.format("train")
HARM: list[tuple[tuple[Callable[[Path], None], Path] | None, tuple[Callable[[Path], None], Path] | None, str]] = [
    (None, (change, PROMPTS), f"{PROMPTS}: changed in W, right in C: `rm -rf {PROMPTS}`, then `dvc checkout {PROMPTS}`"),
    (None, (remove, PROMPTS), f"{PROMPTS}: missing in W, right in C: `dvc checkout {PROMPTS}`"),
    (None, (change, WEIGHTS), f"{WEIGHTS}: changed in W, right in C: `rm -rf {WEIGHTS}`, then `dvc checkout {MODEL}`"),
    (None, (remove, WEIGHTS), f"{WEIGHTS}: missing in W, right in C: `dvc checkout {MODEL}`"),
    (None, (remove, MODEL), f"{MODEL}: missing in W, right in C: `dvc checkout {MODEL}`"),
    ((change, PROMPTS), None, f"{PROMPTS}: right in W, changed in C: `rm -rf PLACE`, then `dvc pull {PROMPTS}` or {AGAIN}"),
    ((remove, PROMPTS), None, f"{PROMPTS}: right in W, missing in C: `dvc pull {PROMPTS}` or {AGAIN}"),
    ((remove, PROMPTS), (remove, PROMPTS), f"{PROMPTS}: missing in W and in C: `dvc pull {PROMPTS}` or {AGAIN}"),
    (
        (change, WEIGHTS),
        (change, WEIGHTS),
        f"{WEIGHTS}: changed in W and in C: `rm -rf {WEIGHTS} PLACE`, then `dvc pull {MODEL}` or {TRAIN}",
    ),
    ((remove, WEIGHTS), (remove, MODEL), f"{WEIGHTS}: missing in W and in C: `dvc pull {MODEL}` or {TRAIN}"),
    ((change, MODEL), None, f"{MODEL}: right in W, changed in C: `rm -rf PLACE`, then `dvc pull {MODEL}` or {TRAIN}"),
    ((remove, MODEL), (remove, MODEL), f"{MODEL}: missing in W and in C: `dvc pull {MODEL}` or {TRAIN}"),
    (
        (remove, MODEL),
        (change, WEIGHTS),
        f"{MODEL}: changed in W, missing in C: `rm -rf {MODEL}`, then `dvc pull {MODEL}` or {TRAIN}",
    ),
    (None, (change, METRICS), f"{METRICS}: changed in W: {FORCE.format('report')}"),
    (None, (remove, METRICS), f"{METRICS}: missing in W: {FORCE.format('report')}"),
]
"""What is done to the cached file or listing of a path, what to the workspace, and the line wanted (PLACE: in the cache)."""


@pytest.mark.parametrize(("there", "here", "wanted"), HARM, ids=[line.partition(": `")[0] for *_, line in HARM])
def test_a_fault_is_one_line_and_its_remedy_mends_it(
    there: tuple[Callable[[Path], None], Path] | None,
    here: tuple[Callable[[Path], None], Path] | None,
    wanted: str,
    pipeline: Path,
) -> None:
    if there:
        harm, path = there
        place = cached(path)
        harm(place)
        wanted = wanted.replace("PLACE", str(pipeline / place))
    if here:
        harm, path = here
        harm(path)
    (line,) = faults()
    stage = {PROMPTS: "assets-prompts", METRICS: "report"}.get(Path(wanted.partition(":")[0]), "train")
    assert line == f"{stage}: " + wanted.replace("in W", "in the workspace").replace("in C", "in DVC's cache")
    run(line)
    assert faults() == []


def test_what_dvc_believes_is_found(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cached file that changed under its write protection is what DVC checks out, and then calls up to date."""
    change(cached(WEIGHTS))
    remove(WEIGHTS)
    assert dvc(["checkout", "-q"]) == 0
    capsys.readouterr()
    assert dvc(["status"]) == 0
    assert "up to date" in capsys.readouterr().out
    (line,) = faults()
    assert line.startswith(f"train: {WEIGHTS}: changed in the workspace and in DVC's cache: ")
    run(line)
    assert faults() == []


def test_a_link_into_the_cache_is_harmed_with_it(pipeline: Path) -> None:
    dvc(["config", "cache.type", "hardlink", "-q"])
    dvc(["checkout", "--relink", "-q"])
    assert PROMPTS.stat().st_ino == cached(PROMPTS).stat().st_ino
    change(PROMPTS)
    (line,) = faults()
    assert line.startswith(f"assets-prompts: {PROMPTS}: changed in the workspace and in DVC's cache: ")
    run(line)
    assert faults() == []


def test_a_remote_mends_what_both_lost(pipeline: Path, tmp_path: Path) -> None:
    for command in (f"remote add -d shared {tmp_path / 'remote'}", "push"):
        assert dvc([*command.split(), "-q"]) == 0
    change(cached(WEIGHTS))
    change(WEIGHTS)
    (line,) = faults()
    removal, pull, _ = re.findall("`(.*?)`", line)
    subprocess.run(removal.split(), check=True)
    assert dvc([*pull.split()[1:], "-q"]) == 0
    assert faults() == []


def test_a_file_that_does_not_belong_is_named(pipeline: Path) -> None:
    (MODEL / "stray").write_text("")
    assert faults() == [f"train: {MODEL / 'stray'}: not of this artifact: remove it"]


def test_a_file_of_another_schema_is_named_though_its_hash_is_right(pipeline: Path) -> None:
    row = {"prompt_id": schemas.prompt_id("Why?"), "prompt": "Why?"}
    files.write_table(pa.Table.from_pylist([row], schema=schemas.PART), schemas.PART, Path("prompts"))
    assert dvc(["repro", "-q"]) == 0
    assert faults() == [f"assets-prompts: {PROMPTS}: lacks column 'part': " + FORCE.format("assets-prompts")]


def test_a_prompt_in_two_parts_is_named(pipeline: Path) -> None:
    def part(name: str, *prompts: str) -> None:
        rows = [{"prompt_id": schemas.prompt_id(prompt), "prompt": prompt} for prompt in prompts]
        files.write_table(rows, schemas.PART, Path("parts") / f"{name}.parquet")

    part("hold-out", "Why?", "Who?")
    part("iter1", "What?", "When?")
    stage = "  split: {cmd: cp -r parts data/split, deps: [parts], outs: [data/split]}\n"
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text() + stage)
    assert dvc(["repro", "-q"]) == 0
    assert faults() == []
    part("iter1", "What?", "Who?")
    assert dvc(["repro", "-q"]) == 0
    parts = Path("data/split")
    first, second = parts / "hold-out.parquet", parts / "iter1.parquet"
    assert faults() == [f"split: {second}: 1 of its prompts are in {first} too: " + FORCE.format("split")]


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("params.yaml", "eta: 20\n", "changed since: eta in params.yaml: `dvc repro`"),
        (
            "stages/report.py",
            REPORT_PY.replace("write_text(text)", "write_text('')"),
            "changed since: stages/report.py: `dvc repro`",
        ),
        ("undeclared", "another", FORCE.format("report")),
    ],
)
def test_a_report_that_is_another_when_made_again_is_named(name: str, text: str, remedy: str, pipeline: Path) -> None:
    Path(name).write_text(text)
    reports = ("reports/index.html", "reports/metrics.json")
    assert faults() == [f"report: {report}: changed when made again: {remedy}" for report in reports]


def test_reports_that_cannot_be_made_are_one_fault(pipeline: Path) -> None:
    Path("undeclared").unlink()
    (line,) = faults()
    assert line.startswith("report: the reports cannot be made again (FileNotFoundError: ")


def test_reports_are_not_made_of_what_is_lost(pipeline: Path) -> None:
    remove(cached(WEIGHTS))
    remove(WEIGHTS)
    lines, looked = verify.verify(Path())
    assert len(lines) == 1
    assert "the reports not made again: what they are made of is at fault" in looked


def test_a_recipe_is_addressed_as_dvc_does(pipeline: Path) -> None:
    recipe = Path("recipes/own")
    recipe.mkdir(parents=True)
    (recipe / "dvc.yaml").write_text("stages: {train: {cmd: echo 1 > model, outs: [model]}}\n")
    assert dvc(["repro", "-q", str(recipe / "dvc.yaml")]) == 0
    lines, looked = verify.verify(recipe)
    assert lines == []
    assert looked.startswith("1 artifacts, no reports among them, 1 files (0 with schemas), 2 bytes, ")
    remove(cached(recipe / "model"))
    remove(recipe / "model")
    (line,) = verify.verify(recipe)[0]
    assert line.startswith(
        "train: recipes/own/model: missing in the workspace and in DVC's cache: `dvc pull recipes/own/model` or "
    )
    assert line.endswith(FORCE.format("recipes/own/dvc.yaml:train"))
    run(line)
    assert verify.verify(recipe)[0] == []


def test_faults_end_in_exit_code_1_and_a_missing_lock_in_one_line(pipeline: Path, tmp_path: Path) -> None:
    remove(PROMPTS)
    command = [sys.executable, "-P", "-m", "stages.verify"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stdout == f"assets-prompts: {PROMPTS}: missing in the workspace, right in DVC's cache: `dvc checkout {PROMPTS}`\n"
    )
    assert done.stderr.startswith("1 fault: 4 artifacts, ")
    with pytest.raises(StageError, match=r"dvc.lock is missing: run the experiment with `dvc repro`"):
        verify.verify(tmp_path)

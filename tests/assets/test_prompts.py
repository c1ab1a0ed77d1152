import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import files, schemas
from stages.assets import prompts
from stages.cli import ROOT, StageError
from stages.params import Parts, PromptsAsset


def _data_set(folder: Path, column: str, **splits: list[str | None] | list[int]) -> None:
    """A data set in the Hub's own form: Parquet, and a README.md whose front matter names the splits."""
    (folder / "data").mkdir(parents=True)
    lines = [f"  - {{split: {split}, path: data/{split}.parquet}}" for split in splits]
    head = ["---", "configs:", "- config_name: default", "  data_files:", *lines, "---", ""]
    (folder / "README.md").write_text("\n".join(head))
    for split, texts in splits.items():
        pq.write_table(pa.table({column: texts, "source": ["x"] * len(texts)}), folder / "data" / f"{split}.parquet")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


ASSET = PromptsAsset(repo="./main")
WITH_PARTS = PromptsAsset(
    repo="./main",
    parts=Parts(repo="./parts", column="prompt", splits={"iter1": "train_iteration_1", "iter2": "train_iteration_2"}),
)


def test_prompts_are_kept_as_they_are_once_and_counted(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["What?", " Who\n is\tit? ", "", "Who is it?", None, "  \n", "What?", "what?"]
    _data_set(here / "main", "instruction", train=texts, test=["Other?"])
    with caplog.at_level(logging.INFO, "stages"):
        assert prompts.published(ASSET) == [("What?", None), (" Who\n is\tit? ", None), ("what?", None)]
    assert "no part: 8 prompts, 3 empty, 2 there already, 3 kept" in caplog.text


def test_a_part_gives_its_prompts_their_iteration_and_the_rest_have_none(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    known: list[str | None] = [f"Question {index}?" for index in range(30)]
    _data_set(here / "main", "instruction", train=known)
    _data_set(
        here / "parts",
        "prompt",
        train_iteration_1=[f" Question {index}? " for index in range(12)],
        train_iteration_2=[*known[10:25], "Unknown?", None],
    )
    with caplog.at_level(logging.INFO, "stages"):
        rows = prompts.published(WITH_PARTS)
    parts = {text.strip(): part for text, part in rows}
    assert len(rows) == len(parts) == 31
    assert [parts[f"Question {index}?"] for index in range(30)] == ["iter1"] * 12 + ["iter2"] * 13 + [None] * 5
    assert parts["Unknown?"] == "iter2"
    assert (" Question 0? ", "iter1") in rows
    assert "1 of the parts' 26 different prompts are not in ./main" in caplog.text
    assert "iter2: 17 prompts, 1 empty, 2 there already, 14 kept" in caplog.text


@pytest.mark.parametrize(("unknown", "refused"), [(2, False), (3, True)])
def test_parts_of_another_data_set_are_refused(here: Path, unknown: int, refused: bool) -> None:
    known: list[str | None] = [f"Question {index}?" for index in range(30)]
    _data_set(here / "main", "instruction", train=known)
    others = [f"Unknown {index}?" for index in range(unknown)]
    _data_set(here / "parts", "prompt", train_iteration_1=known[: 20 - unknown], train_iteration_2=others)
    if refused:
        with pytest.raises(StageError, match=r"^3 of the 20 prompts of \./parts are not in \./main, split train: they are not"):
            prompts.published(WITH_PARTS)
    else:
        assert len(prompts.published(WITH_PARTS)) == 32


@pytest.mark.parametrize(
    ("column", "texts", "message"),
    [
        ("question", ["What?"], r"^\./main, split train: no column 'instruction' among question, source: name one of them"),
        ("instruction", [1, 2], r"^\./main, split train: row 0: 'instruction' is no text"),
    ],
)
def test_a_column_that_holds_no_prompts_is_named(here: Path, column: str, texts: list[str | None], message: str) -> None:
    _data_set(here / "main", column, train=texts)
    with pytest.raises(StageError, match=message):
        prompts.published(ASSET)


def _stage(folder: Path, assets: str) -> subprocess.CompletedProcess[str]:
    (folder / "params.yaml").write_text(f"seed: 3\nassets:\n  prompts: {assets}\n")
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "stages.assets.prompts", "prompts.parquet"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_stage_reads_a_local_data_set(here: Path) -> None:
    _data_set(here / "main", "text", train=["What?"], dev=["Who?", "Why?"])
    done = _stage(here, "{repo: ./main, split: dev, column: text}")
    assert done.returncode == 0, done.stderr
    table = files.read_table(here / "prompts.parquet", schemas.PROMPTS)
    assert table.to_pylist() == [
        {"prompt_id": hashlib.sha256(text.encode()).hexdigest(), "prompt": text, "part": None} for text in ("Who?", "Why?")
    ]
    assert not list((here / "scratch").glob("datasets-*"))


def test_the_stage_makes_the_miniatures_prompts_from_the_seed(here: Path) -> None:
    made = []
    for _ in range(2):
        done = _stage(here, "{repo: miniature, count: 300}")
        assert done.returncode == 0, done.stderr
        made.append((here / "prompts.parquet").read_bytes())
    assert made[0] == made[1]
    table = files.read_table(here / "prompts.parquet", schemas.PROMPTS)
    assert len(set(table.column("prompt_id").to_pylist())) == 300


def test_more_prompts_than_the_domain_has_are_refused(here: Path) -> None:
    done = _stage(here, "{repo: miniature, count: 5300}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("prompts: error: assets.prompts.count: the miniature's domain has about ")
    assert not (here / "prompts.parquet").exists()

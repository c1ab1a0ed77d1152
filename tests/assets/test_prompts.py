import bz2
import csv
import gzip
import hashlib
import io
import json
import logging
import lzma
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts import schemas, tables
from stages.assets import prompts
from stages.runtime.errors import StageError
from stages.runtime.params import Assignment, PromptsAsset
from support.hub import FakeHub, Run
from support.messages import assert_message

Texts = list[str | None]


def write_data_set(folder: Path, column: str, **splits: Texts | list[int]) -> None:
    """Write a data set in the Hub's own format: Parquet, and a README.md whose front matter names the splits."""
    (folder / "data").mkdir(parents=True)
    lines = [f"  - {{split: {split}, path: data/{split}.parquet}}" for split in splits]
    head = ["---", "configs:", "- config_name: default", "  data_files:", *lines, "---", ""]
    (folder / "README.md").write_text("\n".join(head))
    for split, texts in splits.items():
        pq.write_table(pa.table({column: texts, "source": ["x"] * len(texts)}), folder / "data" / f"{split}.parquet")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


ASSET = PromptsAsset(repo="./main", split="train", column="instruction")
ASSIGNED = PromptsAsset(
    repo="./main",
    split="train",
    column="instruction",
    assignment=Assignment(
        repo="./assignment", column="prompt", splits={"iter1": "train_iteration_1", "iter2": "train_iteration_2"}
    ),
)


def test_prompts_are_kept_verbatim_without_duplicates_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["What?", " Who\n is\tit? ", "", "Who is it?", None, "  \n", "What?", "what?"]
    write_data_set(folder / "main", "instruction", train=texts, test=["Other?"])
    with caplog.at_level(logging.INFO, "stages"):
        assert prompts.read_prompts(ASSET) == [("What?", None), (" Who\n is\tit? ", None), ("what?", None)]
    assert "unassigned: 8 prompts, 3 empty, 2 duplicate, 3 kept" in caplog.text


def test_a_data_set_without_prompts_is_rejected(folder: Path) -> None:
    write_data_set(folder / "main", "instruction", train=["", None, " "])
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    assert_message(str(error.value), "./main, split train", "every prompt is empty", "assets.prompts in params.yaml")


def test_prompts_get_the_iteration_they_are_assigned_to_and_the_others_none(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known: Texts = [f"Question {index}?" for index in range(30)]
    write_data_set(folder / "main", "instruction", train=known)
    write_data_set(
        folder / "assignment",
        "prompt",
        train_iteration_1=[f" Question {index}? " for index in range(12)],
        train_iteration_2=[*known[10:25], "Unknown?", None],
    )
    with caplog.at_level(logging.INFO, "stages"):
        rows = prompts.read_prompts(ASSIGNED)
    iterations = {text.strip(): iteration for text, iteration in rows}
    assert len(rows) == len(iterations) == 31
    assert [iterations[f"Question {index}?"] for index in range(30)] == ["iter1"] * 12 + ["iter2"] * 13 + [None] * 5
    assert iterations["Unknown?"] == "iter2"
    assert (" Question 0? ", "iter1") in rows
    assert "1 of 26 distinct assigned prompts are not in ./main" in caplog.text
    assert "iter2: 17 prompts, 1 empty, 2 duplicate, 14 kept" in caplog.text


@pytest.mark.parametrize(("unknown", "rejected"), [(2, False), (3, True)])
def test_an_assignment_of_another_data_set_is_rejected(folder: Path, unknown: int, rejected: bool) -> None:
    known: Texts = [f"Question {index}?" for index in range(30)]
    write_data_set(folder / "main", "instruction", train=known)
    others: Texts = [f"Unknown {index}?" for index in range(unknown)]
    write_data_set(folder / "assignment", "prompt", train_iteration_1=known[: 20 - unknown], train_iteration_2=others)
    if rejected:
        with pytest.raises(StageError) as error:
            prompts.read_prompts(ASSIGNED)
        parts = ["3 of the 20 prompts of ./assignment", "./main, split train", "assets.prompts.assignment", "params.yaml"]
        assert_message(str(error.value), *parts)
    else:
        assert len(prompts.read_prompts(ASSIGNED)) == 32


@pytest.mark.parametrize(
    ("column", "texts", "parts"),
    [
        ("question", ["What?"], ["'instruction'", "'question', 'source'"]),
        ("instruction", [1, 2], ["row 0", "'instruction' is 1", "not text"]),
    ],
)
def test_a_column_without_prompts_is_named(folder: Path, column: str, texts: Texts, parts: list[str]) -> None:
    write_data_set(folder / "main", column, train=texts)
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    assert_message(str(error.value), "./main, split train", *parts, "params.yaml")


ODD: list[Any] = [5, 0, 1.5, True, False, ["What?"], [], {"text": "What?"}, {}, "\ud800", "What\udfff?"]


def write_json(folder: Path, values: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"instruction": value, "n": 1}) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.mark.parametrize("odd", ODD)
def test_one_odd_value_is_refused_by_row_and_rewrites_no_other(folder: Path, odd: object) -> None:
    path = write_json(folder / "main", ["What?", 'Who is "it"?', odd, None])
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    assert_message(str(error.value), f"{path.relative_to(folder)}: row 2: 'instruction' is ", "correct the row")


VALUES = st.one_of(st.text(st.characters(codec="utf-8")), st.none(), st.integers(), st.booleans(), st.lists(st.text()))


@given(st.lists(VALUES, max_size=6), st.sampled_from(["lines", "list"]))
def test_the_first_odd_row_of_a_json_file_is_found(values: list[Any], form: str) -> None:
    rows = [{"p": value} for value in values]
    text = json.dumps(rows) if form == "list" else "\n".join(map(json.dumps, rows))
    fault = prompts._find_fault(text, "p")
    odd = [row for row, value in enumerate(values) if value is not None and not isinstance(value, str)]
    assert (fault or "").partition(":")[0] == (f"row {odd[0]}" if odd else "")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
@pytest.mark.parametrize("content", [b"\xff", b"What\xc3?", b"\xed\xa0\x80"])
def test_invalid_utf8_is_refused_by_line(folder: Path, content: bytes, suffix: str) -> None:
    (folder / "main").mkdir()
    path = folder / "main" / f"train.{suffix}"
    path.write_bytes(b"instruction\nsecond " + content + b"\n")
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    assert_message(str(error.value), f"main/train.{suffix}: line 2: not valid UTF-8")


@pytest.mark.parametrize("content", [b"x\xff", b"\xed\xa0\x80"])
def test_invalid_utf8_in_parquet_is_refused_by_row(folder: Path, content: bytes) -> None:
    write_data_set(folder / "main", "instruction", train=[])
    buffers = pa.array([b"What?", None, content], pa.binary()).buffers()
    texts = pa.Array.from_buffers(pa.string(), 3, buffers)
    pq.write_table(pa.table({"instruction": texts}), folder / "main/data/train.parquet")
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    assert_message(str(error.value), "./main, split train: row 2: 'instruction' is b", "not text")


@pytest.mark.parametrize("word", ["NA", "null", "None", "n/a", "nan", ""])
def test_a_word_that_csv_takes_for_nothing_is_refused_by_row(folder: Path, word: str) -> None:
    (folder / "main").mkdir()
    (folder / "main/train.csv").write_text(f"instruction,n\nWhat?,1\n{word},2\nWho?,3\n", encoding="utf-8")
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    assert_message(str(error.value), "./main, split train: row 1: 'instruction' is empty, or a word such as NA", "JSON Lines")


def write_csv(folder: Path, **files: str) -> None:
    (folder / "main").mkdir()
    for name, text in files.items():
        (folder / "main" / name.replace("_", ".")).write_text(text, encoding="utf-8", newline="")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("instruction,x\nWhat?,1\nWhat?,1,extra\n", ["line 3", "3 cells", "header has 2"]),
        ("instruction,x\nWhat?,1,extra\n", ["line 2", "3 cells", "header has 2"]),
        ("instruction\nWhat, is it?\n", ["line 2", "2 cells", "header has 1"]),
        ('\ninstruction,x\n\n"What\nis it?",1\nWho?\n', ["line 6", "1 cells", "header has 2"]),
        ('instruction,x\n"What" is it?,1\n', ["line 2", "expected after"]),
        ('instruction,x\n"What?,1\nWho?,2\n', ["line 2", "unexpected end"]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_csv_row_that_may_not_be_read_as_written_is_refused_by_line(
    folder: Path, text: str, parts: list[str], suffix: str
) -> None:
    write_csv(folder, **{f"train_{suffix}": text.replace(",", "," if suffix == "csv" else "\t")})
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    parts = [part.replace(",", "," if suffix == "csv" else "\\t") for part in parts]
    assert_message(str(error.value), f"main/train.{suffix}: ", *parts, "double quotes", "Parquet or JSON Lines")


def test_two_columns_of_one_name_are_refused(folder: Path) -> None:
    write_csv(folder, train_csv="instruction,x,instruction\nWhat?,1,Who?\n")
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    assert_message(str(error.value), "main/train.csv: line 1: 2 columns are named 'instruction'", "name one column so")


@pytest.mark.parametrize("written", ["007", "1.50", "1e3", "True", '"007"'])
def test_a_prompt_that_csv_takes_for_a_number_is_refused_by_line(folder: Path, written: str) -> None:
    """The first 1000 rows make the column one of texts, into which the second file's values are converted."""
    write_csv(folder, **{"train-0_csv": "instruction\n" + "What?\n" * 1000, "train-1_csv": f"instruction\n\n{written}\n"})
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    value = written.strip('"')
    assert_message(str(error.value), f"main/train-1.csv: line 3: 'instruction' is '{value}', but is read as '", "JSON Lines")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@settings(max_examples=15)
@given(texts=st.lists(st.text("a ,\t\n\r'\"\u00e91", min_size=1, max_size=6).map("x{}".format), min_size=1, max_size=5))
def test_quoted_csv_is_read_verbatim(tmp_path_factory: pytest.TempPathFactory, suffix: str, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("csv")
    buffer = io.StringIO()
    separator = "," if suffix == "csv" else "\t"
    writer = csv.writer(buffer, delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writerows([["n", "instruction"], *([str(index), text] for index, text in enumerate(texts))])
    write_csv(folder, **{f"train_{suffix}": "\ufeff" + buffer.getvalue()})
    asset = ASSET.model_copy(update={"repo": str(folder / "main")})
    assert list(prompts._read_column(asset, "train", "instruction")) == texts


def test_only_the_files_of_the_split_count(folder: Path) -> None:
    """Other CSV files, such as notes, may have other columns."""
    write_csv(folder, train_csv="instruction\nWhat?\n\n  \nNumber 007\n", test_csv="a,b\n1,2,3\n")
    front = "configs: [{config_name: default, data_files: [{split: train, path: train.csv}]}]"
    (folder / "main/README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
    assert prompts.read_prompts(ASSET) == [("What?", None), ("Number 007", None)]


@pytest.mark.parametrize("name", ["train.csv.gz", "train.jsonl.gz", "train.json.xz", "train.csv.bz2", "train.csv"])
def test_a_compressed_file_is_named_and_read_once_it_is_decompressed(folder: Path, name: str) -> None:
    """Whatever its name: `datasets` recognizes compression by the content."""
    text = b"instruction\nWhat?\n" if "csv" in name else b'{"instruction": "What?"}\n'
    (folder / "main").mkdir()
    path = folder / "main" / name
    path.write_bytes({"xz": lzma, "bz2": bz2}.get(name.rpartition(".")[2], gzip).compress(text))
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    assert_message(str(error.value), f"main/{name} is compressed", "decompress it")
    path.unlink()
    path.with_name(".".join(name.split(".")[:2])).write_bytes(text)
    assert prompts.read_prompts(ASSET) == [("What?", None)]


SCRIPT = """
import sys
from stages.assets import prompts
from stages.runtime.errors import StageError
from stages.runtime.params import PromptsAsset
for asset in sys.argv[1:]:
    repo, revision = asset.split("@")
    try:
        asset = PromptsAsset(repo=repo, revision=revision, split="train", column="instruction")
        print(min(text for text, _ in prompts.read_prompts(asset)))
    except StageError as error:
        print(error)
"""
"""Reads data sets, and prints the first prompt of each in the order of the alphabet, or the error, on a line."""


@pytest.mark.slow
def test_the_files_of_the_hub_are_compared_too(run: Run, fake_hub: FakeHub) -> None:
    texts = {
        "ragged": ("train.csv", b"instruction,x\nWhat?,1\nWhat, is it?,1\n"),
        "number": ("train.csv", b"instruction\n007\nWhat?\n"),
        "late-number": ("train.csv", b"instruction\n" + b"What?\n" * 1000 + b"007\n"),
        "compressed": ("train.csv.gz", gzip.compress(b"instruction\nWhat?\n")),
        "json-number": ("train.jsonl", b'{"instruction": "What?"}\n{"instruction": 5}\n'),
    }
    fake_hub.repos |= {f"datasets/some/{repo}": {name: content} for repo, (name, content) in texts.items()}
    assets = [f"some/{repo}@{fake_hub.commit(f'datasets/some/{repo}')}" for repo in texts]
    done = run("-c", SCRIPT, *assets, endpoint=fake_hub.endpoint)
    ragged, number, late, compressed, json_number = done.stdout.splitlines()
    assert_message(ragged, "train.csv: line 3: 3 cells", "JSON Lines")
    assert number == late == "007"
    assert_message(compressed, "train.csv.gz is compressed")
    assert_message(json_number, "train.jsonl: row 1: 'instruction' is 5")


@pytest.mark.parametrize("blank", ["\r", " ", "\t", " \r"])
def test_blank_lines_of_json_do_not_hide_the_odd_row(folder: Path, blank: str) -> None:
    path = write_json(folder / "main", ["What?", 5])
    path.write_text(path.read_text(encoding="utf-8").replace("\n", f"\n{blank}\n"), encoding="utf-8", newline="")
    with pytest.raises(StageError) as error:
        prompts.read_prompts(ASSET)
    assert_message(str(error.value), "main/train.jsonl: row 1: 'instruction' is 5", "correct the row")


def test_the_named_remedy_helps(folder: Path) -> None:
    """The words that CSV takes for nothing are text in JSON Lines."""
    texts = ["What?", "NA", "null", "None", "5", "true", "[1]", '{"a": 1}', "\u00e9 \U0001f600"]
    write_json(folder / "main", texts)
    assert prompts.read_prompts(ASSET) == [(text, None) for text in texts]


def run_stage(run: Run, folder: Path, asset: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    (folder / "params.yaml").write_text(json.dumps({"seed": 3, "assets": {"prompts": asset}}))
    return run("-m", "stages", "assets-prompts", "--out", "prompts.parquet")


@pytest.mark.slow
def test_the_stage_reads_a_local_data_set(run: Run, folder: Path) -> None:
    write_data_set(folder / "main", "text", train=["What?"], dev=["Who?", "Why?"])
    done = run_stage(run, folder, {"repo": "./main", "split": "dev", "column": "text"})
    assert done.returncode == 0, done.stderr
    table = tables.read(folder / "prompts.parquet", schemas.PROMPTS)
    assert table.to_pylist() == [
        {"prompt_id": hashlib.sha256(text.encode()).hexdigest(), "prompt": text, "iteration": None} for text in ("Who?", "Why?")
    ]
    assert not list((folder / "scratch").glob("datasets-*"))


def test_the_seed_determines_the_miniature_s_prompts(run: Run, folder: Path) -> None:
    contents = []
    for _ in range(2):
        done = run_stage(run, folder, {"repo": "miniature", "count": 300})
        assert done.returncode == 0, done.stderr
        contents.append((folder / "prompts.parquet").read_bytes())
    assert contents[0] == contents[1]
    table = tables.read(folder / "prompts.parquet", schemas.PROMPTS)
    assert len(set(table["prompt_id"].to_pylist())) == 300
    assert table["iteration"].null_count == 300


@pytest.mark.slow
def test_more_prompts_than_there_are_raise_an_error(run: Run, folder: Path) -> None:
    done = run_stage(run, folder, {"repo": "miniature", "count": 5300})
    assert done.returncode == 1
    assert_message(done.stderr, "assets-prompts: error: params.yaml", "assets.prompts.count", "not 5300", "lower it")
    assert not (folder / "prompts.parquet").exists()

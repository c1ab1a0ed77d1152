"""A data set's front matter names files of the data set only."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts import files, front_matter
from stages.runtime.errors import StageError
from support.messages import assert_message

OUTSIDE = [
    "../x.parquet",
    "/etc/passwd",
    "data/../../x.jsonl",
    "..",
    "http://example.org/x.csv",
    "https://example.org/x.csv",
    "hf://datasets/a/b/x.parquet",
    "zip://x.csv::http://example.org/x.zip",
    "file:/etc/passwd",
    "",
    5,
]
INSIDE = ["x.parquet", "data/*.parquet", "data/train-*", "./x.csv", "**/x y.jsonl"]


def write(folder: Path, name: str, configs: object) -> Path:
    """Write a README.md or .huggingface.yaml; JSON is YAML."""
    text = json.dumps({"license": "mit", "configs": configs})
    (folder / name).write_text(f"---\n{text}\n---\n# A data set\n" if name == "README.md" else text, encoding="utf-8")
    return folder / name


def list_forms(path: object) -> list[object]:
    """List the places of a path in the front matter."""
    return [
        [{"config_name": "a", "data_files": path}],
        [{"config_name": "a", "data_files": ["x.csv", path]}],
        [{"config_name": "a", "data_files": [{"split": "train", "path": path}]}],
        [
            {"config_name": "a", "data_files": "x.csv"},
            {"config_name": "b", "data_files": [{"split": "t", "path": ["x", path]}]},
        ],
        [{"config_name": "a", "data_dir": path}],
    ]


@pytest.mark.parametrize("name", front_matter.NAMES)
@pytest.mark.parametrize("path", OUTSIDE)
def test_data_elsewhere_is_refused(path: object, name: str, tmp_path: Path) -> None:
    for form in list_forms(path):
        file = write(tmp_path, name, form)
        with pytest.raises(StageError) as error:
            front_matter.check(tmp_path)
        assert_message(str(error.value), f"{file}: configs: {path!r}", "put the file there")


@pytest.mark.parametrize("path", INSIDE)
def test_data_of_the_data_set_is_accepted(path: str, tmp_path: Path) -> None:
    for form in list_forms(path):
        write(tmp_path, "README.md", form)
        front_matter.check(tmp_path)


@given(st.lists(st.sampled_from(["a", "..", "", ".", "*", "http:", "b.csv"]), min_size=1).map("/".join))
def test_a_path_is_accepted_only_below_the_folder(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    write(folder, "README.md", list_forms(path)[0])
    try:
        front_matter.check(folder)
    except StageError:
        assert ".." in path or ":" in path or not path.strip("./") or path.startswith("/")
    else:
        assert path == "." or (files.is_inside(path) and ":" not in path)


@pytest.mark.parametrize("configs", [None, [], {}, "x", 5, [5], [{}], [{"config_name": "a"}]])
def test_front_matter_without_paths_is_left_to_the_library(configs: object, tmp_path: Path) -> None:
    write(tmp_path, "README.md", configs)
    front_matter.check(tmp_path)


def test_a_data_set_without_front_matter_is_accepted(tmp_path: Path) -> None:
    front_matter.check(tmp_path)
    (tmp_path / "README.md").write_text("# A data set\n", encoding="utf-8")
    front_matter.check(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "[1, 2]", "{a: b: c}", "\t- x"])
def test_front_matter_that_cannot_be_read_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8")
    with pytest.raises(StageError) as error:
        front_matter.check(tmp_path)
    assert_message(str(error.value), f"{tmp_path / 'README.md'}: ", "correct it")

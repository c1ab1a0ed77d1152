import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import STRANGE

from stages import domain, files, schemas, split
from stages.assets.prompts import table
from stages.cli import ROOT, StageError

ITERATIONS = ["iter1", "iter2", "iter3"]
Parts = list[str | None]
parts_lists = st.lists(st.sampled_from([None, None, "iter1", "iter2"]), min_size=40, max_size=120)


def allot(
    parts: Parts,
    iterations: list[str] = ITERATIONS,
    seed: int = 1,
    each: int | None = 5,
    hold_out: int = 4,
    order: list[int] | None = None,
) -> dict[str, list[str]]:
    """The ids that each iteration and the hold-out get; order: the rows' order in the input."""
    ids = [hashlib.sha256(str(index).encode()).hexdigest() for index in range(len(parts))]
    rows = order or list(range(len(parts)))
    found = split.allot(
        [ids[row] for row in rows],
        [parts[row] for row in rows],
        iterations,
        seed=seed,
        prompts_per_iteration=each,
        hold_out=hold_out,
    )
    return {name: [ids[rows[index]] for index in indices] for name, indices in found.items()}


def _enough(parts: Parts) -> bool:
    return parts.count(None) >= 4 + 3 * 5 and all(parts.count(name) in (0, *range(5, 200)) for name in ("iter1", "iter2"))


@settings(deadline=None)
@given(parts_lists.filter(_enough), st.integers(0, 3))
def test_no_prompt_is_in_two_files(parts: Parts, seed: int) -> None:
    found = allot(parts, seed=seed)
    ids = [name for part in found.values() for name in part]
    assert len(ids) == len(set(ids)) == 4 + 3 * 5
    assert list(found) == ["hold-out", *ITERATIONS]


@settings(deadline=None)
@given(parts_lists.filter(_enough), st.randoms())
def test_the_order_of_the_rows_does_not_matter(parts: Parts, random: object) -> None:
    order = list(range(len(parts)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert allot(parts, order=order) == allot(parts)


@settings(deadline=None)
@given(parts_lists.filter(lambda parts: _enough(parts) and parts.count(None) >= 24))
def test_a_further_iteration_leaves_the_others_as_they_were(parts: Parts) -> None:
    three, four = allot(parts), allot(parts, [*ITERATIONS, "iter4"])
    assert {name: four[name] for name in three} == three
    two = allot(parts, ITERATIONS[:2])
    assert {name: three[name] for name in two} == two


def test_another_seed_draws_others() -> None:
    parts: Parts = [None] * 100
    assert allot(parts, seed=1) != allot(parts, seed=2)


def test_given_parts_stay_whole_while_others_suffice_for_the_hold_out() -> None:
    parts: Parts = ["iter1"] * 10 + ["iter2"] * 11 + [None] * 4
    found = allot(parts, ["iter1", "iter2"], each=None, hold_out=4)
    assert {name: len(ids) for name, ids in found.items()} == {"hold-out": 4, "iter1": 10, "iter2": 11}
    found = allot(parts, ["iter1", "iter2"], each=None, hold_out=6)
    assert len(found["hold-out"]) == 6
    assert len(found["iter1"]) + len(found["iter2"]) == 19


def test_a_part_of_an_absent_iteration_goes_to_nobody() -> None:
    parts: Parts = ["iter9"] * 10 + [None] * 20
    found = allot(parts, ["iter1"])
    absent = {hashlib.sha256(str(index).encode()).hexdigest() for index in range(10)}
    assert not absent & {name for ids in found.values() for name in ids}


@pytest.mark.parametrize(
    ("parts", "each", "hold_out", "message"),
    [
        ([None] * 20, 5, 21, "split.hold_out: 21 prompts are wanted and there are 20"),
        ([None] * 18, 5, 4, "iter3: 5 prompts are wanted and 4 of 18 are left: lower split.prompts_per_iteration"),
        ([None] * 20, None, 4, "iter1 has no part of its own in the prompts: set split.prompts_per_iteration"),
        (
            ["iter1"] * 3 + [None] * 20,
            5,
            4,
            "iter1: 5 prompts are wanted and its part has 3: lower split.prompts_per_iteration",
        ),
    ],
)
def test_too_few_prompts_are_said_with_the_parameter(parts: Parts, each: int | None, hold_out: int, message: str) -> None:
    with pytest.raises(StageError) as error:
        allot(parts, each=each, hold_out=hold_out)
    assert str(error.value).startswith(message)


def _stage(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stages.split", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_the_stage_writes_a_file_each_byte_for_byte_stable(tmp_path: Path) -> None:
    rows: list[tuple[str, str | None]] = [(f"Question {index}?", None) for index in range(60)]
    settings = (
        "seed: 3\nsplit: {{prompts_per_iteration: 10, hold_out: 7, contamination: count}}\n"
        "iterations: {{iter1: base, iter2: iter1{}}}\n"
    )
    outs = []
    for more, order in (("", rows), (", iter3: iter2", rows[::-1])):
        (tmp_path / "params.yaml").write_text(settings.format(more))
        files.write_json([{"instruction": "Why?"}], tmp_path / "instructions.json")
        files.write_table(table(order), schemas.PROMPTS, tmp_path / "prompts.parquet")
        done = _stage(tmp_path, "prompts.parquet", "instructions.json", "out")
        assert done.returncode == 0, done.stderr
        outs.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    records = [json.loads(found.pop("contamination.json"))["contaminated"] for found in outs]
    assert records == [{"hold-out": 0, "iter1": 0, "iter2": 0}, {"hold-out": 0, "iter1": 0, "iter2": 0, "iter3": 0}]
    assert set(outs[0]) == {"hold-out.parquet", "iter1.parquet", "iter2.parquet"}
    assert set(outs[1]) == {*outs[0], "iter3.parquet"}
    assert {name: outs[1][name] for name in outs[0]} == outs[0]
    assert files.read_table(tmp_path / "out" / "hold-out.parquet", schemas.PART).num_rows == 7


@pytest.mark.parametrize(
    ("prompt", "instruction", "found"),
    [
        ("What is  1 plus 2?", "what is 1 plus 2", True),
        ("“What is” ① plus 2 ?!", "What is 1 plus 2.", True),
        ("What is 1+2?", "What is 1 2?", False),
        ("कि?", "की?", False),
        (" ".join("abcdefghijklm") + " and more", "so " + " ".join("ABCDEFGHIJKLM"), True),
        (" ".join("abcdefghijkl") + " and more", "so " + " ".join("abcdefghijkl"), False),
        ("What is 1 plus 2? And 3?", "What is 1 plus 2?", False),
    ],
)
def test_a_prompt_is_contaminated_by_the_same_words_or_thirteen_in_a_row(prompt: str, instruction: str, found: bool) -> None:
    assert split.contaminated(["Another?", prompt], ["Something else.", instruction]) == [False, found]


def _contaminated(folder: Path, contamination: str) -> subprocess.CompletedProcess[str]:
    """The stage on 20 prompts, all but two of which are allotted, four of them AlpacaEval's too."""
    (folder / "params.yaml").write_text(
        f"seed: 3\nsplit: {{prompts_per_iteration: 7, hold_out: 4, contamination: {contamination}}}\n"
        "iterations: {iter1: base, iter2: iter1}\n"
    )
    files.write_table(table([(f"Question {index}?", None) for index in range(20)]), schemas.PROMPTS, folder / "prompts.parquet")
    asked = [{"instruction": f"question {index}"} for index in (1, 7, 8, 13, 99)]
    files.write_json(asked, folder / "instructions.json")
    return _stage(folder, "prompts.parquet", "instructions.json", "out")


def _counted(folder: Path) -> dict[str, int]:
    """How many of each part's prompts are among the contaminated, looked up in the files."""
    names = [f"Question {index}?" for index in (1, 7, 8, 13)]
    parts = {path.stem: files.read_table(path, schemas.PART) for path in (folder / "out").glob("*.parquet")}
    return {name: sum(prompt in names for prompt in part["prompt"].to_pylist()) for name, part in parts.items()}


def test_contaminated_prompts_are_counted_where_they_went(tmp_path: Path) -> None:
    done = _contaminated(tmp_path, "count")
    assert done.returncode == 0, done.stderr
    record = files.read_json(tmp_path / "out" / "contamination.json")
    assert record == {"contaminated": _counted(tmp_path), "dropped": 0, "instructions": 5}
    assert sum(record["contaminated"].values()) >= 2
    assert "4 of 20 prompts are in AlpacaEval too" in done.stderr


def test_contaminated_prompts_are_dropped_or_refused_by_parameter(tmp_path: Path) -> None:
    done = _contaminated(tmp_path, "refuse")
    assert done.returncode == 1
    assert re.fullmatch(
        r"split: error: prompts\.parquet: [2-4] prompts to train on are in AlpacaEval too, 'Question \d+\?' the first: have "
        r"them dropped \(split\.contamination\)",
        done.stderr.splitlines()[-1],
    )
    assert not (tmp_path / "out").exists()
    done = _contaminated(tmp_path, "drop")
    assert done.returncode == 1
    assert "iter2: 7 prompts are wanted and 5 of 16 are left" in done.stderr
    text = (tmp_path / "params.yaml").read_text().replace(": 7,", ": 6,")
    (tmp_path / "params.yaml").write_text(text)
    done = _stage(tmp_path, "prompts.parquet", "instructions.json", "out")
    assert done.returncode == 0, done.stderr
    assert _counted(tmp_path) == {"hold-out": 0, "iter1": 0, "iter2": 0}
    assert files.read_json(tmp_path / "out" / "contamination.json")["dropped"] == 4


def test_the_miniatures_prompts_are_not_those_it_is_evaluated_on() -> None:
    prompts = domain.distinct_prompts("1/prompts", "training", 1500)
    assert not any(split.contaminated(prompts, domain.distinct_prompts("1/evaluation", "evaluation", 700)))


def test_the_stage_refuses_repeated_prompts_and_missing_input(tmp_path: Path) -> None:
    assert _contaminated(tmp_path, "count").returncode == 0
    files.remove(tmp_path / "out")
    pq.write_table(table([("Why?", None), ("Same?", None), ("Same?", None)]), tmp_path / "twice.parquet")
    named = schemas.prompt_id("Same?")
    for prompts, instructions, message in (
        ("twice.parquet", "instructions.json", f"twice.parquet: row 2: 'prompt_id' is '{named}', which is there before"),
        ("none.parquet", "instructions.json", "none.parquet is missing"),
        ("prompts.parquet", "none.json", "none.json is missing"),
    ):
        done = _stage(tmp_path, prompts, instructions, "out")
        assert (done.returncode, done.stderr) == (1, f"split: error: {message}: check the path, or make the file again\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("contamination", ["count", "drop"])
def test_prompts_of_every_kind_come_through_as_they_are(contamination: str, tmp_path: Path) -> None:
    settings = "seed: 3\nsplit: {{prompts_per_iteration: {}, hold_out: 2, contamination: {}}}\niterations: {{iter1: base}}\n"
    (tmp_path / "params.yaml").write_text(settings.format(len(STRANGE) - 2, contamination))
    files.write_table(table([(text, None) for text in STRANGE]), schemas.PROMPTS, tmp_path / "prompts.parquet")
    files.write_json([{"instruction": "Why?"}, {"instruction": "\u2028!"}], tmp_path / "instructions.json")
    done = _stage(tmp_path, "prompts.parquet", "instructions.json", "out")
    assert done.returncode == 0, done.stderr
    parts = [files.read_table(tmp_path / "out" / name, schemas.PART) for name in ("hold-out.parquet", "iter1.parquet")]
    assert sorted(text for part in parts for text in part["prompt"].to_pylist()) == sorted(STRANGE)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "error: prompts.parquet: no rows: check the path, or make the file again"),
        (1, "error: split.hold_out: 4 prompts are wanted and there are 1: lower it"),
        (4, "error: iter1: 7 prompts are wanted and 0 of 4 are left: "),
    ],
)
def test_hardly_any_prompts_are_refused(count: int, message: str, tmp_path: Path) -> None:
    assert _contaminated(tmp_path, "count").returncode == 0
    files.remove(tmp_path / "out")
    pq.write_table(table([(f"Question {index}?", None) for index in range(count)]), tmp_path / "prompts.parquet")
    done = _stage(tmp_path, "prompts.parquet", "instructions.json", "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"split: {message}")
    assert not (tmp_path / "out").exists()

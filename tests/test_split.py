import hashlib
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import split
from stages.artifacts import files, schemas, tables
from stages.assets.prompts import make_table
from stages.miniature import domain
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.running import ALONE, run_stage
from support.tables import STRANGE

ITERATIONS = ["iter1", "iter2", "iter3"]
OPTIONS = ("--prompts", "prompts.parquet", "--instructions", "instructions.json", "--out", "out")
Assigned = list[str | None]
assignments = st.lists(st.sampled_from([None, None, "iter1", "iter2"]), min_size=40, max_size=120)


def allot(
    assigned: Assigned,
    iterations: list[str] = ITERATIONS,
    seed: int = 1,
    each: int | None = 5,
    hold_out: int = 4,
    order: list[int] | None = None,
) -> dict[str, list[str]]:
    """Return the IDs that the hold-out and each iteration get. order: of the rows in the input."""
    ids = [hashlib.sha256(str(index).encode()).hexdigest() for index in range(len(assigned))]
    rows = order or list(range(len(assigned)))
    parts = split.allot(
        [ids[row] for row in rows],
        [assigned[row] for row in rows],
        iterations,
        seed=seed,
        prompts_per_iteration=each,
        hold_out=hold_out,
    )
    return {name: [ids[rows[index]] for index in indices] for name, indices in parts.items()}


def suffices(assigned: Assigned) -> bool:
    """Return whether there are enough prompts for the defaults of `allot`."""
    return assigned.count(None) >= 4 + 3 * 5 and all(assigned.count(name) in (0, *range(5, 200)) for name in ("iter1", "iter2"))


@settings(deadline=None)
@given(assignments.filter(suffices), st.integers(0, 3))
def test_no_prompt_is_in_two_parts(assigned: Assigned, seed: int) -> None:
    parts = allot(assigned, seed=seed)
    ids = [name for part in parts.values() for name in part]
    assert len(ids) == len(set(ids)) == 4 + 3 * 5
    assert list(parts) == ["hold-out", *ITERATIONS]


@settings(deadline=None)
@given(assignments.filter(suffices), st.randoms())
def test_the_order_of_the_rows_does_not_matter(assigned: Assigned, rng: random.Random) -> None:
    order = list(range(len(assigned)))
    rng.shuffle(order)
    assert allot(assigned, order=order) == allot(assigned)


@settings(deadline=None)
@given(assignments.filter(lambda assigned: suffices(assigned) and assigned.count(None) >= 24))
def test_an_additional_iteration_does_not_change_the_others(assigned: Assigned) -> None:
    three, four = allot(assigned), allot(assigned, [*ITERATIONS, "iter4"])
    assert {name: four[name] for name in three} == three
    two = allot(assigned, ITERATIONS[:2])
    assert {name: three[name] for name in two} == two


def test_another_seed_gives_other_parts() -> None:
    assigned: Assigned = [None] * 100
    assert allot(assigned, seed=1) != allot(assigned, seed=2)


def test_assigned_prompts_are_held_out_only_if_the_others_do_not_suffice() -> None:
    assigned: Assigned = ["iter1"] * 10 + ["iter2"] * 11 + [None] * 4
    parts = allot(assigned, ["iter1", "iter2"], each=None, hold_out=4)
    assert {name: len(ids) for name, ids in parts.items()} == {"hold-out": 4, "iter1": 10, "iter2": 11}
    parts = allot(assigned, ["iter1", "iter2"], each=None, hold_out=6)
    assert len(parts["hold-out"]) == 6
    assert len(parts["iter1"]) + len(parts["iter2"]) == 19


def test_prompts_assigned_to_an_absent_iteration_are_not_used() -> None:
    assigned: Assigned = ["iter9"] * 10 + [None] * 20
    parts = allot(assigned, ["iter1"])
    absent = {hashlib.sha256(str(index).encode()).hexdigest() for index in range(10)}
    assert not absent & {name for ids in parts.values() for name in ids}


@pytest.mark.parametrize(
    ("assigned", "each", "hold_out", "message"),
    [
        ([None] * 20, 5, 21, ["split.hold_out is 21", "only 20 prompts", "lower it"]),
        ([None] * 18, 5, 4, ["iter3 needs 5 prompts", "only 4 of 18", "split.prompts_per_iteration", "assets.prompts"]),
        ([None] * 20, None, 4, ["split.prompts_per_iteration is null", "assigned to iter1", "set it to a number"]),
        (["iter1"] * 3 + [None] * 20, 5, 4, ["iter1 needs 5 prompts", "only 3", "split.prompts_per_iteration", "null"]),
    ],
)
def test_too_few_prompts_are_an_error_that_names_the_parameter(
    assigned: Assigned, each: int | None, hold_out: int, message: list[str]
) -> None:
    with pytest.raises(StageError) as error:
        allot(assigned, each=each, hold_out=hold_out)
    assert_message(str(error.value), "params.yaml", *message)


def write_params(folder: Path, each: int, hold_out: int, contamination: str, iterations: dict[str, str]) -> None:
    values = {"prompts_per_iteration": each, "hold_out": hold_out, "contamination": contamination}
    (folder / "params.yaml").write_text(json.dumps({"seed": 3, "split": values, "iterations": iterations}))


@pytest.mark.slow
def test_the_stage_writes_one_file_per_part_and_the_same_bytes_for_any_order(tmp_path: Path) -> None:
    rows: list[tuple[str, str | None]] = [(f"Question {index}?", None) for index in range(60)]
    two = {"iter1": "base", "iter2": "iter1"}
    outs = []
    for iterations, order in ((two, rows), (two | {"iter3": "iter2"}, rows[::-1])):
        write_params(tmp_path, 10, 7, "count", iterations)
        files.write_json([{"instruction": "Why?"}], tmp_path / "instructions.json")
        tables.write(make_table(order), schemas.PROMPTS, tmp_path / "prompts.parquet")
        done = run_stage(tmp_path, "split", *OPTIONS, **(ALONE if outs else {}))
        assert done.returncode == 0, done.stderr
        outs.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    counts = [json.loads(out.pop("contamination.json"))["contaminated"] for out in outs]
    assert counts == [{"hold-out": 0, "iter1": 0, "iter2": 0}, {"hold-out": 0, "iter1": 0, "iter2": 0, "iter3": 0}]
    assert set(outs[0]) == {"hold-out.parquet", "iter1.parquet", "iter2.parquet"}
    assert set(outs[1]) == {*outs[0], "iter3.parquet"}
    assert {name: outs[1][name] for name in outs[0]} == outs[0]
    assert tables.read(tmp_path / "out" / "hold-out.parquet", schemas.SPLIT).num_rows == 7


@pytest.mark.parametrize(
    ("prompt", "instruction", "expected"),
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
def test_a_prompt_with_an_instruction_s_words_or_thirteen_in_a_row_is_contaminated(
    prompt: str, instruction: str, expected: bool
) -> None:
    assert split.find_contaminated(["Another?", prompt], ["Something else.", instruction]) == [False, expected]


def write_contaminated(folder: Path, contamination: str, each: int = 7) -> None:
    """Write 20 prompts, 4 of which are AlpacaEval's, and parameters that use 18 of them."""
    write_params(folder, each, 4, contamination, {"iter1": "base", "iter2": "iter1"})
    prompts = make_table([(f"Question {index}?", None) for index in range(20)])
    tables.write(prompts, schemas.PROMPTS, folder / "prompts.parquet")
    instructions = [{"instruction": f"question {index}"} for index in (1, 7, 8, 13, 99)]
    files.write_json(instructions, folder / "instructions.json")


def count_contaminated(folder: Path) -> dict[str, int]:
    """Count the contaminated prompts in each written part."""
    names = [f"Question {index}?" for index in (1, 7, 8, 13)]
    parts = {path.stem: tables.read(path, schemas.SPLIT) for path in (folder / "out").glob("*.parquet")}
    return {name: sum(prompt in names for prompt in part["prompt"].to_pylist()) for name, part in parts.items()}


@pytest.mark.slow
def test_contaminated_prompts_are_counted_by_part(tmp_path: Path) -> None:
    write_contaminated(tmp_path, "count")
    done = run_stage(tmp_path, "split", *OPTIONS)
    assert done.returncode == 0, done.stderr
    record = files.read_json(tmp_path / "out" / "contamination.json")
    assert record == {"contaminated": count_contaminated(tmp_path), "dropped": 0, "instructions": 5}
    assert sum(record["contaminated"].values()) >= 2
    assert "4 of 20 prompts are also in AlpacaEval" in done.stderr


@pytest.mark.slow
def test_contaminated_prompts_can_be_refused(tmp_path: Path) -> None:
    write_contaminated(tmp_path, "refuse")
    done = run_stage(tmp_path, "split", *OPTIONS)
    assert done.returncode == 1
    assert_message(done.stderr, "split: error: prompts.parquet", " training prompts", "'Question ", "split.contamination")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_contaminated_prompts_can_be_dropped_and_then_do_not_count_as_available(tmp_path: Path) -> None:
    write_contaminated(tmp_path, "drop")
    done = run_stage(tmp_path, "split", *OPTIONS)
    assert done.returncode == 1
    assert_message(done.stderr, "iter2 needs 7 prompts", "only 5 of 16")
    write_contaminated(tmp_path, "drop", each=6)
    done = run_stage(tmp_path, "split", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert count_contaminated(tmp_path) == {"hold-out": 0, "iter1": 0, "iter2": 0}
    assert files.read_json(tmp_path / "out" / "contamination.json")["dropped"] == 4


def test_the_miniature_s_prompts_are_not_contaminated() -> None:
    prompts = domain.distinct_prompts("1/prompts", "training", 1500)
    assert not any(split.find_contaminated(prompts, domain.distinct_prompts("1/evaluation", "evaluation", 700)))


@pytest.mark.slow
def test_duplicate_prompts_and_missing_input_are_rejected(tmp_path: Path) -> None:
    write_contaminated(tmp_path, "count")
    pq.write_table(make_table([("Why?", None), ("Same?", None), ("Same?", None)]), tmp_path / "twice.parquet")
    for prompts, instructions, parts in (
        ("twice.parquet", "instructions.json", ["twice.parquet", "row 2", "'prompt_id'", schemas.prompt_id("Same?")]),
        ("none.parquet", "instructions.json", ["none.parquet is missing"]),
        ("prompts.parquet", "none.json", ["none.json is missing"]),
    ):
        done = run_stage(tmp_path, "split", "--prompts", prompts, "--instructions", instructions, "--out", "out")
        assert done.returncode == 1
        assert_message(done.stderr, "split: error: ", *parts, "check the path")
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("contamination", ["count", "drop"])
def test_prompts_of_every_kind_remain_unchanged(contamination: str, tmp_path: Path) -> None:
    write_params(tmp_path, len(STRANGE) - 2, 2, contamination, {"iter1": "base"})
    tables.write(make_table([(text, None) for text in STRANGE]), schemas.PROMPTS, tmp_path / "prompts.parquet")
    files.write_json([{"instruction": "Why?"}, {"instruction": "\u2028!"}], tmp_path / "instructions.json")
    done = run_stage(tmp_path, "split", *OPTIONS)
    assert done.returncode == 0, done.stderr
    parts = [tables.read(tmp_path / "out" / name, schemas.SPLIT) for name in ("hold-out.parquet", "iter1.parquet")]
    assert sorted(text for part in parts for text in part["prompt"].to_pylist()) == sorted(STRANGE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (0, ["prompts.parquet: no rows"]),
        (1, ["split.hold_out is 4", "only 1 prompts"]),
        (4, ["iter1 needs 7 prompts", "only 0 of 4"]),
    ],
)
def test_almost_no_prompts_are_an_error(count: int, parts: list[str], tmp_path: Path) -> None:
    write_contaminated(tmp_path, "count")
    pq.write_table(make_table([(f"Question {index}?", None) for index in range(count)]), tmp_path / "prompts.parquet")
    done = run_stage(tmp_path, "split", *OPTIONS)
    assert done.returncode == 1
    assert_message(done.stderr, "split: error: ", *parts)
    assert not (tmp_path / "out").exists()

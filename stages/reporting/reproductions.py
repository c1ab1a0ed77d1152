"""Runs of the experiment on other machines: the files reproductions/*.json and the table of docs/reproductions.md."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from stages.artifacts import files
from stages.reporting import markdown
from stages.runtime.errors import StageError, one_line
from stages.runtime.params import BASE, Positive, PositiveFloat, Section, Text

Count = Annotated[int, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Machine(Section):
    """The machine that an experiment ran on. Null: a report written by hand does not say."""

    processor: Text
    instruction_set: Text | None
    """The widest one that numerical libraries have kernels for, such as AVX2 or AVX-512."""
    cores: Positive | None
    memory_gib: PositiveFloat | None
    gpus: dict[str, Positive] | None
    """Name -> how many; null: none that is known of."""
    emulated: Text | None
    """What emulated this CPU, and on which real one; null: it was not emulated."""


class Gain(Section):
    """The last iteration's AlpacaEval win rate minus the base policy's, in percentage points."""

    difference: Annotated[float, Field(ge=-100, le=100)]
    standard_error: Annotated[float, Field(ge=0)] | None
    """That of the paired difference."""


class Figures(Section):
    """AlpacaEval win rates in percent."""

    win_rates: dict[str, Percent]
    """Of every model."""
    last: Text
    """The last iteration."""
    gain: Gain

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        for name in (BASE, self.last):
            if name not in self.win_rates:
                raise ValueError(f"win_rates has no model {name}")
        if (
            abs(self.win_rates[self.last] - self.win_rates[BASE] - self.gain.difference) > 0.006
        ):  # each has two decimals or more
            raise ValueError(f"gain.difference is not the win rate of {self.last} minus that of {BASE}")
        return self


class Reproduction(Section):
    """One run, compared with the committed run. Null: a report written by hand does not say."""

    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    """The commit that was run, and whose dvc.lock the run is compared with."""
    dirty: bool | None
    """Whether code, requirements or parameters differed from the commit."""
    recipe: Text
    """The folder of the experiment's dvc.yaml, relative to the root: `.` is the miniature."""
    lock_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    """SHA-256 of the run's dvc.lock."""
    machine: Machine
    numerics: Literal["portable", "fast", "mixed"] | None
    """The numerics that the stages used; mixed: not all used the same."""
    versions: dict[str, Text] | None
    """Versions of Python and of the libraries that can affect results; several where environments differ."""
    stages: Annotated[dict[str, bool], Field(min_length=1)] | None
    """Stage -> whether its results have the hashes of the committed run."""
    first_difference: Text | None
    """The first stage with other results; null: all results are the same."""
    outputs: Positive | None
    differing_outputs: Count | None
    """Number of outputs, and of those with other hashes, without fingerprints of code and records of versions."""
    not_run_here: list[Text] | None
    """Stages whose results did not come from this machine, but from DVC's cache."""
    figures: Figures
    note: Text | None

    @property
    def same(self) -> bool:
        """Whether all results have the same bytes as those of the committed run."""
        return self.first_difference is None

    @property
    def is_attested(self) -> bool:
        """Whether `make attest` can have written the file: it leaves none of these null."""
        facts = (self.dirty, self.lock_sha256, self.stages, self.outputs, self.differing_outputs, self.not_run_here)
        return None not in facts

    @field_validator("recipe")
    @classmethod
    def _check_recipe(cls, recipe: str) -> str:
        path = PurePosixPath(recipe)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{recipe} is not a folder relative to the root of the repository")
        return recipe

    @model_validator(mode="after")
    def _check_differences(self) -> Self:
        if self.stages is not None and (self.first_difference is None) != all(self.stages.values()):
            raise ValueError("first_difference is null if, and only if, all stages are true")
        if self.stages is not None and self.first_difference is not None and self.stages.get(self.first_difference, True):
            raise ValueError(f"first_difference is {self.first_difference}, which is not a stage with other results")
        if self.differing_outputs is not None and (self.first_difference is None) != (self.differing_outputs == 0):
            raise ValueError("first_difference is null if, and only if, differing_outputs is 0")
        if None not in (self.outputs, self.differing_outputs) and (self.differing_outputs or 0) > (self.outputs or 0):
            raise ValueError("differing_outputs exceeds outputs")
        return self


def read_reproduction(path: Path) -> Reproduction:
    """Read and validate a file of reproductions/. Raises StageError."""
    return validate(files.read_json(path), str(path), "recreate it with `make attest`, or correct it by hand")


def validate(values: Any, where: str, remedy: str) -> Reproduction:
    """Validate the content of a file of reproductions/. where: its source in messages. Raises StageError with the remedy."""
    try:
        return Reproduction.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "file"
        raise StageError(f"{where}: {key}: {one_line(problem['msg'])}: {remedy}") from error


def format_reproductions(folder: Path) -> str:
    """Format the table of all runs in a folder of reproductions, sorted by file name. Raises StageError for an invalid file."""
    runs = [read_reproduction(path) for path in sorted(folder.glob("*.json"))]
    header = ["machine", "experiment", "commit", "numerics", "same bytes", "last iteration − base", "last iteration", "note"]
    return markdown.table(header, [format_row(run) for run in runs], text=True, hashes=True)


def format_row(run: Reproduction) -> list[str]:
    """Format the cells of one run."""
    figures = run.figures
    error = figures.gain.standard_error
    return [
        format_machine(run.machine),
        "miniature" if run.recipe == "." else run.recipe.removeprefix("recipes/"),
        run.commit[:7] + (", with changes" if run.dirty else ""),
        run.numerics or "–",
        format_bytes(run),
        f"{figures.gain.difference:+.2f}" + ("" if error is None else f" ± {error:.2f}"),
        f"{figures.last}: {figures.win_rates[figures.last]:.2f}",
        run.note or "–",
    ]


def format_machine(machine: Machine) -> str:
    """Format a machine in one line; what is not known is left out."""
    parts = [
        machine.processor,
        machine.instruction_set,
        f"{machine.cores} core{'' if machine.cores == 1 else 's'}" if machine.cores else None,
        f"{machine.memory_gib:.0f} GiB" if machine.memory_gib else None,
        *(f"{count} x {name}" for name, count in (machine.gpus or {}).items()),
    ]
    return ", ".join(filter(None, parts)) + (f" (emulated: {machine.emulated})" if machine.emulated else "")


def format_bytes(run: Reproduction) -> str:
    """Say whether a run has the committed bytes or, if not, which stage differed first and how many outputs differ.

    A plain "yes" means that `make attest` compared all stages, and that all ran on this machine, with the commit's code.
    """
    cached = len(run.not_run_here or [])
    elsewhere = f"{cached} stage{'' if cached == 1 else 's'} not run on this machine" if cached else ""
    if run.same and elsewhere:
        return f"in part: {elsewhere}"
    if run.same:
        return "yes, run by hand" if not run.is_attested else "yes, with changes" if run.dirty else "yes"
    if run.differing_outputs is None:
        text = f"no, from {run.first_difference} on"
    else:
        text = f"no, from {run.first_difference} on: {run.differing_outputs} of {run.outputs or '?'} outputs"
    return text + (f" ({elsewhere})" if elsewhere else "")

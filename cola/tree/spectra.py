"""spectrum.json: what each link added to the matrices of one arm and seed. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cola.recipe.plan import Job
from cola.tree.made import Made
from cola.tree.run_folder import RunFolder
from cola.tree.shapes import Count, Number, Record, Relative, Seconds, Share, Text

SPECTRUM = "spectrum.json"
VERSION = 2  # of its content: raise it when more is measured, or otherwise


class Update(Record):
    rank: Number | None = Field(description="singular values that are not zero")
    relative_size: Relative | None = Field(description="‖ΔW‖/‖W‖")
    effective_rank: Number | None = Field(description="exp of the entropy of the singular values")
    rank_90: Number | None = Field(description="fewest directions that hold 90 % of the energy")
    stable_rank: Number | None = Field(description="‖ΔW‖_F² / ‖ΔW‖_2²")
    values: list[Annotated[float, Field(strict=True, ge=0, le=1e30)]] = Field(
        description="the largest singular values, largest first"
    )
    intruders: Number | None = Field(description="singular vectors that resemble none of the base's; null: not counted")


class Sides(Record):
    left: Share = Field(description="overlap of the directions that two updates write to")
    right: Share = Field(description="of those that they read from")
    random: Share = Field(description="what random ones would come to")


class Overlap(Record):
    links: list[Text] = Field(description="which two")
    left: Share = Field(description="of the directions that both write to")
    right: Share = Field(description="of those that both read from")
    random: Share = Field(description="what random ones would come to")


class WithFull(Record):
    rank: Count | None = Field(default=None, description="directions that are compared")
    updates: dict[str, Sides]


class Matrix(Record):
    shape: list[Count] = Field(default=[], description="of the matrix")
    updates: dict[str, Update] = Field(description="by `link K`, `chain` or `all weights`")
    overlap: list[Overlap] = Field(description="of each two links")
    with_full: WithFull | None = Field(description="each update against full fine-tuning's")


class Spectrum(Record):
    version: int = Field(description="of this file")
    left_out: Any = Field(description="why there are no matrices, or null")
    full: Any = Field(description="full fine-tuning's state, if it is compared with")
    looked_at: list[Count] = Field(default=[], description="of full fine-tuning: matrices taken, and all of them")
    matrices: dict[str, Matrix]
    seconds: Seconds = Field(default=0, description="that taking them took")
    made: Made | None = Field(default=None, description="with what they were taken")


class SpectrumVersion(Record):
    """spectrum.json of any version."""

    version: int


def read_spectrum(folder: RunFolder, job: Job) -> Spectrum | None:
    """The spectra of one arm and seed; None where there are none of this version."""
    path = folder.job(job) / SPECTRUM
    found = folder.read(path, SpectrumVersion)
    return folder.read(path, Spectrum) if found is not None and found.version == VERSION else None


def spectrum_of(record: Mapping[str, Any]) -> Spectrum:
    """What was measured, as the file has it."""
    return Spectrum.model_validate({**record, "version": VERSION})


def write_spectrum(folder: RunFolder, job: Job, spectrum: Spectrum) -> Path:
    """Keep the spectra of one arm and seed in the run's folder; returns the file."""
    path = folder.job(job) / SPECTRUM
    folder.write_jsonl(path.relative_to(folder.path), [spectrum.content()])  # one line: thousands of numbers
    return path

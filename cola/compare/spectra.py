"""The spectra of a run's arms, read from its folder and brought together for tables and figures. No torch.

RUN/arms/ARM/seed-S/spectrum.json holds those of one arm and seed, matrix by matrix; docs/numbers.md says what each
number is.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, zip_longest
from typing import Any

import numpy as np

from cola.compare.records import ArmSpectra, OverlapTable, SpectrumRow, WithFullRow
from cola.errors import RunFolderError
from cola.recipe.plan import Job
from cola.tree.run_folder import RunFolder
from cola.tree.spectra import Matrix, Overlap, Sides, Spectrum, read_spectrum

NUMBERS = ("rank", "relative_size", "effective_rank", "rank_90", "stable_rank")

Matrices = list[Matrix]  # of one seed


def spectra_of(folder: RunFolder, done: Mapping[str, Iterable[int]]) -> tuple[dict[str, ArmSpectra], list[str]]:
    """The spectra of a run's arms and of the seeds that came to their end, as `summarized`; and what is wrong with a
    file that cannot be read, which spoils no other."""
    records: dict[str, list[Spectrum]] = {}
    damaged = []
    for job in (Job(arm=arm, seed=seed) for arm, seeds in done.items() for seed in seeds):
        try:
            if (record := read_spectrum(folder, job)) is not None:
                records.setdefault(job.arm, []).append(record)
        except RunFolderError as error:
            damaged.append(str(error))
    return summarized(records), damaged


def summarized(records: Mapping[str, Sequence[Spectrum]]) -> dict[str, ArmSpectra]:
    """Medians over matrices and means over seeds; an arm without any spectrum is left out."""
    found = {}
    for arm, all_of_arm in records.items():
        seeds = [list(record.matrices.values()) for record in all_of_arm if record.matrices]
        if not seeds:
            continue
        # In the order of the chain, whatever matrices each link touched.
        updates = {what for matrices in seeds for matrix in matrices for what in matrix.updates}
        whats = sorted(updates, key=lambda what: (what == "chain", len(what), what))
        links = [what for what in whats if what.startswith("link ")]
        found[arm] = ArmSpectra(
            rows=[_row(what, seeds) for what in whats],
            values={what: _values(what, seeds) for what in whats},
            overlap=_overlap(links, seeds) if len(links) > 1 else None,
            with_full=_with_full(whats, seeds),
        )
    return found


def _row(what: str, seeds: list[Matrices]) -> SpectrumRow:
    def over(key: str, middle: Any) -> float | None:
        each = [[getattr(one.updates[what], key) for one in matrices if what in one.updates] for matrices in seeds]
        return _mean([_of(middle, values) for values in each])

    numbers = {key: over(key, np.median) for key in NUMBERS}
    if what == "all weights":
        numbers["rank"] = None  # nothing limits it
    # Few matrices have any, so that their median would nearly always be 0.
    return SpectrumRow(what=what, **numbers, intruders=over("intruders", np.mean))


def _values(what: str, seeds: list[Matrices]) -> list[float]:
    """Singular values by the largest: those of a matrix that has fewer go on as zeros."""
    each = []
    for matrices in seeds:
        values = [one.updates[what].values for one in matrices if what in one.updates]
        values = [[value / row[0] for value in row] for row in values if row and row[0]]
        if values:
            each.append(np.median(_filled(values), axis=0))
    return np.mean(_filled(each), axis=0).tolist() if each else []


def _filled(rows: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    return np.array(list(zip(*zip_longest(*rows, fillvalue=0.0), strict=True)))


def _overlap(links: list[str], seeds: list[Matrices]) -> OverlapTable:
    """Of each two links: the mean of both sides; None where no matrix has learned something in both."""
    values: dict[tuple[str, ...], float | None] = {(what, what): 1.0 for what in links}
    expected = []
    for two in combinations(links, 2):
        pairs = [[pair for one in matrices for pair in one.overlap if pair.links == [*two]] for matrices in seeds]
        values[two] = values[two[::-1]] = _mean([_of(np.median, map(_both, mine)) for mine in pairs])
        expected.append(_mean([_of(np.median, [pair.random for pair in mine]) for mine in pairs]))
    return OverlapTable(
        labels=links, matrix=[[values[one, other] for other in links] for one in links], random=_mean(expected)
    )


def _with_full(whats: list[str], seeds: list[Matrices]) -> WithFullRow | None:
    """Of each update with full fine-tuning's; None where there is nothing to compare with."""
    each = [[one.with_full.updates for one in matrices if one.with_full] for matrices in seeds]
    if not any(each):
        return None

    def over(what: str, number: Any) -> float | None:
        return _mean([_of(np.median, [number(one[what]) for one in mine if what in one]) for mine in each])

    expected = [over(what, lambda sides: sides.random) for what in whats]
    return WithFullRow(labels=whats, values=[over(what, _both) for what in whats], random=_mean(expected))


def _both(sides: Sides | Overlap) -> float:
    return (sides.left + sides.right) / 2


def _of(middle: Any, values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(middle(known)) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    return _of(np.mean, values)

"""The spectra of a run's arms, read from its folder and brought together for tables and figures. No torch.

RUN/arms/ARM/seed-S/spectrum.json holds those of one arm and seed, matrix by matrix; docs/numbers.md says what each
number is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cola.compare.records import ArmSpectra, OverlapTable, SpectrumRow, WithFullRow
from cola.errors import RunFolderError
from cola.recipe.plan import Job
from cola.tree.run_folder import RunFolder
from cola.tree.spectra import Matrix, Overlap, Sides, Spectrum, read_spectrum

NUMBERS = ("rank", "relative_size", "effective_rank", "rank_90", "stable_rank")

Records = Mapping[str, Sequence[Spectrum]]  # of each arm: its seeds'


def spectra_of(folder: RunFolder, done: Mapping[str, Iterable[int]]) -> tuple[dict[str, ArmSpectra], list[str]]:
    """The spectra of a run's arms for its summary.

    Args:
        folder: The run's.
        done: The seeds of each arm that came to their end.

    Returns:
        As `summarized`; and what is wrong with a file that cannot be read, which spoils no other.
    """
    records: dict[str, list[Spectrum]] = {}
    damaged = []
    for arm, seeds in done.items():
        for seed in seeds:
            try:
                record = read_spectrum(folder, Job(arm=arm, seed=seed))
            except RunFolderError as error:
                damaged.append(str(error))
                continue
            if record is not None:
                records.setdefault(arm, []).append(record)
    return summarized(records), damaged


def summarized(records: Records) -> dict[str, ArmSpectra]:
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


Matrices = list[Matrix]  # of one seed


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
            each.append(np.median(_filled(values), axis=0).tolist())
    return [float(value) for value in np.mean(_filled(each), axis=0)] if each else []


def _filled(rows: list[list[float]]) -> np.ndarray:
    longest = max(map(len, rows))
    return np.array([[*row, *[0.0] * (longest - len(row))] for row in rows])


def _overlap(links: list[str], seeds: list[Matrices]) -> OverlapTable:
    """Of each two links: the mean of both sides; None where no matrix has learned something in both."""
    places = {what: number for number, what in enumerate(links)}
    matrix: list[list[float | None]] = [[1.0 if i == j else None for j in range(len(links))] for i in range(len(links))]
    expected = []
    for one in links:
        for other in links[places[one] + 1 :]:
            pairs = [
                [pair for matrix_ in matrices for pair in matrix_.overlap if pair.links == [one, other]]
                for matrices in seeds
            ]
            value = _mean([_of(np.median, [_both(pair) for pair in mine]) for mine in pairs])
            matrix[places[one]][places[other]] = matrix[places[other]][places[one]] = value
            expected.append(_mean([_of(np.median, [pair.random for pair in mine]) for mine in pairs]))
    return OverlapTable(labels=links, matrix=matrix, random=_mean(expected))


def _with_full(whats: list[str], seeds: list[Matrices]) -> WithFullRow | None:
    """Of each update with full fine-tuning's; None where there is nothing to compare with."""
    each = [[one.with_full.updates for one in matrices if one.with_full] for matrices in seeds]
    if not any(each):
        return None

    def over(what: str, number: Any) -> float | None:
        return _mean([_of(np.median, [number(one[what]) for one in mine if what in one]) for mine in each])

    values = {what: over(what, _both) for what in whats}
    expected = [over(what, lambda sides: sides.random) for what in whats]
    return WithFullRow(labels=list(values), values=list(values.values()), random=_mean(expected))


def _both(sides: Sides | Overlap) -> float:
    return (sides.left + sides.right) / 2


def _of(middle: Any, values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(middle(known)) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    return _of(np.mean, values)

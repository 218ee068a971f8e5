"""What `cola inspect RUN` prints: the spectra of what its arms learned, from the run's folder and the base alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from cola.compare.spectra import summarized
from cola.errors import ModelError, RunFolderError
from cola.export.outcome import Outcome, outcomes
from cola.link.accelerator import make_accelerator, quiet_libraries
from cola.measure.learned import Learned
from cola.recipe.plan import Job
from cola.report.numbers import duration
from cola.report.tables import matrices_table, overlap_table, spectra_table
from cola.report.terminal import Terminal
from cola.tree.mend import said
from cola.tree.spectra import SPECTRUM, Spectrum, read_spectrum, spectrum_of, write_spectrum

FEW = 60  # rows of a table of matrices that a terminal is given


def inspect_run(run: Path, terminal: Terminal, arm: str | None, seed: int | None, intruders: bool) -> None:
    """Print the spectra of a run's arms and seeds, or of one arm, of one seed, intruder dimensions counted too or not;
    what its folder lacks of them is computed and kept there. Raises RunFolderError if it is no run folder, or has no
    such arm or seed that came to its end; ModelError if none of them changes the base's matrices, or their weights or
    the base are not there."""
    quiet_libraries()
    changed = [outcome for outcome in outcomes(run, arm, seed) if outcome.kind.merges]
    if not changed:
        raise ModelError(f"{run}: {f'arm {arm} changes none of' if arm else 'no arm changes'} the base's matrices")
    view = _View(changed, terminal)
    records: dict[str, list[Spectrum]] = {}
    for number, outcome in enumerate(changed, 1):
        try:
            record = view.record(outcome, intruders)
        except ModelError as error:
            if not records and number == len(changed):
                raise
            terminal.warn(f"{outcome.job.label}: {error}")
            continue
        if record.left_out:
            terminal.warn(f"{outcome.job.label} is left out: {record.left_out}")
        records.setdefault(outcome.job.arm, []).append(record)
    spectra = summarized(records)
    tables = [spectra_table(spectra), overlap_table(spectra)]
    if len(changed) == 1:
        detail = matrices_table(records[changed[0].job.arm][0])
        tables += [detail] if len(detail.rows) <= FEW else []
    for table in tables:
        if table.rows:
            terminal.table(table)
    where = changed[0].path if len(changed) == 1 else run / "arms" / "ARM" / "seed-S"
    terminal.say(f"matrix by matrix: {where / SPECTRUM}")


@dataclass
class _View:
    """Reads or takes spectra of the outcomes of one run."""

    outcomes: Sequence[Outcome]
    terminal: Terminal

    @cached_property
    def learned(self) -> Learned:
        """Made where something has to be computed: it needs the base."""
        source, recipe = self.outcomes[0].source, self.outcomes[0].recipe
        return Learned(source, source.skeleton(), recipe.pairs, make_accelerator("float32").device)

    def record(self, outcome: Outcome, intruders: bool) -> Spectrum:
        started = perf_counter()
        try:
            spectrum = read_spectrum(outcome.folder, outcome.job)
        except RunFolderError as error:
            self.terminal.warn(f"{said(error)}; its spectra are taken again")
            spectrum = None
        new = spectrum is None
        if spectrum is None:
            self.terminal.say(f"{outcome.job.label}: taking the spectra")
            spectrum = spectrum_of(self._taken(outcome))
        updates = [update for matrix in spectrum.matrices.values() for update in matrix.updates.values()]
        if intruders and all(update.intruders is None for update in updates):
            if outcome.quantization is not None:
                self.terminal.warn(
                    f"{outcome.job.label}: no intruders are counted: its base is the matrices that the "
                    f"{outcome.quantization} codes stand for, which no file has"
                )
            elif spectrum.matrices:
                self.terminal.say(f"{outcome.job.label}: counting intruders in {len(spectrum.matrices)} matrices")
                weights = outcome.added() if outcome.kind.is_pair else outcome.tuned.folder
                record = spectrum.content()
                self.learned.count_intruders(record, outcome.dtype, weights)
                spectrum, new = spectrum_of(record), True
        if new:
            self.terminal.say(f"{outcome.job.label}: {duration(perf_counter() - started)}")
            try:
                write_spectrum(outcome.folder, outcome.job, spectrum)
            except OSError as error:  # another's folder, a full disk: what was computed can be shown all the same
                self.terminal.warn(f"{outcome.path}: {error.strerror}; the next look computes it again")
        return spectrum

    def _taken(self, outcome: Outcome) -> dict[str, Any]:
        if outcome.kind.is_whole:
            return self.learned.of_full(str(outcome.path), outcome.tuned.folder, outcome.dtype)
        return self.learned.of_links(outcome.added(), *self._full(outcome))

    def _full(self, outcome: Outcome) -> tuple[Any, str | None]:
        """Full fine-tuning's update under the same seed and its state, where its weights are in the run's folder."""
        job = Job(arm=outcome.recipe.full_arm, seed=outcome.job.seed)
        result = outcome.folder.result(job)
        if job.arm not in outcome.recipe.arms or result is None:
            return None, None
        full = Outcome(outcome.folder, outcome.recipe, job, result)
        if not full.kind.is_whole:
            return None, None
        kept = (full.path / "model" / "config.json").is_file()
        update = self.learned.full(str(full.path), lambda: full.tuned.folder if kept else None, full.dtype)
        return update, full.info.scored_state if update is not None else None

"""What a run is expected to take: said where it will not fit, and kept to be laid beside what it took."""

import shutil

from cola.errors import one_line
from cola.measure.cost import Meter
from cola.plan.calibrate import read_calibration
from cola.plan.devices import device_of
from cola.plan.fit import fit_of
from cola.plan.forecast import Forecast
from cola.plan.models import Planned
from cola.plan.rows import Rows
from cola.plan.seconds import rates_of
from cola.recipe.plan import room_of
from cola.recipe.recipe import Recipe
from cola.report.numbers import size
from cola.report.terminal import Terminal
from cola.run.materials import Materials
from cola.tree.foreseen import Foreseen, ForeseenArm
from cola.tree.segments import Tree
from cola.tree.store import Store


def foresee(materials: Materials, meter: Meter, tree: Tree, store: Store, terminal: Terminal) -> Foreseen:
    """Each arm's peak memory and the seconds of its steps; warns of an arm that this machine has no room for, and of a
    disk that the run will fill."""
    recipe, source, device = materials.recipe, materials.source, device_of()
    stored = sum(file.stat().st_size for file in source.files)
    planned = Planned(source, materials.skeleton, "on this disk", True, stored)
    rates = rates_of(device, read_calibration())
    rows = Rows(materials.splits, "the recipe's own rows")
    forecast = Forecast(recipe, planned, rows, device, rates, meter=meter, tree=tree)
    arms: dict[str, ForeseenArm] = {}
    for arm in recipe.arms:
        try:
            memory, seconds = forecast.memory(arm), forecast.training_seconds(arm)
        # Code of a model's own may fail on shapes alone in any way: no reason to lose a run that has not begun.
        except Exception as error:
            terminal.warn(f"{arm}: its memory is not known beforehand: {type(error).__name__}: {one_line(error, 200)}")
            continue
        arms[arm] = ForeseenArm(memory=memory.parts, peak=memory.peak, seconds=seconds)
        fit = fit_of(forecast, arm, memory)
        if not fit.fits:
            would = f"with {' '.join(fit.words)} it would take {size(fit.then)}" if fit.words else "no change would do"
            terminal.warn(f"{arm} takes about {size(fit.peak)} of memory and there are {size(fit.room)}: {would}")
    _warn_of_disk(recipe, materials, store, terminal)
    return Foreseen(device=device.kind, times=forecast.times, arms=arms)


def _warn_of_disk(recipe: Recipe, materials: Materials, store: Store, terminal: Terminal) -> None:
    wanted, free = room_of(recipe, materials.skeleton.num_parameters()), shutil.disk_usage(store.path).free
    if wanted > free:
        terminal.warn(f"{store.path}: the run may come to {size(wanted)} on a disk that has {size(free)} free")

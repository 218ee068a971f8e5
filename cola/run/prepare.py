"""A recipe laid out for its jobs: base, data, folder and store found and tried, the plan said."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cola.files import store_path
from cola.measure.evaluate import Ways
from cola.plan.tree import Planner
from cola.recipe.plan import jobs_of
from cola.recipe.recipe import Recipe
from cola.report.terminal import RunProgress
from cola.report.tracking import NoTracker, Tracker, mode_of, need_tracker
from cola.run.announce import say_cautions
from cola.run.assignment import Bench
from cola.run.code import admit_code
from cola.run.foresee import foresee
from cola.run.inputs import inputs_of
from cola.run.interrupt import Signals
from cola.run.materials import check_bases, check_folder, gather, heeding
from cola.run.ranks import need_ranks, spread_of
from cola.tree.leases import in_use
from cola.tree.prune import register
from cola.tree.run_folder import NOTES, RunFolder
from cola.tree.store import Store


@contextmanager
def prepared(
    recipe: Recipe,
    folder: RunFolder,
    signals: Signals,
    progress: RunProgress,
    group: str | None = None,
    tracked: set[tuple[str, int, str]] | None = None,
    siblings: Sequence[Recipe] = (),
    notes: str = NOTES,
) -> Iterator[Bench]:
    """What all jobs of a run share, while the run holds the store; arguments as of `run`, and `notes`: where in the
    folder this process says what it needs of the store. A ColaError where model, data or disk cannot serve the
    recipe."""
    terminal = progress.terminal
    need_tracker(recipe.tracking)
    need_ranks(recipe)
    code = admit_code(recipe, folder)
    inputs = inputs_of(recipe)  # before they are read: what changes meanwhile is not taken for what was read
    materials = replace(gather(recipe, terminal), code=code)
    store = Store(store_path(recipe.store), terminal.warn)
    with in_use(store.path, store.warn):
        meta, used = check_folder(materials, folder, store, terminal), folder.references()
        meta = meta.model_copy(update={"inputs": inputs})
        selfcheck, ready = check_bases(materials, store, used, terminal)
        began, meta = (made.model_copy(update={"selfcheck": selfcheck}) for made in (folder.provenance() or meta, meta))
        if notes == NOTES:  # else it is a worker, and the command has written it
            folder.begin("provenance.json", began)
        ways = Ways(**dict(selfcheck.ways))
        recipe, siblings = heeding(ways, recipe), [heeding(ways, sibling) for sibling in siblings]
        materials = replace(materials, recipe=recipe, evaluator=materials.evaluator.asking(ways))
        base, device = (materials.source, materials.skeleton, materials.splits), materials.device.type
        planner = Planner(*base, device, code, spread_of(recipe))
        meter, jobs = planner.meter(recipe), jobs_of(recipe)
        tree = planner.tree(recipe, meter, siblings)
        say_cautions(recipe, tree, jobs, meter, terminal, of_ablation=bool(siblings))
        if notes == NOTES:
            folder.write("plan.json", foresee(materials, meter, tree, store, terminal))
        off = mode_of(recipe.tracking) == "off"
        tracker = NoTracker() if off else Tracker(recipe.tracking, group, folder.path, terminal.warn)
        sent = set() if tracked is None else tracked
        progress.expect(len(jobs), sum(tree.lineage(job).n_steps for job in jobs))
        register(store, folder.path)
        laid_out = (planner, meter, tree, meta, used, ready)
        yield Bench(materials, folder, store, *laid_out, tracker, sent, signals, progress, notes)

"""`cola run --dry-run`: everything that can be checked without weights, data or network, and the plan."""

import importlib.util
import shutil
from pathlib import Path

from cola.errors import DataError, ModelError, RunFolderError
from cola.package_file import need_package, package_file
from cola.plan import jobs_of, plan_arm
from cola.recipe import SAMPLE, SPLITS, Recipe, is_remote
from cola.scope import overlap_note
from cola.tables import plan_table
from cola.terminal import Terminal
from cola.tracking import mode_of


def preview(recipe: Recipe, terminal: Terminal) -> None:
    """Print the plan.

    Raises:
        ColaError: a local path is missing, an arm's links do not fit the budget, or target_modules match nothing
            in a model whose config is on this disk.
    """
    unchecked = []
    matched = recipe.training.match
    known = (recipe.data.rows.train is not None or recipe.training.steps is not None) and matched == "steps"
    if matched != "steps":
        unchecked.append(f"the optimizer steps of each arm, which are matched by {matched}")
    elif not known:
        unchecked.append("the number of training rows, and with it the steps")
    # Which rows there are does not change what a link trains, so one row stands for an unknown number.
    links = {arm: plan_arm(recipe, arm, recipe.seeds[0], recipe.data.rows.train or 1) for arm in recipe.arms if known}
    steps = {arm: [len(link.learning_rates) for link in links[arm]] if known else None for arm in recipe.arms}
    unchecked += _check_data(recipe)
    for arm in recipe.arms:
        if (quantization := recipe.base_of(arm)[1]) is not None:
            need_package("bitsandbytes", f"quantization: {quantization}", "quantized")
    parameters, notes = _parameters(recipe)
    if parameters is None:
        unchecked.append(f"the model {recipe.model.name_or_path}, its modules and parameters")
    free = _free_bytes(Path(recipe.output).expanduser())
    table = plan_table(recipe, steps, parameters)
    terminal.table(f"{recipe.name}: plan", table.columns, table.rows)
    jobs = jobs_of(recipe)
    trials = sum(job.trial for job in jobs)
    seeds = recipe.trial_seeds
    on = f" (on seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})" if seeds else ""
    on = " (on each seed)" if trials and not seeds else on
    terminal.say(
        f"seeds {', '.join(map(str, recipe.seeds))}: {len(jobs) - trials} runs and {trials} trials of a search{on}"
    )
    for note in [*notes, *filter(None, [overlap_note(recipe)])]:
        terminal.say(note)
    if all(lengths is not None for lengths in steps.values()):
        total = sum(sum(steps[job.arm] or []) for job in jobs)
        terminal.say(f"optimizer steps in all: {total} of {recipe.training.batch_size} rows")
    score = recipe.evaluation
    rule = "the last step" if score.checkpoint == "last" else f"the best on validation by {score.select_by}"
    terminal.say(f"scored checkpoint: {rule}; W&B: {mode_of(recipe.tracking)}; output: {recipe.output} ({free} free)")
    for what in unchecked:
        terminal.say(f"not checked without data, weights or network: {what}")


def _check_data(recipe: Recipe) -> list[str]:
    data, general = recipe.data, recipe.evaluation.general_text
    if general not in (None, SAMPLE):
        _check_file("evaluation.general_text", general)
    if data.files is not None:
        for split in SPLITS:
            if path := getattr(data.files, split):
                _check_file(f"data.files.{split}", path)
        return ["the rows of the data files"]
    if data.reasoning_gym is not None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise DataError("data.reasoning_gym needs the package: pip install reasoning-gym")
        return ["the rows of the generator"]
    assert data.hub is not None
    return [f"the hub data set {data.hub.name}"]


def _check_file(key: str, path: str) -> None:
    if not Path(path).is_file():
        why = "is a folder; name a file" if Path(path).is_dir() else "does not exist"
        raise DataError(f"{key}: {path} {why}")


def _parameters(recipe: Recipe) -> tuple[dict[str, int] | None, list[str]]:
    """Trainable parameters of each arm, from the config of a local model, None for another model; and what is to be
    said of what they leave out."""
    name = recipe.model.name_or_path
    path = Path(name).expanduser()
    if name.startswith("package://"):
        package_file(name)
        return None, []
    if is_remote(name):
        return None, []
    if not path.exists():
        raise ModelError(f"model.name_or_path: {name}: no such {'file' if path.suffix else 'folder'}")
    if path.is_file():
        return None, []
    from cola import adapters, starts
    from cola.model import Source

    skeleton = Source(name, path, recipe.model.trust_remote_code).skeleton()
    counts = {}
    for arm in recipe.arms:
        links = recipe.links_of(arm)
        try:
            starts.check_room(skeleton, links[:1] if recipe.knot_of(arm).pair == "keep" else links)
            counts[arm] = max((adapters.count_parameters(skeleton, link) for link in links), default=0)
        except ModelError as error:
            raise ModelError(f"arms.{arm}: {error}") from None
    return counts, adapters.all_linear_notes(skeleton, recipe)


def _free_bytes(output: Path) -> str:
    existing = next(p for p in [output.absolute(), *output.absolute().parents] if p.exists())
    if not existing.is_dir():
        raise RunFolderError(f"output: {existing} is a file, not a folder")
    return f"{shutil.disk_usage(existing).free / 1e9:.0f} GB"

"""`cola run --dry-run`: everything that can be checked without weights, data or network, and the plan."""

import importlib.util
import shutil
from pathlib import Path

from cola.errors import DataError, ModelError, RunFolderError
from cola.plan import jobs_of, plan_arm, trials_of
from cola.recipe import SPLITS, Recipe, is_remote
from cola.tables import plan_table
from cola.terminal import Terminal
from cola.tracking import mode_of


def preview(recipe: Recipe, terminal: Terminal) -> None:
    """Print the plan.

    Raises:
        ColaError: a local path is missing, an arm's links do not fit the budget, target_modules match nothing
            in a model whose config is on this disk, or the output folder has no room.
    """
    unchecked = []
    n_train = recipe.data.rows.train
    if n_train is None and recipe.training.steps is None:
        unchecked.append("the number of training rows, and with it the steps")
    steps = {}
    for arm in recipe.arms:
        if n_train is None and recipe.training.steps is None:
            steps[arm] = None
        else:
            links = plan_arm(recipe, arm, recipe.seeds[0], n_train or 1)
            steps[arm] = [len(link.learning_rates) for link in links]
    unchecked += _check_data(recipe)
    parameters = _parameters(recipe)
    if parameters is None:
        unchecked.append(f"the model {recipe.model.name_or_path}, its modules and parameters")
    free = _free_bytes(Path(recipe.output).expanduser())
    table = plan_table(recipe, steps, parameters)
    terminal.table(f"{recipe.name}: plan", table.columns, table.rows)
    jobs = jobs_of(recipe)
    trials = sum(len(trials_of(recipe, arm)) for arm in recipe.arms)
    terminal.say(
        f"seeds {', '.join(map(str, recipe.seeds))}: {len(jobs) - trials} runs and {trials} trials of a search"
    )
    if all(lengths is not None for lengths in steps.values()):
        total = sum(sum(steps[job.arm] or []) for job in jobs)
        terminal.say(f"optimizer steps in all: {total} of {recipe.training.batch_size} rows")
    score = recipe.evaluation
    rule = "the last step" if score.checkpoint == "last" else f"the best on validation by {score.select_by}"
    terminal.say(f"scored checkpoint: {rule}; W&B: {mode_of(recipe.tracking)}; output: {recipe.output} ({free} free)")
    for what in unchecked:
        terminal.say(f"not checked without data, weights or network: {what}")


def _check_data(recipe: Recipe) -> list[str]:
    data = recipe.data
    if data.files is not None:
        for split in SPLITS:
            path = getattr(data.files, split)
            if path and not Path(path).is_file():
                raise DataError(f"data.files.{split}: {path} does not exist")
        return ["the rows of the data files"]
    if data.reasoning_gym is not None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise DataError("data.reasoning_gym needs the package: pip install reasoning-gym")
        return ["the rows of the generator"]
    assert data.hub is not None
    return [f"the hub data set {data.hub.name}"]


def _parameters(recipe: Recipe) -> dict[str, int] | None:
    """Trainable parameters of each arm, from the config of a local model; None for another model."""
    name = recipe.model.name_or_path
    path = Path(name).expanduser()
    if is_remote(name) or path.suffix == ".gguf":
        return None
    if not path.is_dir():
        raise ModelError(f"model.name_or_path: {name}: no such {'file' if path.suffix else 'folder'}")
    from cola import adapters
    from cola.model import find_model

    skeleton = find_model(recipe.model).skeleton()
    counts = {}
    for arm in recipe.arms:
        links = (
            plan_arm(recipe, arm, 0, recipe.data.rows.train or 1)
            if recipe.training.steps or recipe.data.rows.train
            else []
        )
        sizes = [adapters.count_parameters(skeleton, link) for link in links]
        counts[arm] = max(sizes, default=0)
    return counts


def _free_bytes(output: Path) -> str:
    existing = next(p for p in [output.absolute(), *output.absolute().parents] if p.exists())
    if not existing.is_dir():
        raise RunFolderError(f"output: {existing} is a file, not a folder")
    return f"{shutil.disk_usage(existing).free / 1e9:.0f} GB"

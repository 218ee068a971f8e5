"""What was compared, a line each, alike on every page: model, data, rows, steps, arms, date, versions and recipe."""

from collections.abc import Mapping
from pathlib import Path

from cola.compare.contrasts import METRICS
from cola.compare.scope import scope_of, scope_sentence
from cola.errors import ColaError
from cola.files import without_home
from cola.recipe.methods import Settings
from cola.recipe.plan import budget_steps
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import Rules
from cola.report.numbers import size
from cola.tree.made import Provenance
from cola.tree.run_folder import RunFolder

Facts = dict[str, list[tuple[str, str]]]  # of each kind what is true, and of which runs; "": of all


def facts_of(folders: Mapping[str, RunFolder], n_bytes: int | None = None) -> Facts:
    """The facts of some runs by their names; one that is the same for all is told once. Of a run whose folder has gone
    or is damaged nothing is known. `n_bytes`: what the store takes on disk."""
    told: dict[str, dict[str, list[str]]] = {}
    for name, folder in folders.items():
        if (read := _read(folder)) is None:
            continue
        recipe, provenance = read
        mine = _facts(recipe, provenance)
        for kind, texts in [*mine.items(), ("arms", [f"{arm}: {_arm_text(recipe, arm)}" for arm in recipe.arms])]:
            for text in texts:
                told.setdefault(kind, {}).setdefault(text, []).append(name)
    if n_bytes:
        disk = f"{size(n_bytes)} in the store, which runs share; a state of full fine-tuning is as large as the model"
        told["disk"] = {disk: list(folders)}
    return {
        kind: [("" if len(of) == len(folders) else ", ".join(of), text) for text, of in texts.items()]
        for kind, texts in told.items()
    }


def holds_of(folder: RunFolder) -> list[str]:
    """What the intervals of a run speak of, and what they hold fixed; empty where it cannot be read."""
    if (read := _read(folder)) is None:
        return []
    recipe, provenance = read
    return [scope_sentence(scope_of(recipe, provenance and provenance.rows.get("train")))]


def _read(folder: RunFolder) -> tuple[Recipe, Provenance | None] | None:
    try:
        return read_recipe(folder.recipe_file), folder.provenance()
    except (ColaError, OSError):
        return None


def _facts(recipe: Recipe, provenance: Provenance | None) -> dict[str, list[str]]:
    model, training = recipe.model, recipe.training
    name = (provenance and provenance.model.name) or model.name_or_path
    known = [f"revision {model.revision}"] if model.revision else []
    known += [f"in {model.quantization or model.dtype}"]
    facts = {"model": f"{name}, {', '.join(known)}", "data": _data_text(recipe)}
    n_train = recipe.data.rows.train
    if provenance is not None:
        facts["rows"] = ", ".join(f"{n} {split}" for split, n in provenance.rows.items())
        n_train = provenance.rows.get("train", n_train)
    if n_train or training.steps:
        steps = budget_steps(training, n_train or 0)
        by = "" if training.match == "steps" else f"; the other arms as many {training.match} as the first"
        each = "optimizer steps of each link" if training.protocol == "grow" else "optimizer steps"
        facts["steps"] = f"{steps} {each}, {training.batch_size} rows a step{by}"
    facts["seeds"] = ", ".join(map(str, recipe.seeds))
    if provenance is not None:
        machine, commit = provenance.machine, provenance.commit.hash
        facts["begun"] = f"{provenance.started[:10]}, on {machine.cpu}, {machine.cores} cores; {provenance.device}"
        packages = [f"{p} {v}" for p in ("torch", "transformers", "peft") if (v := provenance.packages.get(p))]
        cola = f"cola {provenance.cola}" + (f" at {commit[:10]}" if commit else "")
        facts["versions"] = ", ".join([cola, f"Python {provenance.python}", *packages])
    return {kind: [text] for kind, text in {**facts, "recipe": recipe.name}.items()}


def _data_text(recipe: Recipe) -> str:
    """Where the rows come from, and what is asked of them."""
    data = recipe.data
    if data.hub:
        source = data.hub.name + (f" ({data.hub.config})" if data.hub.config else "")
    elif data.files:
        named = [data.files.train, data.files.validation, data.files.test]
        source = ", ".join(dict.fromkeys("/".join(Path(without_home(file)).parts[-2:]) for file in named if file))
    else:
        source = f"{data.reasoning_gym.name}, of reasoning-gym" if data.reasoning_gym else ""
    return f"{source}; task: {data.task.replace('_', ' ')}, judged by {METRICS[data.task]}"


def _arm_text(recipe: Recipe, arm: str) -> str:
    """An arm in words: how many links of what, and which knots are not the usual ones."""
    resolved = recipe.resolved(arm)
    if not resolved.links:
        return "the base as it comes"
    kinds = list(dict.fromkeys(_link_text(link) for link in resolved.links))
    n = len(resolved.links)
    if "links" in recipe.searches_of(arm):
        kinds = ["links, their number searched", *kinds]
    text = kinds[0] if n == 1 else f"{n} links of {' and '.join(kinds)}"
    rules, usual = resolved.rules, Rules()
    keys = [key for key in Rules.model_fields if n > 1 and getattr(rules, key) != getattr(usual, key)]
    return text + (f" ({', '.join(f'{key}: {getattr(rules, key)}' for key in keys)})" if keys else "")


def _link_text(link: Settings) -> str:
    said = link.record()
    targets = said.get("target_modules")
    on = f" on {targets if isinstance(targets, str) else ', '.join(targets)}" if targets else ""
    init = f", init {said['init']}" if said.get("init", "default") != "default" else ""
    rank = f" of rank {said['rank']}" if "rank" in said else ""
    name = {"full": "full fine-tuning", "lora": "LoRA"}.get(said["method"], said["method"])
    return f"{name}{rank}{on}{init}"

"""What can be checked of a recipe without weights or network, and what it trains in words: all of `cola run --dry-run`,
and where `cola plan` begins."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cola.compare.scope import overlap_note
from cola.data.fields import fill, lookup
from cola.data.labels import label_of
from cola.data.sources import Pool, open_pools, open_texts
from cola.errors import DataError, ModelError, RunFolderError
from cola.files import each_once, need_package
from cola.link import adapters, starts, targets
from cola.measure.memory import need_memory
from cola.plan.models import Planned, find_planned
from cola.recipe.arms import Prune
from cola.recipe.data_section import Data
from cola.recipe.ideas import ADAMW, Idea, read_code
from cola.recipe.methods import Adapter, Full, Lora, Settings, VirtualTokens
from cola.recipe.plan import Job, jobs_of, plan_arm, room_of, tuned_as_a_whole
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import Rules
from cola.recipe.schema import SAMPLE, SPLITS, Search, is_remote
from cola.report.numbers import count, size
from cola.report.table import NONE, Shown, Table
from cola.report.terminal import Terminal
from cola.report.tracking import TITLES, mode_of, need_tracker

FIRST_ROWS = 100  # of a file, that are looked at


def check(recipe: Recipe, terminal: Terminal, network: bool = False, here: bool = True) -> Planned | None:
    """Print what will be trained; returns the model without weights, None where its config cannot be had.

    Args:
        network: Whether the hub may be asked for the config of a model that is on no disk here.
        here: Whether it will be trained on this machine, whose memory must hold what is trained.

    Raises:
        ColaError: a local path is missing, a local file cannot be read or lacks a field or rows, an arm's links do not
            fit the budget, or target_modules match nothing in the model.
    """
    need_tracker(recipe.tracking)
    unchecked, matched = [], recipe.training.match
    known = (recipe.data.rows.train is not None or recipe.training.steps is not None) and matched == "steps"
    if matched != "steps":
        unchecked.append(f"the optimizer steps of each arm, which are matched by {matched}")
    elif not known:
        unchecked.append("the number of training rows, and with it the steps")
    # Which rows there are does not change what a link trains, so one row stands for an unknown number.
    links = {arm: plan_arm(recipe, arm, recipe.seeds[0], recipe.data.rows.train or 1) for arm in recipe.arms if known}
    steps = {arm: [len(link.learning_rates) for link in links[arm]] for arm in links} if known else None
    unchecked += _check_data(recipe)
    for file, named in recipe.own_code.items():
        read_code(file, named[0][0])
        unchecked.append(f"the code of {file}, which a dry run does not run")
    for arm in recipe.arms:
        if (quantization := recipe.resolved(arm).base.quantization) is not None:
            need_package("bitsandbytes", f"quantization: {quantization}", "quantized")
    planned = find_planned(recipe.model, network)
    parameters, notes = (None, []) if planned is None else _parameters(recipe, planned, here)
    if parameters is None:
        unchecked.append(f"the model {recipe.model.name_or_path}, its modules and parameters")
    output = Path(recipe.output).expanduser().absolute()
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not existing.is_dir():
        raise RunFolderError(f"output: {existing} is a file, not a folder")
    free = f"{shutil.disk_usage(existing).free / 1e9:.0f} GB"
    terminal.table(plan_table(recipe, steps, parameters))
    jobs = jobs_of(recipe)
    terminal.say(_jobs_text(recipe, jobs))
    for note in [*notes, *filter(None, [overlap_note(recipe)])]:
        terminal.say(note)
    if steps is not None:
        total = sum(sum(steps[job.arm]) for job in jobs)
        terminal.say(f"optimizer steps in all: {total} of {recipe.training.batch_size} rows")
    if parameters and (full := tuned_as_a_whole(recipe)):
        room = size(room_of(recipe, max(parameters[arm] for arm in full)))
        terminal.say(f"disk: up to {room} at once, since a state of {', '.join(full)} is as large as the model")
    score = recipe.evaluation
    rule = "the last step" if score.checkpoint == "last" else f"the best on validation by {score.select_by}"
    if score.train_rows is not None:
        terminal.say(f"train is scored on {score.train_rows} rows")
    tracker = f"{TITLES[recipe.tracking.tracker]}: {mode_of(recipe.tracking)}"
    terminal.say(f"scored checkpoint: {rule}; {tracker}; output: {recipe.output} ({free} free)")
    for part in unchecked:
        terminal.say(f"not checked without weights or network: {part}")
    return planned


def _jobs_text(recipe: Recipe, jobs: list[Job]) -> str:
    """How many runs and trials there are, and on which seeds."""
    trials, seeds = sum(job.trial for job in jobs), recipe.trial_seeds
    on = f" (on seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})" if seeds else ""
    on = " (on each seed)" if trials and not seeds else on
    return f"seeds {', '.join(map(str, recipe.seeds))}: {len(jobs) - trials} runs and {trials} trials of a search{on}"


def _check_data(recipe: Recipe) -> list[str]:
    data, general = recipe.data, recipe.evaluation.general_text
    if general not in (None, SAMPLE):
        _check_rows(open_texts(Path(general), "evaluation.general_text"), {"evaluation.general_text": "{text}"}, {})
    if data.files is not None:
        _check_files(data)
        return [f"the rows of the data files but the first {FIRST_ROWS}, and how many tokens they have"]
    if data.reasoning_gym is not None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise DataError("data.reasoning_gym needs the package: pip install reasoning-gym")
        return ["the rows of the generator"]
    assert data.hub is not None
    return [f"the hub data set {data.hub.name}"]


def _check_files(data: Data) -> None:
    """The fields that the recipe names and what labels mean, in the first rows of each file; and whether there are rows
    enough."""
    templates = {f"data.{key}": getattr(data, key) for key in ("prompt", "answer", "text")}
    fields = {f"data.{key}": getattr(data, key) for key in ("label", "group", "choices", "choice_labels")}
    templates = {key: template for key, template in templates.items() if template is not None}
    fields = {key: field for key, field in fields.items() if isinstance(field, str)}
    pools = open_pools(data)
    for pool in {id(pool): pool for pool in pools.values()}.values():
        _check_rows(pool, templates, fields)
        if data.task == "multiple_choice":
            for number in range(min(pool.size or 0, FIRST_ROWS)):
                label_of(pool.row(number), f"{pool.name} row {number + 1}", data)
        wanted = {split: getattr(data.rows, split) or 0 for split in SPLITS if pools[split] is pool}
        if pool.size is not None and sum(wanted.values()) > pool.size:
            told = " and ".join(f"{number} for {split}" for split, number in wanted.items() if number)
            raise DataError(f"data.rows: {told} are wanted and {pool.name} has {pool.size} rows")


def _check_rows(pool: Pool, templates: dict[str, str], fields: dict[str, str]) -> None:
    for number in range(min(pool.size or 0, FIRST_ROWS)):
        row, place = pool.row(number), f"{pool.name} row {number + 1}"
        for key, template in templates.items():
            fill(template, row, place, key)
        for key, field in fields.items():
            lookup(row, field, place, key)


def _parameters(recipe: Recipe, planned: Planned, here: bool) -> tuple[dict[str, int], list[str]]:
    """Trainable parameters of each arm, and what is to be said of what they leave out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    skeleton, counts, notes = planned.skeleton, dict[str, int](), list[str]()
    arms = {arm: recipe.resolved(arm) for arm in recipe.arms}
    for arm, resolved in arms.items():
        links = resolved.links
        try:
            starts.check_room(skeleton, links[:1] if resolved.rules.keeps_pair else links)
            counts[arm] = max((adapters.count_parameters(skeleton, link) for link in set(links)), default=0)
        except (ModelError, ValueError) as error:
            raise ModelError(f"arms.{arm}: {error}") from None
        try:
            if here:
                need_memory(counts[arm], device, all(link.optimizer == ADAMW for link in links))
        except ModelError as error:
            if not is_remote(recipe.model.name_or_path):
                raise ModelError(f"arms.{arm}: {error}") from None
            notes.append(f"{arm} will not train on this machine: {error}")  # another one will perhaps run the recipe
    return counts, notes + targets.all_linear_notes(skeleton, {arm: resolved.links for arm, resolved in arms.items()})


def plan_table(recipe: Recipe, steps: dict[str, list[int]] | None, parameters: dict[str, int] | None) -> Table:
    """What a run will do: the steps of each arm's links, None where the number of rows is not known yet, and the
    parameters that its largest link trains, None where the model is not on this disk."""
    rows: list[list[Shown]] = []
    for name in recipe.arms:
        arm = recipe.resolved(name)
        links = arm.links
        rate, searches = recipe.learning_rate_of(name), recipe.searches_of(name)
        rates = f"best of {len(rate.search)}" if isinstance(rate, Search) else f"{rate:g}"
        rates += "".join(f", {key} of {len(s.search)}" for key, s in searches.items() if key != "learning_rate")
        rates += " for each seed" if any(search.per == "seed" for search in searches.values()) else ""
        base = [said for said in (arm.base.quantization, arm.base.dtype) if said not in (None, "float32")]
        knots = f"; {_knots(arm.rules)}" if len(links) > 1 else ""
        rows.append(
            [
                name,
                str(len(links)),
                ", ".join([*base, _trains(links), *_optimizers(links)]) + knots,
                ("+".join(map(str, steps[name])) or "0") if steps is not None else "by epochs",
                rates if links else NONE,
                count(parameters[name]) if parameters else "?",
            ]
        )
    return Table(
        f"{recipe.name}: plan", ["arm", "links", "each link trains", "steps", "learning rate", "parameters"], rows
    )


def _trains(links: Sequence[Settings]) -> str:
    """What an arm's links train, in words; settings that change along the chain are written with an arrow."""
    if not links:
        return NONE

    def along(values: list[Any]) -> str:
        texts = [", ".join(v) if isinstance(v, tuple) else f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        return texts[0] if len(set(texts)) == 1 else " → ".join(texts)

    match links[0]:
        case Full(freeze=parts):
            return "all weights" + (f" but the {' and '.join(parts)}" if parts else "")
        case Adapter() as adapter:
            return f"bottlenecks of {adapter.bottleneck}, {adapter.placement}"
        case VirtualTokens() as prompt:
            return f"{prompt.num_virtual_tokens} virtual tokens, {prompt.method}"
    first, *_ = pairs = [link for link in links if isinstance(link, Lora)]
    rank, alpha, modules, inits = (
        along([getattr(pair, key) for pair in pairs]) for key in ("rank", "alpha", "target_modules", "init")
    )
    kinds = [kind for key, kind in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if getattr(first, key)]
    kinds += [f"LoRA+ {first.loraplus_lr_ratio:g}"] if first.loraplus_lr_ratio != 1 else []
    kinds += [f"init {inits}"] if inits != "default" else []
    return ", ".join([f"a pair of rank {rank}, alpha {alpha}, on {modules}", *kinds])


def _optimizers(links: Sequence[Settings]) -> list[str]:
    """What takes the steps, where that is not AdamW."""
    names = each_once([str(link.optimizer) for link in links])
    return [] if names in ([], [str(ADAMW)]) else [f"steps by {' → '.join(names)}"]


def _knots(rules: Rules) -> str:
    """What an arm's knots do; a fresh optimizer and one schedule over the run go without saying."""
    parts = [{"exact": "merged", "naive": "merged in place", "no": "not merged"}[rules.merge]]
    if rules.keeps_pair:
        parts = ["the same pair goes on"]
    elif isinstance(rules.pair, Idea):
        parts.append(f"the next pair by {rules.pair}")
    if isinstance(rules.merge_fraction, Idea):
        parts.append(f"a share kept by {rules.merge_fraction}")
    elif rules.merge_fraction != 1:
        parts.append(f"{rules.merge_fraction:.0%} kept")
    if isinstance(rules.optimizer, Prune):
        how = "by magnitude" if rules.optimizer.prune_magnitude else "at random"
        parts.append(f"{rules.optimizer.share:.1%} of the moments pruned {how}")
    elif isinstance(rules.optimizer, Idea):
        parts.append(f"optimizer's state by {rules.optimizer}")
    elif rules.hands_on:
        parts.append("optimizer kept")
    if rules.schedule == "link":
        parts.append("schedule restarted")
    return ", ".join(parts)

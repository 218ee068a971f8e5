"""What a job leaves in its run folder: the weights that are kept, the record of its result, what a tracker is sent."""

import math
import shutil
from dataclasses import asdict
from datetime import datetime
from typing import Any

from cola.clock import cpu_total
from cola.files import each_once
from cola.link import adapter_files
from cola.plan.tree import cost_of
from cola.recipe.plan import Job, Link
from cola.recipe.recipe import Recipe
from cola.recipe.write import recorded
from cola.run.assignment import Assignment
from cola.run.course import Course
from cola.tree.manifest import Entry
from cola.tree.records import Result, TrialResult
from cola.tree.run_folder import FORMAT, MADE_WITH
from cola.tree.store import hand_out as copy_out


def hand_out(given: Assignment, scored_step: int) -> dict[str, Entry]:
    """The knots, and the weights of full fine-tuning, into the run folder; returns what its manifest says of them. A
    file's digest is the one that the store had of it: a copy that is not the same is found."""
    entries = {}
    kept = [(f"knots/link-{number}", link.last_step, link) for number, link in enumerate(given.links, 1)]
    if 0 < scored_step < given.n_steps:
        number = given.lineage.link_of(scored_step)
        kept.append((f"knots/best-link-{number + 1}", scored_step, given.links[number]))
    for name, step, link in kept:
        full = link.settings.is_whole
        if (not link.settings.is_pair and step != scored_step) or not given.states.has_weights(step):
            continue
        if full and not given.recipe.keep_full_weights:
            continue
        folder = given.path / {"lora": name, "full": "model"}.get(link.settings.method, "adapter")
        folder.mkdir(parents=True)
        segment = given.states.there(step)
        for file, known in segment.record["files"].items():
            if adapter_files.is_export(file):
                copy_out(segment.folder / file, folder / file, large=full and file.endswith(".safetensors"))
                number = given.lineage.link_of(step) + 1
                key = (folder / file).relative_to(given.path).as_posix()
                entries[key] = Entry(**known, link=number, state=segment.name)
        if full:
            given.evaluator.tokenizer.save_pretrained(folder)
            if (own := given.bench.materials.source.folder / "generation_config.json").is_file():
                shutil.copyfile(own, folder / own.name)  # readable for whom the user's other files are
    return entries


def result_record(
    given: Assignment, course: Course, evaluation: dict[str, Any], seconds: float
) -> Result | TrialResult:
    """The content of result.json; `seconds`: what all of it took in this session."""
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    record = {
        "format": FORMAT,
        "status": "ok",
        "run_info": {**asdict(given.job), "created_at": created, "seconds": seconds, "error": None},
        "train_info": _train_info(given, course),
        "evaluation": evaluation,
        "meta_info": given.bench.meta,
    }
    return TrialResult.model_validate(record) if given.job.trial else Result.model_validate(record)


def _train_info(given: Assignment, course: Course) -> dict[str, Any]:
    names, steps, scored = given.lineage.names, course.steps, course.scored_step
    cost = cost_of(given.bench.meter, given.links, given.order, given.job.seed)  # whenever they were trained
    # With what, and in how much memory, the segments were made, in this session or an earlier one.
    segments = [segment.record for step in given.cuts if (segment := given.states.get(step)) is not None]
    parts = [*steps, *given.measured.took, *course.knots]
    return {
        "learning_rate": max((max(link.learning_rates) for link in given.links), default=None),
        "choice": dict(given.job.choice),
        "at_grid_edge": _at_edge(given.recipe, given.job),
        "base": given.arm.base._asdict(),
        "rules": given.arm.rules.model_dump(mode="json") if given.links else None,
        "checkpoint": given.recipe.evaluation.checkpoint,
        "scored_step": scored,
        "looked_loss": course.looks[scored]["loss"] if scored in given.points else None,
        "steps": given.n_steps,
        "reused_steps": course.reused,
        "segments": [names[step] for step in given.cuts],
        "segments_made": each_once({key: record["made"][key] for key in MADE_WITH} for record in segments),
        "measured_made": given.measured.made_with,
        "final_state": names[-1],
        "scored_state": names[scored],
        "tokens": sum(step["tokens"] for step in steps),
        "flops": cost.flops,
        "optimizer_flops": None if math.isnan(cost.optimizer) else cost.optimizer,
        "start_flops": None if math.isnan(cost.start) else cost.start,
        "positions": cost.positions,
        "without_gradient": min((step["without_gradient"] for step in steps), default=0),
        "num_trainable_params": given.n_trained,
        "num_total_params": given.bench.materials.skeleton.num_parameters(),
        "train_seconds": sum(step["seconds"] for step in steps),
        # What the result costs, whichever session made its parts.
        "total_seconds": sum(part["seconds"] for part in parts),
        "train_cpu_seconds": cpu_total(steps),
        "total_cpu_seconds": cpu_total(parts),
        "optimizer_bytes": _largest_state(given, steps),
        "accelerator_memory_max": _peak(segments, "accelerator"),
        "process_memory_max": _peak(segments, "process"),
        "links": [link_record(link) | {"cleared": steps[link.first_step]["cleared"]} for link in given.links],
        "knots": course.knots,
        "evaluations": [course.looks[step] for step in sorted(course.looks)],
    }


def _largest_state(given: Assignment, steps: list[dict[str, Any]]) -> int | None:
    """Bytes of what the optimizer of a link remembered, the largest; None without links, or where a version that did
    not log it trained one."""
    held: list[int | None] = [steps[link.first_step].get("optimizer_bytes") for link in given.links]
    known = [size for size in held if size is not None]
    return max(known, default=None) if len(known) == len(held) else None


def _peak(segments: list[dict[str, Any]], memory: str) -> int | None:
    """The largest memory that training took, whichever sessions did it; None where nothing was trained, or where a
    state is from a version that did not note it."""
    known = [record.get("memory", {}).get(memory) for record in segments]
    return None if None in known else max(known, default=None)


def link_record(link: Link) -> dict[str, Any]:
    """A link for the records, its learning rates shortened to first, peak and last."""
    rates = link.learning_rates
    return {
        **link.settings.record(),
        "first_step": link.first_step,
        "last_step": link.last_step,
        "learning_rate_first": rates[0],
        "learning_rate_peak": max(rates),
        "learning_rate_last": rates[-1],
        "seed": link.seed,
    }


def _at_edge(recipe: Recipe, job: Job) -> list[str]:
    """The searched keys whose chosen number is the smallest or the largest that was tried."""
    searches, chosen = recipe.searches_of(job.arm), dict(job.choice)
    grids = {key: [v for v in search.search if type(v) in (int, float)] for key, search in searches.items()}
    return [key for key, grid in grids.items() if grid and chosen.get(key) in (min(grid), max(grid))]


def tracked_config(given: Assignment) -> dict[str, Any]:
    """The config of the job's run at a tracker."""
    meta = given.bench.meta
    return {
        "arm": given.job.arm,
        "seed": given.job.seed,
        "links": [link_record(link) for link in given.links],
        "recipe": recorded(given.recipe.with_choice(given.job.arm, given.job.choice), exclude_none=True),
        "model_sha256": meta.model.sha256,
        "data_sha256": meta.data.sha256,
        "state": given.lineage.names[-1],
    }


def tracked_numbers(given: Assignment, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The final numbers under a tracker's fixed names."""
    if given.job.trial:
        return {}
    summary = {f"final/{split}_{key}": evaluation[split][key] for split in given.splits for key in ("loss", "score")}
    summary |= {"gap/loss": evaluation["gap_loss"], "gap/acc": evaluation["gap_acc"]}
    if (general := evaluation["general"]) is not None:
        summary |= {"general/loss": general["loss"], "general/forgetting": general["forgetting"]}
    # Full fine-tuning is trained first in each seed, so that every other arm knows its distance to it.
    full = given.bench.folder.result(Job(arm=given.recipe.full_arm, seed=given.job.seed))
    if full and full.evaluation.test.score is not None and evaluation["test"]["score"] is not None:
        summary["gap/ft"] = full.evaluation.test.score - evaluation["test"]["score"]
    return summary

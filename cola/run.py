"""A recipe from end to end: every arm and seed is trained, scored and recorded; one failure takes no other along."""

import errno
import json
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from cola import adapters, residual
from cola.compare import summarize
from cola.data import Splits, load_splits
from cola.errors import ColaError, DataError, ModelError, RecipeError, RunFolderError
from cola.evaluate import Evaluator
from cola.job import Bench, JobRun, make_accelerator, selection_key
from cola.model import Source, dtype_warning, find_model
from cola.plan import Job, jobs_of, plan_arm, trials_of
from cola.recipe import Recipe
from cola.record import FORMAT, RunFolder, provenance
from cola.terminal import Terminal
from cola.tracking import Tracker, sync_command


class Interrupted(BaseException):
    """SIGTERM: what is finished is kept, as with Ctrl-C."""


def run(recipe: Recipe, folder: RunFolder, terminal: Terminal) -> dict[str, Any]:
    """Train and score everything the recipe asks for that the folder does not hold yet.

    Returns:
        The summary, as in summary.json; `interrupted` is true where the user stopped it.

    Raises:
        ColaError: model, data or disk cannot serve the recipe; nothing has been trained then.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(recipe.model.dtype)
    if accelerator.num_processes > 1:
        raise ModelError("cola runs as one process; start it without accelerate launch or torchrun")
    if warning := dtype_warning(recipe.model.dtype, accelerator.device):
        terminal.warn(warning)
    source = find_model(recipe.model, terminal.say)
    tokenizer = source.tokenizer()
    splits = load_splits(recipe.data, tokenizer)
    sizes = ", ".join(f"{len(examples)} {name}" for name, examples in splits.items())
    terminal.say(f"data: {sizes} examples")
    for note in splits.notes:
        terminal.warn(f"data: {note}")
    _check_arms(recipe, source, splits, accelerator.device)
    meta = _check_and_record(recipe, folder, source, splits, terminal)
    longest = max(len(answer) for _, examples in splits.items() for e in examples for answer in e.answers)
    evaluator = Evaluator(
        recipe.data.task,
        tokenizer,
        recipe.data.normalize or [],
        recipe.evaluation.batch_tokens,
        accelerator.autocast,  # pyright: ignore[reportArgumentType] - accelerate annotates its default None wrongly
        longest,
    )
    tracker = Tracker(recipe.tracking, folder.path.name, folder.path, terminal.warn)
    steps = {job: _n_steps(recipe, job, splits) for job in jobs_of(recipe)}
    interrupted = False
    with _sigterm_interrupts(), terminal.progress(sum(steps.values())) as progress:
        bench = Bench(recipe, folder, source, splits, evaluator, progress, tracker, meta)
        try:
            for job, n_steps in steps.items():
                _do(bench, job, n_steps, terminal)
        except (KeyboardInterrupt, Interrupted):
            interrupted = True
        progress.close()
    summary = summarize(recipe, folder, np.random.default_rng(0))
    summary["interrupted"] = interrupted
    summary["wandb"] = {"mode": tracker.mode, "sync": sync_command(folder.path)}
    folder.write_json("summary.json", summary)
    return summary


def device_description() -> str:
    """What computes: the GPU's name and CUDA's version, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _n_steps(recipe: Recipe, job: Job, splits: Splits) -> int:
    links = plan_arm(recipe, job.arm, job.seed, len(splits.train))
    return links[-1].last_step if links else 0


def _check_arms(recipe: Recipe, source: Source, splits: Splits, device: torch.device) -> None:
    """What an arm asks of the model and the data, checked before anything is trained."""
    skeleton = source.skeleton()
    _check_fit(source, skeleton.config, len(residual.weight_of(skeleton.get_input_embeddings(), "")), splits)
    tried = set()
    for arm in recipe.arms:
        for link in plan_arm(recipe, arm, 0, len(splits.train)):
            if link.method == "full" and recipe.model.dtype == "float16" and device.type == "cpu":
                raise RecipeError(f"arms.{arm}: full fine-tuning in float16 needs a GPU; set model.dtype: float32")
            if link.method == "lora" and link.target_modules not in tried:
                tried.add(link.target_modules)
                try:
                    adapters.attach(source.skeleton(), link)
                except (ModelError, ValueError) as error:
                    raise ModelError(f"arms.{arm}: {error}") from None


def _check_fit(source: Source, config: PreTrainedConfig, n_tokens: int, splits: Splits) -> None:
    """The tokens must be ones that the model has, at positions that it has."""
    examples = [example for _, part in splits.items() for example in part]
    largest = max(max(map(max, [e.prompt, *e.answers])) for e in examples)
    if largest >= n_tokens:
        raise ModelError(
            f"model.name_or_path: {source.name}: its tokenizer gives token {largest} and the model has {n_tokens}; "
            "the folder's tokenizer belongs to another model"
        )
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(len(e.prompt) + max(map(len, e.answers)) for e in examples)
    if positions is not None and longest > positions:
        raise DataError(
            f"data.max_length: rows of {longest} tokens are drawn and the model has {positions} positions; lower it"
        )


def _check_and_record(
    recipe: Recipe, folder: RunFolder, source: Source, splits: Splits, terminal: Terminal
) -> dict[str, Any]:
    """provenance.json; a resumed run must have the recipe, the data and the base that it began with."""
    meta = {
        "format": FORMAT,
        **provenance(),
        "device": device_description(),
        "recipe": {"sha256": folder.recipe_digest()},
        "model": {"name": source.name, "revision": source.revision, "sha256": source.fingerprint()},
        "data": {"sha256": splits.fingerprint, "notes": splits.notes},
        "rows": {name: len(examples) for name, examples in splits.items()},
    }
    if (before := folder.provenance()) is not None:
        for what in ("recipe", "model", "data"):
            if before[what]["sha256"] != meta[what]["sha256"]:
                raise RunFolderError(
                    f"{folder.path}: the {what} is not the one this run began with; start a new run instead of resuming"
                )
        for what in ("cola", "commit", "packages", "machine", "device"):
            if before[what] != meta[what]:
                terminal.warn(f"{what} changed since this run began; each result says what it was made with")
        return meta
    weights = 4 * sum(parameter.numel() for parameter in source.skeleton().parameters())  # kept in float32
    full = [arm for arm in recipe.arms if any(link.method == "full" for link in recipe.links_of(arm))]
    room = 50_000_000
    room += weights if full and recipe.evaluation.checkpoint == "best" else 0
    room += weights * len(full) * len(recipe.seeds) if recipe.keep_full_weights else 0
    folder.need_room(room, "this run")
    folder.write_json("provenance.json", meta)
    return meta


def _do(bench: Bench, job: Job, n_steps: int, terminal: Terminal) -> None:
    """Train and record one job, unless its result is there."""
    before = bench.folder.result(job)
    if before is not None and before["status"] == "ok":
        bench.progress.skip(n_steps)
        return
    started = perf_counter()
    try:
        bench.progress.job(job.label, n_steps)
        JobRun(bench, job if job.trial else replace(job, learning_rate=_chosen_rate(bench, job.arm))).go()
    except (KeyboardInterrupt, Interrupted):
        _record_end(bench, job, "interrupted", started)
        raise
    except ModelError:
        raise  # a base that does not load fails every arm alike
    # An arm that diverges, runs out of memory or meets a defect must not take the others with it.
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunFolderError(
                f"{bench.folder.path}: the disk is full; finished arms are kept: make room, then "
                f"`cola run --resume {bench.folder.path}`"
            ) from error
        reason = str(error) if isinstance(error, ColaError) else f"{type(error).__name__}: {error}"
        _record_end(bench, job, "failed", started, reason)
        trace = bench.folder.job(job).relative_to(bench.folder.path) / "traceback.txt"
        bench.folder.write_text(trace, "".join(traceback.format_exception(error)))
        terminal.warn(f"{job.label} failed, the others go on: {reason}")


def _record_end(bench: Bench, job: Job, status: str, started: float, error: str | None = None) -> None:
    """The result of a job that did not come to its end; one that did is left as it is."""
    written = bench.folder.result(job)
    if written is not None and written["status"] == "ok":
        return
    info = {**asdict(job), "seconds": perf_counter() - started, "error": error}
    where = bench.folder.job(job).relative_to(bench.folder.path) / "result.json"
    bench.folder.write_json(where, {"format": FORMAT, "status": status, "run_info": info})
    bench.tracker.finish({}, failed=True)


def _chosen_rate(bench: Bench, arm: str) -> float | None:
    """The learning rate that was best on validation over the trials' seeds; None where it was not searched.

    The choice is made once and written down, so that a trial which is tried again cannot change it between seeds.
    """
    trials = trials_of(bench.recipe, arm)
    if not trials:
        return None
    path = bench.folder.path / "trials" / arm / "chosen.json"
    if path.is_file():
        return json.loads(path.read_text())["learning_rate"]
    by_rate: dict[float, list[tuple[float, float]]] = {}
    for trial in trials:
        result = bench.folder.result(trial)
        if result is not None and result["status"] == "ok" and trial.learning_rate is not None:
            validation = result["evaluation"]["validation"]
            key = selection_key(bench.recipe, validation["loss"], validation["score"])
            by_rate.setdefault(trial.learning_rate, []).append(key)
    # A rate at which some seed failed is no candidate: its mean would be over other seeds than the rest.
    n_seeds = len({trial.seed for trial in trials})
    whole = {rate: np.mean(keys, axis=0) for rate, keys in by_rate.items() if len(keys) == n_seeds}
    if not whole:
        raise ColaError(f"every trial of the learning-rate search failed; see {bench.folder.path / 'trials' / arm}")
    chosen = max(whole, key=lambda rate: tuple(whole[rate]))
    bench.folder.write_json(path.relative_to(bench.folder.path), {"learning_rate": chosen})
    return chosen


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, a cluster's way to stop a job, is treated as Ctrl-C."""

    def interrupt(_signum: int, _frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""A recipe from end to end: every arm and seed is trained, scored and recorded; one failure takes no other along."""

import contextlib
import errno
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cola import adapters, environment, starts
from cola.batches import batch_digests, batch_order
from cola.bench import Bench
from cola.cache import store_path
from cola.choice import choose
from cola.data import PASSAGE_TOKENS, Example, Splits, fingerprint_of, load_passages, load_splits
from cola.errors import ColaError, ModelError, RunChanged, RunFolderError, StoreError
from cola.evaluate import Evaluator, Ways
from cola.flops import Budget, Meter
from cola.interrupt import Interrupted, Signals
from cola.job import JobRun
from cola.learned import Learned
from cola.memory import need_memory
from cola.model import (
    Source,
    check_fit,
    check_tokens,
    dtype_warning,
    find_model,
    make_accelerator,
    quiet_libraries,
)
from cola.package_file import need_package
from cola.plan import Job, Link, candidates_of, choice_of, evaluation_steps, jobs_of, plan_arm, trials_of
from cola.recipe import SPLITS, Prune, Recipe
from cola.record import FORMAT, RunFolder, choice_file, need_room, provenance
from cola.scope import overlap_note
from cola.segments import Causes, Tree, digest, merge_of, root_causes
from cola.selfcheck import VERSION as SELFCHECK_VERSION
from cola.selfcheck import Subject, self_check, slowest
from cola.settle import Spectra
from cola.store import WAIT_SECONDS, Store, size_of
from cola.summary import summarize
from cola.terminal import Terminal
from cola.text_part import text_config
from cola.tracking import Tracker, sync_command


def run(
    recipe: Recipe,
    folder: RunFolder,
    terminal: Terminal,
    signals: Signals | None = None,
    group: str | None = None,
    tracked: set[str] | None = None,
    siblings: Sequence[Recipe] = (),
) -> dict[str, Any]:
    """Train and score everything the recipe asks for that neither the folder nor the store holds yet.

    Args:
        recipe: The resolved recipe.
        folder: The run's, locked by the caller.
        terminal: Told of the plan, progress and warnings.
        signals: Installed by the caller; None: for the time of this call.
        group: W&B group, where the run is a point of an ablation. Default: the run folder's name.
        tracked: Arms, seeds and final states that W&B has been sent, by other points of the ablation; added to.
        siblings: The recipes of the ablation's other points: states are kept where those part from this one.

    Returns:
        The summary, as in summary.json; `interrupted` is true where the user stopped it.

    Raises:
        ColaError: model, data or disk cannot serve the recipe; nothing has been trained then.
    """
    quiet_libraries()
    accelerator = _accelerator(recipe, terminal)
    source = find_model(recipe.model, terminal.say)
    tokenizer = source.tokenizer()
    splits = load_splits(recipe.data, tokenizer, recipe.drawn_seeds, source.ends())
    sizes = ", ".join(f"{n} {name}" for name, n in splits.sizes.items())
    terminal.say(f"data: {sizes} examples" + (", other training rows under each seed" if splits.redrawn else ""))
    for note in splits.notes:
        terminal.warn(f"data: {note}")
    _check_arms(recipe, source, splits, accelerator.device)
    general = _general_text(recipe, source, tokenizer, terminal)
    store = Store(store_path(recipe.store), terminal.warn)
    meta = _check_folder(recipe, folder, source, splits, general, store, terminal)
    evaluator = Evaluator.of(recipe, tokenizer, splits, accelerator, source.ends())
    skeleton, used = source.skeleton(), folder.references()
    meta["selfcheck"], ready = _self_check(recipe, source, skeleton, evaluator, splits, general, store, used, terminal)
    folder.write_json("provenance.json", (folder.provenance() or meta) | {"selfcheck": meta["selfcheck"]})
    ways = Ways(**meta["selfcheck"]["ways"])
    evaluator = evaluator.asking(ways)
    if ways.rows == "alone":
        recipe, siblings = _one_row_a_pass(recipe), [_one_row_a_pass(sibling) for sibling in siblings]
    meter = _meter(recipe, skeleton, splits)
    tree = _tree(recipe, siblings, source, meter, splits, accelerator.device.type)
    jobs = jobs_of(recipe)
    if not siblings:  # a point of an ablation may well be another arm: a chain of one link is LoRA
        _say_twins(recipe, tree, jobs, terminal)
    _say_cautions(recipe, tree, jobs, meter, terminal)
    tracker = Tracker(recipe.tracking, group, folder.path, terminal.warn)
    steps = {job: tree.lineage(job).n_steps for job in jobs}
    interrupted = False
    with (
        store.in_use(),
        contextlib.nullcontext(signals) if signals else Signals().installed() as signals,
        terminal.progress(sum(steps.values())) as progress,
    ):
        bench = Bench(
            recipe=recipe,
            folder=folder,
            source=source,
            skeleton=skeleton,
            splits=splits,
            general=general,
            evaluator=evaluator,
            scoring={**dict.fromkeys(SPLITS, evaluator.causes()), "general": evaluator.of_text().causes()},
            store=store,
            tree=tree,
            signals=signals,
            progress=progress,
            tracker=tracker,
            tracked=set() if tracked is None else tracked,
            meter=meter,
            learned=Learned(source, skeleton, recipe, accelerator.device),
            meta=meta,
            used=used,
            ready=ready,
        )
        store.register(folder.path)
        try:
            _do_all(bench, steps, terminal)
        except (KeyboardInterrupt, Interrupted):
            interrupted = True
        progress.close()
        bench.write_references()
    summary = summarize(recipe, folder)
    summary["interrupted"] = interrupted
    summary["wandb"] = {"mode": tracker.mode, "sync": sync_command(folder.path)}
    summary["store"] = {"path": str(store.path), "bytes": size_of(store.path)}
    folder.write_json("summary.json", summary)
    return summary


def _accelerator(recipe: Recipe, terminal: Terminal) -> Accelerator:
    """What computes; the user is told what of the environment it does not heed, and of a dtype that is slow on it."""
    accelerator = make_accelerator(recipe.model.dtype)
    if said := environment.note():
        terminal.warn(said)
    for dtype in sorted({recipe.base_of(arm)[0] for arm in recipe.arms}):
        if warning := dtype_warning(dtype, accelerator.device):
            terminal.warn(warning)
    return accelerator


def _meter(recipe: Recipe, skeleton: PreTrainedModel, splits: Splits) -> Meter:
    def lengths(examples: Sequence[Example]) -> list[tuple[int, int]]:
        return [(example.n_tokens, len(example.answers[example.gold])) for example in examples]

    redrawn = {seed: lengths(examples) for seed, examples in splits.redrawn.items()}
    return Meter(skeleton, lengths(splits.train), recipe.training.gradient_checkpointing, redrawn)


def _tree(
    recipe: Recipe, siblings: Sequence[Recipe], source: Source, meter: Meter, splits: Splits, device: str
) -> Tree:
    """The recipe's tree, cut also where the other points of an ablation on the same base and data need it."""
    fingerprint, skeleton = source.fingerprint(), meter.skeleton
    modules: dict[str, list[str]] = {}
    buffers = adapters.kept_buffers(skeleton)

    def modules_of(link: Link) -> list[str] | None:
        if link.method != "lora":
            return None
        said = str(link.what.target_modules)
        if said not in modules:
            modules[said] = adapters.target_names(skeleton, link.what)
        return modules[said]

    def tree_of(one: Recipe) -> Tree:
        known: dict[int, list[str]] = {}
        orders: dict[int, list[list[int]]] = {}

        # The first n steps of a seed's order are the same however many follow.
        def order_of(seed: int, n_steps: int) -> list[list[int]]:
            if len(orders.get(seed, [])) < n_steps:
                lengths = [example.n_tokens for example in splits.train_of(seed)]
                orders[seed] = batch_order(lengths, one.training.batch_size, n_steps, seed)
            return orders[seed][:n_steps] if n_steps else []

        def digests_of(seed: int, n_steps: int) -> list[str]:
            if len(known.get(seed, [])) < n_steps:
                order = order_of(seed, n_steps)
                known[seed] = list(batch_digests(splits.train_of(seed), order, one.training.micro_batch_tokens))
            return known.get(seed, [])[:n_steps]

        def root_of(arm: str) -> Causes:
            dtype, quantization = one.base_of(arm)
            return root_causes(fingerprint, dtype, device, quantization)

        budget = Budget(one, replace(meter, checkpointing=one.training.gradient_checkpointing), order_of)
        return Tree(one, splits.sizes["train"], root_of, modules_of, digests_of, budget.steps, buffers)

    tree = tree_of(recipe)
    alike = [tree_of(other) for other in siblings if (other.model, other.data) == (recipe.model, recipe.data)]
    lineages = []
    for one in (tree, *alike):
        # An arm that cannot be planned, of another point, is said when its turn comes.
        with contextlib.suppress(ColaError):
            # Under another seed with rows of its own nothing is in common.
            known = [job for job in candidates_of(one.recipe) if not splits.redrawn or job.seed in splits.redrawn]
            lineages += map(one.lineage, known)
    tree.plan(lineages)  # all at once: where two of them part shows only beside each other
    return tree


def _say_twins(recipe: Recipe, tree: Tree, jobs: list[Job], terminal: Terminal) -> None:
    """Arms that come to the same weights in the same way: what differs between them in the recipe has no effect."""
    ends: dict[tuple[str, str | None], str] = {}
    for job in jobs:
        if job.trial or job.seed != recipe.seeds[0]:
            continue
        lineage = tree.lineage(job)
        low_rank = lineage.links and lineage.links[0].method == "lora"
        merge = merge_of(recipe.knot_of(job.arm), "quantization" in lineage.root) if low_rank else None
        twin = ends.setdefault((lineage.names[-1], merge), job.arm)
        if twin != job.arm and not recipe.choices_of(job.arm):
            terminal.warn(f"{job.arm} is the same training as {twin}: what the recipe says differently has no effect")


def _say_cautions(recipe: Recipe, tree: Tree, jobs: list[Job], meter: Meter, terminal: Terminal) -> None:
    """What may surprise, or cannot be counted, is said before anything is trained."""
    if note := overlap_note(recipe):
        terminal.warn(note)
    for arm in recipe.arms:
        rules = recipe.knot_of(arm)
        several = recipe.arms[arm].n_links > 1 or "links" in recipe.searches_of(arm)
        if isinstance(rules.optimizer, Prune) and several and not rules.warmup_steps:
            terminal.warn(
                f"{arm}: pruning keeps Adam's step count, so entries that were cleared take steps of up to 6.6 times "
                "the learning rate after a knot; knot.warmup_steps softens that"
            )
    for link in [link for job in jobs for link in tree.lineage(job).links]:
        meter.steps(link, [], recipe.seeds[0])
    if meter.trouble:
        terminal.warn(f"FLOPs cannot be counted for this model: {meter.trouble}")


def _known(bench: Bench, jobs: list[Job]) -> list[Job]:
    """The jobs whose searched values are known by now; what the run refers to is noted for the store."""
    known = []
    for job in jobs:
        with contextlib.suppress(ColaError):  # said when its turn comes
            known.append(_with_choice(bench, job))
    bench.used["segments"] |= set(bench.tree.segments(known))
    bench.write_references()
    return known


def _say_plan(bench: Bench, known: list[Job], jobs: list[Job], terminal: Terminal) -> None:
    """How many segments are needed, found and to be trained."""
    needed = bench.tree.segments(known)
    missing: dict[str, int] = {}
    begun: dict[str, int] = {}
    for job in known:
        lineage, first = bench.tree.lineage(job), 0
        names, measured = lineage.names, bench.measurements(job)
        points = evaluation_steps(bench.recipe, lineage.links, bench.splits.sizes["train"])
        # From a point on where validation is to be looked at for the first time, the steps have to be made again.
        sure = next((p for p in points if not measured.has_scores("validation", p, "attached")), len(names))
        there = {n for n in bench.tree.cuts(job) if bench.store.has(names[n])}
        ends = [link.last_step for link in lineage.links]
        known_to = [n for n in there if n <= sure and there.issuperset(end for end in ends if end < n)]
        for cut in bench.tree.cuts(job):
            if cut > max(known_to, default=0):
                steps = [n for n in range(first + 1, min(sure, cut) + 1) if bench.store.has(names[n])]
                missing[names[cut]] = cut - first
                begun[names[cut]] = max(steps, default=first) - first
            first = cut
    made = sum(begun.values())
    terminal.say(
        f"segments: {len(needed)} needed, {len(needed) - len(missing)} found in {bench.store.path}, {len(missing)} to "
        f"be trained: {sum(missing.values()) - made} of {sum(map(len, needed.values()))} optimizer steps"
        + (f" ({made} more are in checkpoints)" if made else "")
    )
    if later := len(jobs) - len(known):
        terminal.say(f"segments: those of {later} more runs are known when the searches are at their end")


def device_description() -> str:
    """What computes: the GPU and CUDA's version, or the CPU and its threads, whose number moves the last bits."""
    if not torch.cuda.is_available():
        return f"cpu, threads: {torch.get_num_threads()}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _check_arms(recipe: Recipe, source: Source, splits: Splits, device: torch.device) -> None:
    """What an arm asks of the model and the data, checked before anything is trained."""
    skeleton = source.skeleton()
    check_fit(source, skeleton, splits, _virtual_tokens(recipe))
    tried = set()
    for arm in recipe.arms:
        dtype, quantization = recipe.base_of(arm)
        if quantization is not None:
            need_package("bitsandbytes", f"quantization: {quantization}", "quantized")
        for choice in map(choice_of, recipe.choices_of(arm) or [{}]):
            whats = [link.what for link in plan_arm(recipe, arm, 0, splits.sizes["train"], choice)]
            try:
                for what in whats:
                    if what.method == "full" and dtype == "float16" and device.type == "cpu":
                        raise ModelError("full fine-tuning in float16 needs a GPU; set dtype: float32")
                    if (key := what.model_dump_json()) not in tried:
                        tried.add(key)
                        attached = adapters.attach(source.skeleton(), what, 0)
                        need_memory(sum(p.numel() for p in adapters.trainable(attached)), device)
                starts.check_room(skeleton, whats[:1] if recipe.knot_of(arm).pair == "keep" else whats)
            except (ModelError, ValueError) as error:
                raise ModelError(f"arms.{arm}: {error}") from None


def _virtual_tokens(recipe: Recipe) -> int:
    """The largest number of virtual tokens that an arm puts before a row."""
    tried = [
        recipe.with_choice(arm, one).links_of(arm) for arm in recipe.arms for one in recipe.choices_of(arm) or [{}]
    ]
    return max((link.num_virtual_tokens or 0 for links in tried for link in links), default=0)


def _general_text(
    recipe: Recipe, source: Source, tokenizer: PreTrainedTokenizerBase, terminal: Terminal
) -> list[Example]:
    """The passages of the general text, the same for all arms; none where the recipe leaves it out."""
    if recipe.evaluation.general_text is None:
        return []
    skeleton = source.skeleton()
    positions = getattr(text_config(skeleton), "max_position_embeddings", None) or PASSAGE_TOKENS
    room = min(PASSAGE_TOKENS, positions - _virtual_tokens(recipe))
    passages = load_passages(recipe.evaluation.general_text, tokenizer, room)
    check_tokens(source, skeleton, passages)
    why = f" at most, as the model has {positions} positions" if room < PASSAGE_TOKENS else " at most"
    n_tokens = sum(passage.n_tokens for passage in passages)
    terminal.say(f"general text: {n_tokens} tokens in {len(passages)} passages of {room}{why}")
    return passages


def _check_folder(
    recipe: Recipe,
    folder: RunFolder,
    source: Source,
    splits: Splits,
    general: list[Example],
    store: Store,
    terminal: Terminal,
) -> dict[str, Any]:
    """What provenance.json will hold; a resumed run must have the recipe, the data and the base that it began with."""
    meta = {
        "format": FORMAT,
        **provenance(),
        "device": device_description(),
        "recipe": {"sha256": folder.recipe_digest()},
        "model": {"name": source.name, "revision": source.revision, "sha256": source.fingerprint()},
        "data": {"sha256": splits.fingerprint, "notes": splits.notes},
        "rows": splits.sizes,
        "general_text": {
            "name": recipe.evaluation.general_text,
            "sha256": fingerprint_of({"general": general}),
            "passages": len(general),
            "longest": max((passage.n_tokens for passage in general), default=0),
        },
    }
    folder.check_readable()
    if (before := folder.provenance()) is not None:
        for what in ("recipe", "model", "data", "general_text"):
            if before[what]["sha256"] != meta[what]["sha256"]:
                raise RunChanged(
                    f"{folder.path}: the {what.replace('_', ' ')} is not the one this run began with; start a new run "
                    "instead of resuming"
                )
        for what in ("cola", "commit", "packages", "machine", "device"):
            if before[what] != meta[what]:
                terminal.warn(f"{what} changed since this run began; each result says what it was made with")
        return meta
    weights = 4 * sum(parameter.numel() for parameter in source.skeleton().parameters())  # kept in float32
    full = _tuned_as_a_whole(recipe)
    room = 50_000_000
    room += 4 * weights if full else 0  # a checkpoint with its two moments, and the end or the best so far
    kept = len(full) * len(recipe.seeds) if recipe.keep_full_weights else 0
    # Of every value that is tried, until the best is known: before any is kept, or beside those of earlier seeds.
    tried = sum(len(trials_of(recipe, arm, recipe.seeds[0])) for arm in full)
    each_seed = any(search.per == "seed" for search in recipe.search_rules.values())
    room += weights * (kept + tried if each_seed else max(kept, tried))
    need_room(store.path, room, "this run")
    return meta


def _self_check(
    recipe: Recipe,
    source: Source,
    skeleton: PreTrainedModel,
    evaluator: Evaluator,
    splits: Splits,
    general: list[Example],
    store: Store,
    used: dict[str, set[str]],
    terminal: Terminal,
) -> tuple[dict[str, Any], dict[tuple[str, str | None], PreTrainedModel]]:
    """Try every base that an arm has, unless it was tried before on these rows, with these versions.

    Returns:
        The record; and the base of the first arm, where it was loaded, for who needs it next.

    Raises:
        ModelError: one of them is not what training and scoring rely on.
    """
    bases: dict[tuple[str, str | None], list[str]] = {}
    for job in jobs_of(recipe):
        bases.setdefault(recipe.base_of(job.arm), []).append(job.arm)
    examples = [example for _, part in splits.items() for example in part] + general
    virtual, packages = _virtual_tokens(recipe), {name: version(name) for name in ("torch", "transformers")}
    records, ready = [], {}
    for base in reversed(bases):  # the first one last: it is what the first job needs
        dtype, quantization = base
        methods = {link.method for arm in bases[base] for link in recipe.links_of(arm)}
        accelerator = make_accelerator(dtype)
        what = {
            "measured": "selfcheck",
            "version": SELFCHECK_VERSION,
            "state": digest(root_causes(source.fingerprint(), dtype, accelerator.device.type, quantization)),
            "rows": digest([splits.fingerprint, fingerprint_of({"general": general})]),
            "scoring": evaluator.causes(),
            "asked": [virtual, bool(methods), "full" in methods],
            "packages": packages,
        }
        used["measured"].add(digest(what))
        if (record := store.recall(what)) is None:
            terminal.say(f"self-check: trying what training and scoring rely on, on {source.name}")
            ready.clear()
            ready[base] = model = source.load(dtype, accelerator.device, quantization)
            mine = replace(evaluator, autocast=accelerator.autocast)
            subject = Subject(source.name, model, mine, examples, virtual, bool(methods), "full" in methods)
            record = {"dtype": dtype, "quantization": quantization, **self_check(subject)}
            store.remember(what, record)
        records.insert(0, record)
    notes = list(dict.fromkeys(note for record in records for note in record["notes"]))
    notes += adapters.all_linear_notes(skeleton, recipe)
    for note in notes:
        terminal.warn(note)
    return {
        "bases": records,
        "ways": asdict(slowest([Ways(**record["ways"]) for record in records])),
        "shared": adapters.shared_matrices(skeleton),
        "notes": notes,
    }, ready


def _one_row_a_pass(recipe: Recipe) -> Recipe:
    """The recipe for a model whose rows must not share a pass."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_tokens": 1})})


def _do_all(bench: Bench, steps: dict[Job, int], terminal: Terminal) -> None:
    """Every job, in order; what another process is at comes later, so that one command given twice shares the work.

    Args:
        steps: Optimizer steps of each job.
    """
    left, known, spectra = list(steps), _known(bench, list(steps)), Spectra(bench)
    bench.want_weights(_wanted_weights(bench, known, spectra))
    _say_plan(bench, known, left, terminal)
    searching, waits = len(known) < len(left), False
    while left:
        open_trials = {job for job in left if job.trial}
        for job in left:
            if not job.trial and open_trials.intersection(trials_of(bench.recipe, job.arm, job.seed)):
                continue
            with bench.store.claim(_claim(bench, job)) as mine:
                if not mine:
                    continue
                if searching and not job.trial:
                    known = _known(bench, list(steps))
                    if not open_trials:
                        _say_plan(bench, known, known, terminal)
                        searching = False
                bench.want_weights(_wanted_weights(bench, steps, spectra))
                _do(bench, job, steps[job], terminal)
                _settle(bench, [other for other in steps if other.seed == job.seed and not other.trial], spectra)
                bench.want_weights(_wanted_weights(bench, steps, spectra))
                _let_full_weights_go(bench, job.seed)
            left.remove(job)
            waits = False
            break
        else:
            if not waits:
                bench.progress.job(left[0].label, steps[left[0]])
                bench.progress.stage("another process is at it, and at all that is left; waiting")
            waits = True
            sleep(WAIT_SECONDS)


def _claim(bench: Bench, job: Job) -> str:
    """The key that a process holds while it is at a job: the state in which the job ends, tried or scored in full."""
    with contextlib.suppress(ColaError):  # said when its turn comes
        job = _with_choice(bench, job)
    return digest({"job": bench.tree.lineage(job).names[-1], "trial": job.trial})


def _do(bench: Bench, job: Job, n_steps: int, terminal: Terminal) -> None:
    """Train and record one job, unless its result is there."""
    before = bench.folder.result(job)
    if before is not None and before["status"] == "ok":
        bench.progress.skip(n_steps)
        return
    started = perf_counter()
    try:
        bench.progress.job(job.label, n_steps)
        JobRun(bench, _with_choice(bench, job)).go()
    except (KeyboardInterrupt, Interrupted):
        _record_end(bench, job, "interrupted", started)
        raise
    except ModelError:
        raise  # a base that does not load fails every arm alike
    # An arm that diverges, runs out of memory or meets a defect must not take the others with it.
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunFolderError(
                f"{error.filename or bench.folder.path}: the disk is full; what is finished is kept: make room "
                f"(`cola store prune`), then `cola run --resume {bench.folder.path}`"
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
    bench.tracker.finish({}, status)


class SearchOpen(ColaError):
    """A searched value is still to be chosen."""


def _with_choice(bench: Bench, job: Job) -> Job:
    """The job with the values that were best on validation over its trials' seeds, where any are searched.

    The choice is made once and written down, so that a trial which is tried again cannot change it between seeds.

    Raises:
        SearchOpen: not all trials have ended.
        ColaError: none of them came to its end.
    """
    search = None if job.trial else bench.recipe.search_of(job.arm)
    if search is None:
        return job
    trials, seed = trials_of(bench.recipe, job.arm, job.seed), job.seed if search.per == "seed" else None
    choices = list(dict.fromkeys(trial.choice for trial in trials))
    if (written := bench.folder.choice(job.arm, seed)) is not None:
        return replace(job, choice=choices[int(written["chosen"])])
    table = []
    for choice in choices:
        found = []
        for trial in trials:
            result = bench.folder.result(trial) if trial.choice == choice else None
            if trial.choice == choice and (result is None or result["status"] == "interrupted"):
                raise SearchOpen(f"{job.arm}: its search is not at its end")
            if result is not None and result["status"] == "ok":
                found.append(result["evaluation"]["validation"])
        # A choice at which some seed failed is no candidate: its mean would be over other seeds than the rest.
        whole = len(found) == len(trials) // len(choices)
        scored = whole and found[0]["score"] is not None
        table.append(
            {
                "values": dict(choice),
                "loss": float(np.mean([one["loss"] for one in found])) if whole else None,
                "score": float(np.mean([one["score"] for one in found])) if scored else None,
                "failed": not whole,
            }
        )
    candidates = [number for number, row in enumerate(table) if not row["failed"]]
    where = choice_file(job.arm, seed)
    if not candidates:
        raise ColaError(f"every trial of the search failed; see {bench.folder.path / where.parent}")
    losses_C, scores_C = (np.array([[table[n][key]] for n in candidates], float) for key in ("loss", "score"))
    chosen = candidates[int(choose(losses_C, scores_C if search.select_by == "score" else None)[0])]
    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    bench.folder.write_json(where, {"chosen": chosen, "seeds": seeds, "trials": table})
    return replace(job, choice=choices[chosen])


def _settle(bench: Bench, jobs: Iterable[Job], spectra: Spectra) -> None:
    """Take the spectra that the end of a job has made possible, under its seed."""
    chosen = []
    for job in jobs:
        with contextlib.suppress(ColaError):  # it has not been tried
            chosen.append(_with_choice(bench, job))
    spectra.settle(chosen)


def _wanted_weights(bench: Bench, jobs: Iterable[Job], spectra: Spectra) -> set[str]:
    """The fully fine-tuned states of which the run needs the weights: those that it keeps, and until a job is scored,
    and all spectra are taken that its weights are looked at for, whatever it may come to score."""
    recipe, wanted = bench.recipe, set()
    tuned, best = _tuned_as_a_whole(recipe), recipe.evaluation.checkpoint == "best"
    for job in jobs:
        if job.arm not in tuned:
            continue
        with contextlib.suppress(ColaError):  # said when its turn comes
            result, chosen = bench.folder.result(job), _with_choice(bench, job)
            lineage = bench.tree.lineage(chosen)
            if result is None or result["status"] != "ok":
                points = evaluation_steps(recipe, lineage.links, bench.splits.sizes["train"]) if best else ()
                wanted |= {lineage.names[step] for step in (*bench.tree.cuts(chosen), *points)}
            elif job.trial:
                # Where a seed is scored too, one of its trials may be what it chooses.
                scored = bench.folder.result(Job(arm=job.arm, seed=job.seed)) if job.seed in recipe.seeds else result
                wanted |= {lineage.names[-1]} if scored is None or scored["status"] != "ok" else set()
            elif recipe.keep_full_weights or spectra.awaits(job.arm, job.seed):
                wanted.add(result["train_info"]["scored_state"])
    return wanted


def _tuned_as_a_whole(recipe: Recipe) -> list[str]:
    """The arms that train all weights."""
    return [arm for arm in recipe.arms if any(link.method == "full" for link in recipe.links_of(arm))]


def _let_full_weights_go(bench: Bench, seed: int) -> None:
    """Fully fine-tuned weights are as large as the model: where nothing will ask for them, their record is enough.

    That is once all of their seed's arms are scored and compared, unless the recipe keeps them; and in any case the
    trials' weights, as soon as the chosen value's are scored, but for what is still to be scored or kept.
    """
    recipe, done = bench.recipe, set()
    for arm in _tuned_as_a_whole(recipe):
        job = Job(arm=arm, seed=seed)
        result = bench.folder.result(job)
        if result is None or result["status"] != "ok":
            continue
        with contextlib.suppress(ColaError):  # what is needed cannot be told, so nothing goes
            chosen = _with_choice(bench, job)
            # The chosen one's trial too: on a seed of its own it is nothing that is scored.
            for one in (*trials_of(recipe, arm, seed), *([] if recipe.keep_full_weights else [chosen])):
                done.update(bench.tree.lineage(one).names[1:])
    loose = {name for name in done - bench.used["weights"] if bench.store.has(name)}
    with contextlib.suppress(StoreError):  # what others need cannot be told
        bench.store.let_go(loose, bench.folder.path)

"""What is checked before anything is trained, and what is said of it."""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from cola import environment
from cola.compare.scope import overlap_note
from cola.data.encode import Example, fingerprint_of
from cola.data.passages import PASSAGE_TOKENS, load_passages
from cola.data.splits import Splits
from cola.errors import ModelError, RunChanged
from cola.files import need_package, need_room
from cola.link import adapters, starts
from cola.link.accelerator import dtype_warning, make_accelerator
from cola.link.model import Source, check_fit, check_tokens
from cola.link.text_part import text_config
from cola.measure.cost import Meter
from cola.measure.memory import need_memory
from cola.recipe.arms import Prune
from cola.recipe.plan import Job, plan_arm, trials_of
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.run.weights import tuned_as_a_whole
from cola.tree.provenance import provenance
from cola.tree.run_folder import FORMAT, RunFolder
from cola.tree.segments import Tree, merge_of
from cola.tree.store import Store


def check_accelerator(recipe: Recipe, terminal: Terminal) -> Accelerator:
    """What computes; the user is told what of the environment it does not heed, and of a dtype that is slow on it."""
    accelerator = make_accelerator(recipe.model.dtype)
    if said := environment.note():
        terminal.warn(said)
    for dtype in sorted({recipe.resolved(arm).base.dtype for arm in recipe.arms}):
        if warning := dtype_warning(dtype, accelerator.device):
            terminal.warn(warning)
    return accelerator


def say_twins(recipe: Recipe, tree: Tree, jobs: list[Job], terminal: Terminal) -> None:
    """Arms that come to the same weights in the same way: what differs between them in the recipe has no effect."""
    ends: dict[tuple[str, str | None], str] = {}
    for job in jobs:
        if job.trial or job.seed != recipe.seeds[0]:
            continue
        lineage = tree.lineage(job)
        low_rank = lineage.links and lineage.links[0].settings.is_pair
        merge = merge_of(recipe.resolved(job.arm).rules, "quantization" in lineage.root) if low_rank else None
        twin = ends.setdefault((lineage.names[-1], merge), job.arm)
        if twin != job.arm and not recipe.searches_of(job.arm):
            terminal.warn(f"{job.arm} is the same training as {twin}: what the recipe says differently has no effect")


def say_cautions(recipe: Recipe, tree: Tree, jobs: list[Job], meter: Meter, terminal: Terminal) -> None:
    """What may surprise, or cannot be counted, is said before anything is trained."""
    if note := overlap_note(recipe):
        terminal.warn(note)
    for arm in recipe.arms:
        rules = recipe.resolved(arm).rules
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


def device_description() -> str:
    """What computes: the GPU and CUDA's version, or the CPU and its threads, whose number moves the last bits."""
    if not torch.cuda.is_available():
        return f"cpu, threads: {torch.get_num_threads()}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def check_arms(recipe: Recipe, source: Source, splits: Splits, device: torch.device) -> None:
    """What an arm asks of the model and the data, checked before anything is trained."""
    skeleton = source.skeleton()
    check_fit(source, skeleton, splits, virtual_tokens(recipe))
    tried = set()
    for arm in recipe.arms:
        rules, (dtype, quantization) = recipe.resolved(arm).rules, recipe.resolved(arm).base
        if quantization is not None:
            need_package("bitsandbytes", f"quantization: {quantization}", "quantized")
        for choice in recipe.choices_of(arm):
            links = [link.settings for link in plan_arm(recipe, arm, 0, splits.sizes["train"], choice)]
            try:
                for settings in links:
                    if settings.is_whole and dtype == "float16" and device.type == "cpu":
                        raise ModelError("full fine-tuning in float16 needs a GPU; set dtype: float32")
                    if settings not in tried:
                        tried.add(settings)
                        attached = adapters.attach(source.skeleton(), settings, 0)
                        need_memory(sum(p.numel() for p in adapters.trainable(attached)), device)
                starts.check_room(skeleton, links[:1] if rules.keeps_pair else links)
            except (ModelError, ValueError) as error:
                raise ModelError(f"arms.{arm}: {error}") from None


def virtual_tokens(recipe: Recipe) -> int:
    """The largest number of virtual tokens that an arm puts before a row."""
    variants = [variant for arm in recipe.arms for variant in recipe.variants(arm)]
    return max((link.virtual_tokens for variant in variants for link in variant.links), default=0)


def general_text_of(
    recipe: Recipe, source: Source, tokenizer: PreTrainedTokenizerBase, terminal: Terminal
) -> list[Example]:
    """The passages of the general text, the same for all arms; none where the recipe leaves it out."""
    if recipe.evaluation.general_text is None:
        return []
    skeleton = source.skeleton()
    positions = getattr(text_config(skeleton), "max_position_embeddings", None) or PASSAGE_TOKENS
    room = min(PASSAGE_TOKENS, positions - virtual_tokens(recipe))
    passages = load_passages(recipe.evaluation.general_text, tokenizer, room)
    check_tokens(source, skeleton, passages)
    why = f" at most, as the model has {positions} positions" if room < PASSAGE_TOKENS else " at most"
    n_tokens = sum(passage.n_tokens for passage in passages)
    terminal.say(f"general text: {n_tokens} tokens in {len(passages)} passages of {room}{why}")
    return passages


def check_folder(
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
    full = tuned_as_a_whole(recipe)
    room = 50_000_000
    room += 4 * weights if full else 0  # a checkpoint with its two moments, and the end or the best so far
    kept = len(full) * len(recipe.seeds) if recipe.keep_full_weights else 0
    # Of every value that is tried, until the best is known: before any is kept, or beside those of earlier seeds.
    tried = sum(len(trials_of(recipe, arm, recipe.seeds[0])) for arm in full)
    each_seed = any(search.per == "seed" for search in recipe.search_rules.values())
    room += weights * (kept + tried if each_seed else max(kept, tried))
    need_room(store.path, room, "this run")
    return meta

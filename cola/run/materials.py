"""What a recipe is run with: base, data, scoring, the run's folder; found and tried before anything is trained."""

from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cola import environment
from cola.data.encode import Example, fingerprint_of
from cola.data.passages import PASSAGE_TOKENS, load_passages
from cola.data.splits import Splits, load_splits
from cola.errors import ModelError, RunChanged
from cola.files import digest, file_digest, need_package, need_room, without_home
from cola.link import adapters, starts, targets, wires
from cola.link.accelerator import device_said, dtype_warning, make_accelerator, quiet_libraries
from cola.link.find import find_model
from cola.link.model import Source, check_fit, check_tokens
from cola.link.text_part import text_config
from cola.measure.evaluate import Evaluator, Ways
from cola.measure.memory import need_memory
from cola.measure.selfcheck import VERSION, Subject, self_check, slowest
from cola.recipe.ideas import ADAMW
from cola.recipe.methods import Lora, Settings
from cola.recipe.plan import jobs_of, plan_arm, room_of, tuned_as_a_whole
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import BaseFormat
from cola.report.terminal import Terminal
from cola.run import shards
from cola.tree.made import Data, GeneralText, Model, Provenance, RecipeDigest, SelfCheck, provenance
from cola.tree.run_folder import FORMAT, RunFolder
from cola.tree.segments import root_causes
from cola.tree.store import Store


@dataclass(frozen=True)
class Materials:
    """What a recipe is run with."""

    recipe: Recipe
    source: Source  # the base
    skeleton: PreTrainedModel  # the base without weights
    splits: Splits
    general: list[Example]  # passages of the general text; empty where none is scored
    evaluator: Evaluator
    device: torch.device
    counts: dict[Settings, int]  # parameters that each link of an arm trains
    code: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file of the user's own code


def gather(recipe: Recipe, terminal: Terminal) -> Materials:
    """Find and check all of it; a ColaError where model or data cannot serve the recipe."""
    quiet_libraries()
    accelerator = make_accelerator(recipe.model.dtype)
    dtypes = sorted({recipe.resolved(arm).base.dtype for arm in recipe.arms})
    for note in (environment.note(), *(dtype_warning(dtype, accelerator.device) for dtype in dtypes)):
        if note:
            terminal.warn(note)
    source = find_model(recipe.model, terminal.say)
    tokenizer = source.tokenizer()
    splits = load_splits(recipe.data, tokenizer, recipe.drawn_seeds, source.ends())
    sizes = ", ".join(f"{n} {name}" for name, n in splits.sizes.items())
    terminal.say(f"data: {sizes} examples" + (", other training rows under each seed" if splits.redrawn else ""))
    scored = splits.scored(recipe.seeds[0], recipe.evaluation.train_rows)["train"]
    if len(scored) < splits.sizes["train"]:
        terminal.say(f"train is scored on a sample of {len(scored)} of its examples, the same for all arms")
    for note in splits.notes:
        terminal.warn(f"data: {note}")
    skeleton = source.skeleton()
    counts = _check_arms(recipe, source, skeleton, splits, accelerator.device)
    for settings in counts:
        if isinstance(settings, Lora) and (note := targets.wide_note(skeleton, settings)):
            terminal.warn(note)
    general = _general_text(recipe, source, skeleton, tokenizer, terminal)
    evaluator = Evaluator.of(recipe.data, recipe.evaluation.batch_tokens, tokenizer, splits, accelerator, source.ends())
    return Materials(recipe, source, skeleton, splits, general, evaluator, accelerator.device, counts)


def heeding(ways: Ways, recipe: Recipe) -> Recipe:
    """The recipe for a model that is asked in these ways, whose rows must perhaps not share a pass."""
    alone = recipe.training.model_copy(update={"micro_batch_tokens": 1})
    return recipe.model_copy(update={"training": alone}) if ways.rows == "alone" else recipe


def _check_arms(
    recipe: Recipe, source: Source, skeleton: PreTrainedModel, splits: Splits, device: torch.device
) -> dict[Settings, int]:
    """What each arm asks of the model and the data; returns the parameters that links train, by their settings."""
    check_fit(source, skeleton, splits, virtual_tokens(recipe))
    counts: dict[Settings, int] = {}
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
                    if settings not in counts:
                        counts[settings] = adapters.count_parameters(skeleton, settings)
                        need_memory(counts[settings], device, settings.optimizer == ADAMW)
                starts.check_room(skeleton, links[:1] if rules.keeps_pair else links)
            except (ModelError, ValueError) as error:
                raise ModelError(f"arms.{arm}: {error}") from None
    return counts


def virtual_tokens(recipe: Recipe) -> int:
    """The largest number of virtual tokens that an arm puts before a row."""
    variants = [variant for arm in recipe.arms for variant in recipe.variants(arm)]
    return max((link.virtual_tokens for variant in variants for link in variant.links), default=0)


def _general_text(
    recipe: Recipe, source: Source, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, terminal: Terminal
) -> list[Example]:
    """The passages of the general text, the same for all arms; none where the recipe leaves it out."""
    if recipe.evaluation.general_text is None:
        return []
    positions = getattr(text_config(skeleton), "max_position_embeddings", None) or PASSAGE_TOKENS
    room = min(PASSAGE_TOKENS, positions - virtual_tokens(recipe))
    passages = load_passages(recipe.evaluation.general_text, tokenizer, room)
    check_tokens(source, skeleton, passages)
    why = f" at most, as the model has {positions} positions" if room < PASSAGE_TOKENS else " at most"
    n_tokens = sum(passage.n_tokens for passage in passages)
    terminal.say(f"general text: {n_tokens} tokens in {len(passages)} passages of {room}{why}")
    return passages


def check_bases(
    materials: Materials, store: Store, used: dict[str, set[str]], terminal: Terminal
) -> tuple[SelfCheck, dict[BaseFormat, PreTrainedModel]]:
    """Try every base that an arm has, unless it was tried before on these rows, with these versions. Returns the record
    and, for who needs it next, the first arm's base if it was loaded; a ModelError where one cannot be relied on."""
    recipe, source, skeleton = materials.recipe, materials.source, materials.skeleton
    bases: dict[BaseFormat, list[str]] = {}
    for job in jobs_of(recipe):
        bases.setdefault(recipe.resolved(job.arm).base, []).append(job.arm)
    examples = [example for _, part in materials.splits.items() for example in part] + materials.general
    records, ready = [], {}
    for base in reversed(bases):  # the first one last: it is what the first job needs
        dtype, quantization = base
        links = [link for arm in bases[base] for link in recipe.resolved(arm).links]
        accelerator = make_accelerator(dtype)
        asked = (virtual_tokens(recipe), bool(links), any(link.is_whole for link in links))
        causes = {
            "measured": "selfcheck",
            "version": VERSION,
            "state": digest(root_causes(source.fingerprint(), dtype, accelerator.device.type, quantization)),
            "rows": digest([materials.splits.fingerprint, fingerprint_of({"general": materials.general})]),
            "scoring": materials.evaluator.causes(),
            "asked": list(asked),
            "packages": {name: version(name) for name in ("torch", "transformers")},
        }
        used["measured"].add(digest(causes))
        if (record := store.recall(causes)) is None:
            terminal.say(f"self-check: trying what training and scoring rely on, on {source.name}")
            ready.clear()
            ready[base] = model = shards.load(source, base, accelerator.device, recipe.model.shard)
            mine = replace(materials.evaluator, autocast=accelerator.autocast)
            tried = self_check(Subject(source.name, model, mine, examples, *asked))
            record = {"dtype": dtype, "quantization": quantization, **tried}
            store.remember(causes, record)
        records.insert(0, record)
    notes = list(dict.fromkeys(note for record in records for note in record["notes"]))
    notes += targets.all_linear_notes(skeleton, {arm: recipe.resolved(arm).links for arm in recipe.arms})
    for note in notes:
        terminal.warn(note)
    ways, shared = slowest([Ways(**record["ways"]) for record in records]), targets.shared_matrices(skeleton)
    return SelfCheck.model_validate({"bases": records, "ways": asdict(ways), "shared": shared, "notes": notes}), ready


def check_folder(materials: Materials, folder: RunFolder, store: Store, terminal: Terminal) -> Provenance:
    """What provenance.json will hold; RunChanged where a resumed run has not the recipe, the data and the base that it
    began with, a RunFolderError where another version wrote it, or the store's disk has no room for a new run."""
    recipe, source, splits, general = materials.recipe, materials.source, materials.splits, materials.general
    device = device_said()
    if wires.count() > 1:
        device += f", processes: {wires.count()}" + (", the base in shards" if recipe.model.shard else "")
    meta = Provenance(
        format=FORMAT,
        **provenance(),
        device=device,
        recipe=RecipeDigest(sha256=file_digest(folder.recipe_file)),
        code={without_home(file): sha256 for file, sha256 in materials.code.items()},
        model=Model(name=without_home(source.name), revision=source.revision, sha256=source.fingerprint()),
        data=Data(sha256=splits.fingerprint, notes=splits.notes),
        rows=splits.sizes,
        general_text=GeneralText(
            name=recipe.evaluation.general_text,
            sha256=fingerprint_of({"general": general}),
            passages=len(general),
            longest=max((passage.n_tokens for passage in general), default=0),
        ),
    )
    if (before := folder.provenance()) is not None:
        for key in ("recipe", "model", "data", "general_text"):
            if getattr(before, key).sha256 != getattr(meta, key).sha256:
                raise RunChanged(
                    f"{folder.path}: the {key.replace('_', ' ')} is not the one this run began with; start a new run "
                    "instead of resuming"
                )
        for key in ("cola", "commit", "packages", "machine", "device"):
            if getattr(before, key) != getattr(meta, key):
                terminal.warn(f"{key} changed since this run began; each result says what it was made with")
        return meta
    keeps = tuned_as_a_whole(recipe) and recipe.keep_full_weights
    need_room(
        store.path, room_of(recipe, materials.skeleton.num_parameters()), ", or keep_full_weights: false" * bool(keeps)
    )
    return meta

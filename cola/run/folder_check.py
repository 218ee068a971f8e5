"""A run folder and the store's disk, checked before anything is trained."""

import torch

from cola.data.encode import fingerprint_of
from cola.errors import RunChanged
from cola.files import file_digest, need_room
from cola.recipe.plan import trials_of
from cola.report.terminal import Terminal
from cola.run.full_weights import tuned_as_a_whole
from cola.run.materials import Materials
from cola.tree.made import Data, GeneralText, Model, Provenance, RecipeDigest
from cola.tree.provenance import provenance
from cola.tree.run_folder import FORMAT, RunFolder
from cola.tree.store import Store


def check_folder(materials: Materials, folder: RunFolder, store: Store, terminal: Terminal) -> Provenance:
    """What provenance.json will hold; a resumed run must have the recipe, the data and the base that it began with.

    Raises:
        RunChanged: it has not.
        RunFolderError: another version wrote the folder, or the store's disk has no room for a new run.
    """
    recipe, source, splits, general = materials.recipe, materials.source, materials.splits, materials.general
    meta = Provenance(
        format=FORMAT,
        **provenance(),
        device=device_description(),
        recipe=RecipeDigest(sha256=file_digest(folder.recipe_file)),
        model=Model(name=source.name, revision=source.revision, sha256=source.fingerprint()),
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
    need_room(store.path, _room(materials), "this run")
    return meta


def _room(materials: Materials) -> int:
    """Bytes that a new run may come to keep at once."""
    recipe = materials.recipe
    weights = 4 * sum(parameter.numel() for parameter in materials.skeleton.parameters())  # kept in float32
    full = tuned_as_a_whole(recipe)
    room = 50_000_000
    room += 4 * weights if full else 0  # a checkpoint with its two moments, and the end or the best so far
    kept = len(full) * len(recipe.seeds) if recipe.keep_full_weights else 0
    # Of every value that is tried, until the best is known: before any is kept, or beside those of earlier seeds.
    tried = sum(len(trials_of(recipe, arm, recipe.seeds[0])) for arm in full)
    each_seed = any(search.per == "seed" for search in recipe.search_rules.values())
    return room + weights * (kept + tried if each_seed else max(kept, tried))


def device_description() -> str:
    """What computes: the GPU and CUDA's version, or the CPU and its threads, whose number moves the last bits."""
    if not torch.cuda.is_available():
        return f"cpu, threads: {torch.get_num_threads()}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"

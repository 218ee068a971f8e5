"""The self-check of every base of a recipe, made once for these rows and versions."""

from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from cola.data.encode import fingerprint_of
from cola.files import digest
from cola.link import targets
from cola.link.accelerator import make_accelerator
from cola.measure.evaluate import Ways
from cola.measure.selfcheck import VERSION as SELFCHECK_VERSION
from cola.measure.selfcheck import Subject, self_check, slowest
from cola.recipe.plan import jobs_of
from cola.report.terminal import Terminal
from cola.run.materials import Materials
from cola.tree.segments import root_causes
from cola.tree.store import Store


def check_bases(
    materials: Materials, store: Store, used: dict[str, set[str]], terminal: Terminal
) -> tuple[dict[str, Any], dict[tuple[str, str | None], PreTrainedModel]]:
    """Try every base that an arm has, unless it was tried before on these rows, with these versions.

    Returns:
        The record; and the base of the first arm, where it was loaded, for who needs it next.

    Raises:
        ModelError: one of them is not what training and scoring rely on.
    """
    recipe, source, skeleton = materials.recipe, materials.source, materials.skeleton
    bases: dict[tuple[str, str | None], list[str]] = {}
    for job in jobs_of(recipe):
        bases.setdefault(recipe.resolved(job.arm).base, []).append(job.arm)
    examples = [example for _, part in materials.splits.items() for example in part] + materials.general
    virtual = materials.virtual_tokens
    records, ready = [], {}
    for base in reversed(bases):  # the first one last: it is what the first job needs
        dtype, quantization = base
        links = [link for arm in bases[base] for link in recipe.resolved(arm).links]
        accelerator = make_accelerator(dtype)
        asked = (virtual, bool(links), any(link.is_whole for link in links))
        causes = {
            "measured": "selfcheck",
            "version": SELFCHECK_VERSION,
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
            ready[base] = model = source.load(dtype, accelerator.device, quantization)
            mine = replace(materials.evaluator, autocast=accelerator.autocast)
            subject = Subject(source.name, model, mine, examples, *asked)
            record = {"dtype": dtype, "quantization": quantization, **self_check(subject)}
            store.remember(causes, record)
        records.insert(0, record)
    notes = list(dict.fromkeys(note for record in records for note in record["notes"]))
    notes += targets.all_linear_notes(skeleton, {arm: recipe.resolved(arm).links for arm in recipe.arms})
    for note in notes:
        terminal.warn(note)
    return {
        "bases": records,
        "ways": asdict(slowest([Ways(**record["ways"]) for record in records])),
        "shared": targets.shared_matrices(skeleton),
        "notes": notes,
    }, ready

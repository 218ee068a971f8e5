"""A link attached to the model on the meta device, by the code that trains it, and its passes on shapes alone.

It takes a few tenths of a second for each kind of link, so what was found is kept in cola's cache folder.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from cola.files import cache_dir, digest, load_json, write_text
from cola.link import adapters
from cola.link.base import shape_of
from cola.link.targets import target_names
from cola.measure.cost import SHAPELESS
from cola.plan.memory import Looked, Weights, weights_of
from cola.plan.passes import LARGE, PHASES, Seen, Shape, Work, scoring_pass, training_pass
from cola.recipe.methods import Lora, Settings
from cola.recipe.resolved import BaseFormat

VERSION = 3  # part of the name of what is kept: raise it when a pass is looked at otherwise


@dataclass(frozen=True)
class Asked:
    """What is looked at of a link."""

    settings: Settings | None  # None: the base alone
    base: BaseFormat
    training: Shape | None  # of its heaviest pass
    checkpointing: bool
    accumulating: bool  # whether a step has several passes
    scoring: Mapping[str, Shape]  # of the heaviest passes without gradients
    cached: bool  # whether answers go on from keys and values

    def name(self, skeleton: PreTrainedModel) -> str:
        """What all of it hashes to."""
        said = {} if self.settings is None else self.settings.record()
        # A dropout keeps what it took out; what else changes no shape is left out.
        settings = {k: v for k, v in said.items() if k not in SHAPELESS - {"dropout"}}
        about = [repr(skeleton.config.to_dict()), type(skeleton).__module__, torch.__version__, VERSION]
        shapes = {name: asdict(shape) for name, shape in self.scoring.items()}
        asked = [settings, list(self.base), None if self.training is None else asdict(self.training), shapes]
        return digest([*about, *asked, self.checkpointing, self.accumulating, self.cached])


def look(skeleton: PreTrainedModel, asked: Asked) -> Looked:
    """What a link takes, from the cache where it was looked at before.

    Raises:
        ModelError: it cannot be attached to the model.
    """
    if asked.settings is None:  # nothing is trained, however that would be done
        asked = replace(asked, training=None, checkpointing=False, accumulating=False)
    note = cache_dir() / "plan" / f"{asked.name(skeleton)}.json"
    try:
        return _read(load_json(note))
    except (OSError, ValueError, KeyError, TypeError):
        found = _look(skeleton, asked)
    write_text(note, json.dumps(_written(found)))
    return found


def _look(skeleton: PreTrainedModel, asked: Asked) -> Looked:
    kind = getattr(torch, asked.base.dtype)
    model, settings = copy.deepcopy(skeleton), asked.settings
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind)
    model.requires_grad_(False)
    matrices = []
    if isinstance(settings, Lora):
        matrices = [n_out * n_in for n_out, n_in in _shapes(model, settings)]
    if settings is not None:
        with torch.device("meta"):
            model = adapters.attach(model, settings, 0)
    trained = adapters.trainable(model)
    training = None
    if asked.training is not None and settings is not None:
        how = {"checkpointing": asked.checkpointing, "accumulating": asked.accumulating}
        training = training_pass(model, asked.training, dtype=getattr(torch, asked.base.dtype), **how)
    if settings is not None and (settings.is_pair or settings.is_whole):
        # What is tied is scored as the base is; a pair that stays beside a weight adds next to nothing to its pass.
        scoring = look(skeleton, replace(asked, settings=None)).scoring
    else:
        scoring = {
            name: scoring_pass(model, shape, dtype=getattr(torch, asked.base.dtype), cached=asked.cached)
            for name, shape in asked.scoring.items()
        }
    return Looked(
        sum(parameter.numel() for parameter in trained),
        len(trained),
        weights_of(model, asked.base.quantization),
        training,
        scoring,
        sum(matrices),
        max(matrices, default=0),
        sum(size for p in trained if (size := p.numel() * 4) >= LARGE),
    )


def _shapes(model: PreTrainedModel, settings: Lora) -> list[tuple[int, int]]:
    return [shape_of(model, name) for name in target_names(model, settings.target_modules)]


def _written(found: Looked) -> dict[str, Any]:
    def of(seen: Seen | None) -> Any:
        if seen is None:
            return None
        work = asdict(seen.work) | {"products": [[*product, times] for product, times in seen.work.products.items()]}
        return {"phases": seen.phases, "work": work, "small": seen.small, "large": seen.large}

    rest = {key: value for key, value in vars(found).items() if key not in ("weights", "training", "scoring")}
    scoring = {name: of(seen) for name, seen in found.scoring.items()}
    return {**rest, "weights": asdict(found.weights), "training": of(found.training), "scoring": scoring}


def _read(said: dict[str, Any]) -> Looked:
    def of(record: Any) -> Seen | None:
        if record is None:
            return None
        products = {(m, k, n, dtype): times for m, k, n, dtype, times in record["work"]["products"]}
        phases = {phase: record["phases"][phase] for phase in PHASES}
        return Seen(phases, Work(**record["work"] | {"products": products}), record["small"], record["large"])

    scoring = {name: seen for name, record in said["scoring"].items() if (seen := of(record)) is not None}
    parts = {"weights": Weights(**said["weights"]), "training": of(said["training"]), "scoring": scoring}
    return Looked(**said | parts)

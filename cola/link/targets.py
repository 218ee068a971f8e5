"""Which matrices get a pair, which cannot, and which are left out."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cola.errors import ModelError, listed, nearest, quoted
from cola.link.base import shape_of
from cola.link.text_part import in_text, outside_text
from cola.recipe.methods import Lora, Settings, Targets

# Layers that fused kernels pass over, reading the matrix without calling them: PEFT refuses a pair there
# (peft.tuners.tuners_utils._check_lora_target_modules_mamba).
FUSED_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
FUSED_LAYERS = {"out_proj", "conv1d"}


def target_names(model: PreTrainedModel, target_modules: Targets) -> list[str]:
    """Full names of the linear modules of the text part that target_modules means, in the model's order. Raises
    ModelError for a name that matches none (the message lists what the model has), and for a matrix that other modules
    share, such as a tied head."""
    head, tied, outside = model.get_output_embeddings(), model.get_input_embeddings(), outside_text(model)
    every = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    linear = {name: module for name, module in every.items() if in_text(name, outside)}
    shared = {name: names for names in shared_matrices(model) for name in names}
    fused = FUSED_LAYERS if model.config.model_type in FUSED_MODELS else set()
    bypassed = {name for name in linear if name.rpartition(".")[2] in fused}
    if target_modules == "all-linear":
        if own := [name for name in hidden_linear(model) if name not in bypassed]:
            return own
        raise ModelError("target_modules: all-linear means no layer of this model: " + left_out_note(model, []))
    chosen = []
    for target in target_modules:
        matches = [name for name in linear if _means(target, name)]
        if not matches:
            raise ModelError(f"target_modules: {_why_no_match(model, target, every, linear)}")
        chosen += matches
    for name in chosen:
        if name in bypassed:
            raise ModelError(
                f"target_modules: {name}: PEFT puts no pair there, as the fused kernels of {model.config.model_type} "
                "read its matrix without calling it; leave it out"
            )
        if linear[name] is head and getattr(tied, "weight", None) is linear[name].weight:
            raise ModelError(f"target_modules: {name} shares its matrix with the input embeddings; leave it out")
        if others := [other for other in shared.get(f"{name}.weight", ()) if other != f"{name}.weight"]:
            # Two pairs would be merged into one matrix.
            raise ModelError(f"target_modules: {name} shares its matrix with {others[0]}; leave them out")
    return [name for name in linear if name in set(chosen)]


def wide_note(model: PreTrainedModel, settings: Lora) -> str | None:
    """What is said of a rank that no matrix which it adapts has."""
    widest = max(min(shape_of(model, name)) for name in target_names(model, settings.target_modules))
    if settings.rank <= widest:
        return None
    return (
        f"rank {settings.rank} is more than any matrix has that it adapts ({widest}): its pair can be no more than one "
        f"of rank {widest}, and takes more memory and time"
    )


def hidden_linear(model: PreTrainedModel) -> list[str]:
    """Full names of the linear modules of the text part but the head, and those whose matrix another module shares."""
    head, outside = model.get_output_embeddings(), outside_text(model)
    shared = {name for names in shared_matrices(model) for name in names}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and in_text(name, outside)
        and module is not head
        and f"{name}.weight" not in shared
    ]


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)


def _why_no_match(model: nn.Module, target: str, every: Iterable[str], linear: Iterable[str]) -> str:
    """What is wrong with a target that means none of the `linear` modules of the text part; `every`: of the model."""
    if beyond := next((name for name in every if _means(target, name)), None):
        return (
            f"{target!r} is in a part of the model that text does not pass through ({beyond}), so nothing would train "
            "it; leave it out"
        )
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim != 1}
    kinds = {
        name: f"a parameter of {matrix.ndim} axes ({' x '.join(map(str, matrix.shape))})"
        for name, matrix in matrices.items()
    }
    kinds |= {name: f"a {type(module).__name__}" for name, module in model.named_modules()}
    if other := next((name for name in kinds if _means(target, name)), None):
        return (
            f"{target!r} is {other}, {kinds[other]} and no linear layer, which takes no pair; leave it out, or train "
            "all weights in an arm with method: full"
        )
    names = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()})
    near = nearest(target, names)
    hint = f"did you mean {near}? " if near else ""
    return f"{quoted(target)} matches no linear layer; {hint}the model has {listed(names)}, or write all-linear"


def shared_matrices(model: nn.Module) -> list[list[str]]:
    """Matrices that several modules have, each by all its names, those of a tied head among them.

    A module that several others hold is one only where a pair put in its place is seen by all of them: where the module
    around it is the one that is shared.
    """
    names: dict[int, dict[tuple[int, str], str]] = {}
    around = dict(model.named_modules(remove_duplicate=False))
    for name, module in around.items():
        parent, _, child = name.rpartition(".")
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                names.setdefault(id(parameter), {}).setdefault((id(around[parent]), f"{child}.{key}"), f"{name}.{key}")
    return [list(places.values()) for places in names.values() if len(places) > 1]


def left_out(model: PreTrainedModel, names: Sequence[str]) -> dict[str, float]:
    """Share of the model's parameters in each kind of matrix that gets no pair where the modules `names` get one: fused
    experts, routers, convolutions, embeddings of a layer and the like. Input embeddings, output head and vectors go
    without saying."""
    total = sum(parameter.numel() for parameter in model.parameters())
    with_pair, outside = {f"{name}.weight" for name in names}, outside_text(model)
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    usual = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    shares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and in_text(name, outside) and name not in with_pair and id(parameter) not in usual:
            shares[_kind(name)] = shares.get(_kind(name), 0.0) + parameter.numel() / total
    return shares


def _kind(name: str) -> str:
    """The name of a parameter in any layer."""
    return re.sub(r"\b\d+\b", "*", name)


def left_out_note(model: PreTrainedModel, names: Sequence[str]) -> str:
    """`left_out` in a sentence; empty where there is nothing to say."""
    shared = {_kind(name) for names in shared_matrices(model) for name in names}
    told = [
        f"{kind} ({share:.2g} of the parameters{', shared by several modules' if kind in shared else ''})"
        for kind, share in sorted(left_out(model, names).items(), key=lambda item: -item[1])
    ]
    return f"no pair is put on {', '.join(told)}; method: full trains all weights" if told else ""


def all_linear_notes(skeleton: PreTrainedModel, arms: Mapping[str, Sequence[Settings]]) -> list[str]:
    """What is to be said of the arms, given by their links, that adapt all linear layers: one sentence, or none."""
    every = [
        arm
        for arm, links in arms.items()
        if any(isinstance(link, Lora) and link.target_modules == "all-linear" for link in links)
    ]
    if not every:
        return []
    note = left_out_note(skeleton, target_names(skeleton, "all-linear"))
    return [f"{', '.join(every)}: target_modules: all-linear: {note}"] if note else []

"""Which matrices get a pair, which cannot, and which are left out."""

import re
from collections.abc import Mapping, Sequence

from peft import (
    LoraConfig,
)
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cola.errors import ModelError, listed, nearest, quoted
from cola.link.text_part import in_text, outside_text
from cola.recipe.methods import Lora, Settings, Targets


def target_names(model: PreTrainedModel, target_modules: Targets) -> list[str]:
    """Full names of the linear modules of the text part that target_modules means, in the model's order.

    Raises:
        ModelError: a name that matches no linear layer (the message lists what the model has), or a matrix that other
            modules share, such as a tied head.
    """
    head, outside = model.get_output_embeddings(), outside_text(model)
    every = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    linear = {name: module for name, module in every.items() if in_text(name, outside)}
    shared = {name: names for names in shared_matrices(model) for name in names}
    if target_modules == "all-linear":
        free = [name for name, module in linear.items() if module is not head and f"{name}.weight" not in shared]
        own = [name for name in free if not _is_bypassed(model, name)]
        if not own:
            raise ModelError("target_modules: all-linear means no layer of this model: " + left_out_note(model, []))
        return own
    chosen = []
    for target in target_modules:
        matches = [name for name in linear if name == target or name.endswith("." + target)]
        if not matches:
            if beyond := next((name for name in every if name == target or name.endswith("." + target)), None):
                raise ModelError(
                    f"target_modules: {target!r} is in a part of the model that text does not pass through ({beyond}), "
                    "so nothing would train it; leave it out"
                )
            if (other := _no_place_for_a_pair(model, target)) is not None:
                raise ModelError(
                    f"target_modules: {target!r} is {other}, which takes no pair; leave it out, or train all "
                    "weights in an arm with method: full"
                )
            kinds = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()})
            near = nearest(target, kinds)
            hint = f"did you mean {near}? " if near else ""
            raise ModelError(
                f"target_modules: {quoted(target)} matches no linear layer; {hint}the model has {listed(kinds)}, "
                "or write all-linear"
            )
        chosen += matches
    tied = model.get_input_embeddings()
    for name in chosen:
        if _is_bypassed(model, name):
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


def _is_bypassed(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT refuses a pair on a layer, which a model's fused kernels would pass over."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _no_place_for_a_pair(model: nn.Module, target: str) -> str | None:
    """What a name means that is no linear layer; None where it means nothing."""

    def means(name: str) -> bool:
        return name == target or name.endswith("." + target)

    for name, parameter in model.named_parameters():
        if means(name) and parameter.ndim != 1:
            shape = " x ".join(map(str, parameter.shape))
            return f"{name}, a parameter of {parameter.ndim} axes ({shape}) and no linear layer"
    for name, module in model.named_modules():
        if means(name):
            return f"{name}, a {type(module).__name__} and no linear layer"
    return None


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
    """Share of the model's parameters in each kind of matrix that gets no pair: fused experts, routers, convolutions,
    embeddings of a layer and the like. Input embeddings, output head and vectors go without saying.

    Args:
        model: Weights are not needed.
        names: Modules that get a pair.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    with_pair = {f"{name}.weight" for name in names}
    usual = {
        id(weight)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        if part is not None
        for weight in part.parameters()
    }
    outside = outside_text(model)
    shares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if not in_text(name, outside):
            continue
        if parameter.ndim > 1 and name not in with_pair and id(parameter) not in usual:
            kind = re.sub(r"\b\d+\b", "*", name)
            shares[kind] = shares.get(kind, 0.0) + parameter.numel() / total
    return shares


def left_out_note(model: PreTrainedModel, names: Sequence[str]) -> str:
    """`left_out` in a sentence; empty where there is nothing to say."""
    shared = {name for names in shared_matrices(model) for name in names}
    kinds = {re.sub(r"\b\d+\b", "*", name) for name in shared}
    told = [
        f"{kind} ({share:.2g} of the parameters{', shared by several modules' if kind in kinds else ''})"
        for kind, share in sorted(left_out(model, names).items(), key=lambda item: -item[1])
    ]
    if not told:
        return ""
    return f"no pair is put on {', '.join(told)}; method: full trains all weights"


def all_linear_notes(skeleton: PreTrainedModel, arms: Mapping[str, Sequence[Settings]]) -> list[str]:
    """What is to be said of the arms, given by the links of each, that adapt all linear layers: one sentence, or
    none."""
    every = [
        arm
        for arm, links in arms.items()
        if any(isinstance(link, Lora) and link.target_modules == "all-linear" for link in links)
    ]
    if not every:
        return []
    note = left_out_note(skeleton, target_names(skeleton, "all-linear"))
    return [f"{', '.join(every)}: target_modules: all-linear: {note}"] if note else []

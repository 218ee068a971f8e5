"""Attach, read, detach, save and load a link's trainable weights. The only file that imports peft."""

import difflib
import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cola.errors import ModelError
from cola.plan import Link
from cola.recipe import OneLink
from cola.residual import LinkWeights, Pair, weight_of

ADAPTER = "default"


def attach(model: PreTrainedModel, link: Link) -> None:
    """Give the model the weights that the link trains, in place; everything else is frozen.

    A low-rank pair is drawn from the link's own seed (A Kaiming-uniform, B zero: PEFT's default), whatever state
    the global generator is in, and kept in float32. Method `full` makes all weights trainable, in float32.

    Raises:
        ModelError: target_modules match nothing, or a matrix that is shared with another module.
    """
    if link.method == "full":
        model.float()
        model.requires_grad_(True)
        return
    names = target_names(model, link)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(link.seed)
        # PEFT sets fan_in_fan_out by itself for Conv1D and warns that it did.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        inject_adapter_in_model(_lora_config(link, names), model, ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            # PEFT makes the pair in the base's dtype; in bfloat16 an AdamW update is mostly rounded away.
            parameter.data = parameter.data.float()


def _lora_config(link: Link, names: list[str]) -> LoraConfig:
    assert link.rank is not None
    assert link.alpha is not None
    return LoraConfig(
        r=link.rank,
        lora_alpha=link.alpha,  # pyright: ignore[reportArgumentType] - PEFT types it int and computes with floats
        lora_dropout=link.dropout,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
    )


def target_names(model: PreTrainedModel, link: Link | OneLink) -> list[str]:
    """Full names of the linear modules that the link's target_modules mean, in the model's order.

    Raises:
        ModelError: a name that matches no linear layer (the message lists what the model has), or a tied head.
    """
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if link.target_modules == "all-linear":
        return [name for name, module in linear.items() if module is not head]
    assert isinstance(link.target_modules, tuple | list)
    found = []
    for target in link.target_modules:
        matches = [name for name in linear if name == target or name.endswith("." + target)]
        if not matches:
            kinds = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()})
            near = difflib.get_close_matches(target, kinds, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ModelError(
                f"target_modules: {target!r} matches no linear layer; {hint}the model has {', '.join(kinds)}, "
                "or write all-linear"
            )
        found += matches
    tied = model.get_input_embeddings()
    for name in found:
        if linear[name] is head and getattr(tied, "weight", None) is linear[name].weight:
            raise ModelError(f"target_modules: {name} shares its matrix with the input embeddings; leave it out")
    return [name for name in linear if name in set(found)]


def count_parameters(model: PreTrainedModel, link: Link | OneLink) -> int:
    """Parameters that a link trains, from shapes alone (a model on the meta device will do)."""
    if link.method == "full":
        return sum(parameter.numel() for parameter in model.parameters())
    assert link.rank is not None
    return sum(link.rank * sum(weight_of(model, name).shape) for name in target_names(model, link))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a link trains, in the model's order, a shared one once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_pair(model: nn.Module) -> LinkWeights:
    """A float32 CPU copy of the attached pair; empty where nothing low-rank is attached."""
    return {
        name: Pair(
            A_RI=weight_of(layer.lora_A, ADAPTER).to("cpu", torch.float32, copy=True),
            B_OR=weight_of(layer.lora_B, ADAPTER).to("cpu", torch.float32, copy=True),
            scale=float(layer.scaling[ADAPTER]),
        )
        for name, layer in _lora_layers(model)
    }


def detach(model: nn.Module) -> LinkWeights:
    """Take the pair off again, in place, and return it: the model is as it was before `attach`."""
    pair = read_pair(model)
    for name, layer in _lora_layers(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(False)
    return pair


def _lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def save_pair(folder: Path, model: PreTrainedModel, pair: LinkWeights, link: Link, base_name: str) -> None:
    """Write a link as a standard PEFT adapter: `PeftModel.from_pretrained(model, folder)` loads it.

    A link adapts the model as it was when the link began, which is the base plus the links before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, factors in pair.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = factors.A_RI.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.B_OR.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _lora_config(link, _target_modules(model, list(pair)))
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.fan_in_fan_out = any(isinstance(model.get_submodule(name), Conv1D) for name in pair)
    config.save_pretrained(str(folder))


def load_pair(folder: Path) -> LinkWeights:
    """Read back what `save_pair` wrote."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    return {
        name: Pair(
            A_RI=tensors[f"base_model.model.{name}.lora_A.weight"],
            B_OR=tensors[f"base_model.model.{name}.lora_B.weight"],
            scale=config["lora_alpha"] / config["r"],
        )
        for name in names
    }


@torch.no_grad()
def set_pair(model: nn.Module, pair: LinkWeights) -> None:
    """Give the attached pair these weights."""
    for name, layer in _lora_layers(model):
        weight_of(layer.lora_A, ADAPTER).copy_(pair[name].A_RI)
        weight_of(layer.lora_B, ADAPTER).copy_(pair[name].B_OR)


def _target_modules(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Last parts (`q_proj`) as other tools write them, where they mean these modules and no others; else the names."""
    short = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if meant == set(names) else sorted(names)

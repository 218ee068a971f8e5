"""Attach, read and detach a link's trainable weights; `adapter_files` writes and reads them."""

import copy
import json
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cola.errors import ModelError
from cola.link import bottleneck
from cola.link.base import as_stored, shape_of, weight_of
from cola.link.from_peft import (
    LoraConfig,
    LoraLayer,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    codes_unseen,
    get_peft_model,
    inject_adapter_in_model,
)
from cola.link.residual import LinkWeights, Pair
from cola.link.targets import target_names
from cola.link.text_part import outside_text, text_config
from cola.recipe.methods import Adapter, Full, Lora, Prefix, PromptTuning, PTuning, Settings, VirtualTokens

ADAPTER = "default"
# transformers' generate hands positions over, and PEFT leaves them to the model, every time with a warning.
warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")

PROMPTS = {Prefix: PrefixTuningConfig, PTuning: PromptEncoderConfig, PromptTuning: PromptTuningConfig}


def attach(model: PreTrainedModel, settings: Settings, seed: int) -> PreTrainedModel:
    """Give the model the weights that a link trains; everything else is frozen. The model to go on with is the same, or
    in PEFT's wrapper where virtual tokens come before its rows.

    They are drawn from the link's own seed, whatever state the global generator is in, and kept in float32. A low-rank
    pair, DoRA's row lengths and bottleneck adapters leave the function as it is; virtual tokens do not.

    Raises:
        ModelError: target_modules match nothing, or a matrix that is shared with another module, or the model has no
            place for what the method adds.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # which PEFT 0.21 asks for
        match settings:
            case Full():
                model.float().requires_grad_(True)
                parts = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
                outside = [model.get_submodule(name) for name in outside_text(model)]
                for module in (*outside, *(parts[part] for part in settings.freeze)):
                    module.requires_grad_(False)
                return model
            case Lora():
                # PEFT sets fan_in_fan_out by itself for Conv1D and warns that it did.
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
                names = target_names(model, settings.target_modules)
                with codes_unseen():
                    inject_adapter_in_model(_lora_config(settings, names), model, ADAPTER)
            case Adapter():
                bottleneck.attach(model, settings)
            case VirtualTokens():
                model = _with_virtual_tokens(model, settings)
    for name, parameter in model.named_parameters():
        mine = is_trained(name)
        parameter.requires_grad_(mine)
        if mine:
            # PEFT makes its weights in the base's dtype; in bfloat16 an AdamW update is mostly rounded away.
            parameter.data = parameter.data.float()
    return model


def is_trained(name: str) -> bool:
    """Whether a parameter is what a link has added to the model."""
    return any(part in name for part in ("lora_", f".{bottleneck.NAME}.", "prompt_encoder."))


def _lora_config(settings: Lora, names: list[str] | str) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType] - PEFT types it int and computes with floats
        lora_dropout=settings.dropout,
        target_modules=names,
        init_lora_weights="gaussian" if settings.init.name == "gaussian" else True,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def peft_config(settings: Settings) -> dict[str, Any] | None:
    """How PEFT is asked for what a link trains, as JSON; None for what it does not have: all weights, bottlenecks.
    `init_lora_weights` is null where cola draws the pair in a way of its own."""
    match settings:
        case Lora():
            targets = settings.target_modules
            config = _lora_config(settings, targets if isinstance(targets, str) else list(targets)).to_dict()
            if settings.init not in ("default", "gaussian"):
                config["init_lora_weights"] = None
        case VirtualTokens():
            said = {key: value for key, value in settings.record().items() if key != "method"}
            config = PROMPTS[type(settings)](task_type="CAUSAL_LM", **said).to_dict()
        case _:
            return None
    return json.loads(json.dumps(config, default=sorted))  # PEFT has sets


def _with_virtual_tokens(model: PreTrainedModel, settings: VirtualTokens) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        return model
    config = settings.model_dump(exclude={"optimizer"})
    if isinstance(settings, Prefix | PTuning):
        config["encoder_hidden_size"] = settings.encoder_hidden_size or text_config(model).hidden_size
    try:
        wrapped = get_peft_model(model, PROMPTS[type(settings)](task_type="CAUSAL_LM", **config), ADAPTER)
    except (ValueError, AttributeError, KeyError) as error:
        raise ModelError(f"method {settings.method}: PEFT cannot add virtual tokens to this model: {error}") from error
    return wrapped  # pyright: ignore[reportReturnType] - it stands for the model wherever one is called


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model without PEFT's wrapper, which would put its virtual tokens before what is read next."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # pyright: ignore[reportReturnType]


def virtual_tokens(model: PreTrainedModel) -> int:
    """Virtual tokens that PEFT's wrapper puts before a row."""
    return getattr(model.active_peft_config, "num_virtual_tokens", None) or 0 if isinstance(model, PeftModel) else 0


def count_parameters(skeleton: PreTrainedModel, settings: Settings) -> int:
    """Parameters that a link trains, a shared one once, from the model on the meta device."""
    if isinstance(settings, Lora):  # by the shapes: it takes PEFT most of a second to put pairs into a small model
        shapes = [shape_of(skeleton, name) for name in target_names(skeleton, settings.target_modules)]
        return sum(settings.rank * (n_out + n_in) + settings.use_dora * n_out for n_out, n_in in shapes)
    attached = attach(copy.deepcopy(skeleton), settings, 0)
    return sum(parameter.numel() for parameter in trainable(attached))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a link trains, in the model's order, a shared one once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def pair_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The modules that carry the attached pair, by the name of the linear module they stand for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def read_pair(model: nn.Module) -> LinkWeights:
    """A float32 CPU copy of the attached pair; empty where nothing low-rank is attached."""
    return {name: _read(layer) for name, layer in pair_layers(model).items()}


@torch.no_grad()
def _read(layer: LoraLayer) -> Pair:
    A_RI, B_OR = factors_of(layer)
    scale = scale_of(layer)
    pair = Pair(A_RI.to("cpu", torch.float32, copy=True), B_OR.to("cpu", torch.float32, copy=True), scale)
    if ADAPTER in layer.lora_magnitude_vector:
        base: Any = layer.get_base_layer()
        weight_OI = as_stored(base, base.weight.detach())
        length_O = (weight_OI + (scale * B_OR @ A_RI).to(weight_OI.dtype)).norm(dim=1)  # as PEFT's DoRA takes it
        magnitude_O = weight_of(layer.lora_magnitude_vector, ADAPTER)
        rows_O = (magnitude_O / length_O).float().cpu()
        pair = replace(pair, rows_O=rows_O, magnitude_O=magnitude_O.float().cpu().clone())
    taken = getattr(layer, "taken_out", None)
    return pair if taken is None else pair.without(taken)


def scale_of(layer: LoraLayer) -> float:
    """alpha / rank of an attached pair, or what rsLoRA makes of it."""
    return float(layer.scaling[ADAPTER])


def parameters_of(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of an attached pair, as they are trained."""
    A_RI, B_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    assert isinstance(A_RI, nn.Parameter)
    assert isinstance(B_OR, nn.Parameter)
    return A_RI, B_OR


def parameter_names(module: str) -> tuple[str, str]:
    """What the model calls A and B of the pair that is attached to a module."""
    return f"{module}.lora_A.{ADAPTER}.weight", f"{module}.lora_B.{ADAPTER}.weight"


def factors_of(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A and B of an attached pair, to be read or written."""
    return weight_of(layer.lora_A, ADAPTER), weight_of(layer.lora_B, ADAPTER)


def detach(model: PreTrainedModel) -> LinkWeights:
    """Freeze what was trained. A low-rank pair is taken off, in place, and returned: without it the model is as it was
    before `attach`. What no pair stands for stays where it is, and nothing is returned."""
    pair = read_pair(model)
    for name, layer in pair_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if pair and hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(False)
    return pair


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All that a folder of the whole model must hold: its parameters, a shared one once, and the buffers that belong to
    its state, such as the bias by which a router spreads its tokens."""
    return dict(model.named_parameters()) | {name: model.get_buffer(name) for name in kept_buffers(model)}


def kept_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that belong to a model's state; the others are computed from its config."""
    state = model.state_dict()
    return [name for name, _ in model.named_buffers() if name in state]


@torch.no_grad()
def set_pair(model: nn.Module, pair: LinkWeights) -> None:
    """Give the attached pair these weights."""
    for name, layer in pair_layers(model).items():
        A_RI, B_OR = factors_of(layer)
        own, taken = pair[name].split(len(A_RI))
        A_RI.copy_(own.A_RI)
        B_OR.copy_(own.B_OR)
        if own.magnitude_O is not None:
            weight_of(layer.lora_magnitude_vector, ADAPTER).copy_(own.magnitude_O)
        if taken is not None:
            take_out(layer, taken)


def take_out(layer: LoraLayer, pair: Pair) -> None:
    """Note a pair that was taken out of the frozen weight of a layer when its own was drawn (PiSSA)."""
    layer.taken_out = pair  # pyright: ignore[reportAttributeAccessIssue]


def taken_out(model: nn.Module) -> LinkWeights:
    """What was taken out of the frozen weights, as a residual to be added to them."""
    taken = {name: getattr(layer, "taken_out", None) for name, layer in pair_layers(model).items()}
    return {name: pair.negated() for name, pair in taken.items() if pair is not None}

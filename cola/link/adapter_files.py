"""What a link trains, as files: standard PEFT adapters, Hugging Face folders; any PEFT adapter onto a model."""

import json
import warnings
from pathlib import Path
from statistics import mode

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cola.errors import ModelError, one_line
from cola.link import adapters
from cola.link.from_peft import LoraConfig, PeftModel, get_peft_model_state_dict
from cola.link.residual import LinkWeights, Pair
from cola.recipe.methods import Lora, Settings

PREFIX = "base_model.model."  # of a module's name in an adapter's file


def save(folder: Path, model: PreTrainedModel, settings: Settings, base_name: str, skeleton: PreTrainedModel) -> None:
    """Write what a link trains; `put_back` reads it. A pair is a standard PEFT adapter, for the model as it was when
    the link began; all weights are a Hugging Face folder; virtual tokens have PEFT's folder beside them."""
    if isinstance(settings, Lora):
        # With what was taken out of the weight beside it (PiSSA) the pair is a plain one of twice the rank.
        save_pair(folder, adapters.read_pair(model), base_name, skeleton, settings.dropout)
        return
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _kept(model, settings).items()}
    save_file(weights, folder / settings.file, metadata={"format": "pt"})
    if settings.is_whole:
        model.config.save_pretrained(folder)
    elif isinstance(model, PeftModel):
        model.peft_config[adapters.ADAPTER].base_model_name_or_path = base_name
        # "auto" would look on the hub for whether the embeddings were resized.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's is an empty form
    else:
        shape = settings.record() | {"base": base_name}
        (folder / "bottleneck.json").write_text(json.dumps(shape, indent=1) + "\n", encoding="utf-8")


def _kept(model: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """What the file of a link that leaves no pair holds."""
    if settings.is_whole:
        return adapters.whole_state(model)
    return {name: parameter for name, parameter in model.named_parameters() if adapters.is_trained(name)}


def save_pair(folder: Path, pair: LinkWeights, base_name: str, skeleton: PreTrainedModel, dropout: float = 0.0) -> None:
    """Write a standard PEFT LoRA that adds these pairs, whatever rank and scale each of them has. Beside DoRA's lengths
    of rows, `rows.safetensors` holds the factors that they came to.

    Args:
        base_name: What the adapter's config calls the base.
        skeleton: Knows the modules.
        dropout: What the pair was trained with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, rows = {}, {}
    for name, factors in pair.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.A_RI.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.B_OR.contiguous()
        if factors.rows_O is not None and factors.magnitude_O is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = factors.magnitude_O.contiguous()
            rows[name] = factors.rows_O.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if rows:
        save_file(rows, folder / "rows.safetensors", metadata={"format": "pt"})
    ranks = {name: len(factors.A_RI) for name, factors in pair.items()}
    alphas = {name: factors.scale * ranks[name] for name, factors in pair.items()}  # alpha / rank, from whichever rule
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - PEFT types it int and computes with floats
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
        lora_dropout=dropout,
        use_dora=bool(rows),
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_name,
        fan_in_fan_out=any(isinstance(skeleton.get_submodule(name), Conv1D) for name in pair),
    )
    # PEFT makes a set of them, and writes that in an order of its own in each process.
    config.target_modules = _target_modules(skeleton, list(pair))
    config.save_pretrained(str(folder))


def _target_modules(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Last parts (`q_proj`) as other tools write them, where they mean these modules and no others; else the names."""
    short = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if meant == set(names) else sorted(names)


def is_export(file: str) -> bool:
    """Whether a file that `save` wrote is of use outside the store."""
    return file.startswith(("adapter_", "rows", "model", "config", "bottleneck"))


def load_pair(folder: Path) -> LinkWeights:
    """Read back a low-rank pair that `save` wrote."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    rows = load_file(folder / "rows.safetensors") if config["use_dora"] else {}
    pairs = {}
    for key in [key for key in tensors if "lora_A" in key]:
        module = key.removesuffix(".lora_A.weight")
        name, A_RI, B_OR = module.removeprefix(PREFIX), tensors[key], tensors[f"{module}.lora_B.weight"]
        scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / len(A_RI)
        pairs[name] = Pair(A_RI, B_OR, scale, rows.get(name), tensors.get(f"{module}.lora_magnitude_vector"))
    return pairs


def load_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with any PEFT adapter on it, for scoring: one of cola's exports or a foreign one. Raises ModelError where
    that has no safetensors weights, or does not fit the model."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(
            f"{folder} has no adapter_model.safetensors; pickled weights (.bin) can run code and are not read"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing weights, which are looked for below
            loaded = PeftModel.from_pretrained(model, str(folder))
        with safe_open(file, framework="pt") as opened:
            stored = set(opened.keys())
    except (ValueError, KeyError, RuntimeError, TypeError, OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter does not fit this base: {one_line(error)}") from error
    own = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    with_embeddings = get_peft_model_state_dict(loaded, save_embedding_layers=True)  # which PEFT may have stored too
    if wrong := (stored - with_embeddings.keys()) | (own.keys() - stored):
        raise ModelError(
            f"{folder}: the adapter is for another base: {len(wrong)} of its weights and the base's modules do not "
            f"match, the first is {min(wrong)}"
        )
    return loaded.eval()  # pyright: ignore[reportReturnType] - it stands for the model wherever one is called


@torch.no_grad()
def put_back(folder: Path, model: PreTrainedModel, settings: Settings) -> None:
    """Give the attached weights the values that `save` wrote."""
    if settings.is_pair:
        adapters.set_pair(model, load_pair(folder))
        return
    weights = load_file(folder / settings.file)
    for name, tensor in _kept(model, settings).items():
        tensor.copy_(weights[name])

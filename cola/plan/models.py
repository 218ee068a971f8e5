"""Which model a plan is about: its config, from this disk, from the built-in ones, or from the hub. No weights."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cola.errors import ModelError, did_you_mean, one_line
from cola.files import cache_dir, package_file, sha256, write_text
from cola.link.find import gguf_config, gguf_weights
from cola.link.model import Source
from cola.recipe.schema import Model, is_remote

FAMILY = "Qwen/Qwen1.5-"
OF_GGUF = "of a GGUF file"  # which is dequantized to float32


@dataclass(frozen=True)
class Planned:
    """A model without weights, and where its config is from."""

    source: Source
    skeleton: PreTrainedModel
    config: str  # in words
    has_weights: bool  # whether the folder of `source` holds them
    stored: int  # bytes of their files, or what these would be


def built_in() -> dict[str, dict[str, Any]]:
    """The configs of the Qwen1.5 family, by hub id, with the parameters that each is published with."""
    told = json.loads(files("cola.plan").joinpath("qwen1_5.json").read_text(encoding="utf-8"))
    return {f"{FAMILY}{size}": {**told["shared"], **own} for size, own in told["sizes"].items()}


def find_planned(model: Model, network: bool) -> Planned | None:
    """The model that a recipe names, without weights. None where it is on the hub, no built-in one, and the network is
    not to be used. Raises ModelError where it is not there, or no causal language model that transformers knows."""
    name = model.name_or_path
    if (sizes := built_in().get(name.removesuffix("-Chat"))) is not None and not Path(name).exists():
        sizes = {key: value for key, value in sizes.items() if key != "published_parameters"}
        return _of_config(model, json.dumps(sizes), "built in")
    path = Path(name).expanduser()
    if name.startswith("package://"):
        path = package_file(name)
    elif is_remote(name) and path.suffix != ".json":
        return _of_config(model, _from_hub(model), "from the hub") if network else None
    if not path.exists():
        raise ModelError(f"model.name_or_path: {name}: no such {'file' if path.suffix else 'folder'}")
    if path.suffix == ".json" and path.is_file():
        return _of_config(model, path.read_text(encoding="utf-8"), "a config.json on this disk")
    if path.is_file():
        weights = gguf_weights(path)
        source = Source(name, weights or gguf_config(path), model.trust_remote_code)
        return _planned(source, OF_GGUF, weights is not None)
    if not (path / "config.json").is_file():
        raise ModelError(f"model.name_or_path: {name} is no Hugging Face model folder: it has no config.json")
    source = Source(name, path.resolve(), model.trust_remote_code)
    return _planned(source, "on this disk", any(source.folder.glob("*.safetensors")))


def _from_hub(model: Model) -> str:
    from huggingface_hub import hf_hub_download

    name = model.name_or_path
    try:
        file = hf_hub_download(name, "config.json", revision=model.revision)
        return Path(file).read_text(encoding="utf-8")
    # The hub client, its http library and its cache raise errors without a common base.
    except Exception as error:
        raise ModelError(
            f"model.name_or_path: {name}: no such folder here, the hub did not give its config.json "
            f"({type(error).__name__}: {one_line(error, 120)}), and it is not built in: those are "
            f"{', '.join(built_in())}{did_you_mean(name, built_in())}. A folder with a config.json, or that "
            "file, is enough for a plan"
        ) from None


def _of_config(model: Model, text: str, where: str) -> Planned:
    """A model of a config.json's text, which is laid where transformers reads one."""
    folder = cache_dir() / "configs" / f"plan-{sha256(text)[:16]}"
    if not (folder / "config.json").is_file():
        write_text(folder / "config.json", text)
    return _planned(Source(model.name_or_path, folder, model.trust_remote_code), where, False)


def _planned(source: Source, where: str, has_weights: bool) -> Planned:
    try:
        skeleton = source.skeleton()
    except ModelError:
        raise
    # transformers raises what it likes at a config that it does not know, or that is none.
    except Exception as error:
        known = "transformers knows no such architecture" if "does not recognize" in str(error) else one_line(error)
        raise ModelError(
            f"model.name_or_path: {source.name}: {known}{_kind(source.folder)}; what is known are the causal language "
            "models of transformers (model_type qwen2, llama, mistral, gemma2, gpt2 and others): give a config.json of "
            "one of them"
        ) from None
    if has_weights:
        stored = sum(file.stat().st_size for file in source.files)
    else:
        kind = torch.float32 if where == OF_GGUF else getattr(skeleton.config, "dtype", None) or torch.float32
        stored = skeleton.num_parameters() * kind.itemsize
    return Planned(source, skeleton, where, has_weights, stored)


def _kind(folder: Path) -> str:
    try:
        return f" (model_type {json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('model_type')!r})"
    except (ValueError, AttributeError):
        return " (its config.json is no JSON object)"

"""A GGUF file as a safetensors folder in float32, with all that its header says about the model's function.

transformers' conversion takes the keys that it knows and passes over the rest, and over tensors that its model has no
place for, without a word: rope scaling, soft caps, sliding windows. Here each key and tensor of a file is carried over,
says what holds anyway, or stops the conversion by name.
"""

import contextlib
import io
import json
from collections import UserDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.utils.quantization_config import GgufConfig

from cola.errors import ModelError

VERSION = 2  # part of a converted folder's name: raise it when the same file must become another model

# What llama.cpp calls a thing (gguf's constants.py), and what a config of transformers calls it.
SAME = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
}
# Values that say nothing: what any model of its class does.
NOTHING = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "attention.shared_kv_layers": 0,
    "attention.sliding_window": 0,
    "nextn_predict_layers": 0,
}
# Sizes that the tensors' shapes have already confirmed, and notes about how the file was made.
ABOUT = {"vocab_size", "tensor_data_layout", "attention.max_alibi_bias"}
FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
HEADS_OF = {"gemma2": 46, "gemma3_text": 62}  # layers of the one size that llama.cpp scales attention otherwise in


def convert(file: Path, folder: Path) -> None:
    """Write the file's model and tokenizer as a Hugging Face folder. Raises ModelError where something that the file
    says cannot be carried over, and what transformers, gguf and tokenizers like where they cannot read it."""
    config = read_config(file)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that transformers' own switch leaves on
        model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if faulty := sorted(map(str, info[kind])):
            raise ModelError(f"{len(faulty)} {kind.replace('_', ' ')} in its tensors, the first is {faulty[0]:.80}")
    model.save_pretrained(folder)
    write_tokenizer(file, folder)


def write_tokenizer(file: Path, folder: Path) -> None:
    """Write the file's tokenizer, and the tokens that end an answer into the generation config, where that lacks some.
    Raises what transformers, gguf and tokenizers like where they cannot read it."""
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    ends = end_tokens(file)
    note = folder / "generation_config.json"
    if len(ends) > 1 or (ends and not note.is_file()):
        generation = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        note.write_text(json.dumps(generation | {"eos_token_id": ends}, indent=2) + "\n")


def read_config(file: Path) -> PreTrainedConfig:
    """The config of the file's model, from its header; no weight is read. Raises as `convert`."""
    reader = GGUFReader(file)
    said, tensors = _header(reader), {tensor.name: tensor for tensor in reader.tensors}
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    factors = {
        name: dequantize(tensors[name].data, tensors[name].tensor_type).flatten().tolist()
        for name in FACTORS
        if name in tensors
    }
    carry_over(config, said, list(tensors), factors)
    _check_places(config, said["general.architecture"], tensors.keys() - set(FACTORS))
    return config


def _header(reader: GGUFReader) -> dict[str, Any]:
    """What a file says, without its vocabulary."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.tok")}


def end_tokens(file: Path) -> list[int]:
    """The tokens that end an answer by the file's header. Raises OSError or ValueError where it is no GGUF file."""
    said = _header(GGUFReader(file))
    kinds = ("eos", "eot", "eom")  # end of text, of a turn, of a message
    return list(dict.fromkeys(said[key] for kind in kinds if (key := f"tokenizer.ggml.{kind}_token_id") in said))


def carry_over(
    config: PreTrainedConfig, said: dict[str, Any], tensors: Iterable[str], factors: dict[str, list[float]]
) -> None:
    """Put into a config, made by transformers' conversion, what that has passed over of the header, `said`, and of the
    tensors; `factors`: those of them that divide rotary frequencies. Raises ModelError where a key has no place in this
    kind of model."""
    architecture = said["general.architecture"]
    own = {key.removeprefix(f"{architecture}."): value for key, value in said.items() if key.startswith(architecture)}
    taken = _taken(architecture, said, tensors, str(config.model_type))
    if (eos := said.get("tokenizer.ggml.eos_token_id")) is not None:
        config.eos_token_id = eos  # else the class's default, whatever token that is here
    if (config.pad_token_id or 0) >= config.vocab_size:
        config.pad_token_id = None  # likewise, of a larger vocabulary
    if hasattr(config, "attention_bias") and any(name.endswith("attn_q.bias") for name in tensors):
        config.attention_bias = True
    if config.model_type in HEADS_OF:
        whole = config.num_hidden_layers == HEADS_OF[config.model_type]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if whole else config.head_dim
    _carry_rope(config, own, factors, architecture)
    for key, value in own.items():
        if key in taken or key in ABOUT or key.startswith("rope.") or (key in NOTHING and value == NOTHING[key]):
            continue
        if key in ("attention.key_length", "attention.value_length") and value == _head_size(config):
            continue
        if key == "attention.sliding_window" and value >= config.max_position_embeddings:
            continue
        if key == "attention.sliding_window_pattern" and hasattr(config, "layer_types"):
            # For each layer whether it slides, or every how many layers one does not.
            layers = range(config.num_hidden_layers)
            slides = value if isinstance(value, list) else [bool((layer + 1) % value) for layer in layers]
            config.layer_types = ["sliding_attention" if slide else "full_attention" for slide in slides]
            continue
        name = SAME.get(key)
        if name is None or not hasattr(config, name) or not _slides(config, name):
            raise _refusal(f"{architecture}.{key} = {value!r:.80}", config)
        setattr(config, name, value)


def _taken(architecture: str, said: dict[str, Any], tensors: Iterable[str], model_type: str) -> set[str]:
    """The keys of the header that transformers' own conversion makes use of."""
    if architecture not in GGUF_CONFIG_ARCHS:
        mapping = GGUF_CONFIG_MAPPING.get(model_type.removesuffix("_text")) or GGUF_CONFIG_MAPPING[architecture]
        return {key for key, name in mapping.items() if name is not None}
    seen = _Seen(said | {"tokenizer.ggml.tokens": 0})
    get_gguf_config(seen, tuple(tensors))  # pyright: ignore[reportArgumentType] - all that it takes of a dict
    return {key.removeprefix(f"{architecture}.") for key in seen.asked}


class _Seen(UserDict):
    """Notes which keys were asked for."""

    def __init__(self, said: dict[str, Any]) -> None:
        super().__init__(said)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def _refusal(fact: str, config: PreTrainedConfig) -> ModelError:
    return ModelError(
        f"the file has {fact}, for which transformers' {config.model_type} has no place, and without it the model is "
        "another one; give the model as a Hugging Face folder"
    )


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _slides(config: PreTrainedConfig, name: str) -> bool:
    """Whether a window that is put into the config is one that the model looks at."""
    layers = getattr(config, "layer_types", None)
    return name != "sliding_window" or layers is None or "sliding_attention" in layers


def _carry_rope(
    config: PreTrainedConfig, own: dict[str, Any], factors: dict[str, list[float]], architecture: str
) -> None:
    """Rotary positions: their base, width and scaling."""
    said = {key.removeprefix("rope."): value for key, value in own.items() if key.startswith("rope.")}
    if not said and not factors:
        return
    rope = getattr(config, "rope_parameters", None)
    sliding = rope.get("sliding_attention") if rope else None
    rope = rope.get("full_attention", rope) if rope else None  # a model may have one for each kind of layer

    def refuse(key: str) -> ModelError:
        return _refusal(f"{architecture}.rope.{key} = {said[key]!r:.80}", config)

    if rope is None:
        if key := next((key for key in said if key != "dimension_count"), None):
            raise refuse(key)
        return
    rope["rope_theta"] = float(said.pop("freq_base", rope["rope_theta"]))
    if "freq_base_swa" in said and sliding is not None:
        sliding["rope_theta"] = float(said.pop("freq_base_swa"))
    share = said["dimension_count"] / _head_size(config) if "dimension_count" in said else 1.0
    if share != rope.get("partial_rotary_factor", 1.0):
        if "partial_rotary_factor" not in rope:
            raise refuse("dimension_count")
        rope["partial_rotary_factor"] = share
    said.pop("dimension_count", None)
    said.pop("scaling.finetuned", None)
    linear, kind = said.pop("scale_linear", 1), said.pop("scaling.type", None)
    factor = said.pop("scaling.factor", linear)
    original = said.pop("scaling.original_context_length", None)
    longer = factors.get("rope_factors_long.weight") or factors.get("rope_freqs.weight")
    if longer and set(longer) != {1.0}:
        # One factor for each frequency, as transformers' longrope has them, whatever rule they came from.
        near = factors.get("rope_factors_short.weight", longer)
        attention = float(said.pop("scaling.attn_factor", 1.0))
        rope |= {"rope_type": "longrope", "long_factor": longer, "short_factor": near, "attention_factor": attention}
        rope["original_max_position_embeddings"] = original or config.max_position_embeddings
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = rope["original_max_position_embeddings"]
    elif factor not in (0, 1) and kind in (None, "linear"):
        rope |= {"rope_type": "linear", "factor": float(factor)}
    elif factor not in (0, 1) and kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": float(factor)}
        rope["original_max_position_embeddings"] = original or config.max_position_embeddings
        for key in ("beta_fast", "beta_slow"):
            if f"scaling.yarn_{key}" in said:
                rope[key] = float(said.pop(f"scaling.yarn_{key}"))
    elif kind not in (None, "none", "linear", "yarn"):
        said["scaling.type"] = kind
    neutral = {"scaling.attn_factor": 1, "scaling.yarn_attn_factor": 1, "scaling.yarn_log_multiplier": 0}
    neutral |= {"scaling.yarn_ext_factor": 1, "scaling.alpha": 0, "dimension_sections": [0, 0, 0, 0]}
    if key := next((key for key, value in said.items() if value != neutral.get(key)), None):
        raise refuse(key)


def _check_places(config: PreTrainedConfig, architecture: str, tensors: Iterable[str]) -> None:
    """transformers' older conversion passes over the tensors that its model has no place for."""
    if architecture in GGUF_CONFIG_ARCHS:
        return  # the newer one reports them
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    places = get_gguf_hf_weights_map(model, processor)
    homeless = [n for n in tensors if n not in places and n.removesuffix(".weight") not in places]
    # GPT-2's head, which the conversion places by itself, is the one tensor that is not on the map.
    if homeless := sorted(name for name in homeless if name != "output.weight"):
        raise _refusal(f"the tensor {homeless[0]:.80}", config)

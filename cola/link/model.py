"""The pretrained base on this disk: how it is loaded, and what identifies it."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cola.data.encode import Example
from cola.data.splits import Splits
from cola.errors import DataError, ModelError, one_line
from cola.files import need_package
from cola.link.checkpoint import content_digest, read_json, weight_names
from cola.link.text_part import text_config

# Encoders that AutoModelForCausalLM takes too, with attention in both directions unless is_decoder is set.
BIDIRECTIONAL = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "data2vec-text", "megatron-bert"}

TEXT_PARTS = ("text_config", "decoder", "generator")  # of a config, as transformers' get_text_config knows them


@dataclass(frozen=True)
class Source:
    """A base model on this disk."""

    name: str  # as the recipe has it
    folder: Path  # of Hugging Face's kind, with safetensors weights
    trust_remote_code: bool  # whether the folder's own Python code may run
    revision: str | None = None  # commit of a hub model

    @property
    def files(self) -> list[Path]:
        """The safetensors files of the weights, without another format's copy of them. Raises ModelError where one is
        not there, or the folder does not say which they are."""
        names = weight_names(self.folder)
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise ModelError(
                f"model.name_or_path: {self.folder} lacks {len(missing)} of the {len(names)} files of its weights, the "
                f"first is {missing[0]:.80}"
            )
        return [self.folder / name for name in names]

    @property
    def codes(self) -> str | None:
        """`nf4` or `int8` where the weights lie there quantized by bitsandbytes."""
        config = read_json(self.folder, "config.json").get("quantization_config")
        return None if config is None else "int8" if config.get("load_in_8bit") else "nf4"

    def fingerprint(self) -> str:
        """SHA-256 over config, weights and code of its own, wherever in the folder that lies."""
        code = sorted(self.folder.rglob("*.py")) if self.trust_remote_code else []
        files = [file.resolve() for file in (self.folder / "config.json", *code, *self.files)]
        with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock: shards are read side by side
            digest = hashlib.sha256("".join(pool.map(content_digest, files)).encode())
        if self.trust_remote_code:
            told = read_json(self.folder, "config.json").get("auto_map") or {}
            if any("--" in str(where) for where in told.values()):
                # Code of another repository: its modules' name, of transformers' making, holds its commit or content.
                digest.update(type(self.skeleton()).__module__.encode())
        return digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer; raises ModelError where there is none."""
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"model.name_or_path: {self.name}: no tokenizer could be loaded: {one_line(error)}"
            ) from error

    def ends(self) -> list[int]:
        """The tokens that end an answer by generation_config.json and config.json; the tokenizer may name another one.
        Raises ModelError where what they say is no token's number."""
        config, generation = (read_json(self.folder, file) for file in ("config.json", "generation_config.json"))
        parts = [config, *(part for name in TEXT_PARTS if isinstance(part := config.get(name), dict))]
        own = next((part for part in parts if part.get("eos_token_id") is not None), {})
        ends: dict[int, None] = {}
        for file, said in (("generation_config.json", generation), ("config.json", own)):
            value = said.get("eos_token_id")
            tokens = [] if value is None else value if isinstance(value, list) else [value]
            if wrong := [token for token in tokens if type(token) is not int]:
                raise ModelError(
                    f"model.name_or_path: {self.folder / file}: eos_token_id: {wrong[0]!r:.80} is no token's number; "
                    "write a whole number or a list of them"
                )
            ends |= dict.fromkeys(tokens)
        return list(ends)

    def skeleton(self) -> PreTrainedModel:
        """The model without weights (on the meta device): its modules can be looked at before anything is loaded.
        Raises ModelError where it is no causal language model."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        named = f"model.name_or_path: {self.name} ({config.model_type})"
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        # Each class of transformers makes of a config what it likes, and fails on a wrong one in its own way.
        except Exception as error:
            if "Unrecognized configuration class" in str(error):
                raise ModelError(f"{named} is no causal language model") from error
            raise ModelError(
                f"{named}: transformers cannot build the model that its config.json describes: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
        if getattr(config, "is_decoder", None) is False and config.model_type in BIDIRECTIONAL:
            raise ModelError(f"{named} reads in both directions, so it cannot predict the next token")
        return model

    def load(self, dtype: str, device: torch.device, quantization: str | None = None) -> PreTrainedModel:
        """The model in eval mode, all weights frozen. Raises ModelError where it is no causal language model, its
        weights do not load, or bitsandbytes is not there.

        Args:
            dtype: Of the weights and the computation.
            quantization: `nf4` (with double quantization) or `int8` codes for the linear layers but the output head.
        """
        quantized: dict[str, Any] = {}
        codes = quantization or self.codes
        if codes is not None:
            need_package("bitsandbytes", f"quantization: {codes}", "quantized")
            quantized["device_map"] = {"": device}
        if quantization == "int8":
            quantized["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        elif quantization == "nf4":
            quantized["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=getattr(torch, dtype),
            )
        try:
            model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                self.folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, with names
                output_loading_info=True,
                trust_remote_code=self.trust_remote_code,
                **quantized,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelError(f"model.name_or_path: {self.name} does not load: {one_line(error)}") from error
        # transformers fills what is missing with random numbers, other ones at every load.
        for kind in ("missing_keys", "mismatched_keys"):
            if faulty := sorted(map(str, info[kind])):
                raise ModelError(
                    f"model.name_or_path: the weights of {self.name} do not fit its config: {len(faulty)} "
                    f"{kind.replace('_', ' ')}, the first is {faulty[0]}"
                )
        if model.get_output_embeddings() is None:
            raise ModelError(f"model.name_or_path: {self.name} ({type(model).__name__}) has no output head")
        model.requires_grad_(False)
        for module in model.modules():
            # On CPUs with avx512_bf16, bitsandbytes repacks NF4 codes at the first look in eval mode and rounds their
            # scales to bfloat16 for good: the frozen base would be another one from then on.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportAttributeAccessIssue]
            # On CPUs, bitsandbytes multiplies by dequantized int8 codes in training mode and rounds the activations to
            # 8 bits too in eval mode: what is scored would be another function than what was trained.
            if codes == "int8" and device.type == "cpu" and hasattr(module, "state"):
                module.train = partial(_in_training_mode, module)
        # Many models come with sampling and repetition penalties of their own; here greedy decoding is the argmax.
        model.generation_config = GenerationConfig()
        return (model if quantized else model.to(device)).eval()  # pyright: ignore[reportArgumentType] - transformers wraps Module.to


def _in_training_mode(module: torch.nn.Module, _mode: bool = True) -> torch.nn.Module:
    module.training = True
    return module


def check_fit(source: Source, skeleton: PreTrainedModel, splits: Splits, n_virtual: int = 0) -> None:
    """Raise ModelError where a token is not one that the model has; and DataError where a row, after `n_virtual`
    virtual tokens, goes beyond its positions."""
    examples = [example for _, part in splits.items() for example in part]
    check_tokens(source, skeleton, examples)
    positions = getattr(text_config(skeleton), "max_position_embeddings", None)
    longest = n_virtual + max(len(e.prompt) + max(map(len, e.answers)) for e in examples)
    if positions is not None and longest > positions:
        raise DataError(
            f"data.max_length: rows of {longest} tokens are drawn"
            + (f" ({n_virtual} virtual ones among them)" if n_virtual else "")
            + f" and the model has {positions} positions; lower it"
        )


def check_tokens(source: Source, skeleton: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Raise ModelError where a token is not one that the model has."""
    n_tokens = len(skeleton.get_input_embeddings().get_parameter("weight"))
    largest = max(max(map(max, [e.prompt, *e.answers])) for e in examples)
    if largest >= n_tokens:
        raise ModelError(
            f"model.name_or_path: {source.name}: its tokenizer gives token {largest} and the model has {n_tokens}; "
            "the folder's tokenizer belongs to another model"
        )

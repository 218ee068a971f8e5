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
from cola.link.checkpoint import content_digest, end_tokens, read_json, weight_files
from cola.link.text_part import text_config

# Encoders that AutoModelForCausalLM takes too, with attention in both directions unless is_decoder is set.
BIDIRECTIONAL = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "data2vec-text", "megatron-bert"}


@dataclass(frozen=True)
class Source:
    """A base model on this disk.

    Attributes:
        name: As the recipe names it.
        folder: Hugging Face folder with safetensors weights.
        trust_remote_code: Whether the folder's own Python code may run.
        revision: Commit of a hub model.
    """

    name: str
    folder: Path
    trust_remote_code: bool
    revision: str | None = None

    @property
    def files(self) -> list[Path]:
        """The safetensors files of the weights, without another format's copy of them.

        Raises:
            ModelError: one of them is not there, or the folder does not say which they are.
        """
        return weight_files(self.folder)

    @property
    def codes(self) -> str | None:
        """`nf4` or `int8` where the weights lie there quantized by bitsandbytes."""
        config = read_json(self.folder, "config.json").get("quantization_config")
        return None if config is None else "int8" if config.get("load_in_8bit") else "nf4"

    def fingerprint(self) -> str:
        """SHA-256 over config, weights and code of its own, wherever in the folder that lies."""
        code = sorted(self.folder.rglob("*.py")) if self.trust_remote_code else []
        files = [file.resolve() for file in (self.folder / "config.json", *code, *self.files)]
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock: shards are read side by side
            for part in pool.map(content_digest, files):
                digest.update(part.encode())
        if self.trust_remote_code:
            told = read_json(self.folder, "config.json").get("auto_map") or {}
            if any("--" in str(where) for where in told.values()):
                # Code of another repository: its modules' name, of transformers' making, holds its commit or content.
                digest.update(type(self.skeleton()).__module__.encode())
        return digest.hexdigest()

    def tokenizer(self, **where: str) -> PreTrainedTokenizerBase:
        """The base's tokenizer.

        Args:
            where: `gguf_file`, where it is in a file of that kind and not yet in one of its own.

        Raises:
            ModelError: the folder has none.
        """
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code, **where)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"model.name_or_path: {self.name}: no tokenizer could be loaded: {one_line(error)}"
            ) from error

    def ends(self) -> list[int]:
        """The tokens that end an answer by the generation config and the config, beside the tokenizer's own.

        Raises:
            ModelError: what they say is no token's number.
        """
        return end_tokens(self.folder)

    def skeleton(self) -> PreTrainedModel:
        """The model without weights (on the meta device): its modules can be looked at before anything is loaded.

        Raises:
            ModelError: it is no causal language model.
        """
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        # Each class of transformers makes of a config what it likes, and fails on a wrong one in its own way.
        except Exception as error:
            if "Unrecognized configuration class" in str(error):
                raise ModelError(
                    f"model.name_or_path: {self.name} ({config.model_type}) is no causal language model"
                ) from error
            raise ModelError(
                f"model.name_or_path: {self.name} ({config.model_type}): transformers cannot build the model that its "
                f"config.json describes: {type(error).__name__}: {one_line(error)}"
            ) from error
        if getattr(config, "is_decoder", None) is False and config.model_type in BIDIRECTIONAL:
            raise ModelError(
                f"model.name_or_path: {self.name} ({config.model_type}) reads in both directions, so it cannot predict "
                "the next token"
            )
        return model

    def load(self, dtype: str, device: torch.device, quantization: str | None = None) -> PreTrainedModel:
        """The model in eval mode, all weights frozen.

        Args:
            dtype: Of the weights and the computation.
            device: To hold it.
            quantization: `nf4` (with double quantization) or `int8` codes for the linear layers but the output head.

        Raises:
            ModelError: it is no causal language model, its weights do not load, or bitsandbytes is not there.
        """
        quantized: dict[str, Any] = {}
        if quantization is not None or self.codes is not None:
            need_package("bitsandbytes", f"quantization: {quantization or self.codes}", "quantized")
            quantized = {"device_map": {"": device}}
        if quantization is not None:
            quantized["quantization_config"] = _quantization_config(quantization, dtype)
        quantization = quantization or self.codes
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
            if quantization == "int8" and device.type == "cpu" and hasattr(module, "state"):
                module.train = partial(_in_training_mode, module)
        # Many models come with sampling and repetition penalties of their own; here greedy decoding is the argmax.
        model.generation_config = GenerationConfig()
        return (model if quantized else model.to(device)).eval()  # pyright: ignore[reportArgumentType] - transformers wraps Module.to


def _in_training_mode(module: torch.nn.Module, _mode: bool = True) -> torch.nn.Module:
    module.training = True
    return module


def _quantization_config(quantization: str, dtype: str) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def check_fit(source: Source, skeleton: PreTrainedModel, splits: Splits, n_virtual: int = 0) -> None:
    """Check that the tokens are ones that the model has, at positions that it has.

    Raises:
        ModelError: a token is not the model's.
        DataError: a row is too long.
    """
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
    """Check that the tokens are ones that the model has.

    Raises:
        ModelError: one is not.
    """
    n_tokens = len(skeleton.get_input_embeddings().get_parameter("weight"))
    largest = max(max(map(max, [e.prompt, *e.answers])) for e in examples)
    if largest >= n_tokens:
        raise ModelError(
            f"model.name_or_path: {source.name}: its tokenizer gives token {largest} and the model has {n_tokens}; "
            "the folder's tokenizer belongs to another model"
        )

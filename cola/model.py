"""The pretrained base: where it lies, how it is loaded, and what identifies it."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from huggingface_hub import snapshot_download
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
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

from cola import recipe
from cola.cache import cache_dir
from cola.data import Example, Splits
from cola.errors import DataError, ModelError
from cola.package_file import need_package, package_file

HUB_FILES = ["model*.safetensors", "adapter_model.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]
# What the readers of a damaged or unknown GGUF file raise: they check little of what they read.
GGUF_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    struct.error,
)
SETTLED_SECONDS = 2.0  # the coarsest clock of a file system that is in use

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
        """The safetensors files of the weights, without another format's copy of them."""
        return sorted(self.folder.glob("model*.safetensors"))

    @property
    def codes(self) -> str | None:
        """`nf4` or `int8` where the weights lie there quantized by bitsandbytes."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        return None if config is None else "int8" if config.get("load_in_8bit") else "nf4"

    def fingerprint(self) -> str:
        """SHA-256 over config, weights and code of its own."""
        digest = hashlib.sha256()
        code = sorted(self.folder.glob("*.py")) if self.trust_remote_code else []
        for file in [self.folder / "config.json", *code, *self.files]:
            digest.update(_file_digest(file.resolve()).encode())
        return digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer.

        Raises:
            ModelError: the folder has none.
        """
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"model.name_or_path: {self.name}: no tokenizer could be loaded: {_line(error)}"
            ) from error

    def skeleton(self) -> PreTrainedModel:
        """The model without weights (on the meta device): its modules can be looked at before anything is loaded.

        Raises:
            ModelError: it is no causal language model.
        """
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        except ValueError as error:
            raise ModelError(
                f"model.name_or_path: {self.name} ({config.model_type}) is no causal language model"
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
            raise ModelError(f"model.name_or_path: {self.name} does not load: {_line(error)}") from error
        # transformers fills what is missing with random numbers, other ones at every load.
        for what in ("missing_keys", "mismatched_keys"):
            if faulty := sorted(map(str, info[what])):
                raise ModelError(
                    f"model.name_or_path: the weights of {self.name} do not fit its config: {len(faulty)} "
                    f"{what.replace('_', ' ')}, the first is {faulty[0]}"
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


def find_model(
    settings: recipe.Model, say: Callable[[str], None] = lambda text: None, quantized: bool = False
) -> Source:
    """Locate the base, downloading from the hub or dequantizing a GGUF file once where that is needed.

    Args:
        settings: The recipe's.
        say: Told what takes a while.
        quantized: Whether its weights may be codes already, which is for scoring only.

    Raises:
        ModelError: it is not there, cannot be reached, or is not in a format that is safe to load.
    """
    name = settings.name_or_path
    if name.startswith("package://"):
        return _source(settings, _from_gguf(package_file(name), say))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.name_or_path: {name}: no such file")
        return _source(settings, _from_gguf(path, say))
    if path.exists() or not recipe.is_remote(name):
        if not path.exists():
            raise ModelError(f"model.name_or_path: {name}: no such folder")
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name_or_path: {name} is no Hugging Face model folder: it has no config.json")
        return _source(settings, path.resolve(), quantized=quantized)
    snapshot = _from_hub(settings)
    # The hub's cache names a snapshot by its commit.
    return _source(settings, snapshot, revision=snapshot.name, quantized=quantized)


def find_adapter(settings: recipe.Model) -> Path | None:
    """The folder of a PEFT adapter, here or on the hub; None for what is no adapter.

    Raises:
        ModelError: the hub cannot be reached.
    """
    name = settings.name_or_path
    folder = Path(name).expanduser()
    if recipe.is_remote(name) and not name.startswith("package://"):
        folder = _from_hub(settings)
    return folder if (folder / "adapter_config.json").is_file() else None


def _source(settings: recipe.Model, folder: Path, revision: str | None = None, quantized: bool = False) -> Source:
    source = Source(settings.name_or_path, folder, settings.trust_remote_code, revision)
    if not source.files:
        raise ModelError(
            f"model.name_or_path: {source.name} has no .safetensors weights; pickled weights (.bin, .pt) can run code "
            "and are not read: convert them with transformers' save_pretrained"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if not settings.trust_remote_code and "auto_map" in (folder / "config.json").read_text(encoding="utf-8"):
            raise ModelError(
                f"model.name_or_path: {source.name} needs Python code that comes with it, which is not run unless the "
                "recipe says model.trust_remote_code: true"
            ) from None
        raise ModelError(f"model.name_or_path: {source.name}: {_line(error)}") from error
    codes = getattr(config, "quantization_config", None) or {}
    if quantized and codes and codes.get("quant_method") != "bitsandbytes":
        raise ModelError(
            f"{source.name} is quantized by {codes.get('quant_method')}; only bitsandbytes' codes are read"
        )
    if codes and not quantized:
        raise ModelError(
            f"model.name_or_path: {source.name} is quantized already; give the dense model and say "
            "model.quantization: nf4 (or int8)"
        )
    return source


def _from_hub(settings: recipe.Model) -> Path:
    name = settings.name_or_path
    files = [*HUB_FILES, "*.py"] if settings.trust_remote_code else HUB_FILES
    try:
        return Path(snapshot_download(name, revision=settings.revision, allow_patterns=files))
    # The hub client, its http library and its cache raise errors without a common base.
    except Exception as error:
        raise ModelError(
            f"model.name_or_path: {name}: no such folder here, and the hub did not give it "
            f"({type(error).__name__}: {_line(error)}); without a network, run `hf download {name} --local-dir DIR` "
            "elsewhere and set model.name_or_path to that folder"
        ) from error


def _from_gguf(file: Path, say: Callable[[str], None]) -> Path:
    """A safetensors folder with the file's weights in float32, made the first time and reused."""
    folder = cache_dir() / "models" / f"{file.stem}-{_file_digest(file)[:16]}"
    if (folder / "config.json").is_file():
        return folder
    say(f"dequantizing {file.name} to safetensors, once, into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix="making-"))
    try:
        where = {"gguf_file": file.name}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that transformers' own switch leaves on
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(aside)
        aside.replace(folder)
    except GGUF_ERRORS as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        if not (folder / "config.json").is_file():  # another process may have been first
            raise ModelError(f"model.name_or_path: {file}: not a GGUF file that can be read: {_line(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def gguf_config(file: Path) -> Path:
    """A folder with the config of a GGUF file's model, read from its metadata the first time; no weight is read.

    Raises:
        ModelError: it is no GGUF file that can be read.
    """
    name = f"{file.stem}-{_file_digest(file)[:16]}"
    dequantized, folder = (cache_dir() / kind / name for kind in ("models", "configs"))
    if (dequantized / "config.json").is_file():
        return dequantized
    if not (folder / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        except GGUF_ERRORS as error:
            raise ModelError(f"model.name_or_path: {file}: not a GGUF file that can be read: {_line(error)}") from error
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".config.{os.getpid()}"
        aside.write_text(config.to_json_string(), encoding="utf-8")
        aside.replace(folder / "config.json")
    return folder


def _file_digest(file: Path) -> str:
    """SHA-256 of a file; weights are large, so it is remembered in the cache by all that changes with the content.

    Path, size and time of modification do not: reproducible archives and whole images give every file one time. The
    inode is another one where a file has come in another's place, and no user can set back the time at which it last
    changed. A file that has changed a moment ago may do so again within one tick of that clock, and is not remembered.
    """
    state = file.stat()
    told = [file.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
    note = cache_dir() / "digests" / hashlib.sha256("|".join(map(str, told)).encode()).hexdigest()
    if note.is_file():
        return json.loads(note.read_text())["sha256"]
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if time() - state.st_ctime >= SETTLED_SECONDS:
        note.parent.mkdir(parents=True, exist_ok=True)
        aside = note.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps({"sha256": digest, "file": str(file)}))
        aside.replace(note)
    return digest


def check_fit(source: Source, skeleton: PreTrainedModel, splits: Splits, n_virtual: int = 0) -> None:
    """Check that the tokens are ones that the model has, at positions that it has.

    Raises:
        ModelError: a token is not the model's.
        DataError: a row is too long.
    """
    examples = [example for _, part in splits.items() for example in part]
    check_tokens(source, skeleton, examples)
    positions = getattr(skeleton.config, "max_position_embeddings", None)
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


def quiet_libraries() -> None:
    """No warnings and progress bars of transformers between cola's own lines."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def dtype_warning(dtype: str, device: torch.device) -> str | None:
    """What a half-precision format costs on a CPU that has no instructions for it; None where it is fine."""
    if device.type != "cpu" or dtype == "float32":
        return None
    if dtype == "bfloat16" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return None
    times = "3 to 4" if dtype == "bfloat16" else "about 10"
    return f"model.dtype {dtype} on this CPU, which has no instructions for it, is {times} times slower than float32"


def make_accelerator(dtype: str) -> Accelerator:
    """accelerate with a base's precision, on the device it finds.

    accelerate fixes the precision once per process; here every arm may have one of its own. On a CPU it has no fp16
    autocast: the weights are fp16 there and a pair computes in float32.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

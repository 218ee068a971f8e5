"""The pretrained base: where it lies, how it is loaded, and what identifies it."""

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import time
from typing import Any

import torch
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

from cola.data.encode import Example
from cola.data.splits import Splits
from cola.errors import DataError, ModelError
from cola.files import cache_dir, need_package, package_file
from cola.link import gguf_file
from cola.link.accelerator import SETTLED_SECONDS
from cola.link.checkpoint import end_tokens, weight_files, weight_names
from cola.link.text_part import text_config
from cola.recipe.bounds import is_remote
from cola.recipe.schema import Model

HUB_TEXTS = ["*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]
HUB_FILES = ["model*.safetensors", "adapter_model.safetensors", *HUB_TEXTS]

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
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        return None if config is None else "int8" if config.get("load_in_8bit") else "nf4"

    def fingerprint(self) -> str:
        """SHA-256 over config, weights and code of its own, wherever in the folder that lies."""
        code = sorted(self.folder.rglob("*.py")) if self.trust_remote_code else []
        files = [file.resolve() for file in (self.folder / "config.json", *code, *self.files)]
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock: shards are read side by side
            for part in pool.map(_file_digest, files):
                digest.update(part.encode())
        if self.trust_remote_code:
            told = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
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
                f"model.name_or_path: {self.name}: no tokenizer could be loaded: {_line(error)}"
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
                f"config.json describes: {type(error).__name__}: {_line(error)}"
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


def find_model(settings: Model, say: Callable[[str], None] = lambda text: None, quantized: bool = False) -> Source:
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
    if path.exists() or not is_remote(name):
        if not path.exists():
            raise ModelError(f"model.name_or_path: {name}: no such folder")
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name_or_path: {name} is no Hugging Face model folder: it has no config.json")
        return _source(settings, path.resolve(), quantized=quantized)
    snapshot = _from_hub(settings)
    # The hub's cache names a snapshot by its commit.
    return _source(settings, snapshot, revision=snapshot.name, quantized=quantized)


def find_tokenizer(settings: Model) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The base's tokenizer, and the tokens that end an answer by the model. No weights are fetched from the hub, and a
    GGUF file is not dequantized.

    Raises:
        ModelError: it is not there, or cannot be reached.
    """
    name = settings.name_or_path
    path = package_file(name) if name.startswith("package://") else Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file() and (_gguf_folder(path, "models") / "config.json").is_file():
        path = _gguf_folder(path, "models")  # a run has read it before, which takes a while
    elif path.suffix == ".gguf" and path.is_file():
        tokenizer = Source(name, path.parent, settings.trust_remote_code).tokenizer(gguf_file=path.name)
        with _reading(path):
            return tokenizer, gguf_file.end_tokens(path)
    if not path.exists() and is_remote(name):
        path = _from_hub(settings, HUB_TEXTS)
    elif not path.is_dir():
        raise ModelError(f"model.name_or_path: {name}: no such {'file' if path.suffix == '.gguf' else 'folder'}")
    source = Source(name, path, settings.trust_remote_code)
    return source.tokenizer(), source.ends()


def find_adapter(settings: Model) -> Path | None:
    """The folder of a PEFT adapter, here or on the hub; None for what is no adapter.

    Raises:
        ModelError: the hub cannot be reached.
    """
    name = settings.name_or_path
    folder = Path(name).expanduser()
    if is_remote(name) and not name.startswith("package://"):
        folder = _from_hub(settings)
    return folder if (folder / "adapter_config.json").is_file() else None


def _source(settings: Model, folder: Path, revision: str | None = None, quantized: bool = False) -> Source:
    source = Source(settings.name_or_path, folder, settings.trust_remote_code, revision)
    if not source.files:
        if found := sorted(path.name for path in folder.glob("*.safetensors")):
            raise ModelError(
                f"model.name_or_path: {source.name} has {found[0]:.80}, and neither model.safetensors nor "
                "model.safetensors.index.json, which names the files of the weights"
            )
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


def _from_hub(settings: Model, files: Sequence[str] = HUB_FILES) -> Path:
    name = settings.name_or_path

    def fetch(revision: str | None, files: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=files))
        # The hub client, its http library and its cache raise errors without a common base.
        except Exception as error:
            raise ModelError(
                f"model.name_or_path: {name}: no such folder here, and the hub did not give it "
                f"({type(error).__name__}: {_line(error)}); without a network, run `hf download {name} --local-dir "
                "DIR` elsewhere and set model.name_or_path to that folder"
            ) from error

    folder = fetch(settings.revision, [*files, "*.py"] if settings.trust_remote_code else [*files])
    if files is not HUB_FILES:
        return folder
    if others := [file for file in weight_names(folder) if not (folder / file).is_file()]:
        fetch(folder.name, others)  # which the index, now here, is the first to name
    return folder


def _from_gguf(file: Path, say: Callable[[str], None]) -> Path:
    """A safetensors folder with the file's weights in float32, made the first time and reused."""
    folder = _gguf_folder(file, "models")
    if (folder / "config.json").is_file():
        return folder
    say(f"dequantizing {file.name} to safetensors, once, into {folder}")
    with _aside(folder) as aside, _reading(file):
        gguf_file.convert(file, aside)
    return folder


def gguf_config(file: Path) -> Path:
    """A folder with the config of a GGUF file's model, read from its header the first time; no weight is read.

    Raises:
        ModelError: it is no GGUF file that can be read.
    """
    dequantized, folder = _gguf_folder(file, "models"), _gguf_folder(file, "configs")
    if (dequantized / "config.json").is_file():
        return dequantized
    if not (folder / "config.json").is_file():
        with _aside(folder) as aside, _reading(file):
            gguf_file.read_config(file).save_pretrained(aside)
    return folder


def _gguf_folder(file: Path, kind: str) -> Path:
    return cache_dir() / kind / f"{file.stem}-{_file_digest(file)[:16]}-{gguf_file.VERSION}"


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Where to make a folder that holds a config.json, unless another process makes it first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix="making-"))
    try:
        yield aside
        try:
            aside.replace(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """One clear line for a GGUF file that cannot be read."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"model.name_or_path: {file}: {error}") from None
    # transformers, gguf and tokenizers check little of what they read and raise what they like, plain Exceptions too.
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ModelError(f"model.name_or_path: {file}: not a GGUF file that can be read: {_line(error)}") from error


def _file_digest(file: Path) -> str:
    """SHA-256 of a file's content, which is read once by each process that asks.

    No stat says what a file holds: images and archives give every file one time and one inode on whatever machine, a
    network file system may make them up, and what is written through a memory map may move no time at all. So nothing
    is remembered between processes. To look at a file again within one tells whether it has been replaced; one that has
    changed a moment ago may do so again within one tick of the clock, and is read again.
    """
    state = file.stat()
    seen = (file, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev)
    if seen in _digests:
        return _digests[seen]
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if time() - state.st_ctime >= SETTLED_SECONDS:
        _digests[seen] = digest
    return digest


_digests: dict[tuple[Path, int, int, int, int, int], str] = {}  # of files that lay still, in this process


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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

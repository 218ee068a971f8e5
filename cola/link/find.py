"""Where a base, its tokenizer or an adapter lies: in a folder, in a GGUF file, in a package, or on the hub."""

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedTokenizerBase

from cola.errors import ModelError, one_line
from cola.files import cache_dir, package_file
from cola.link import gguf_file
from cola.link.checkpoint import TEXTS, content_digest, weight_names
from cola.link.model import Source
from cola.recipe.schema import Model, is_remote

HUB_FILES = ["model*.safetensors", "adapter_model.safetensors", *TEXTS]


def find_model(settings: Model, say: Callable[[str], None] = lambda text: None, quantized: bool = False) -> Source:
    """Locate the base, downloading from the hub or dequantizing a GGUF file once where that is needed.

    Args:
        say: Told what takes a while.
        quantized: Whether its weights may be codes already, which is for scoring only.

    Raises:
        ModelError: it is not there, cannot be reached, or is not in a format that is safe to load.
    """
    name = settings.name_or_path
    path = _here(name)
    if name.startswith("package://") or path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.name_or_path: {name}: no such file")
        return _source(settings, _from_gguf(path, say))
    if is_remote(name):
        snapshot = _from_hub(settings)
        return _source(settings, snapshot, snapshot.name, quantized)  # the hub's cache names it by its commit
    if not path.exists():
        raise ModelError(f"model.name_or_path: {name}: no such folder")
    if not (path / "config.json").is_file():
        raise ModelError(f"model.name_or_path: {name} is no Hugging Face model folder: it has no config.json")
    return _source(settings, path.resolve(), quantized=quantized)


def _here(name: str) -> Path:
    """Where a name would be on this disk."""
    return package_file(name) if name.startswith("package://") else Path(name).expanduser()


def find_tokenizer(settings: Model) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The base's tokenizer, and the tokens that end an answer by the model. No weights are fetched from the hub, and a
    GGUF file is not dequantized. Raises ModelError where it is not there, or cannot be reached."""
    name, path = settings.name_or_path, _here(settings.name_or_path)
    if path.suffix == ".gguf" and path.is_file():
        path = gguf_tokenizer(path)
    if not path.exists() and is_remote(name):
        path = _from_hub(settings, TEXTS)
    elif not path.is_dir():
        raise ModelError(f"model.name_or_path: {name}: no such {'file' if path.suffix == '.gguf' else 'folder'}")
    source = Source(name, path, settings.trust_remote_code)
    return source.tokenizer(), source.ends()


def find_adapter(settings: Model) -> Path | None:
    """The folder of a PEFT adapter, here or on the hub; None for what is no adapter. Raises ModelError where the hub
    cannot be reached."""
    name = settings.name_or_path
    hub = is_remote(name) and not name.startswith("package://")
    folder = _from_hub(settings) if hub else Path(name).expanduser()
    return folder if (folder / "adapter_config.json").is_file() else None


def _source(settings: Model, folder: Path, revision: str | None = None, quantized: bool = False) -> Source:
    source = Source(settings.name_or_path, folder, settings.trust_remote_code, revision)
    if not source.files:
        if others := sorted(path.name for path in folder.glob("*.safetensors")):
            raise ModelError(
                f"model.name_or_path: {source.name} has {others[0]:.80}, and neither model.safetensors nor "
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
        raise ModelError(f"model.name_or_path: {source.name}: {one_line(error)}") from error
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
                f"({type(error).__name__}: {one_line(error)}); without a network, run `hf download {name} --local-dir "
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
    if not (folder / "config.json").is_file():
        say(f"dequantizing {file.name} to safetensors, once, into {folder}")
        with _aside(folder, "config.json") as aside, _reading(file):
            gguf_file.convert(file, aside)
    return folder


def gguf_weights(file: Path) -> Path | None:
    """The safetensors folder that an earlier run has made of a GGUF file; None where none has."""
    folder = _gguf_folder(file, "models")
    return folder if (folder / "config.json").is_file() else None


def gguf_config(file: Path) -> Path:
    """A folder with the config of a GGUF file's model, from its header; no weight is read. Raises ModelError where it
    cannot be read."""
    return _of_gguf(file, "configs", "config.json", lambda aside: gguf_file.read_config(file).save_pretrained(aside))


def gguf_tokenizer(file: Path) -> Path:
    """A folder with its tokenizer, likewise."""
    return _of_gguf(file, "tokenizers", "tokenizer_config.json", lambda aside: gguf_file.write_tokenizer(file, aside))


def _of_gguf(file: Path, kind: str, mark: str, make: Callable[[Path], None]) -> Path:
    """The folder of a file that was dequantized, else one with a part of it: headers take seconds to read, so that is
    made the first time and reused. `mark`: the file by which it is whole."""
    dequantized, folder = _gguf_folder(file, "models"), _gguf_folder(file, kind)
    if (dequantized / "config.json").is_file():
        return dequantized
    if not (folder / mark).is_file():
        with _aside(folder, mark) as aside, _reading(file):
            make(aside)
    return folder


def _gguf_folder(file: Path, kind: str) -> Path:
    return cache_dir() / kind / f"{file.stem}-{content_digest(file)[:16]}-{gguf_file.VERSION}"


@contextlib.contextmanager
def _aside(folder: Path, mark: str) -> Iterator[Path]:
    """Where to make a folder that holds a file `mark`, unless another process makes it first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix="making-", ignore_cleanup_errors=True) as aside:
        yield Path(aside)
        try:
            Path(aside).replace(folder)
        except OSError:
            if not (folder / mark).is_file():
                raise


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
        raise ModelError(f"model.name_or_path: {file}: not a GGUF file that can be read: {one_line(error)}") from error

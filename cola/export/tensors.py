"""Which tensors of a merged checkpoint differ from the base's, by a digest of each: the targets and nothing else.

One tensor of each is in memory at a time. What is compared is what lies on the disk, read by nothing that merges.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cola.errors import ModelError
from cola.export.outcome import Outcome
from cola.link import adapters
from cola.link.base import names_in_model
from cola.link.model import Source
from cola.link.residual import Residual, modules_of

FILE = "tensors.json"
FORMAT = 1  # of tensors.json

Tensors = dict[str, Callable[[], Tensor]]  # by the model's names; each is read when it is called


@dataclass(frozen=True)
class Compared:
    """The tensors of an export beside the base's, by name."""

    differ: dict[str, tuple[str, str]]  # digest of the base's and of the export's
    equal: dict[str, str]
    only_in_base: list[str]  # a head that is stored though it is tied, and the like
    only_in_export: list[str]

    def record(self, base: dict[str, Any], against: str, targets: Collection[str]) -> dict[str, Any]:
        """What tensors.json holds.

        Args:
            base: What identifies the base.
            against: What of it the export was compared with.
            targets: What was trained.
        """
        differ = {
            name: {"base": old, "export": new, "target": name in targets}
            for name, (old, new) in sorted(self.differ.items())
        }
        sizes = {"differ": len(differ), "equal": len(self.equal)}
        alone = {"only_in_base": self.only_in_base, "only_in_export": self.only_in_export}
        return {
            "format": FORMAT,
            "base": base,
            "compared_with": against,
            "digest": "SHA-256 of a tensor's bytes in the dtype that it has in the export",
            "counts": sizes | {key: len(names) for key, names in alone.items()},
            "differ": differ,
            "equal": dict(sorted(self.equal.items())),
            **alone,
        }

    def note(self, targets: Collection[str]) -> str:
        """The same in a sentence or two, where nothing but targets differs."""
        number = len(self.differ) + len(self.equal)
        text = f"{len(self.differ)} of {number} tensors differ from the base's and no other than targets"
        if self.equal:
            text += f"; {len(self.equal)} are equal to the last bit"
        text += f" ({FILE})."
        if still := len(self.equal.keys() & set(targets)):
            text += f" {still} of the equal ones are targets: nothing was learned there, or rounding has lost it."
        if alone := len(self.only_in_base) + len(self.only_in_export):
            text += f" {alone} more are in the files of one of the two only and were not compared."
        return text


def compare(outcome: Outcome, learned: Residual, folder: Path) -> str:
    """Compare a merged checkpoint in a folder with its base and write tensors.json beside it; what was found, in words.
    Raises ModelError where a tensor differs that is no target."""
    source, against = outcome.source, "the base's files"
    if outcome.quantization is None:
        base = stored(source)
    else:
        base = _dequantized(source, outcome.quantization)
        against = f"the weights that the base's {outcome.quantization} codes stand for"
    found = compared(base, stored(Source(str(folder), folder, source.trust_remote_code)))
    if outcome.kind.is_whole:
        trained = adapters.attach(source.skeleton(), outcome.links[0], seed=0)
        frozen = {name for name, parameter in trained.named_parameters() if not parameter.requires_grad}
        targets = (found.differ.keys() | found.equal.keys()) - frozen
    else:
        targets = {f"{name}.weight" for name in modules_of(learned)}
    if foreign := sorted(found.differ.keys() - targets):
        raise ModelError(
            f"arm {outcome.job.arm}: {len(foreign)} tensors of the checkpoint differ from the base's though nothing "
            f"trains them, the first is {foreign[0]}; export it --as adapter"
        )
    identity = {"name": outcome.base_name, "sha256": outcome.provenance.model.sha256}
    said = json.dumps(found.record(identity, against, targets), indent=1)
    (folder / FILE).write_text(said + "\n", encoding="utf-8")
    return found.note(targets)


def stored(source: Source) -> Tensors:
    """What the files of a folder hold, by the model's names; a part of what is one tensor in the model by its own."""
    skeleton, tensors = source.skeleton(), {}
    for file in source.files:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
        names = names_in_model(skeleton, keys)
        tensors |= {names.get(key, key): partial(_read, file, key) for key in keys}
    return tensors


def _dequantized(source: Source, quantization: str) -> Tensors:
    """The weights that a base's codes stand for; all of them are in memory."""
    model = source.load("float32", torch.device("cpu"), quantization).dequantize()
    return {name: partial(Tensor.detach, tensor) for name, tensor in adapters.whole_state(model).items()}


def compared(base: Tensors, export: Tensors) -> Compared:
    """Each tensor of an export with the base's of that name, which is taken in the export's dtype first."""
    differ, equal = {}, {}
    for name in base.keys() & export.keys():
        tensor = export[name]()
        old, new = digest(base[name]().to(tensor.dtype)), digest(tensor)
        if old == new:
            equal[name] = new
        else:
            differ[name] = old, new
    return Compared(differ, equal, sorted(base.keys() - export.keys()), sorted(export.keys() - base.keys()))


def digest(tensor: Tensor) -> str:
    """64 hex digits of SHA-256 over a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)

"""The memory that a link takes, by part: bytes of its tensors as they are made, and of a pass at its largest moment."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cola.link import adapters
from cola.link.targets import shared_matrices
from cola.plan.passes import Seen

FLOAT32 = 4
# glibc's heap, from which blocks below 32 MB come, grows to about twice what lies in it at once, since a hole seldom
# holds the next aligned block: 1.97 and 2.0 to 2.5 times where it was measured. It does not shrink.
HEAP = 2.0
NF4_BLOCK, NF4_STATES = 64, 256  # weights of a scale, and scales of a scale of scales, as bitsandbytes has them
# What a part is, in the order in which it is shown.
PARTS = {
    "weights": "the base, in its number format or as codes",
    "quantization": "scales of the codes, and the largest matrix as it is decoded to be multiplied by",
    "pairs": "what the link trains beside the base, float32",
    "residual": "pairs of the links before, which the chain keeps",
    "gradients": "of what is trained",
    "optimizer": "AdamW's two moments of what is trained",
    "activations": "what the backward pass needs of the forward pass, and what is made on the way",
    "logits": "at the targets, with what the loss makes of them",
    "allocator": "on a CPU: what the heap holds between blocks, and does not give back",
    "knot": "tying it: outputs before and after, and the matrix at hand",
    "evaluation": "scoring: activations, keys and values, logits",
    "libraries": "Python and the libraries, of a process on a CPU",
}


@dataclass(frozen=True)
class Memory:
    """Bytes by part while a link is trained, at the largest moment, and what its knot and its scoring hold in place of
    gradients, activations and logits."""

    training: dict[str, int]
    knot: int
    evaluation: int
    libraries: int = 0
    loading: int = 0  # at most, while the base is read

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return sum(self.training.get(part, 0) for part in ("weights", "quantization", "pairs", "residual", "optimizer"))

    @property
    def moments(self) -> dict[str, int]:
        """The largest moments, each without the libraries."""
        return {
            "training": sum(self.training.values()),
            "knot": self.resident + self.knot,
            "evaluation": self.resident + self.evaluation,
            "loading": self.loading,
        }

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return self.libraries + max(self.moments.values())

    @property
    def when(self) -> str:
        """Which moment that is."""
        return max(self.moments, key=lambda moment: self.moments[moment])

    @property
    def parts(self) -> dict[str, int]:
        """The parts at that moment, which add up to the peak."""
        if self.when == "training":
            parts = dict(self.training)
        elif self.when == "loading":
            parts = {"weights": self.loading}
        else:
            stays = ("weights", "quantization", "pairs", "residual", "optimizer")
            parts = {part: self.training.get(part, 0) for part in stays} | {self.when: getattr(self, self.when)}
        return {part: n for part, n in {**parts, "libraries": self.libraries}.items() if n}

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "peak": self.peak, "when": self.when}


@dataclass(frozen=True)
class Weights:
    """Of a base as it lies in memory."""

    codes: int  # bytes of the weights, codes or not
    states: int  # bytes of what codes need beside them
    decoded: int  # bytes of the largest matrix that is decoded to be multiplied by


def weights_of(model: PreTrainedModel, quantization: str | None) -> Weights:
    """Bytes of what was there before a link was attached; a shared matrix once."""
    head = model.get_output_embeddings()
    shared = {name for names in shared_matrices(model) for name in names}
    codes, states, decoded = 0, 0, 0
    quantized = {}
    for name, module in model.named_modules() if quantization else ():
        if type(module) is nn.Linear and module is not head and f"{name}.weight" not in shared:
            quantized[id(module.weight)] = module.weight
    for name, parameter in model.named_parameters():
        if adapters.is_trained(name):
            continue
        if id(parameter) not in quantized:
            codes += parameter.numel() * parameter.element_size()
            continue
        own, beside = _codes(parameter, str(quantization))
        codes, states = codes + own, states + beside
        decoded = max(decoded, parameter.numel() * parameter.element_size())
    return Weights(codes, states, decoded)


def _codes(weight: torch.Tensor, quantization: str) -> tuple[int, int]:
    """Bytes of a matrix's codes, and of their scales."""
    if quantization == "int8":
        return weight.numel(), FLOAT32 * len(weight) + 1
    blocks = math.ceil(weight.numel() / NF4_BLOCK)
    tables = FLOAT32 * (16 + 256 + 1)  # the 16 values, those of a scale, and the scales' mean
    return math.ceil(weight.numel() / 2), blocks + FLOAT32 * math.ceil(blocks / NF4_STATES) + tables


@dataclass(frozen=True)
class Looked:
    """What was found of a link by attaching it to the model on the meta device, and by passes on shapes alone."""

    trained: int  # parameters
    tensors: int  # that hold them
    weights: Weights
    training: Seen | None  # its heaviest pass; None where nothing is trained
    scoring: dict[str, Seen]  # passes without gradients: of the examples, of the general text
    written: int  # entries of all matrices that a knot writes, of a pair
    largest: int  # of the largest of them
    large: int  # bytes of the trained tensors that are no small block


@dataclass(frozen=True)
class Circumstances:
    """What a link's memory depends on beside that."""

    before: int  # parameters of the pairs of the links before
    is_whole: bool  # whether the base's own are trained
    beside: bool  # whether pairs stay beside the weights at a knot
    on_cpu: bool
    outputs: int  # logits that a knot compares
    stored: int = 0  # bytes of the files that the process reads the base from; 0 on a GPU
    libraries: int = 0  # bytes of the process without a model; 0 on a GPU


def memory_of(looked: Looked, around: Circumstances) -> Memory:
    """The parts of a link's memory."""
    own = 0 if around.is_whole else FLOAT32 * looked.trained
    # The chain holds each pair in the process, and where it stays beside the weights once more, stacked.
    copies = around.on_cpu + around.beside
    parts = {
        "weights": looked.weights.codes,
        "quantization": looked.weights.states + looked.weights.decoded,
        "pairs": own,
        "residual": FLOAT32 * copies * around.before,
        "optimizer": 2 * FLOAT32 * looked.trained,
    }
    if looked.training is not None:
        passing = {part: round(n) for part, n in looked.training.largest.items()}
        # As the optimizer takes its step all gradients are there, and nothing of the pass.
        stepping = {"gradients": FLOAT32 * looked.trained, "activations": 0, "logits": 0}
        parts |= max(passing, stepping, key=lambda moment: sum(moment.values()))
    if around.on_cpu:
        parts["allocator"] = max(
            0, _on_a_heap(looked) - sum(parts.get(p, 0) for p in ("gradients", "activations", "logits"))
        )
    # Outputs before the link, before the knot and after it, and their difference; the pair that was read; a matrix.
    knot = 4 * FLOAT32 * around.outputs + own + (0 if around.beside else FLOAT32 * looked.largest)
    each = (
        seen.large + HEAP * seen.small if around.on_cpu else sum(seen.largest.values())
        for seen in looked.scoring.values()
    )
    scoring = round(max(each, default=0.0))
    # Files are mapped: as they are they are the weights, and in another format they are there beside them.
    as_it_is = abs(around.stored - looked.weights.codes) < 0.05 * looked.weights.codes
    loading = 0 if not around.stored else max(around.stored, looked.weights.codes)
    loading += 0 if as_it_is or not around.stored else min(around.stored, looked.weights.codes)
    return Memory(parts, knot if looked.trained else 0, scoring, around.libraries, loading)


def _on_a_heap(looked: Looked) -> int:
    """Bytes of a training step's passes and gradients in a process: large blocks come and go, the heap stays."""
    seen, gradients = looked.training, FLOAT32 * looked.trained
    if seen is None:
        return 0
    return round(max(seen.large, looked.large) + HEAP * max(seen.small, gradients - looked.large))

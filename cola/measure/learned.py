"""What the arms of a run have learned, as spectra, from the files of their weights: no model is loaded.

A chain is analysed from its factors on the CPU, which takes seconds whatever the model's size. Full fine-tuning's
update is dense, and an eigendecomposition costs the cube of a matrix's side: of that arm only those matrices are looked
at that the run's low-rank arms train, on the GPU where there is one, and of a large model an even share of them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cola.link.base import Base, shape_of
from cola.link.model import Source
from cola.link.residual import Residual, factors
from cola.link.targets import target_names
from cola.measure.spectrum import KEPT, TOP, Svd, Tuned, count_intruders, dense_svd, numbers_of, of_chain
from cola.recipe.methods import Lora, Targets

ALL = "all weights"  # full fine-tuning's update
DORA = "DoRA scales the rows of the base's matrices, so what it adds to them is not of low rank"
# float64 operations that full fine-tuning's spectra may take: a minute or so on two cores; the GPU's is not measured.
FULL_FLOPS = {"cpu": 2e12, "cuda": 1e14}


@dataclass
class Learned:
    """Takes the spectra of a run's arms and seeds."""

    source: Source  # the base
    skeleton: PreTrainedModel  # without weights
    pairs: Sequence[Lora]  # all low-rank links that the run may train; they say which matrices matter
    device: torch.device  # where dense matrices are decomposed, if it is a GPU
    _full: tuple[str, dict[str, Svd]] | None = None  # of one state at a time: it is large
    _norms: dict[str, float | None] = field(default_factory=dict)

    @cached_property
    def base(self) -> Base:
        """The base's own matrices."""
        return Base(self.skeleton, self.source.files)

    def norm_of(self, name: str) -> float | None:
        """Frobenius norm of a matrix of the base; None where its files do not have it under its own name."""
        if name not in self._norms:
            W_OI = self.base.matrix(name)
            self._norms[name] = None if W_OI is None else torch.linalg.vector_norm(W_OI, dtype=torch.float64).item()
        return self._norms[name]

    def of_links(
        self, links: Residual, full: Mapping[str, Svd] | None = None, state: str | None = None
    ) -> dict[str, Any]:
        """The content of a chain's spectrum.json, from what each link added, and from full fine-tuning's update and the
        name of the state that it led to."""
        started = perf_counter()
        if any(pair.rows_O is not None for link in links for pair in link.values()):
            return {"left_out": DORA, "full": state, "matrices": {}, "seconds": 0.0}
        matrices = of_chain(links, self.norm_of, full)
        return {"left_out": None, "full": state, "matrices": matrices, "seconds": perf_counter() - started}

    def of_full(self, state: str, folder: Path, dtype: str) -> dict[str, Any]:
        """The content of full fine-tuning's spectrum.json; its directions are remembered until another state's are.

        Args:
            state: What identifies the weights, which the folder has as safetensors.
            dtype: That the base had when it was trained.
        """
        started = perf_counter()
        self._full = None  # the last one's, before this one's are in memory
        tuned, svds, matrices = self._tuned(folder), {}, {}
        # Directions that chains may be compared in; a pair of `init: pissa` has twice its rank.
        widest = min(KEPT, max((2 * pair.rank for pair in self.pairs), default=0))
        for name in self.looked_at:
            weight_OI, tuned_OI = self._began(name, dtype), tuned.matrix(name)
            if weight_OI is None or tuned_OI is None:
                continue
            update_OI = tuned_OI.to(self._device, torch.float64) - weight_OI
            svd = dense_svd(update_OI, widest)
            svds[name] = Svd(svd.left_OR.cpu(), svd.values_R.cpu(), svd.right_IR.cpu())
            numbers = numbers_of(svds[name].values_R, weight_OI.norm().item())
            shape = list(update_OI.shape)
            matrices[name] = {"shape": shape, "updates": {ALL: numbers}, "overlap": [], "with_full": None}
        self._full = state, svds
        looked_at, seconds = [len(matrices), len(self.trained)], perf_counter() - started
        return {"left_out": None, "full": None, "looked_at": looked_at, "matrices": matrices, "seconds": seconds}

    def full(self, state: str, folder: Callable[[], Path | None], dtype: str) -> dict[str, Svd] | None:
        """Full fine-tuning's update, of what `of_full` takes; None where `folder` does not find its weights."""
        if self._full is None or self._full[0] != state:
            if (weights := folder()) is None:
                return None
            self.of_full(state, weights, dtype)
        assert self._full is not None
        return self._full[1]

    def count_intruders(self, record: dict[str, Any], dtype: str, weights: Residual | Path) -> None:
        """Put into a record of `of_links` or `of_full`, which were given `weights`, how many intruders each of its
        matrices has: after each link, and in the end. `dtype`: that the base had when it was trained."""
        tuned = self._tuned(weights) if isinstance(weights, Path) else weights
        for name, matrix in record["matrices"].items():
            weight_OI = self._began(name, dtype)
            if weight_OI is None:
                continue
            base = Tuned.of(weight_OI)
            base_left_OM = base.left_vectors()
            intruders = None
            for update, numbers in matrix["updates"].items():
                if isinstance(tuned, Base):
                    tuned_OI = tuned.matrix(name)
                    assert tuned_OI is not None  # it was there for the record
                    after = Tuned.of(tuned_OI.to(self._device))
                    intruders = count_intruders(base_left_OM, after.left_vectors(TOP))
                elif update != "chain":  # which is where its last link led
                    B_OK, A_KI, _ = factors(tuned[: int(update.removeprefix("link "))], name)
                    intruders = count_intruders(base_left_OM, base.plus(B_OK, A_KI).left_vectors(TOP))
                numbers["intruders"] = intruders

    @cached_property
    def trained(self) -> list[str]:
        """The matrices that some low-rank arm trains, in the model's order; where none does, all linear layers'."""
        targets: set[Targets] = {pair.target_modules for pair in self.pairs}
        names = {name for modules in targets for name in target_names(self.skeleton, modules)}
        linear = target_names(self.skeleton, "all-linear")
        return [name for name, _ in self.skeleton.named_modules() if name in (names or linear)]

    @cached_property
    def looked_at(self) -> list[str]:
        """Those of `trained` that full fine-tuning's spectra are taken of: all, or of each kind every n-th layer's."""
        shapes = {name: shape_of(self.skeleton, name) for name in self.trained}
        return sampled(shapes, FULL_FLOPS[self._device.type])

    @property
    def _device(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")  # others have no float64

    def _tuned(self, folder: Path) -> Base:
        return Base(self.skeleton, sorted(folder.glob("model*.safetensors")))

    def _began(self, name: str, dtype: str) -> Tensor | None:
        """W_0 as training began with it, float64 on the device."""
        weight_OI = self.base.matrix(name)
        return None if weight_OI is None else weight_OI.to(getattr(torch, dtype)).to(self._device, torch.float64)


def sampled(shapes: Mapping[str, tuple[int, int]], flops: float) -> list[str]:
    """Names of matrices whose eigendecompositions keep within a budget: all of them, or of each kind (the last part of
    a name) every n-th, so that all kinds and depths have their share. At least one of each kind."""
    # The Gram matrix of the smaller side, and its eigenvectors.
    work = sum(2 * min(shape) * math.prod(shape) + 10 * min(shape) ** 3 for shape in shapes.values())
    kinds = defaultdict(list)
    for name in shapes:
        kinds[name.rpartition(".")[2]].append(name)
    taken = {name for names in kinds.values() for name in names[:: math.ceil(work / flops)]}
    return [name for name in shapes if name in taken]

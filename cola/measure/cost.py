"""What training costs, counted before it runs: FLOPs and positions of every optimizer step.

PyTorch's own counter (torch.utils.flop_counter: matrix products and attention, two FLOPs for a multiply and add) sees
one row go forward and backward through the model on the meta device, with the link's weights attached, so whatever
needs no gradient is not counted. A row's cost is a polynomial of degree two in its length, so three lengths give it.
The output head, which is computed where there is a target, is added; where a pair begins along the full gradient, the
passes and products that make it; and what start and optimizer say of themselves (`NAME_flops` beside each in
`cola/link/ideas`: products and decompositions, so that AdamW has none). Padding, what is done entry by entry, knots,
the encoder of virtual tokens and the frozen pairs beside an unmerged base are left out; codes count as the matrices
they stand for.
"""

import copy
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from cola.errors import one_line
from cola.files import cache_dir, digest, write_text
from cola.link import adapters
from cola.link.base import shape_of
from cola.link.ideas import door
from cola.link.ideas.work import Shape
from cola.link.layers import extended, few_layers
from cola.link.targets import hidden_linear, target_names
from cola.link.text_part import text_config
from cola.recipe.ideas import BY_PEFT, TAKEN_OUT, Idea
from cola.recipe.methods import Lora, Prefix, Settings, Targets, VirtualTokens
from cola.recipe.plan import Link

LENGTHS = (8, 24, 40)  # of the rows that are counted
COUNT_VERSION = 1  # part of the name of a remembered count: raise it when the counting changes
SHAPELESS = {"init", "init_batches", "optimizer", "alpha", "dropout", "use_rslora", "loraplus_lr_ratio"}

Lengths: TypeAlias = Sequence[tuple[int, int]]  # of rows: tokens, and target tokens among them


@dataclass(frozen=True)
class Cost:
    """Of some training."""

    flops: float  # floating-point operations: forward, backward, and the two that follow
    positions: int  # that passed through the model, virtual ones too, padding not
    optimizer: float = 0.0  # FLOPs of it; nan where code of the user's own says none, which are not in `flops` then
    start: float = 0.0  # likewise of the pairs' starts, with the full gradient that they are given

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def of(self, match: str) -> float:
        """The number that `training.match` names."""
        return self.flops if match == "flops" else self.positions


@dataclass
class Meter:
    """Counts what links cost on the training rows."""

    skeleton: PreTrainedModel  # without weights
    rows: Lengths  # of the training rows; empty where each seed draws its own
    checkpointing: bool  # whether activations are computed twice
    redrawn: Mapping[int, Lengths] = field(default_factory=dict)  # of each seed's own rows
    trouble: str | None = None  # why a link could not be counted; its FLOPs are nan then
    # Not shared by `replace`, which may change what is counted.
    _shapes: dict[str, tuple[list[float], float]] = field(default_factory=dict, init=False)
    _named: dict[Targets | None, list[str]] = field(default_factory=dict, init=False)

    @property
    def n_train(self) -> int:
        """Training rows of each seed."""
        return len(next(iter(self.redrawn.values()), self.rows))

    def steps(self, link: Link, order: Sequence[Sequence[int]], seed: int, earlier: Sequence[Link] = ()) -> list[Cost]:
        """The cost of each optimizer step of a link, given the rows of each under a seed, and the links before it."""
        known = self.redrawn[seed] if self.redrawn else self.rows
        costs = self._steps(link.settings, order, known, self.checkpointing)
        if not costs:
            return []
        matrices = self._matrices(link.settings, [one.settings for one in earlier])
        of_steps = _said(link.settings.optimizer, matrices, range(len(order)))
        costs = [cost + Cost(_known(said), 0, optimizer=said) for cost, said in zip(costs, of_steps, strict=True)]
        if isinstance(link.settings, Lora) and not link.keeps_pair:
            if link.settings.init.name not in BY_PEFT:
                [said] = _said(link.settings.init, matrices)
                costs[0] += Cost(_known(said), 0, start=said)
            if link.settings.init_batches:
                costs[0] += self._gradient(link.settings, order[: link.settings.init_batches], known)
        return costs

    def _matrices(self, settings: Settings, earlier: Sequence[Settings]) -> dict[Shape, int]:
        """The matrices that the optimizers of pairs, or of whole weights, are about: how many there are of a shape."""
        if isinstance(settings, Lora):
            names, rank = self._names(settings.target_modules), settings.rank
        else:
            names, rank = self._names(None) if settings.is_whole else [], 0
        used: Counter[str] = Counter()
        for pair in (one for one in earlier if isinstance(one, Lora)):
            times = 2 if pair.init.name in TAKEN_OUT else 1  # with what was taken out
            used.update(dict.fromkeys(self._names(pair.target_modules), times * pair.rank))
        return Counter(Shape(*shape_of(self.skeleton, name), rank, used[name]) for name in names)

    def _names(self, targets: Targets | None) -> list[str]:
        """The linear modules that target_modules mean; of None all but the head."""
        if targets not in self._named:
            self._named[targets] = target_names(self.skeleton, targets) if targets else hidden_linear(self.skeleton)
        return self._named[targets]

    def _steps(
        self, settings: Settings, order: Sequence[Sequence[int]], known: Lengths, checkpointing: bool
    ) -> list[Cost]:
        polynomial, per_target = self._shape(settings, checkpointing)
        virtual = settings.virtual_tokens
        costs = []
        for rows in order:
            tokens, targets = zip(*(known[row] for row in rows), strict=True)
            flops = float(np.polyval(polynomial, tokens).sum()) + per_target * sum(targets)
            costs.append(Cost(flops, sum(tokens) + virtual * len(rows)))
        return costs

    def _gradient(self, pair: Lora, order: Sequence[Sequence[int]], known: Lengths) -> Cost:
        """A pair along the full gradient reads some batches once more before its first step, in eval mode, where no
        activation is computed twice, and multiplies what goes into each matrix by the gradient of what comes out."""
        head, names = self.skeleton.get_output_embeddings(), target_names(self.skeleton, pair.target_modules)
        products = {name: 2 * math.prod(shape_of(self.skeleton, name)) for name in names}
        at_target = sum(products[name] for name in names if self.skeleton.get_submodule(name) is head)
        at_row = sum(products.values()) - at_target
        tokens, targets = (sum(n) for n in zip(*(known[row] for rows in order for row in rows), strict=True))
        all_of_it = sum(self._steps(pair, order, known, False), Cost(at_row * tokens + at_target * targets, 0))
        return replace(all_of_it, start=all_of_it.flops)

    def _shape(self, settings: Settings, checkpointing: bool) -> tuple[list[float], float]:
        """Coefficients of a row's FLOPs in its tokens, highest first, and the FLOPs of each target."""
        # What changes no shape is left out; counting takes seconds, so it is remembered.
        key = {key: value for key, value in settings.record().items() if key not in SHAPELESS}
        # The module's name of a model's own code holds its digest.
        model = [repr(self.skeleton.config.to_dict()), type(self.skeleton).__module__]
        name = digest([*model, key, checkpointing, torch.__version__, COUNT_VERSION])
        note = cache_dir() / "flops" / name
        if name not in self._shapes and note.is_file():
            self._shapes[name] = tuple(json.loads(note.read_text(encoding="utf-8")))
        if name not in self._shapes:
            try:
                model = copy.deepcopy(self.skeleton).requires_grad_(False)
                if not isinstance(settings, VirtualTokens):  # which are stood in for
                    model = adapters.attach(model, settings, 0)
                counts = self._counts(model, settings, checkpointing)
            # A model's own code may ask the meta device for values, and fail in any way: no reason to lose an arm.
            except Exception as error:
                self.trouble = self.trouble or f"{type(error).__name__}: {one_line(error, 200)}"
                self._shapes[name] = [math.nan], math.nan
            else:
                polynomial = np.polyfit(LENGTHS, [flops for flops, _ in counts], 2).round(3)
                self._shapes[name] = polynomial.tolist(), counts[0][1]
                write_text(note, json.dumps(self._shapes[name]))
        return self._shapes[name]

    def _counts(self, model: PreTrainedModel, settings: Settings, checkpointing: bool) -> list[tuple[float, float]]:
        """At each length FLOPs of a row without the head, and of the head at one target; of layers that are all alike
        two and three are counted, which takes a tenth of a large model's time."""
        few = None if isinstance(settings, Prefix) else few_layers(model)
        if few is None:
            return [self._count(model, settings, length, checkpointing) for length in LENGTHS]
        n_layers, models = few
        two, three = ([self._count(one, settings, n, checkpointing) for n in LENGTHS] for one in models)
        return [(extended((a[0], b[0]), n_layers), a[1]) for a, b in zip(two, three, strict=True)]

    def _count(
        self, model: PreTrainedModel, settings: Settings, length: int, checkpointing: bool
    ) -> tuple[float, float]:
        """FLOPs of a row without the head, and of the head at one target."""
        virtual = settings.virtual_tokens
        body: Any = model.base_model
        head: Any = model.get_output_embeddings()
        hidden = text_config(model).hidden_size
        # With a cache, if an empty one, transformers does not look for packed rows, in positions without values here.
        inputs: dict[str, object] = {"past_key_values": DynamicCache(config=text_config(model)), "use_cache": True}
        with torch.device("meta"):
            if isinstance(settings, Prefix):
                inputs["past_key_values"] = _cache(model, virtual)
            if virtual and not isinstance(settings, Prefix):
                inputs["inputs_embeds"] = torch.zeros(1, virtual + length, hidden, requires_grad=True)
            else:
                inputs["input_ids"] = torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            output = body(**inputs).last_hidden_state
            forward = counter.get_total_flops()
            if output.requires_grad:  # not where nothing but the head is trained
                output.sum().backward()
        selected = output[:, :1].detach().requires_grad_(output.requires_grad)
        with FlopCounterMode(display=False) as at_target:
            head(selected).sum().backward()
        return counter.get_total_flops() + checkpointing * forward, float(at_target.get_total_flops())


def _said(idea: Idea, matrices: Mapping[Shape, int], steps: Iterable[int] | None = None) -> list[float]:
    """FLOPs that an idea says of itself, of all matrices: of a start one number, of an optimizer one for each step of
    its link. Of code of the user's own that says none, or may not run, nan."""
    wanted = [()] if steps is None else [(step,) for step in steps]
    says = door.flops_of(idea) if door.may_run(idea) else None
    if says is None:
        return [0.0 if idea.file is None else math.nan] * len(wanted)
    return [sum(n * says(shape, *step) for shape, n in matrices.items()) for step in wanted]


def _known(flops: float) -> float:
    return 0.0 if math.isnan(flops) else flops


def _cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """Keys and values of some positions that want a gradient, as a prefix is."""
    config = text_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.zeros(1, heads, length, size, requires_grad=True) for _ in range(2))
        cache.update(keys, values, layer)
    return cache

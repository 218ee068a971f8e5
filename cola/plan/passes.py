"""A pass through a model on shapes alone: what lies in memory at each moment of it, and what work it is.

The code that trains runs under PyTorch's FakeTensorMode: tensors have a shape, a dtype and a device and no values, and
operators, autograd, autocast and checkpointing do with them what they do with others. So nothing is assumed of what a
layer keeps for its backward pass: each storage is noted as it is made and as it goes. Of layers that are all alike two
and three are run, and the others extended from these.

Fake tensors are the CPU's: PyTorch has no autograd for a fake GPU where there is no real one. Attention is the CPU's
flash kernel then, which keeps what a GPU's keeps.

Axes: B rows, T tokens of a row, N targets.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from cola.link.adapters import trainable, unwrapped
from cola.link.forward import head_in_float32
from cola.link.layers import extended, few_layers
from cola.link.text_part import text_config

PHASES = ("body", "head", "back")  # to the output head; there, to the gradient of what came in; back through the body
PARTS = ("activations", "logits", "gradients")
Product = tuple[int, int, int, str]  # (m, k, n) of a matrix product, and its dtype
NUMBERS = ("attention", "moved", "fresh", "operations")  # of a pass's work
LARGE = 32 << 20  # bytes from which on glibc maps a block of memory for itself
ATTENTION = "_scaled_dot_product"


@dataclass(frozen=True)
class Shape:
    """Of one pass: B rows of T tokens, and N targets in all."""

    rows: int
    tokens: int
    targets: int

    @property
    def positions(self) -> int:
        """B T, padding included."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Work:
    """What a pass computes, layers that are not run extended."""

    products: dict[Product, float]  # how often each
    attention: float  # FLOPs of fused attention
    moved: float  # bytes that all other operations read and write
    fresh: float  # bytes of large results, for which a CPU's allocator asks the system anew each time
    operations: float  # that are no view

    def scaled(self, share: float) -> "Work":
        """The work of a pass over so many of its tokens; each operation is there all the same."""
        products: Counter[Product] = Counter()
        for (m, k, n, dtype), times in self.products.items():
            products[max(1, round(m * share)), k, n, dtype] += times  # pyright: ignore[reportArgumentType]
        moving = self.attention * share, self.moved * share, self.fresh * share
        return Work(dict(products), *moving, self.operations)


@dataclass(frozen=True)
class Seen:
    """A pass: the bytes of each part at the largest moment of each phase, weights and optimizer left out; its work."""

    phases: dict[str, dict[str, float]]
    work: Work
    small: float  # the most that lies in storages below LARGE at once
    large: float  # and in others

    @property
    def largest(self) -> dict[str, float]:
        """The parts at the largest moment of all."""
        return max(self.phases.values(), key=lambda parts: sum(parts.values()))


def training_pass(
    model: PreTrainedModel, shape: Shape, *, dtype: torch.dtype, checkpointing: bool, accumulating: bool
) -> Seen:
    """Forward and backward of one micro-batch through a model on the meta device, whose link is attached.

    Args:
        dtype: Of the base; half precision computes under autocast, as accelerate has it.
        checkpointing: Whether activations are computed twice.
        accumulating: Whether the gradients of an earlier micro-batch are there.
    """

    def go(model: PreTrainedModel, watch: "Watch") -> None:
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        for parameter in trainable(model) if accumulating else ():
            parameter.grad = torch.zeros_like(parameter)
            watch.note(parameter.grad)
        with watch, _autocast(dtype):
            logits_NV = _logits(model, shape, watch, DynamicCacheOfNothing(config=text_config(model)))
            loss = cross_entropy(logits_NV, torch.zeros(shape.targets, dtype=torch.long), reduction="sum")
            del logits_NV
        with watch:
            (loss / shape.targets).backward()
        watch.close([p.grad for p in trainable(model) if p.grad is not None])

    return _seen(model, go)


def scoring_pass(model: PreTrainedModel, shape: Shape, *, dtype: torch.dtype, cached: bool) -> Seen:
    """A pass without gradients; `cached`: keys and values are kept, so that answers can go on from them."""

    def go(model: PreTrainedModel, watch: "Watch") -> None:
        model.eval()
        config = text_config(model)
        cache = DynamicCache(config=config) if cached else DynamicCacheOfNothing(config=config)
        with torch.no_grad(), watch, _autocast(dtype), head_in_float32(model):
            logits_NV = _logits(model, shape, watch, cache)
            nats_N = cross_entropy(logits_NV, torch.zeros(shape.targets, dtype=torch.long), reduction="none")
            del logits_NV, nats_N
        watch.close([])

    return _seen(model, go)


class DynamicCacheOfNothing(DynamicCache):
    """Keys and values are handed on and not kept. With it transformers looks for no packed rows, which would take the
    values of positions that have none; without one it finds that there are none, and takes the same way."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)


def _logits(model: PreTrainedModel, shape: Shape, watch: "Watch", cache: DynamicCache) -> Tensor:
    """As `forward.logits_at`, whose choice of positions takes a mask's values: here the first N of the pass."""
    head: Any = model.get_output_embeddings()
    index_N = torch.arange(shape.targets) % shape.positions

    def select(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        own_BTH = args[0][:, -shape.tokens :]
        selected_NH = own_BTH.flatten(0, 1)[index_N]
        watch.phase = "head"
        if selected_NH.requires_grad:
            selected_NH.register_hook(lambda _: setattr(watch, "phase", "back"))
        return (selected_NH.unsqueeze(0),)

    hook = head.register_forward_pre_hook(select)
    prefixed = unwrapped(model) is not model and model.active_peft_config.peft_type == "PREFIX_TUNING"
    inputs: dict[str, Any] = {} if prefixed else {"past_key_values": cache}  # a prefix is a cache of its own
    try:
        output = model(input_ids=torch.zeros(shape.rows, shape.tokens, dtype=torch.long), use_cache=False, **inputs)
    finally:
        hook.remove()
    return output.logits[0].float()


def _seen(model: PreTrainedModel, go: Callable[[PreTrainedModel, "Watch"], None]) -> Seen:
    few = few_layers(model) if unwrapped(model) is model else None  # a prefix has keys for every layer
    if few is None:
        return _run(model, go).seen()
    n_layers, models = few
    two, three = (_run(one, go).seen() for one in models)

    def of(a: float, b: float) -> float:
        return max(0.0, extended((a, b), n_layers))

    phases = {
        phase: {part: of(two.phases[phase][part], three.phases[phase][part]) for part in PARTS} for phase in PHASES
    }
    known = {*two.work.products, *three.work.products}
    products = {p: of(two.work.products.get(p, 0.0), three.work.products.get(p, 0.0)) for p in known}
    numbers = (of(getattr(two.work, key), getattr(three.work, key)) for key in NUMBERS)
    return Seen(phases, Work(products, *numbers), of(two.small, three.small), of(two.large, three.large))


def _run(model: PreTrainedModel, go: Callable[[PreTrainedModel, "Watch"], None]) -> "Watch":
    watch = Watch()
    # PEFT numbers its virtual tokens by tensors that have values.
    with FakeTensorMode(allow_non_fake_inputs=True), _fake(model):
        watch.leave_out(model)
        go(model, watch)
    return watch


@contextmanager
def _fake(model: nn.Module) -> Iterator[None]:
    """Tensors without values on a CPU in place of the model's, which have no device; as it was, afterwards."""
    made: dict[int, Tensor] = {}
    before = []
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            before.append((tensors, dict(tensors)))
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                tensors[name] = None if tensor is None else made[id(tensor)]
    try:
        yield
    finally:
        for tensors, known in before:
            tensors.update(known)


@dataclass
class Watch(TorchDispatchMode):
    """Notes every storage that is made and when it goes, and what each operation does."""

    phase: str = "body"
    events: list[tuple[int, bool, str]] = field(default_factory=list)  # a storage by number, made or gone, when
    sizes: list[int] = field(default_factory=list)  # bytes of each storage
    made_in: list[str] = field(default_factory=list)  # and its phase
    products: Counter[Product] = field(default_factory=Counter)
    attention: float = 0.0
    moved: float = 0.0
    fresh: float = 0.0
    operations: int = 0
    gradients: set[int] = field(default_factory=set)  # storages that are gradients at the end
    _numbers: dict[int, int] = field(default_factory=dict)  # of the storages that are there

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # asked of fake tensors at every turn
            return out
        fresh = [self.note(t) for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        if any(fresh) or func._schema.is_mutable:
            self._work(func, args, out)
        return out

    def leave_out(self, model: nn.Module) -> None:
        """The model's own tensors are there before the pass, and are none of it."""
        self._numbers |= {t.untyped_storage()._cdata: -1 for t in (*model.parameters(), *model.buffers())}

    def note(self, tensor: Tensor) -> bool:
        """Count a tensor's storage; whether it was not there before."""
        storage = tensor.untyped_storage()
        key, number = storage._cdata, len(self.sizes)
        if key in self._numbers:
            return False
        self._numbers[key] = number
        self.sizes.append(storage.nbytes())
        self.fresh += storage.nbytes() if storage.nbytes() >= LARGE else 0
        self.made_in.append(self.phase)
        self.events.append((number, True, self.phase))
        weakref.finalize(storage, self._gone, key, number)
        return True

    def _gone(self, key: int, number: int) -> None:
        del self._numbers[key]
        self.events.append((number, False, self.phase))

    def _work(self, func: Any, args: Any, out: Any) -> None:
        self.operations += 1
        given = [t for t in chain(*(a if isinstance(a, tuple | list) else (a,) for a in args)) if isinstance(t, Tensor)]
        name = func._schema.name.partition("::")[2]
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = given[-2:]
            times = left.shape[0] if left.ndim == 3 else 1
            m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
            self.products[m, k, n, str(left.dtype).removeprefix("torch.")] += times
        elif name.startswith(ATTENTION):
            query, key = (given[0], given[1]) if "backward" not in name else (given[1], given[2])
            b, h, t, d = query.shape
            # Two products forward; back five, since the scores are computed again. Half of each is above the diagonal.
            self.attention += (5 if "backward" in name else 2) * b * h * t * key.shape[-2] * d
        else:
            outs = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in (*given, *outs))

    def close(self, gradients: list[Tensor]) -> None:
        """The pass is over, and these are the gradients that it leaves."""
        self.gradients = {self._numbers[gradient.untyped_storage()._cdata] for gradient in gradients}

    def seen(self) -> Seen:
        """What the pass took."""
        now = dict.fromkeys(PARTS, 0.0)
        phases = {phase: dict(now) for phase in PHASES}
        kinds, most = [0, 0], [0, 0]  # small storages and large ones
        for number, is_made, phase in self.events:
            part = "gradients" if number in self.gradients else "logits" if self.made_in[number] == "head" else PARTS[0]
            change, kind = self.sizes[number] if is_made else -self.sizes[number], self.sizes[number] >= LARGE
            now[part] += change
            kinds[kind] += change
            most[kind] = max(most[kind], kinds[kind])
            if sum(now.values()) > sum(phases[phase].values()):
                phases[phase] = dict(now)
        return Seen(phases, Work(dict(self.products), *(getattr(self, key) for key in NUMBERS)), *most)

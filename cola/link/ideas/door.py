"""The door of the joints: what an idea is given, what it gives back, and how a recipe's name of one becomes a function.

cola's own ideas and a user's come in by it alike: a function in a file, whose options are its keyword-only arguments.
A user's file is read once, its bytes are what the states' names hold the SHA-256 of, and nothing of it runs before
`admit` was called, which a command does where it is told to (`--allow-code`).

Axes: I input features, O output features, R rank.
"""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model
from torch import Generator, Tensor, nn

from cola.errors import IdeaError, listed, one_line
from cola.link.residual import LinkWeights, Pair, Share
from cola.recipe.ideas import Idea

_admitted: dict[str, ModuleType | bytes] = {}  # files of ideas: what they say, until it has run


@dataclass(frozen=True)
class Matrix:
    """One matrix, as a start is given it: a function of a matrix that returns A (R, I), A and B (O, R), `Factors`, or
    None where PEFT's own draw stays."""

    name: str  # of its module
    scale: float  # alpha / rank: the pair adds scale * B @ A
    rank: int
    earlier: Sequence[Pair]  # what the links before have added to it
    generator: Generator  # seeded by the link, the same for all its matrices
    _weight: Callable[[], Tensor]
    _gradient_OI: Tensor | None

    @cached_property
    def weight_OI(self) -> Tensor:
        """The weight with all that is tied so far, float32, on the model's device."""
        return self._weight()

    @property
    def gradient_OI(self) -> Tensor:
        """The full gradient of the mean loss per target token, float32, over the first `init_batches` batches of the
        link; IdeaError where the recipe says none."""
        if self._gradient_OI is None:
            raise IdeaError("a start that looks at the gradient needs init_batches: how many of the link's batches")
        return self._gradient_OI


@dataclass(frozen=True)
class Factors:
    """What a pair begins with. With B not zero the pair would change the function: so scale * B @ A is taken out of the
    frozen weight, or, where `moves`, the function is changed by it."""

    A_RI: Tensor
    B_OR: Tensor | None = None
    moves: bool = False


@dataclass(frozen=True)
class TrainedPair:
    """A pair that is trained, as an optimizer is given it."""

    name: str  # of its module
    A_RI: nn.Parameter
    B_OR: nn.Parameter
    scale: float


@dataclass(frozen=True)
class Trained:
    """What a link trains, as an optimizer is given it: a function of it that returns a `torch.optim.Optimizer`.

    cola sets the learning rate of each group before each step (`ratio` times the schedule's). What the optimizer
    remembers lies in `state[parameter]`, as tensors and numbers, or as numbers in a group: that is kept and put back.
    """

    groups: list[dict[str, Any]]  # of parameters, each with its `ratio`, as PyTorch's optimizers take them
    pairs: Sequence[TrainedPair]  # of a low-rank link; empty for another
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    n_steps: int  # of the link
    matrices: Sequence[nn.Parameter] = ()  # where all weights are trained: those of the linear layers but the head


@dataclass(frozen=True)
class Seen:
    """What was logged of one step of a link, as a rule for its end is given it: a function of all of them so far that
    says whether the link ends here."""

    step: int  # of the run
    loss: float  # nats per target token over the step's rows, before the update
    grad_norm: float  # L2, before clipping
    learning_rate: float
    update_norm: (
        float | None
    )  # Frobenius norm of scale * B @ A over all matrices, after it; None where there is no pair


State = dict[str, Tensor]  # what an optimizer remembers of a parameter, by its own names


@dataclass(frozen=True)
class HandedOn:
    """One matrix at a knot, as a rule for the optimizer is given it: a function of it that returns the new pair's
    states of A and B, with the same names."""

    name: str  # of its module
    before: Pair  # of the link that was tied
    after: Pair  # as it was drawn for the next
    A: State  # as the link before left them
    B: State


@dataclass(frozen=True)
class PassedOn:
    """One matrix at a knot, as a rule for the pair is given it: a function of it that returns what the next pair begins
    with, as a start does; None where the drawn one stays."""

    name: str  # of its module
    before: Pair  # of the link that was tied, its scale times the share that the knot has kept
    drawn: Pair  # for the next link, by its `init`
    generator: Generator  # seeded by the link, the same for all its matrices


@dataclass(frozen=True)
class Tied:
    """A link whose knot is tied, as a rule for the share that is kept is given it: a function of it that returns the
    share, above 0 and 1 at most, of all its pairs or of each by the name of its module."""

    number: int  # of the link, from 1
    steps: Sequence[Seen]  # all that was logged of it
    pairs: LinkWeights  # by module: what it has learned
    earlier: Sequence[LinkWeights]  # what the chain holds of the links before


def admit(path: str, source: bytes) -> None:
    """Let the code of a file run, as it was read."""
    _admitted[path] = source
    function_of.cache_clear()


@cache
def function_of(idea: Idea) -> Callable[..., Any]:
    """What an idea's name stands for, with its options set; IdeaError where its file may not run, does not, or has no
    such function or options."""
    module = _module_of(idea)
    if idea.file is None:
        return _with_options(getattr(module, idea.name), idea)
    function = getattr(module, idea.function, None)
    if not inspect.isfunction(function):
        known = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        raise IdeaError(f"{idea.file} has no function {idea.function}; it has {listed(known) or 'none'}")
    return _with_options(function, idea)


def may_run(idea: Idea) -> bool:
    """Whether an idea is cola's own, or lies in a file that was let run."""
    return idea.file is None or idea.file in _admitted


def flops_of(idea: Idea) -> Callable[..., Any] | None:
    """The function NAME_flops beside an idea, with those of its options that it takes: the FLOPs of a start for a
    `work.Shape`, of an optimizer for a shape and a step of its link, from 0. None where there is none."""
    if (function := getattr(_module_of(idea), f"{idea.function}_flops", None)) is None:
        return None
    taken = inspect.signature(function).parameters
    return partial(function, **{key: value for key, value in idea.options if key in taken})


def _module_of(idea: Idea) -> ModuleType:
    if idea.file is None:
        return importlib.import_module(f"cola.link.ideas.{idea.name}")
    module = _admitted.get(idea.file)
    if module is None:
        raise IdeaError(f"{idea} is code of {idea.file}, which may not run here")
    if isinstance(module, bytes):
        _admitted[idea.file] = module = _run(idea.file, module)
    return module


def _run(path: str, source: bytes) -> ModuleType:
    """A file as a module."""
    module = ModuleType(f"cola_idea_{hashlib.sha256(source).hexdigest()[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses look for what an annotation means
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        place = (path, error.lineno) if isinstance(error, SyntaxError) else place_of(error) or (path, 0)
        raise IdeaError(f"{path}:{place[1]}: {type(error).__name__}: {one_line(error)}") from error
    return module


def _with_options(function: Callable[..., Any], idea: Idea) -> Callable[..., Any]:
    """A function with an idea's options, checked by the types of its keyword-only arguments as strictly as a recipe's
    keys."""
    asked = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {
        p.name: (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default)
        for p in asked
    }
    model = create_model("Options", __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)
    try:
        options = dict(model.model_validate(dict(idea.options)))
    except ValidationError as error:
        fault = error.errors()[0]
        raise IdeaError(
            f"{idea.name}: option {'.'.join(map(str, fault['loc']))}: {fault['msg'][0].lower()}{fault['msg'][1:]}; its "
            f"options are {listed(fields) or 'none'}"
        ) from None
    return lambda *given: function(*given, **options)


def place_of(error: BaseException) -> tuple[str, int] | None:
    """File and line of the last admitted code that an error passed through; None where it passed through none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _admitted]
    return (frames[-1].filename, frames[-1].lineno or 0) if frames else None


def states_of(given: Any, idea: Idea, matrix: HandedOn) -> tuple[State, State]:
    """What a rule for the optimizer gave back for a matrix, checked; IdeaError says what was expected of it."""
    if not (isinstance(given, tuple) and len(given) == 2):
        raise IdeaError(f"knot.optimizer: {idea} gave a {type(given).__name__}; the states of A and of B are expected")
    for letter, state, before in (("A", given[0], matrix.A), ("B", given[1], matrix.B)):
        if state.keys() != before.keys():
            raise IdeaError(
                f"knot.optimizer: {idea} gave {listed(state) or 'nothing'} for {letter} of {matrix.name}; "
                f"{listed(before)} are expected"
            )
        for key, tensor in state.items():
            if tensor.shape != before[key].shape or not tensor.isfinite().all():
                raise IdeaError(
                    f"knot.optimizer: {idea} gave {key} as {tuple(tensor.shape)} for {letter} of {matrix.name}; finite "
                    f"numbers of shape {tuple(before[key].shape)} are expected"
                )
    return given


def share_of(given: Any, idea: Idea, link: Tied) -> Share:
    """What a rule for the share that is kept gave back, checked; IdeaError says what was expected of it."""
    where = f"knot.merge_fraction: {idea}"
    if isinstance(given, Mapping) and given.keys() != link.pairs.keys():
        odd = next(iter(given.keys() ^ link.pairs.keys()))
        raise IdeaError(
            f"{where} gave shares of {len(given)} modules; one of each of the {len(link.pairs)} that have a pair is "
            f"expected, and {odd} is {'no such module' if odd in given else 'left out'}"
        )
    for name, share in given.items() if isinstance(given, Mapping) else [("the link", given)]:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            told = share if isinstance(share, int | float) else f"a {type(share).__name__}"
            raise IdeaError(f"{where} gave {told} for {name}; a number above 0 and 1 at most is expected")
    return given


def factors_of(given: Any, where: str, name: str, A_shape: tuple[int, int], B_shape: tuple[int, int]) -> Factors | None:
    """What a start, or a rule for the pair, gave back for a matrix, checked; IdeaError says what was expected of it.

    Args:
        where: The key and the idea.
        name: Of the matrix's module.
    """
    if given is None:
        return None
    if isinstance(given, Tensor):
        given = Factors(given)
    if isinstance(given, tuple) and len(given) == 2:
        given = Factors(*given)
    if not isinstance(given, Factors):
        raise IdeaError(f"{where} gave a {type(given).__name__} for {name}; A, (A, B), Factors or None is expected")
    for letter, tensor, shape in (("A", given.A_RI, A_shape), ("B", given.B_OR, B_shape)):
        if tensor is None and letter == "B":
            continue
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise IdeaError(f"{where} gave {letter} as {found} for {name}; {shape} is expected")
        if not tensor.isfinite().all():
            raise IdeaError(f"{where} gave {letter} with NaN or infinity for {name}")
    return given

"""One run over several processes, which torchrun or accelerate launch starts: what rank 0 asks of the others.

Rank 0 runs the recipe as a single process does: it alone reads recipe, data and store, decides, scores, writes, prints
and tracks. Beside it the others train: for each part of a link they are told the base, what the chain has learned, the
link, the weights it has come to and the optimizer's state, and then of each step which rows are whose. So a resume, a
knot, a checkpoint, an end by a rule and an error of the recipe's are no other than in one process, and nothing that the
store holds depends on what another rank might have seen of it.
"""

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from cola.chain import Chain, retie
from cola.data.batches import MicroBatch, Share, collated
from cola.errors import ColaError, RanksLost, RecipeError, one_line
from cola.files import file_digest
from cola.link import adapters, wires
from cola.link.accelerator import make_accelerator, quiet_libraries
from cola.link.base import Base
from cola.link.ideas import door
from cola.link.model import Source
from cola.link.moments import Moments
from cola.link.residual import Pair, Residual
from cola.link.train import tune
from cola.recipe.methods import settings_of
from cola.recipe.plan import Link
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import Rules
from cola.run.assignment import Assignment
from cola.run.course import LinkEnded
from cola.run.interrupt import RESUMABLE, Interrupted


@contextmanager
def team() -> Iterator[bool]:
    """Meet the other processes of the launch; whether this one leads. It tells the others when it has ended."""
    leads = wires.join() == 0
    try:
        yield leads
    except KeyboardInterrupt:
        raise  # perhaps in the middle of a sentence: the others hear the line go dead
    except BaseException:
        _end(leads)
        raise
    _end(leads)


def _end(leads: bool) -> None:
    with suppress(RanksLost):
        if leads:
            wires.send("end")
    wires.leave()


def need_rows(recipe: Recipe) -> None:
    """Raise RecipeError where a step has fewer rows than there are processes: some would never have any."""
    if recipe.training.batch_size < wires.count():
        raise RecipeError(
            f"training.batch_size: {recipe.training.batch_size}: the rows of a step are dealt to the {wires.count()} "
            "processes of this launch, and some would never have any; raise it, or start fewer processes"
        )


@contextmanager
def beside(
    given: Assignment, chain: Chain, link: Link, done: int, moments: Moments | None, steps: Iterable[list[Share]]
) -> Iterator[Iterable[list[MicroBatch]]]:
    """Let the others train a part of a link beside this process; gives the micro-batches of each step, of all ranks.

    Args:
        done: Steps of the link that were made before.
        moments: The optimizer's state after those.
        steps: What each rank reads of each.

    Raises:
        ModelError: another rank cannot.
    """
    if wires.count() == 1:
        yield map(collated, steps)
        return
    taken = adapters.taken_out(chain.model)
    pairs, tensors = _packed([*chain.learned, taken] if taken else chain.learned)
    tensors |= {f"moments/{key}": value for key, value in (moments or {}).items()}
    wires.send("tune", _asked(given, link) | {"learned": pairs, "done": done, "moments": moments is not None}, tensors)
    wires.check_ready(None)
    wires.take_from_leader(adapters.trainable(chain.model))
    try:
        yield _told(steps)
    except (RanksLost, KeyboardInterrupt):
        raise
    except (ColaError, LinkEnded, Interrupted, OSError):  # the others have come to the same, or wait for the next step
        with suppress(RanksLost):
            wires.send("stop")
        raise
    except Exception as error:
        raise RanksLost(f"rank 0 failed in a step that the others wait in: {one_line(error)}") from error
    wires.send("stop")


def _told(steps: Iterable[list[Share]]) -> Iterator[list[MicroBatch]]:
    """The steps, each told to the other ranks before it is taken here."""
    for shares in steps:
        wires.send("step", {"shares": shares})
        yield collated(shares)


def _asked(given: Assignment, link: Link) -> dict[str, Any]:
    """What another rank must know to train a link, as JSON."""
    source, training = given.bench.materials.source, given.recipe.training
    return {
        "job": str(given.path),
        "source": {**asdict(source), "folder": str(source.folder)},
        "fingerprint": given.bench.meta.model.sha256,
        "base": given.arm.base._asdict(),
        "rules": given.arm.rules.model_dump(mode="json"),
        "code": given.bench.materials.code,
        "gradient_checkpointing": training.gradient_checkpointing,
        "optimizer": training.model_dump(include={"betas", "epsilon", "weight_decay", "max_grad_norm"}),
        "link": {
            "settings": link.settings.record(),
            "knot": None if link.knot is None else link.knot.model_dump(mode="json"),
            "first_step": link.first_step,
            "learning_rates": link.learning_rates,
            "seed": link.seed,
        },
    }


def help_along() -> int:
    """Do what rank 0 asks for, until it has ended; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which all ranks get: rank 0 decides what becomes of the run
        signal.signal(number, signal.SIG_IGN)
    quiet_libraries()
    helper = _Helper()
    try:
        while (asked := wires.receive()).what != "end":
            if asked.what == "tune":  # a `stop` may come after an error
                helper.tune(asked)
    except RanksLost:
        print("error: rank 0 of this launch has ended, and with it this process", file=sys.stderr)
        return RESUMABLE
    return 0


class _Helper:
    """A rank that is not the first: the chain as far as rank 0 has asked for it."""

    def __init__(self) -> None:
        self._chain: Chain | None = None
        self._made: Any = None  # what the chain was loaded for
        self._attached: Any = None  # and the link that is attached to it
        self._accelerator: Accelerator | None = None

    def tune(self, asked: wires.Message) -> None:
        """Train a part of a link beside rank 0, or say what is in the way of it."""
        try:
            link = _link_of(asked.values["link"])
            chain = self._ready(asked, link)
        except (ColaError, OSError) as error:
            with suppress(ColaError):
                wires.check_ready(one_line(error))
            return
        try:
            wires.check_ready(None)
            wires.take_from_leader(adapters.trainable(chain.model))
            self._train(asked, chain, link)
        except RanksLost:
            raise
        except ColaError:
            pass  # rank 0 has come to the same, and says it

    def _train(self, asked: wires.Message, chain: Chain, link: Link) -> None:
        assert self._accelerator is not None
        kept = {key.removeprefix("moments/"): t for key, t in asked.tensors.items() if key.startswith("moments/")}
        optimizer = asked.values["optimizer"] | {"betas": tuple(asked.values["optimizer"]["betas"])}
        moments = kept if asked.values["moments"] else None
        done, heard = asked.values["done"], _heard()
        tune(chain.model, link, heard, self._accelerator, lambda *_: None, done=done, moments=moments, **optimizer)

    def _ready(self, asked: wires.Message, link: Link) -> Chain:
        """The chain with the link attached to what was learned before it; its weights are still to be taken."""
        values = asked.values
        _admit(values["code"])
        made = [values[key] for key in ("job", "source", "base", "rules", "gradient_checkpointing")]
        attached = [values["link"], values["learned"]]
        if self._chain is not None and (made, attached) == (self._made, self._attached):
            return self._chain
        if self._chain is None or made != self._made or not link.settings.is_pair:
            self._chain = None  # before there is another one
            self._accelerator = make_accelerator(values["base"]["dtype"])
            self._chain, self._made = _loaded(values, self._accelerator), made
        adapters.detach(self._chain.model)
        retie(self._chain, _unpacked(values["learned"], asked.tensors))
        self._chain.model = adapters.attach(self._chain.model, link.settings, link.seed)
        self._attached = attached
        return self._chain


def _heard() -> Iterator[list[MicroBatch]]:
    """The steps that rank 0 tells, until it says that there are no more for now."""
    while (asked := wires.receive()).what == "step":
        yield collated(asked.values["shares"])


def _loaded(values: dict[str, Any], accelerator: Accelerator) -> Chain:
    """The base, as rank 0 has it; a ModelError where this rank finds another one."""
    source = Source(**{**values["source"], "folder": Path(values["source"]["folder"])})
    if source.fingerprint() != values["fingerprint"]:
        raise ColaError(f"the base that it finds in {source.folder} is not the one that rank 0 has")
    dtype, quantization = values["base"]["dtype"], values["base"]["quantization"]
    model = source.load(dtype, accelerator.device, quantization)
    if values["gradient_checkpointing"]:
        model.activation_checkpointing_enable({"use_reentrant": False})
    base = Base(model, source.files, quantized=quantization is not None)
    return Chain(model, base, Rules.model_validate(values["rules"]))


def _admit(code: dict[str, str]) -> None:
    """Let the files run that rank 0 was allowed to run, if they are the same here."""
    for file, digest in code.items():
        if file_digest(Path(file)) != digest:
            raise ColaError(f"{file} is not what rank 0 has")
        door.admit(file, Path(file).read_bytes())


def _link_of(values: dict[str, Any]) -> Link:
    knot = values["knot"] and Rules.model_validate(values["knot"])
    rates = tuple(values["learning_rates"])
    return Link(**{**values, "settings": settings_of(values["settings"]), "knot": knot, "learning_rates": rates})


TENSORS = ("A_RI", "B_OR", "rows_O", "magnitude_O")  # of a pair


def _packed(learned: Residual) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What a chain has learned, as the scales of each link's pairs, by module, and their tensors by name."""
    tensors = {
        f"learned/{number}/{name}/{key}": tensor
        for number, link in enumerate(learned)
        for name, pair in link.items()
        for key in TENSORS
        if (tensor := getattr(pair, key)) is not None
    }
    return [{name: pair.scale for name, pair in link.items()} for link in learned], tensors


def _unpacked(scales: list[dict[str, float]], tensors: dict[str, Tensor]) -> Residual:
    return [
        {
            name: Pair(scale=scale, **{key: tensors.get(f"learned/{number}/{name}/{key}") for key in TENSORS})  # pyright: ignore[reportArgumentType] - A and B are there
            for name, scale in link.items()
        }
        for number, link in enumerate(scales)
    ]

"""A rank that is not the first: it does what rank 0 asks for (`ranks.py`), and says nothing.

It knows no recipe, no data and no store: the base from its own disk, and what it is told.
"""

import hashlib
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from cola.chain import Chain, retie
from cola.data.batches import MicroBatch, collated
from cola.errors import ColaError, ModelError, RanksLost, one_line
from cola.link import adapters, residual, wires
from cola.link.accelerator import make_accelerator, quiet_libraries
from cola.link.base import Base
from cola.link.ideas import door
from cola.link.model import Source
from cola.link.train import tune
from cola.recipe.methods import settings_of
from cola.recipe.plan import Link
from cola.recipe.resolved import Rules
from cola.run.interrupt import RESUMABLE
from cola.run.shards import unpacked


def help_along() -> int:
    """Do what rank 0 asks for, until it has ended; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which all ranks get: rank 0 decides what becomes of the run
        signal.signal(number, signal.SIG_IGN)
    quiet_libraries()
    helper = _Helper()
    try:
        while (asked := wires.receive()).what != "end":
            helper.do(asked)
    except RanksLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        return RESUMABLE
    return 0


class _Helper:
    """A rank that is not the first: the chain as far as rank 0 has asked for it."""

    def __init__(self) -> None:
        self._chain: Chain | None = None
        self._made: Any = None  # what the chain was loaded for
        self._attached: Any = None  # and the link that is attached to it
        self._accelerator: Accelerator | None = None

    def do(self, asked: wires.Message) -> None:
        """What rank 0 asks for, unless it is over: a `stop` may come after an error."""
        match asked.what:
            case "tune":
                self._tune(asked)
            case "load":
                self._load_shard(asked.values)
            case "attach":
                self._attach(asked)
            case "pass":
                self._pass(asked.values["grad"], asked.values["training"])
            case "write":
                self._write(asked)

    def _tune(self, asked: wires.Message) -> None:
        """Train a part of a link beside rank 0, or say what is in the way of it."""
        try:
            link = self._attach(asked)
        except (ColaError, OSError) as error:
            with suppress(ModelError):  # which rank 0 says
                wires.check_ready(one_line(error))
            return
        try:
            wires.check_ready(None)
            wires.take_from_leader(adapters.trainable(self._model))
            self._train(asked, link)
        except RanksLost:
            raise
        except ColaError:
            pass  # rank 0 has come to the same, and says it

    def _train(self, asked: wires.Message, link: Link) -> None:
        assert self._accelerator is not None
        kept = {key.removeprefix("moments/"): t for key, t in asked.tensors.items() if key.startswith("moments/")}
        optimizer = asked.values["optimizer"] | {"betas": tuple(asked.values["optimizer"]["betas"])}
        moments, done = kept if asked.values["moments"] else None, asked.values["done"]
        steps = self._heard()
        tune(self._model, link, steps, self._accelerator, lambda *_: None, done=done, moments=moments, **optimizer)

    def _heard(self) -> Iterator[list[MicroBatch]]:
        """The steps that rank 0 tells, until it says that there are no more for now."""
        while (asked := wires.receive()).what != "stop":
            if asked.what == "step":
                yield collated(asked.values["shares"])
            else:  # it looks at validation on the way
                self.do(asked)

    def _attach(self, asked: wires.Message) -> Link:
        """Attach the link to what was learned before it; its weights are still to be taken from rank 0."""
        values, link = asked.values, _link_of(asked.values["link"])
        _admit(values["code"])
        made = [values[key] for key in ("job", "source", "base", "rules", "gradient_checkpointing")]
        attached = [made, values["link"], values.get("learned") if not values["shard"] else None]
        if self._chain is not None and attached == self._attached:
            return link
        if not values["shard"]:
            if self._chain is None or made != self._made or not link.settings.is_pair:
                self._load(values)
                self._made = made
            adapters.detach(self._model)
            retie(self._tied, unpacked("learned", values["learned"], asked.tensors))
        adapters.detach(self._model)
        if values["gradient_checkpointing"]:
            self._model.activation_checkpointing_enable({"use_reentrant": False})
        self._tied.model = adapters.attach(self._model, link.settings, link.seed)
        self._attached = attached
        return link

    @property
    def _tied(self) -> Chain:
        assert self._chain is not None
        return self._chain

    @property
    def _model(self) -> PreTrainedModel:
        return self._tied.model

    def _load(self, values: dict[str, Any], shard: bool = False) -> None:
        """The base, as rank 0 has it; a ModelError where this rank finds another one."""
        self._chain = self._attached = None  # before there is another one
        source = Source(**{**values["source"], "folder": Path(values["source"]["folder"])})
        if source.fingerprint() != values["fingerprint"]:
            raise ModelError(f"the base that it finds in {source.folder} is not the one that rank 0 has")
        dtype, quantization = values["base"]["dtype"], values["base"]["quantization"]
        self._accelerator = make_accelerator(dtype)
        device = self._accelerator.device
        model = source.load(dtype, torch.device("cpu") if shard else device, quantization)
        if shard:
            from cola.link import shards

            layers = shards.layers_of(model)
            wires.check_ready(None)
            shards.shard(model, layers, device, wires.count())
        base = Base(model, source.files, quantized=quantization is not None)
        self._chain = Chain(model, base, Rules())

    def _load_shard(self, values: dict[str, Any]) -> None:
        try:
            self._load(values, shard=True)
        except ModelError as error:
            with suppress(ModelError):  # which rank 0 says
                wires.check_ready(one_line(error))

    def _pass(self, grad: bool, training: bool) -> None:
        """Go along in a pass of rank 0's through a base in shards, and back."""
        model = self._model.train(training)
        token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        try:
            with torch.set_grad_enabled(grad):
                logits = model(input_ids=token_11, use_cache=False).logits
            if grad:
                torch.autograd.backward(logits.float().sum() * 0, inputs=adapters.trainable(model))
        except Exception as error:
            raise wires.lost_in_a_pass(error) from error
        model.zero_grad(set_to_none=True)

    def _write(self, asked: wires.Message) -> None:
        """Write this rank's rows of what rank 0 writes."""
        values, base = asked.values, self._tied.base
        now, then = (
            None if values[what] is None else unpacked(what, values[what], asked.tensors) for what in ("now", "before")
        )
        base.remember(values["names"])
        residual.write(self._model, base, now or [], values["names"], values["merge"], then)


def _admit(code: dict[str, str]) -> None:
    """Let the files run that rank 0 was allowed to run, if they are the same here."""
    for file, digest in code.items():
        source = Path(file).read_bytes()
        if hashlib.sha256(source).hexdigest() != digest:
            raise ModelError(f"{file} is not what rank 0 has")
        door.admit(file, source)


def _link_of(values: dict[str, Any]) -> Link:
    knot = values["knot"] and Rules.model_validate(values["knot"])
    rates = tuple(values["learning_rates"])
    return Link(**{**values, "settings": settings_of(values["settings"]), "knot": knot, "learning_rates": rates})

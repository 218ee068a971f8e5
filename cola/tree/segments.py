"""Names: a state of the weights is named by the hash of everything that determined it, and of nothing else.

    root       the base's fingerprint, the number format, the kind of device, the training version
    link       the name it starts from, the knot between, what is trained and how, the link's seed
    step       its exact learning rate and the digest of the tokens of its micro-batches

    name(0) = H(root)        name(n) = H(link, step 1, ..., step n)

Whatever comes later (how many steps and links there will be, other arms, how often validation is looked at) is in
no name. So arms, seeds, trials of a search and recipes that agree up to a step have the same name there, and what
one of them has trained serves the others. A *segment* is the steps of one link up to a state that is kept.

No torch, no files.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from cola.files import canonical, digest
from cola.recipe.arms import Prune
from cola.recipe.ideas import ADAMW, Idea
from cola.recipe.methods import Lora
from cola.recipe.plan import Job, Link
from cola.recipe.resolved import Rules
from cola.recipe.schema import Training

# Part of every name: raise it when the same causes would train other weights (tests/golden holds a loss curve).
TRAINING_VERSION = 4

# Settings of a link that its name has in other words: the modules by their full names, the start, the rates.
ELSEWHERE = {"method", "target_modules", "init", "init_batches", "optimizer", "loraplus_lr_ratio"}

Causes = dict[str, Any]
Code = Mapping[str, str]
NO_CODE: Code = {}
ALONE: Causes = {}


def root_causes(base_sha256: str, dtype: str, device: str, quantization: str | None = None) -> Causes:
    """What a state without any training depends on: the fingerprint of the base's config and weights, their number
    format, the kind of device (`cpu` or `cuda`), and the codes of frozen weights if they are any."""
    causes = {"base": base_sha256, "dtype": dtype, "device": device, "training_version": TRAINING_VERSION}
    return causes | ({"quantization": quantization} if quantization else {})


def state_name(causes: Causes) -> str:
    """The name of the state that a segment's causes (`Lineage.causes`) lead to."""
    return _names(causes["link"], causes["steps"])[-1]


def _names(link: Causes, steps: Iterable[Sequence[Any]]) -> list[str]:
    """The names after each of a link's steps."""
    running = hashlib.sha256(canonical(link).encode())
    names = []
    for step in steps:
        running.update(canonical(list(step)).encode())
        names.append(running.copy().hexdigest()[:32])
    return names


@dataclass(frozen=True)
class Lineage:
    """The states of one arm and seed, from the base to its last step."""

    root: Causes  # of the base's name
    links: list[Link]
    headers: list[Causes]  # of each link, its parent's name among them
    steps: list[tuple[float, str]]  # of each, the learning rate and the digest of the micro-batches
    names: list[str]  # after 0, 1, .., n steps

    @property
    def n_steps(self) -> int:
        """Optimizer steps in all."""
        return len(self.steps)

    def link_of(self, step: int) -> int:
        """Index of the link that makes a step (counted from 1)."""
        return next(i for i, link in enumerate(self.links) if step <= link.last_step)

    def causes(self, step: int) -> Causes:
        """What the segment that ends after `step` came from, in clear; `state_name` hashes it to its name."""
        number = self.link_of(step)
        first = self.links[number].first_step
        return {"link": self.headers[number], "steps": [list(cause) for cause in self.steps[first:step]]}


def lineage(
    root: Causes,
    links: list[Link],
    training: Training,
    modules_of: Callable[[Link], Sequence[str] | None],
    digests: Sequence[str],
    buffers: Sequence[str] = (),
    code: Code = NO_CODE,
    spread: Mapping[str, Any] = ALONE,
) -> Lineage:
    """Name every state of a path from `root_causes` on.

    Args:
        training: Gives the optimizer's constants.
        modules_of: Full names of the modules that a link adapts, however the recipe spells them; None for all weights.
        digests: Of the micro-batches of each step.
        buffers: Of the model's state, which are kept where all weights are.
        code: SHA-256 of each file whose functions the links take.
        spread: Over how many processes a step's rows are dealt and its gradient summed (`dp`), and whether the base
            lies in shards on them (`shard`), whose products round in an order of their own; nothing for one process.
    """
    names, headers, steps = [digest(root)], [], []
    for number, link in enumerate(links):
        batches = digests[link.first_step : link.last_step]
        header = {
            "parent": names[-1],
            "method": link.settings.method,
            "settings": {key: value for key, value in link.settings.record().items() if key not in ELSEWHERE},
            "modules": modules_of(link),
            "start": _start(link, number, batches, root["dtype"], code),
            "seed": link.seed,
            "knot": None if link.knot is None else knot_causes(link.knot, "quantization" in root, code),
            "optimizer": {
                "name": "AdamW" if link.settings.optimizer == ADAMW else link.settings.optimizer.cause(code),
                "betas": list(training.betas),
                "epsilon": training.epsilon,
                "weight_decay": training.weight_decay,
                "max_grad_norm": training.max_grad_norm,
                "ratio": link.settings.loraplus_lr_ratio if isinstance(link.settings, Lora) else 1.0,
            },
        }
        if link.settings.is_whole and buffers:
            header["buffers"] = list(buffers)  # what was kept before they were is no whole model
        header |= spread
        link_steps = list(zip(link.learning_rates, batches, strict=True))
        names += _names(header, link_steps)
        headers.append(header)
        steps += link_steps
    return Lineage(root, links, headers, steps, names)


def _start(link: Link, number: int, digests: Sequence[str], dtype: str, code: Code) -> Causes:
    """How the link's weights are drawn; orthogonal to nothing is the default draw."""
    if link.keeps_pair:
        return {"init": "kept"}
    if not isinstance(link.settings, Lora):
        return {"init": "default"}
    init = link.settings.init.cause(code)
    start: Causes = {"init": "default" if init == "orthogonal" and not number else init}
    if link.settings.init_batches:
        start["batches"] = list(digests[: link.settings.init_batches])
        start |= {"scaled": True} if dtype == "float16" else {}  # before it was, small gradients were lost
    return start


def knot_causes(rules: Rules, quantized: bool, code: Code = NO_CODE) -> Causes:
    """What a knot does to the weights and to the optimizer, each effect in one spelling: moments and step count set to
    zero are a fresh optimizer."""
    optimizer: Any = rules.optimizer if rules.hands_on else "fresh"
    if isinstance(optimizer, Prune):
        optimizer = optimizer.model_dump(exclude_none=True)
    elif isinstance(optimizer, Idea):
        optimizer = optimizer.cause(code)
    resets = {"optimizer": optimizer}
    if rules.keeps_pair:
        return {"pair": "keep", **resets}  # untied again where the next link begins, however it was tied
    passed = {"pair": rules.pair.cause(code)} if isinstance(rules.pair, Idea) else {}
    return {"merge": merge_of(rules, quantized), "fraction": fraction_of(rules, code), **resets, **passed}


def fraction_of(rules: Rules, code: Code = NO_CODE) -> Any:
    """Which share of a pair a knot keeps: a number, or by what rule."""
    return rules.merge_fraction.cause(code) if isinstance(rules.merge_fraction, Idea) else rules.merge_fraction


def merge_of(rules: Rules, quantized: bool) -> str:
    """How links are tied; a quantized base has its pairs beside the codes whatever the rules say."""
    return "no" if quantized else rules.merge


@dataclass
class Tree:
    """The lineages of a recipe's jobs, and where they are cut into segments."""

    lineage: Callable[[Job], Lineage]  # the states of a job whose searched values are known
    _cuts: set[str] = field(default_factory=set)
    _inner: set[str] = field(default_factory=set)

    def plan(self, lineages: Iterable[Lineage]) -> None:
        """Cut the lineages of all jobs that there may be into segments: at the ends of links and where two of them
        part."""
        after: dict[str, set[str]] = defaultdict(set)
        for path in lineages:
            self._cuts |= {path.names[link.last_step] for link in path.links}
            for name, following in pairwise(path.names):
                after[name].add(following)
        self._cuts |= {name for name, following in after.items() if len(following) > 1}
        self._inner |= set(after)

    def cuts(self, job: Job) -> list[int]:
        """Steps of the job after which its state is kept."""
        path = self.lineage(job)
        ends = {link.last_step for link in path.links}
        return [step for step, name in enumerate(path.names) if step and (name in self._cuts or step in ends)]

    def goes_on(self, name: str) -> bool:
        """Whether some job trains on from a state with the optimizer as it is there, or ties it and goes on."""
        return name in self._inner

    def segments(self, jobs: Iterable[Job]) -> dict[str, list[str]]:
        """Each segment that the jobs need, a shared one once: the name of its end, and of the states of its steps."""
        segments = {}
        for job in jobs:
            names = self.lineage(job).names
            for start, end in pairwise([0, *self.cuts(job)]):
                segments[names[end]] = names[start + 1 : end + 1]
        return segments

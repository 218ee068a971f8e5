"""From a recipe to what will be done: each arm's links, their steps and the exact learning rate of each step.

Pure arithmetic: no torch, no files, no network. Steps are optimizer steps.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Literal

from cola.errors import RecipeError
from cola.recipe import OneLink, Recipe, Search, Training


@dataclass(frozen=True, kw_only=True)
class Link:
    """One link of an arm, ready to be trained.

    Attributes:
        method: `lora` or `full`.
        rank: Rank of the pair; None for `full`.
        alpha: The update is scaled by alpha / rank; None for `full`.
        dropout: Dropout probability on the pair's input.
        target_modules: Names of linear layers, or `all-linear`; None for `full`.
        first_step: Steps of the run before this link.
        learning_rates: The learning rate of each of the link's optimizer steps.
        seed: Seed of the pair's first draw and of its dropout.
    """

    method: Literal["lora", "full"]
    rank: int | None
    alpha: float | None
    dropout: float
    target_modules: tuple[str, ...] | str | None
    first_step: int
    learning_rates: tuple[float, ...]
    seed: int

    @property
    def last_step(self) -> int:
        """Steps of the run once this link is tuned."""
        return self.first_step + len(self.learning_rates)


def derived_seed(*causes: object) -> int:
    """A seed below 2**48 (exact in JSON everywhere) that depends on all causes and nothing else."""
    digest = hashlib.sha256(repr(causes).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def budget_steps(training: Training, n_train: int) -> int:
    """Optimizer steps of the budget; an epoch's last batch may be smaller and is a step of its own."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, round(training.epochs * steps_per_epoch(training, n_train)))


def steps_per_epoch(training: Training, n_train: int) -> int:
    """Optimizer steps that one pass over the training rows takes."""
    return math.ceil(n_train / training.batch_size)


def plan_arm(recipe: Recipe, arm: str, seed: int, n_train: int, learning_rate: float | None = None) -> list[Link]:
    """The links of one arm and seed.

    Args:
        recipe: The resolved recipe.
        arm: Name of the arm.
        seed: One of the recipe's seeds.
        n_train: Training examples.
        learning_rate: Peak learning rate chosen by a search; None takes the recipe's (a grid's first value).

    Raises:
        RecipeError: the links' own lengths do not add up to the run's steps.
    """
    training = recipe.training
    settings = recipe.links_of(arm)
    if not settings:
        return []
    lengths = _share(recipe, arm, settings, n_train)
    own = recipe.learning_rate_of(arm)
    peak = learning_rate or (own.search[0] if isinstance(own, Search) else own)
    scope = sum(lengths) if training.scope == "run" else min(lengths)
    if training.warmup_steps >= scope:
        raise RecipeError(
            f"training.warmup_steps: {training.warmup_steps:g} of {scope} steps leave none for the rest of the schedule"
        )
    whole = schedule(training, sum(lengths), sum(lengths))
    links, first = [], 0
    for number, (link, length) in enumerate(zip(settings, lengths, strict=True)):
        shape = whole[first : first + length] if training.scope == "run" else schedule(training, length, length)
        modules = link.target_modules
        links.append(
            Link(
                method=link.method or "lora",
                rank=link.rank,
                alpha=link.alpha,
                dropout=link.dropout or 0.0,
                target_modules=tuple(modules) if isinstance(modules, list) else modules,
                first_step=first,
                learning_rates=tuple((_number(link.learning_rate) or peak) * factor for factor in shape),
                # The first link's draw depends on the seed alone, so LoRA and a chain start from the same pair.
                seed=derived_seed("link", seed, number),
            )
        )
        first += length
    return links


def _number(rate: float | Search | None) -> float | None:
    assert not isinstance(rate, Search), "the recipe refuses a search under one link"
    return rate


def _share(recipe: Recipe, arm: str, links: list[OneLink], n_train: int) -> list[int]:
    total = budget_steps(recipe.training, n_train)
    per_epoch = steps_per_epoch(recipe.training, n_train)
    own = [link.steps or (max(1, round(link.epochs * per_epoch)) if link.epochs else None) for link in links]
    if recipe.training.protocol == "grow":
        return [steps or total for steps in own]
    free = [i for i, steps in enumerate(own) if steps is None]
    left = total - sum(steps or 0 for steps in own)
    if len(free) == len(links) and total < len(links):
        raise RecipeError(
            f"arms.{arm}.links: {len(links)} links need {len(links)} steps or more and the run has {total}; raise "
            "training.epochs or training.steps, or lower training.batch_size"
        )
    if left < len(free) or (not free and left != 0):
        raise RecipeError(
            f"arms.{arm}.links: the links' own lengths take {total - left} of the run's {total} steps"
            + (f", which leaves too few for the other {len(free)}" if free else "; they must add up")
        )
    for place, i in enumerate(free):
        own[i] = (place + 1) * left // len(free) - place * left // len(free)
    return [steps for steps in own if steps is not None]


def schedule(training: Training, n_steps: int, scope: int) -> list[float]:
    """Factors of the peak learning rate for steps 0 .. n_steps - 1 of a scope.

    The formulas are those of transformers' `get_linear_schedule_with_warmup` and its siblings, so the first
    step of a warm-up has learning rate 0.
    """
    warmup = round(training.warmup_steps * scope) if training.warmup_steps < 1 else int(training.warmup_steps)
    factors = []
    for step in range(n_steps):
        if step < warmup:
            factors.append(step / max(1, warmup))
            continue
        done = (step - warmup) / max(1, scope - warmup)
        match training.schedule:
            case "constant":
                factors.append(1.0)
            case "linear":
                factors.append(max(0.0, 1.0 - done))
            case "cosine":
                factors.append(max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))))
    return factors


def evaluation_steps(recipe: Recipe, links: list[Link], n_train: int) -> list[int]:
    """Steps after which validation is looked at, the last step always among them."""
    if not links:
        return [0]
    total = links[-1].last_step
    match recipe.evaluation.every:
        case "never":
            points = []
        case "link":
            points = [link.last_step for link in links]
        case "epoch":
            points = list(range(0, total, steps_per_epoch(recipe.training, n_train)))[1:]
        case steps:
            points = list(range(steps, total, steps))
    return sorted({*points, total})


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training from the base weights: an arm, a seed, and the learning rate where it is searched."""

    arm: str
    seed: int
    learning_rate: float | None = None
    trial: bool = False

    @property
    def label(self) -> str:
        rate = f" lr {self.learning_rate:g}" if self.trial else ""
        return f"{self.arm} seed {self.seed}{rate}"


def trials_of(recipe: Recipe, arm: str) -> list[Job]:
    """The trainings that choose an arm's learning rate; none where it is given."""
    rate = recipe.learning_rate_of(arm)
    if not isinstance(rate, Search) or not recipe.arms[arm].n_links:
        return []
    seeds = rate.seeds or recipe.seeds[:1]
    return [Job(arm=arm, seed=s, learning_rate=r, trial=True) for r in rate.search for s in seeds]


def candidates_of(recipe: Recipe) -> list[Job]:
    """Everything that may be trained: the trials, and each arm and seed at every learning rate of its search."""
    found = []
    for job in jobs_of(recipe):
        rate = recipe.learning_rate_of(job.arm)
        searched = isinstance(rate, Search) and not job.trial and recipe.arms[job.arm].n_links
        rates = rate.search if searched and isinstance(rate, Search) else [job.learning_rate]
        found += [replace(job, learning_rate=each) for each in rates]
    return found


def jobs_of(recipe: Recipe) -> list[Job]:
    """Everything to be trained, in order: all trials, then one seed of all arms at a time.

    The arm that `ft_gap` measures against comes first in each seed, so that the others' distance is known at once.
    """
    arms = sorted(recipe.arms, key=lambda arm: arm != recipe.full_arm)
    trials = [job for arm in arms for job in trials_of(recipe, arm)]
    return trials + [Job(arm=arm, seed=seed) for seed in recipe.seeds for arm in arms]

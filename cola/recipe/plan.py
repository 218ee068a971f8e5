"""From a recipe to what will be done: each arm's links, their steps and the exact learning rate of each step.

Pure arithmetic: no torch, no files, no network. Steps are optimizer steps.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass, replace

from cola.errors import RecipeError
from cola.recipe.ideas import Idea
from cola.recipe.methods import Settings
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import Rules
from cola.recipe.schema import LATE_DECAY, MOST_STEPS, Choice, Search, Training


@dataclass(frozen=True, kw_only=True)
class Link:
    """One link of an arm, ready to be trained. Who trains it in a loop of their own gives settings and seed alone."""

    settings: Settings
    knot: Rules | None = None  # at the joint before it; None for the first link
    first_step: int = 0  # steps of the run before it
    learning_rates: tuple[float, ...] = ()  # of each of its optimizer steps
    seed: int  # of its weights' first draw and of its dropout
    until: Idea | None = None  # by which it may end before its last step; None for the last link

    @property
    def last_step(self) -> int:
        """Steps of the run once this link is tuned."""
        return self.first_step + len(self.learning_rates)

    @property
    def keeps_pair(self) -> bool:
        """Whether it goes on with the pair of the link before."""
        return self.knot is not None and self.knot.keeps_pair

    @property
    def pair_rule(self) -> Idea | None:
        """By which its pair begins, from the one before; None where that is its `init` alone."""
        return self.knot.pair if self.knot is not None and isinstance(self.knot.pair, Idea) else None


def derived_seed(*causes: object) -> int:
    """A seed below 2**48 (exact in JSON everywhere) that depends on all causes and nothing else."""
    digest = hashlib.sha256(repr(causes).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def budget_steps(training: Training, n_train: int) -> int:
    """Optimizer steps of the budget; an epoch's last batch may be smaller and is a step of its own."""
    # A recipe gives one of the two.
    return training.steps or max(1, round((training.epochs or 0) * steps_per_epoch(training, n_train)))


def steps_per_epoch(training: Training, n_train: int) -> int:
    """Optimizer steps that one pass over the training rows takes."""
    return math.ceil(n_train / training.batch_size)


def plan_arm(
    recipe: Recipe,
    arm: str,
    seed: int,
    n_train: int,
    choice: Choice = (),
    total: int | None = None,
    ended: tuple[int, ...] = (),
) -> list[Link]:
    """The links of one arm and seed, for so many training examples.

    Args:
        choice: Values chosen by a search; without any, the first that it tries.
        total: Optimizer steps of the arm, where they are matched to another arm's cost; default: the budget's.
        ended: Steps of the run after which its first links have ended by their rules; the last link makes what the
            others leave.

    Raises:
        RecipeError: the links' own lengths do not add up to the run's steps, there are more steps than a run may have,
            or a link has no learning rate above 0.
    """
    recipe = recipe.with_choice(arm, choice or recipe.choices_of(arm)[0])
    resolved, training = recipe.resolved(arm), recipe.training
    if not resolved.links:
        return []
    rules, entries = resolved.rules, recipe.arms[arm].entries
    rates = [entry.learning_rate or recipe.learning_rate_of(arm) for entry in entries]
    peaks = [float(rate) for rate in rates if not isinstance(rate, Search)]  # all: a choice took its place
    lengths = _share(recipe, arm, n_train, total or budget_steps(training, n_train))
    if sum(lengths) > MOST_STEPS:  # before there is a number for each
        raise RecipeError(
            f"arms.{arm}: {sum(lengths)} optimizer steps; {MOST_STEPS} are the most: lower training.epochs or "
            "training.steps, raise training.batch_size, or take fewer links"
        )
    _check_warmups(arm, lengths, training, rules)
    for number, end in enumerate(ended):
        lengths[-1] += sum(lengths[: number + 1]) - end
        lengths[number] = end - sum(lengths[:number])
    links = [
        Link(
            settings=resolved.links[number],
            knot=rules if number else None,
            first_step=sum(lengths[:number]),
            learning_rates=tuple(peaks[number] * factor for factor in factors),
            # The first link's draw depends on the seed alone, so LoRA and a chain start from the same pair.
            seed=derived_seed("link", seed, number),
            until=resolved.untils[number] if number < len(lengths) - 1 else None,
        )
        for number, factors in enumerate(_factors(lengths, training, rules))
    ]
    for number, link in enumerate(links, 1):
        if not any(link.learning_rates) and not ended:  # the first step of a warm-up has none
            raise RecipeError(
                f"arms.{arm}.links: link {number} has one step, the first of a warm-up, whose learning rate is 0, so "
                "it would learn nothing; give it more steps, or leave out the warm-up"
            )
    return links


def _check_warmups(arm: str, lengths: list[int], training: Training, rules: Rules) -> None:
    """A warm-up must leave steps of its scope for what comes after it, a late decay among them."""
    scopes = [(sum(lengths) if rules.schedule == "run" else lengths[0], training.warmup_steps, "training")]
    scopes += [(length, rules.warmup_steps, f"arms.{arm}.knot") for length in lengths[1:]]
    decay = training.decay_steps or 0
    for number, (scope, warmup, section) in enumerate(scopes):
        if warmup >= scope:
            raise RecipeError(
                f"{section}.warmup_steps: {warmup:g} of {scope} steps leave none for the rest of the schedule"
            )
        if (rules.schedule == "link" or not number) and decay >= 1 and decay > scope - _warmup(warmup, scope):
            raise RecipeError(
                f"training.decay_steps: {decay:g} of {scope} steps, of which the warm-up takes "
                f"{_warmup(warmup, scope)}, are more than are left; lower it, or give a fraction"
            )


def _factors(lengths: list[int], training: Training, rules: Rules) -> list[list[float]]:
    """Of each link's steps the learning rate as a factor of its peak."""
    if rules.schedule == "link":
        warmups = [training.warmup_steps] + [rules.warmup_steps] * (len(lengths) - 1)
        return [schedule(training, length, warmup) for length, warmup in zip(lengths, warmups, strict=True)]
    whole = iter(schedule(training, sum(lengths), training.warmup_steps))
    shares = [list(itertools.islice(whole, length)) for length in lengths]
    for share in shares[1:]:
        if rewarm := _warmup(rules.warmup_steps, len(share)):
            share[:] = [factor * min(1.0, step / rewarm) for step, factor in enumerate(share)]
    return shares


def _share(recipe: Recipe, arm: str, n_train: int, total: int) -> list[int]:
    """Optimizer steps of each link, whatever they do not say themselves shared out evenly."""
    own = own_lengths(recipe, arm, n_train)
    if recipe.training.protocol == "grow":
        return [steps or total for steps in own]
    free = [i for i, steps in enumerate(own) if steps is None]
    left = total - sum(steps or 0 for steps in own)
    if len(free) == len(own) and total < len(own):
        raise RecipeError(
            f"arms.{arm}.links: {len(own)} links need {len(own)} steps or more and the run has {total}; raise "
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


def own_lengths(recipe: Recipe, arm: str, n_train: int) -> list[int | None]:
    """Optimizer steps of an arm's links, as far as they say them themselves."""
    entries, per_epoch = recipe.arms[arm].entries, steps_per_epoch(recipe.training, n_train)
    return [entry.steps or (max(1, round(entry.epochs * per_epoch)) if entry.epochs else None) for entry in entries]


def _warmup(warmup_steps: float, scope: int) -> int:
    """Steps of a warm-up; a fraction leaves one step at least for what comes after it."""
    return min(round(warmup_steps * scope), scope - 1) if warmup_steps < 1 else int(warmup_steps)


def _decay(training: Training, scope: int) -> int:
    """Steps of a late decay, one at least."""
    steps = training.decay_steps or LATE_DECAY
    return max(1, round(steps * scope)) if steps < 1 else int(steps)


def schedule(training: Training, n_steps: int, warmup_steps: float) -> list[float]:
    """Factors of the peak learning rate for the steps of a scope, by the formulas of transformers'
    `get_linear_schedule_with_warmup` and its siblings, so that the first step of a warm-up has learning rate 0."""
    warmup = _warmup(warmup_steps, n_steps)
    rising, rest = [step / warmup for step in range(min(warmup, n_steps))], n_steps - warmup
    match training.schedule:
        case "constant":
            return rising + [1.0] * rest
        case "linear":
            return rising + [1.0 - step / rest for step in range(rest)]
        case "cosine":
            return rising + [0.5 * (1.0 + math.cos(math.pi * (step / rest))) for step in range(rest)]
        case "wsd":
            decay = min(_decay(training, n_steps), rest)
            return rising + [1.0] * (rest - decay) + [1.0 - step / decay for step in range(decay)]


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


def looking_steps(recipe: Recipe, links: list[Link], n_train: int) -> list[int]:
    """Those of them at which a link is looked at as it is, attached. After the last step the tied model is scored in
    any case, and that is the last look; but where the best is to be chosen, all have to be alike: a knot rounds."""
    steps = evaluation_steps(recipe, links, n_train)
    return steps if recipe.evaluation.checkpoint == "best" else steps[:-1]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training from the base weights: an arm, a seed, and the values of what is searched."""

    arm: str
    seed: int
    choice: Choice = ()
    trial: bool = False
    ended: tuple[int, ...] = ()  # steps after which its first links have ended by their rules

    @property
    def label(self) -> str:
        """The job in words."""
        return f"{self.arm} seed {self.seed}" + (f" {choice_text(self.choice)}" if self.trial else "")


def choice_text(choice: Choice) -> str:
    """Searched values in words: `learning_rate=0.0006 rank=8`."""
    return " ".join(f"{k}={'+'.join(v) if isinstance(v, tuple) else repr(v).strip(chr(39))}" for k, v in choice)


def trials_of(recipe: Recipe, arm: str, seed: int) -> list[Job]:
    """The trainings that choose the searched values of an arm under a scored seed; none where nothing is searched.

    All seeds have the same trials, unless each chooses for itself: by trials under it, whose steps it then shares.
    """
    if (search := recipe.search_of(arm)) is None:
        return []
    seeds = [seed] if search.per == "seed" else recipe.search_seeds(arm)
    return [Job(arm=arm, seed=one, choice=choice, trial=True) for choice in recipe.choices_of(arm) for one in seeds]


def candidates_of(recipe: Recipe) -> list[Job]:
    """Everything that may be trained: the trials, and each arm and seed at every choice of its search."""
    choices = {arm: recipe.choices_of(arm) for arm in recipe.arms}
    jobs = jobs_of(recipe)
    return [replace(job, choice=c) for job in jobs for c in ([job.choice] if job.trial else choices[job.arm])]


def jobs_of(recipe: Recipe) -> list[Job]:
    """Everything to be trained, in order: the trials that all seeds share, then one seed of all arms at a time, each
    after the trials of its own if it has any, so that the weights of no more trials than one seed's are kept.

    The arm that `ft_gap` measures against comes first in each seed, so that the others' distance is known at once.
    """
    arms = sorted(recipe.arms, key=lambda arm: arm != recipe.full_arm)
    jobs: dict[Job, None] = {}
    for seed in recipe.seeds:
        jobs |= dict.fromkeys(job for arm in arms for job in trials_of(recipe, arm, seed))
        jobs |= dict.fromkeys(Job(arm=arm, seed=seed) for arm in arms)
    return list(jobs)


def tuned_as_a_whole(recipe: Recipe) -> list[str]:
    """The arms that train all weights."""
    return [arm for arm in recipe.arms if any(link.is_whole for link in recipe.resolved(arm).links)]


def room_of(recipe: Recipe, n_parameters: int) -> int:
    """Bytes of disk that a new run on a base of so many parameters may come to keep at once."""
    weights = 4 * n_parameters  # kept in float32
    full = tuned_as_a_whole(recipe)
    # Of all weights: a checkpoint with its two moments, and the end or the best so far.
    room = 50_000_000 + (4 * weights if full else 0)
    kept = len(full) * len(recipe.seeds) if recipe.keep_full_weights else 0
    # Of every value that is tried, until the best is known: before any is kept, or beside those of earlier seeds.
    tried = sum(len(trials_of(recipe, arm, recipe.seeds[0])) for arm in full)
    each_seed = any(search.per == "seed" for search in recipe.search_rules.values())
    return room + weights * (kept + tried if each_seed else max(kept, tried))

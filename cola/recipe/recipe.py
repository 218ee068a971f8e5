"""A whole recipe, and what its keys mean together: searches, choices and the arms that come of them.

`read.py` reads one from YAML, and `checks.py` says what no recipe may be. Nothing heavier than pydantic is imported.
"""

import itertools
from typing import Annotated

from pydantic import Field

from cola.recipe.arms import SEARCHABLE, Arm, KnotRules, LinkSettings
from cola.recipe.data_section import Data
from cola.recipe.ideas import Idea
from cola.recipe.methods import Lora
from cola.recipe.resolved import ResolvedArm, resolve
from cola.recipe.schema import (
    MOST_ARMS,
    TRIAL_SEEDS,
    Choice,
    Comparison,
    Evaluation,
    LocalPath,
    Model,
    Search,
    Section,
    Seed,
    Tracking,
    Training,
    optional,
)


class Recipe(Section):
    """A whole comparison."""

    name: str = Field(
        max_length=100,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Names the run folder and the group at the tracker.",
    )
    model: Model
    data: Data
    training: Training
    link: LinkSettings = Field(
        default_factory=LinkSettings, description="What every link trains unless its arm says otherwise."
    )
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)], Arm] = Field(
        min_length=1, max_length=MOST_ARMS, description="What is compared, by name."
    )
    knot: KnotRules = Field(default_factory=KnotRules)
    seeds: list[Seed] = Field(
        min_length=1, description="Each arm is trained once per seed: order of the data, first draw of a pair, dropout."
    )
    evaluation: Evaluation = Field(default_factory=Evaluation)
    comparison: Comparison = Field(default_factory=Comparison)
    tracking: Tracking = Field(default_factory=Tracking)
    keep_full_weights: bool = Field(
        default=True,
        description="Keep the weights of fully fine-tuned arms: a whole model for each seed. `false`: until all arms "
        "of the seed are there and their spectra are compared with it, then the scores only; they are trained again "
        "where something new is asked about them.",
    )
    output: LocalPath = Field(default="runs", description="Folder in which each run makes its own folder.")
    store: LocalPath | None = optional(
        "Folder of the segments that runs share. Default: `$COLA_STORE`, else `store` in the cache."
    )
    checkpoint_seconds: Annotated[float, Field(ge=0)] = Field(
        default=60.0,
        description="Least time between two checkpoints inside a segment; longer where one would take over 2 % of it. "
        "0: after every step.",
    )

    def learning_rate_of(self, arm: str) -> float | Search:
        """Peak learning rate of an arm, or the search that will choose it."""
        own = self.arms[arm]
        searched = (own.search or {}).get("learning_rate")
        return searched or own.learning_rate or self.link.learning_rate or self.training.learning_rate

    def resolved(self, arm: str, choice: Choice = ()) -> ResolvedArm:
        """What an arm trains, at a choice of its search; without one, the defaults of what is searched."""
        settings = self.with_choice(arm, choice).arms[arm]
        return resolve(settings, self.link, self.knot, self.model, self.training)

    def variants(self, arm: str) -> list[ResolvedArm]:
        """What an arm may train: at every choice of its search, or the one where nothing is searched."""
        return [self.resolved(arm, choice) for choice in self.choices_of(arm)]

    @property
    def pairs(self) -> list[Lora]:
        """All low-rank links that some arm may train."""
        variants = itertools.chain.from_iterable(map(self.variants, self.arms))
        return [link for variant in variants for link in variant.links if isinstance(link, Lora)]

    @property
    def ideas(self) -> dict[str, list[Idea]]:
        """What fills the joints of the arms, at every choice of their searches, by the key that says it."""
        found: dict[str, list[Idea]] = {}
        for arm in self.arms:
            for variant in self.variants(arm):
                said = [(f"arms.{arm}.{key}", value) for link in variant.links for key, value in link]
                said += [(f"arms.{arm}.knot.{key}", value) for key, value in variant.rules]
                said += [(f"arms.{arm}.until", until) for until in variant.untils]
                for where, value in said:
                    if isinstance(value, Idea) and value not in found.setdefault(where, []):
                        found[where].append(value)
        return found

    @property
    def own_code(self) -> dict[str, list[tuple[str, Idea]]]:
        """The files of the user's own that these ideas lie in, and who names what of them."""
        files: dict[str, list[tuple[str, Idea]]] = {}
        for where, ideas in self.ideas.items():
            for idea in ideas:
                if idea.file is not None:
                    files.setdefault(idea.file, []).append((where, idea))
        return files

    def searches_of(self, arm: str) -> dict[str, Search]:
        """What is searched for an arm, in the order of the keys here; empty for one without links."""
        if not self.arms[arm].n_links:
            return {}
        rate = self.learning_rate_of(arm)
        found = (self.arms[arm].search or {}) | ({"learning_rate": rate} if isinstance(rate, Search) else {})
        return {key: found[key] for key in SEARCHABLE if key in found}

    def choices_of(self, arm: str) -> list[Choice]:
        """Every combination that an arm's search tries; the empty one where nothing is searched."""
        searches = self.searches_of(arm)
        fixed = [[tuple(v) if isinstance(v, list) else v for v in search.search] for search in searches.values()]
        return [tuple(zip(searches, values, strict=True)) for values in itertools.product(*fixed)]

    def search_of(self, arm: str) -> Search | None:
        """A search of an arm, whose rules are those of all its searches; None where nothing is searched."""
        return next(iter(self.searches_of(arm).values()), None)

    @property
    def search_rules(self) -> dict[str, Search]:
        """The same of each arm that has any."""
        return {arm: search for arm in self.arms if (search := self.search_of(arm)) is not None}

    @property
    def unscored_seed(self) -> int:
        """A seed for trials: the same whichever seeds are scored, unless it is one of them."""
        return next(seed for seed in itertools.count(TRIAL_SEEDS) if seed not in self.seeds)

    def search_seeds(self, arm: str) -> list[int]:
        """Seeds of the trials by which an arm chooses `per: arm`."""
        return next((s.seeds for s in self.searches_of(arm).values() if s.seeds), [self.unscored_seed])

    @property
    def trial_seeds(self) -> list[int]:
        """Seeds of trials that choose for all seeds of an arm, in order; none where each seed chooses for itself."""
        arms = [arm for arm, search in self.search_rules.items() if search.per == "arm"]
        return sorted({seed for arm in arms for seed in self.search_seeds(arm)})

    @property
    def drawn_seeds(self) -> list[int]:
        """Every seed that something is trained under."""
        return sorted({*self.seeds, *self.trial_seeds})

    def with_choice(self, arm: str, choice: Choice) -> "Recipe":
        """The recipe with the searched keys of an arm set to values."""
        if not choice:
            return self
        # As if the arm said it: `target_modules: q_proj` is a list of one.
        values = {key: getattr(Arm.model_validate({key: value}), key) for key, value in choice}
        settings = self.arms[arm].model_copy(update={**values, "search": None})
        return self.model_copy(update={"arms": self.arms | {arm: settings}})

    @property
    def trained_arms(self) -> list[str]:
        """The arms that have links."""
        return [name for name, arm in self.arms.items() if arm.n_links]

    @property
    def reference_arm(self) -> str | None:
        """The arm whose tokens or FLOPs the others match: the one that is plain LoRA, else the first trained."""
        return self.lora_arm if self.lora_arm in self.trained_arms else next(iter(self.trained_arms), None)

    @property
    def metric(self) -> str:
        """What the contrasts are about: `score` or `loss`."""
        return self.comparison.metric or ("loss" if self.data.task == "text" else "score")

    @property
    def full_arm(self) -> str:
        """Name of the arm that is full fine-tuning to the comparison (there may be none of that name)."""
        return self.comparison.full or "full"

    @property
    def lora_arm(self) -> str:
        """Name of the arm that is plain LoRA to the comparison."""
        return self.comparison.lora or "lora"

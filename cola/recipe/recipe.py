"""What a recipe may say: the schema, its defaults, and what its keys mean together.

`recipe_file.py` reads one from YAML. Nothing heavier than pydantic is imported here.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    Field,
    model_validator,
)

from cola.errors import listed, quoted
from cola.recipe.arms import METHODS, SEARCHABLE, Arm, KnotRules, LinkSettings, OneLink, resolve
from cola.recipe.bounds import (
    MOST_ARMS,
    MOST_GENERATED,
    MOST_TRAININGS,
    MOST_TRIED,
    SPLITS,
    TRIAL_SEEDS,
    Dtype,
    LocalPath,
    Quantization,
    Section,
    Seed,
)
from cola.recipe.data_section import Data
from cola.recipe.schema import Comparison, Evaluation, Model, Search, Tracking, Training


class Recipe(Section):
    """A whole comparison."""

    name: str = Field(
        max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run folder and the W&B group."
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
    store: LocalPath | None = Field(
        default=None,
        description="Folder of the segments that runs share. Default: `$COLA_STORE`, else `store` in the cache.",
    )
    checkpoint_seconds: Annotated[float, Field(ge=0)] = Field(
        default=60.0,
        description="Least time between two checkpoints inside a segment; longer where one would take over 2 % of it. "
        "0: after every step.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: each seed once")
        self._check_number()
        named = [("primary", name) for name in self.comparison.primary or ()]
        named += [("secondary", name) for pair in self.comparison.secondary for name in pair]
        named += [(key, name) for key in ("full", "lora") if (name := getattr(self.comparison, key)) is not None]
        for key, name in named:
            if name not in self.arms:
                raise ValueError(f"comparison.{key} names the arm {quoted(name)}; the arms are {listed(self.arms)}")
        pairs = [*([self.comparison.primary] if self.comparison.primary else []), *self.comparison.secondary]
        for number, (first, second) in enumerate(pairs):
            if first == second:
                raise ValueError(f"comparison: {first} is compared with itself")
            if {first, second} in [{*pair} for pair in pairs[:number]]:
                raise ValueError(f"comparison: {first} and {second} are compared twice")
        if self.data.task == "text":
            by_score = [
                ("comparison.metric", self.comparison.metric),
                ("evaluation.select_by", self.evaluation.select_by),
            ]
            by_score += [(f"arms.{arm}: select_by", search.select_by) for arm, search in self.search_rules.items()]
            if wrong := next((key for key, by in by_score if by == "score"), None):
                raise ValueError(f"{wrong}: a text has no score; say loss, or leave it out")
        if self.evaluation.checkpoint == "best" and self.evaluation.every == "never":
            raise ValueError("evaluation.every: never leaves nothing to choose the best checkpoint from")
        for name in self.arms:
            self._check_search(name)
            for choice in self.choices_of(name) or [{}]:
                self.with_choice(name, choice)._check_arm(name)
        if self.training.match != "steps" and (reference := self.reference_arm) is not None:
            costly = set(self.searches_of(reference)) - {"learning_rate", "alpha", "dropout", "loraplus_lr_ratio"}
            if costly:
                raise ValueError(
                    f"training.match: {self.training.match}: the other arms are matched to {reference}, whose "
                    f"{min(costly)} is searched, so what it costs is not known: name another arm with comparison.lora, "
                    "or match steps"
                )
        if len({(search.per, search.select_by) for search in self.search_rules.values()}) > 1:
            told = "; ".join(f"{arm}: {_rules_text(search)}" for arm, search in self.search_rules.items())
            raise ValueError(f"every arm's search must have the same per and select_by; there are {told}")
        counts = {
            name: len(self.choices_of(name) or [{}]) * len(self.search_seeds(name))
            for name, arm in self.arms.items()
            if arm.n_links
        }
        if len(set(counts.values())) > 1:
            groups = {n: [name for name in counts if counts[name] == n] for n in sorted(set(counts.values()))}
            told = "; ".join(f"{n} for {', '.join(names)}" for n, names in groups.items())
            raise ValueError(
                f"every arm must have the same number of trials, or the one with more is luckier; there are {told}: "
                "give each a search of as many values and seeds"
            )
        return self

    def _check_number(self) -> None:
        """How many trainings there are, counted before any of them is made."""
        number = len(self.arms) * len(self.seeds)
        for name in self.arms:
            searches = self.searches_of(name)
            tried = math.prod(len(search.search) for search in searches.values()) if searches else 0
            if tried > MOST_TRIED:
                raise ValueError(f"arms.{name}: its search has {tried} combinations; {MOST_TRIED} are the most")
            each = any(search.per == "seed" for search in searches.values())
            number += tried * len(self.seeds if each else self.search_seeds(name))
        if number > MOST_TRAININGS:
            raise ValueError(
                f"arms, seeds and searches make {number} trainings; {MOST_TRAININGS} are the most: give fewer seeds, "
                "arms or values"
            )
        generated = self.data.reasoning_gym is not None
        for split in SPLITS if generated else ():
            if (getattr(self.data.rows, split) or 0) > MOST_GENERATED:
                raise ValueError(f"data.rows.{split}: a generator gives {MOST_GENERATED} rows at most")

    def _check_search(self, name: str) -> None:
        links, searches = self.arms[name].links, self.searches_of(name)
        if len({(search.per, search.select_by) for search in searches.values()}) > 1:
            told = "; ".join(f"{key}: {_rules_text(search)}" for key, search in searches.items())
            raise ValueError(
                f"arms.{name}: all its keys are searched with the same per and select_by; there are {told}"
            )
        if "links" in searches and searches["links"].per == "seed":
            raise ValueError(f"arms.{name}.links: an arm has one number of links, so it is searched per: arm")
        for key in searches:
            if isinstance(links, list) and any(getattr(link, key, None) is not None for link in links):
                raise ValueError(f"arms.{name}: a link's own {key} and a search exclude each other")

    def _check_arm(self, name: str) -> None:
        """What the settings of one arm rule out together."""
        self._check_methods(name)
        self._check_base(name)
        self._check_knot(name)

    def _check_methods(self, name: str) -> None:
        """Keys that a link's method does not take, or not beside the others."""
        arm, links = self.arms[name], self.links_of(name)
        for n, link in enumerate(links if isinstance(arm.links, list) else links[:1]):  # else all are the same
            takes = METHODS[link.method or "lora"]
            own = arm.links[n] if isinstance(arm.links, list) else arm
            for key in LinkSettings.model_fields:
                given = getattr(arm, key) is not None or getattr(own, key) is not None
                if given and key not in takes and key not in ("method", "learning_rate"):
                    raise ValueError(f"arms.{name}.{key} has no effect with method {link.method}: remove it")
            if link.init_batches is not None and link.init != "gradient":
                raise ValueError(f"arms.{name}.init_batches has no effect with init: {link.init}: remove it")
            if link.encoder_hidden_size is not None and link.method == "prefix" and not link.prefix_projection:
                raise ValueError(f"arms.{name}.encoder_hidden_size has no effect without prefix_projection: true")
            if link.method == "prefix" and self.training.gradient_checkpointing:
                raise ValueError(
                    f"arms.{name}: method prefix lies in the cache of keys and values, which "
                    "training.gradient_checkpointing does without: set that to false, or use p_tuning"
                )
        if len(links) > 1 and (odd := next((link.method for link in links if link.method != "lora"), None)):
            why = "full fine-tuning" if odd == "full" else f"method {odd}"
            raise ValueError(f"arms.{name}.links: {why} has no knot to tie, so it takes links: 1, not {len(links)}")
        if links and links[0].method != "lora" and (idle := sorted(arm.knot.model_fields_set)):
            raise ValueError(f"arms.{name}.knot.{idle[0]}: method {links[0].method} has no knot to tie: remove it")

    def _check_base(self, name: str) -> None:
        """What a quantized base, or weights that a knot may not write, cannot take."""
        links, knot = self.links_of(name), self.knot_of(name)
        dtype, quantization = self.base_of(name)
        if quantization and any(link.method == "full" for link in links):
            raise ValueError(
                f"arms.{name}: full fine-tuning has no use for {quantization} codes, which cannot be trained: say "
                "quantization: none, or train a pair beside them (method: lora)"
            )
        if quantization == "nf4" and dtype == "float16":
            raise ValueError(f"arms.{name}: nf4 computes in float32 or bfloat16 here; set dtype")
        if quantization and knot.merge == "naive":
            raise ValueError(
                f"arms.{name}.knot.merge: naive would quantize the base anew at each knot, which loses nearly all that "
                "was learned; a quantized base keeps its pairs beside the codes: leave merge out"
            )
        if knot.merge == "exact" and quantization is None:
            return
        for link in links:
            if link.use_dora:
                why = f"on an {quantization} base" if quantization else f"with knot.merge: {knot.merge}"
                raise ValueError(
                    f"arms.{name}.use_dora: DoRA rescales the rows of the weight, so it cannot be kept {why}; use a "
                    "dense base and merge: exact, or leave use_dora out"
                )
            if link.init == "pissa":
                why = f"with {quantization} codes" if quantization else f"with knot.merge: {knot.merge}"
                raise ValueError(
                    f"arms.{name}.init: pissa takes the pair out of the frozen weight, which cannot be done {why}; use "
                    "init: default"
                )

    def _check_knot(self, name: str) -> None:
        """What one link hands on to the next must fit it, and be whole."""
        links, knot = self.links_of(name), self.knot_of(name)
        if knot.merge_fraction != 1 and len(links) > 1:
            if knot.pair == "keep":
                raise ValueError(
                    f"arms.{name}.knot.merge_fraction: with pair: keep nothing is let go of between links: remove it"
                )
            if any(link.use_dora for link in links):
                raise ValueError(f"arms.{name}.knot.merge_fraction: a part of DoRA's row lengths means nothing: remove")
        shape = ("rank", "target_modules", "use_dora")
        rules = {
            "optimizer": (knot.optimizer not in ("fresh", "zero"), "the moments do", shape),
            # Under another scale the same pair would be another update.
            "pair": (knot.pair == "keep", "the pair before does", (*shape, "alpha", "use_rslora")),
        }
        for rule, (hands_on, what, keys) in rules.items():
            for n, (before, after) in enumerate(itertools.pairwise(links if hands_on else []), 2):
                for key in keys:
                    if getattr(before, key) != getattr(after, key):
                        raise ValueError(
                            f"arms.{name}.knot.{rule}: link {n} has {key} {getattr(after, key)} after "
                            f"{getattr(before, key)}, so {what} not fit it: use fresh"
                        )

    def learning_rate_of(self, arm: str) -> float | Search:
        """Peak learning rate of an arm, or the search that will choose it."""
        settings = self.arms[arm]
        searched = (settings.search or {}).get("learning_rate")
        return searched or settings.learning_rate or self.link.learning_rate or self.training.learning_rate

    def base_of(self, arm: str) -> tuple[Dtype, Quantization | None]:
        """Number format and quantization of the weights that an arm starts from."""
        settings = self.arms[arm]
        quantization = settings.quantization or self.model.quantization
        if any(link.method == "qlora" for link in self._methods(arm)):
            if quantization == "int8" or settings.quantization == "none":
                raise ValueError(
                    f"arms.{arm}: qlora is LoRA on an nf4 base; for {settings.quantization or quantization} write "
                    "method: lora"
                )
            quantization = "nf4"
        return settings.dtype or self.model.dtype, None if quantization == "none" else quantization

    def _methods(self, arm: str) -> list[LinkSettings]:
        settings = self.arms[arm]
        if not settings.n_links:
            return []
        own = settings.links if isinstance(settings.links, list) else [OneLink()]
        said = [next((s for s in (link, settings, self.link) if s.method is not None), LinkSettings()) for link in own]
        return said

    def knot_of(self, arm: str) -> KnotRules:
        """An arm's rules at its knots, every one explicit but max_drift."""
        own = self.arms[arm].knot

        def first(key: str, fallback: Any) -> Any:
            return next((v for rules in (own, self.knot) if (v := getattr(rules, key)) is not None), fallback)

        schedule = first("schedule", "link" if self.training.protocol == "grow" else "run")
        return KnotRules(
            merge=first("merge", "exact"),
            pair=first("pair", "fresh"),
            merge_fraction=first("merge_fraction", 1.0),
            optimizer=first("optimizer", "fresh"),
            schedule=schedule,
            warmup_steps=first("warmup_steps", 0 if schedule == "run" else self.training.warmup_steps),
            max_drift=first("max_drift", None),
        )

    def searches_of(self, arm: str) -> dict[str, Search]:
        """What is searched for an arm, in the order of the keys here; empty for one without links."""
        if not self.arms[arm].n_links:
            return {}
        rate = self.learning_rate_of(arm)
        found = (self.arms[arm].search or {}) | ({"learning_rate": rate} if isinstance(rate, Search) else {})
        return {key: found[key] for key in SEARCHABLE if key in found}

    def choices_of(self, arm: str) -> list[dict[str, Any]]:
        """Every combination that an arm's search tries; none where nothing is searched."""
        searches = self.searches_of(arm)
        if not searches:
            return []
        grids = itertools.product(*(search.search for search in searches.values()))
        return [dict(zip(searches, values, strict=True)) for values in grids]

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

    def with_choice(self, arm: str, choice: Mapping[str, Any]) -> "Recipe":
        """The recipe with the searched keys of an arm set to values."""
        if not choice:
            return self
        tried = {key: list(value) if isinstance(value, tuple) else value for key, value in choice.items()}
        # As if the arm said it: `target_modules: q_proj` is a list of one.
        values = {key: getattr(Arm.model_validate({key: value}), key) for key, value in tried.items()}
        settings = self.arms[arm].model_copy(update={**values, "search": None})
        return self.model_copy(update={"arms": self.arms | {arm: settings}})

    @property
    def reference_arm(self) -> str | None:
        """The arm whose tokens or FLOPs the others match: the one that is plain LoRA, else the first trained."""
        trained = [name for name, arm in self.arms.items() if arm.n_links]
        return self.lora_arm if self.lora_arm in trained else next(iter(trained), None)

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

    def links_of(self, arm: str) -> list[OneLink]:
        """The arm's links with every setting explicit: link < arm < its own entry in `links`."""
        settings = self.arms[arm]
        if isinstance(settings.links, int):
            return [resolve(self.link, settings, OneLink())] * settings.links
        return [resolve(self.link, settings, link) for link in settings.links]


def _rules_text(search: Search) -> str:
    return f"per {search.per}, by {search.select_by}"

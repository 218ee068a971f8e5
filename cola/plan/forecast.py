"""A recipe planned on a model, rows and a device: each arm, and all jobs together, what they share counted once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cola.files import digest, store_path
from cola.link.accelerator import device_said
from cola.link.model import Source
from cola.link.text_part import text_config
from cola.measure.cost import Meter
from cola.measure.evaluate import PROBE_ROWS, PROBE_TARGETS
from cola.measure.memory import resident
from cola.plan.devices import Device
from cola.plan.look import Asked, look
from cola.plan.memory import Circumstances, Looked, Memory, memory_of
from cola.plan.models import Planned
from cola.plan.passes import Shape
from cola.plan.plan import ArmPlan, LinkPlan, RecipePlan, Totals, total
from cola.plan.remembered import Remembered, remembered
from cola.plan.rows import GENERAL, Passes, Rows, Scoring, passes_of, scoring_of
from cola.plan.seconds import Rates
from cola.plan.tree import Planner
from cola.recipe.methods import Lora, Settings
from cola.recipe.plan import Job, Link, candidates_of, jobs_of, looking_steps, plan_arm, room_of
from cola.recipe.recipe import Recipe
from cola.tree.segments import Tree
from cola.tree.store import Store

MOST_STEPS = 400_000  # of all candidates together, whose names are worked out
READ_AT_ONCE = 4e9  # bytes of weights that are read to know their name in the store
GENERAL_PASSAGES = 7  # of the text that comes with cola
MISSES = 0.5  # share of answers that are decoded on, since the right one was not what the model says: an assumption


class _Named(Source):
    """A base whose weights are not read, so that its states have names of their own and none in any store."""

    def fingerprint(self) -> str:
        return digest(self.name)


@dataclass
class Forecast:
    """Plans a recipe on a model, rows and a device."""

    recipe: Recipe
    planned: Planned
    rows: Rows
    device: Device
    rates: Rates | None = None
    meter: Meter | None = None  # those of a run that has them already
    tree: Tree | None = None
    libraries: int = field(default_factory=resident)  # bytes of the process, before there is a model

    def plan(self) -> RecipePlan:
        """All of it. Raises ColaError where an arm cannot be planned."""
        notes = []
        if any(str(link.optimizer) != "adamw" for arm in self.recipe.arms for link in self.recipe.resolved(arm).links):
            notes.append(
                "an optimizer other than AdamW is counted as AdamW, whose two moments are as large as what is trained"
            )
        arms = {arm: self.arm(arm) for arm in self.recipe.arms}
        about = (self.recipe.name, self.recipe.model.name_or_path, self.planned.config, self.device, self.rows.said)
        return RecipePlan(*about, self.times, arms, self._totals(arms), notes)

    def arm(self, name: str) -> ArmPlan:
        """One arm, its searched values the first that are tried."""
        recipe, seed = self.recipe, self.recipe.seeds[0]
        links = self._links(Job(arm=name, seed=seed))
        found = [self.looked(name, link) for link in links]
        memories = self._memories(name, links, found)
        plans = [
            LinkPlan(
                link.settings,
                looked.trained,
                len(link.learning_rates),
                float(self._flops(link, seed).sum()),
                memory,
                self._step(name, number, link, looked),
            )
            for number, (link, looked, memory) in enumerate(zip(links, found, memories, strict=False))
        ]
        last = found[-1] if links else self.looked(name, None)
        looks = len(looking_steps(recipe, links, self.n_train)) if links else 0
        return ArmPlan(
            *recipe.resolved(name, recipe.choices_of(name)[0]).base,
            self.planned.skeleton.num_parameters(),
            plans,
            max(memories, key=lambda memory: memory.peak),
            self._knots(last, links),
            self._scoring(last, self._scorings(seed), looks),
            self._disk(plans),
        )

    def training_seconds(self, name: str) -> float | None:
        """Of all steps of an arm under one seed."""
        seed = self.recipe.seeds[0]
        links = self._links(Job(arm=name, seed=seed))
        steps = [self._step(name, number, link, self.looked(name, link)) for number, link in enumerate(links)]
        return total([each and each * len(link.learning_rates) for each, link in zip(steps, links, strict=True)])

    def every_look(self, name: str) -> list[Looked]:
        """What was found of an arm's links, and of its base."""
        return [self.looked(name, link) for link in (*self._links(Job(arm=name, seed=self.recipe.seeds[0])), None)]

    def memory(self, name: str) -> Memory:
        """An arm's memory alone, by the link that takes most."""
        links = self._links(Job(arm=name, seed=self.recipe.seeds[0]))
        found = [self.looked(name, link) for link in links]
        return max(self._memories(name, links, found), key=lambda memory: memory.peak)

    def _memories(self, name: str, links: Sequence[Link], found: Sequence[Looked]) -> list[Memory]:
        """Of each link, or of the base where there is none."""
        if not links:
            return [self._memory(self.looked(name, None), None, name, 0)]
        pairs = [looked.trained * link.settings.is_pair for link, looked in zip(links, found, strict=True)]
        befores = [sum(pairs[:number]) for number in range(len(pairs))]
        parts = zip(links, found, befores, strict=True)
        return [self._memory(looked, link.settings, name, before) for link, looked, before in parts]

    @property
    def n_train(self) -> int:
        """Training rows of a seed."""
        said = self.recipe.data.rows.train
        return said or self.rows.splits.sizes["train"]

    def looked(self, arm: str, link: Link | None) -> Looked:
        """A link attached to the model; None: the base alone."""
        recipe, seed = self.recipe, self.recipe.seeds[0]
        resolved = recipe.resolved(arm, recipe.choices_of(arm)[0])
        scoring = {name: one.shape for name, one in self._scorings(seed).items()}
        heaviest = max(scoring.values(), key=lambda shape: (shape.positions, shape.targets), default=None)
        shapes = {} if heaviest is None else {"examples": heaviest}
        if recipe.evaluation.general_text is not None:
            shapes["general"] = GENERAL
        passes = None if link is None else self._passes(link, seed)
        return look(
            self.planned.skeleton,
            Asked(
                None if link is None else link.settings,
                resolved.base,
                passes and passes.heaviest,
                recipe.training.gradient_checkpointing,
                passes is not None and passes.several,
                shapes,
                cached=recipe.data.task != "text",
            ),
        )

    def _links(self, job: Job) -> list[Link]:
        if self.recipe.training.match == "steps":
            return plan_arm(self.recipe, job.arm, job.seed, self.n_train, job.choice)
        return self._tree.lineage(job).links

    def _passes(self, link: Link, seed: int) -> Passes:
        training, config = self.recipe.training, text_config(self.planned.skeleton)
        kept = 4 if training.gradient_checkpointing else 36  # of a layer's width, roughly, that a position keeps
        weights = kept * getattr(config, "num_hidden_layers", 1) * config.hidden_size, 3.0 * config.vocab_size
        budget, steps = training.micro_batch_tokens, max(1, len(link.learning_rates))
        return passes_of(self.rows.lengths(seed), training.batch_size, steps, seed, budget, weights)

    def _scorings(self, seed: int) -> dict[str, Scoring]:
        parts = self.rows.splits.scored(seed, self._train_sample)
        budget = self.recipe.evaluation.batch_tokens
        found = {split: scoring_of(examples, budget) for split, examples in parts.items()}
        return {split: one for split, one in found.items() if one is not None}

    @property
    def _train_sample(self) -> int | None:
        sample = self.recipe.evaluation.train_rows
        return None if sample is None else min(sample, self.rows.splits.sizes["train"])

    def _memory(self, looked: Looked, settings: Settings | None, arm: str, before: int) -> Memory:
        resolved = self.recipe.resolved(arm, self.recipe.choices_of(arm)[0])
        beside = resolved.rules.merge == "no" or resolved.base.quantization is not None
        outputs = PROBE_ROWS * PROBE_TARGETS * text_config(self.planned.skeleton).vocab_size
        whole = settings is not None and settings.is_whole
        on_cpu, kept = self.device.kind == "cpu", 0 if resolved.rules.keeps_pair else before
        process = (self.planned.stored, self.libraries) if on_cpu else (0, 0)
        return memory_of(looked, Circumstances(kept, whole, beside, on_cpu, outputs, *process))

    # Times

    def _step(self, arm: str, number: int, link: Link, looked: Looked) -> float | None:
        seed = self.recipe.seeds[0]
        if (seconds := self._remembered_step(arm, number, seed)) is not None:
            return seconds
        if self.rates is None or looked.training is None:
            return None
        passes = self._passes(link, seed)
        work = looked.training.work.scaled(passes.positions / passes.heaviest.positions)
        return passes.in_a_step * self.rates.of(work) + self.rates.step(looked.trained, looked.tensors)

    @cached_property
    def _remembered(self) -> Remembered:
        return remembered(store_path(self.recipe.store), device_said())

    def _remembered_step(self, arm: str, number: int, seed: int) -> float | None:
        """Seconds that like steps took here before; None where the store knows of none."""
        if not (self._in_store and self._named):
            return None
        lengths = [n for n, _ in self.rows.lengths(seed)]
        tokens = self.recipe.training.batch_size * sum(lengths) / len(lengths)
        job = Job(arm=arm, seed=seed, choice=self.recipe.choices_of(arm)[0])
        seconds = self._remembered.seconds(self._tree.lineage(job), number, tokens)
        if seconds is not None:
            self._from_store.add(arm)
        return seconds

    @property
    def times(self) -> str | None:
        """Where the times are from that were asked for so far; None where none is known."""
        store = f"{', '.join(sorted(self._from_store))}: like steps in the store" if self._from_store else None
        return "; ".join(said for said in (store, self.rates and self.rates.said) if said) or None

    def _knots(self, looked: Looked, links: Sequence[Link]) -> float | None:
        pairs = sum(link.settings.is_pair for link in links)
        return None if self.rates is None else pairs * self.rates.knot(looked.written)

    def _scoring(self, looked: Looked, scorings: dict[str, Scoring], looks: int) -> float | None:
        rates = self.rates
        if rates is None or "examples" not in looked.scoring:
            return None
        work, shape = looked.scoring["examples"].work, self._heaviest(scorings)

        def once(one: Scoring) -> float:
            passes = one.positions / shape.positions
            decoding = rates.of(work.scaled(shape.rows / shape.positions)) if self.recipe.data.task == "answer" else 0.0
            return passes * (rates.of(work) + MISSES * (one.answer + 1) * decoding)

        seconds = sum(map(once, scorings.values()))
        seconds += looks * once(scorings["validation"]) if "validation" in scorings else 0.0
        general = looked.scoring.get("general")
        return seconds + (GENERAL_PASSAGES * rates.of(general.work) if general else 0.0)

    @staticmethod
    def _heaviest(scorings: dict[str, Scoring]) -> Shape:
        return max((one.shape for one in scorings.values()), key=lambda shape: (shape.positions, shape.targets))

    # FLOPs, and what jobs share

    @cached_property
    def _meter(self) -> Meter:
        return self.meter or self._planner.meter(self.recipe)

    @cached_property
    def _planner(self) -> Planner:
        source = self.planned.source
        if not self._in_store:
            source = _Named(source.name, source.folder, source.trust_remote_code)
        return Planner(source, self.planned.skeleton, self.rows.splits, self.device.kind)

    @cached_property
    def _in_store(self) -> bool:
        """Whether the store can be asked for the states: by the weights and the rows, on a device of this kind."""
        if not (self.planned.has_weights and self.rows.splits.fingerprint and self.device.here):
            return False
        size = sum(file.stat().st_size for file in self.planned.source.files)
        return size <= READ_AT_ONCE and (store_path(self.recipe.store) / "format.json").is_file()

    @cached_property
    def _named(self) -> bool:
        """Whether the names of all steps are worked out."""
        if self.recipe.own_code:
            return False
        seed = self.recipe.seeds[0]
        links = {arm: self._links(Job(arm=arm, seed=seed)) for arm in self.recipe.arms}
        steps = {arm: sum(len(link.learning_rates) for link in of) for arm, of in links.items()}
        return sum(steps[job.arm] for job in candidates_of(self.recipe)) <= MOST_STEPS

    @cached_property
    def _tree(self) -> Tree:
        return self.tree or self._planner.tree(self.recipe, self._meter)

    def _flops(self, link: Link, seed: int) -> np.ndarray:
        """Of each of a link's optimizer steps."""
        rows = self._row_flops(link.settings, seed)
        order = self._planner.order(self.recipe.training.batch_size, seed, link.last_step)[link.first_step :]
        if not order:
            return np.zeros(0)
        starts = np.cumsum([0, *(len(step) for step in order[:-1])])
        flops = np.add.reduceat(rows[np.concatenate([np.asarray(step) for step in order])], starts)
        if isinstance(link.settings, Lora) and link.settings.init_batches and not link.keeps_pair:
            first = self._meter.steps(link, order[: link.settings.init_batches], seed)[0].flops
            flops[0] = first
        return flops

    def _row_flops(self, settings: Settings, seed: int) -> np.ndarray:
        key = (settings, seed if self.rows.splits.redrawn else None)
        if key not in self._known:
            plain = settings.model_copy(update={"init_batches": 0}) if isinstance(settings, Lora) else settings
            n = len(self.rows.splits.train_of(seed))
            costs = self._meter.steps(Link(settings=plain, seed=0), [[row] for row in range(n)], seed)
            self._known[key] = np.array([cost.flops for cost in costs])
        return self._known[key]

    _known: dict[Any, np.ndarray] = field(default_factory=dict)
    _from_store: set[str] = field(default_factory=set)  # arms whose steps' time the store knows

    def _totals(self, arms: dict[str, ArmPlan]) -> Totals:
        recipe, jobs = self.recipe, jobs_of(self.recipe)
        trials = sum(job.trial for job in jobs)
        disk = room_of(recipe, self.planned.skeleton.num_parameters())
        disk += sum(
            arms[job.arm].disk for job in jobs if not any(link.settings.is_whole for link in arms[job.arm].links)
        )
        per_job = {name: sum(link.steps for link in arm.links) for name, arm in arms.items()}
        asked = sum(per_job[job.arm] for job in jobs)
        ready = (len(jobs) - trials, trials, asked)
        if not self._named:
            return Totals(*ready, None, None, None, None, disk)
        made: dict[str, tuple[float, float | None]] = {}
        rest = 0.0
        for job in jobs:
            path, number = self._tree.lineage(job), 0
            for number, link in enumerate(path.links):
                each = arms[job.arm].links[number].step_seconds
                costs = self._flops(link, job.seed)
                made |= {
                    name: (float(cost), each)
                    for name, cost in zip(path.names[link.first_step + 1 : link.last_step + 1], costs, strict=True)
                }
            others = total([arms[job.arm].knot_seconds, arms[job.arm].scoring_seconds])
            rest += (0.3 if job.trial else 1.0) * (others or 0.0)  # of a trial validation alone is scored
        there = self._found(jobs) if self._in_store else set()
        left = {name: cost for name, cost in made.items() if name not in there}
        seconds = total([cost[1] for cost in left.values()])
        return Totals(
            *ready,
            len(made),
            len(made) - len(left) if self._in_store else None,
            sum(cost[0] for cost in left.values()),
            None if seconds is None else seconds + rest,
            disk,
        )

    def _found(self, jobs: Sequence[Job]) -> set[str]:
        """Names of the states of all steps whose segment is in the store."""
        store = Store(store_path(self.recipe.store), lambda _: None)
        segments = self._tree.segments(jobs)
        return {state for end, states in segments.items() if store.has(end) for state in states}

    def _disk(self, links: Sequence[LinkPlan]) -> int:
        """A pair and its moments at each link's end, and the pair once more in the run folder."""
        return sum(4 * 4 * link.parameters for link in links)

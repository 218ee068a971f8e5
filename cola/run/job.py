"""One arm and seed: from the base weights through its links to a scored, recorded result.

What the store has is taken from there; the model is loaded only for what it has not.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedModel

from cola.chain import Chain, Knot, retie, run_chain
from cola.data.batches import batch_order, training_batches
from cola.data.encode import Example
from cola.errors import ModelError
from cola.files import each_once
from cola.link import adapters
from cola.link.accelerator import make_accelerator
from cola.link.base import Base
from cola.link.drift import Drift, Outputs
from cola.link.moments import Moments, carried, carries, read_moments
from cola.link.residual import Applied, Residual, left_behind
from cola.link.starts import hold_out
from cola.link.train import Step, full_gradients, tune
from cola.measure.cost import Cost
from cola.measure.memory import peaks, restart_peaks
from cola.measure.scores import ExampleScore, evaluation_of, forgetting_of, mean_loss, mean_score, score_rows
from cola.recipe.bounds import SPLITS
from cola.recipe.plan import Job, Link, evaluation_steps
from cola.recipe.recipe import Recipe
from cola.run.bench import Bench
from cola.run.interrupt import Interrupted
from cola.tree.locks import lock
from cola.tree.run_folder import FORMAT, MADE_WITH
from cola.tree.states import States
from cola.tree.store import hand_out

MAX_DRIFT = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}  # what rounding can explain, see knot.max_drift


@dataclass(frozen=True)
class Best:
    """The best evaluation point so far."""

    key: tuple[float, float]
    step: int


class NothingLeft(Exception):
    """While this process waited, another one trained and scored it all, and let the weights go."""


class JobRun:
    """One job. `go` does all of it; the other methods are what happens at a step, a knot and the end.

    A step is counted from 1 and stands for the state after it.
    """

    def __init__(self, bench: Bench, job: Job) -> None:
        self.recipe = recipe = bench.recipe_of(job)
        self.rules = recipe.knot_of(job.arm)
        self.dtype, self.quantization = recipe.base_of(job.arm)
        self.bench = bench
        self.job = job
        self.path = bench.folder.start_job(job)
        self.rows_of = bench.splits.of(job.seed)
        self.lineage = bench.tree.lineage(job)
        self.cuts = bench.tree.cuts(job)
        self.links = self.lineage.links
        self.n_steps = len(self.lineage.steps)
        self.points = set(evaluation_steps(recipe, self.links, len(self.rows_of["train"]))) if self.links else set()
        # One accelerator per job: an arm that fails must not leave its optimizer or gradient scale to the next.
        self.accelerator = make_accelerator(self.dtype)
        self.evaluator = replace(bench.evaluator, autocast=self.accelerator.autocast)
        self.n_trained = max((bench.count_parameters(link.what) for link in self.links), default=0)
        process = restart_peaks(self.accelerator.device)
        self.states = States(
            bench.store,
            self.lineage,
            bench.skeleton,
            bench.source.name,
            recipe.checkpoint_seconds,
            {**bench.made, "recipe": recipe.name, "arm": job.arm, "seed": job.seed},
            self.n_trained,
            partial(peaks, self.accelerator.device, process),
        )
        self.splits = ("validation",) if job.trial else SPLITS  # what is scored at the end
        self.general = [] if job.trial else bench.general  # and after that
        state = f"{job.arm} {job.seed} {self.lineage.names[-1]}"
        self.measured = bench.measurements(job)
        self.tracker = None if job.trial or state in bench.tracked else bench.tracker
        bench.tracked.add(state)
        self.at = 0  # steps that were found or made so far
        self.reused = 0
        self.rows: list[dict[str, Any]] = []
        self.looks: dict[int, dict[str, Any]] = {}
        self.knots: list[dict[str, Any]] = []
        self.ledger: list[dict[str, Any]] = []  # of each knot's matrices
        self.loaded = False
        self.best: Best | None = None
        self.checkpoint: int | None = None
        self.outdone: list[int] = []  # former bests: needed until a later state can be gone on from
        self.heads = list(self.cuts)  # where segments begin, those of other runs too that were come across
        self.optimizer: AcceleratedOptimizer | None = None
        self.tied_from = 0.0
        self.placed: int | None = None  # the step whose tied weights the model has

    def go(self) -> None:
        """Find or train, select, score, record."""
        bench, job = self.bench, self.job
        started = perf_counter()
        if self.tracker:
            self.tracker.start(job.arm, job.seed, self.path, self._config())
        try:
            with (self.path / "metrics.jsonl").open("w", encoding="utf-8", buffering=1) as self.metrics:
                if deepest := self._deepest(self.cuts):
                    self._recall(deepest, with_knot=True)
                if len(self.knots) < len(self.links):
                    self._train()
            scored_step = self.best.step if self.best else self.n_steps
            evaluation = self._evaluate(scored_step)
        finally:
            self.accelerator.free_memory()
        if not self.loaded:
            bench.progress.stage("all of it found in the store")
        if not job.trial:
            self._hand_out(scored_step)
        self._refer(scored_step)
        created = datetime.now().astimezone().isoformat(timespec="seconds")
        result = {
            "format": FORMAT,
            "status": "ok",
            "run_info": {**asdict(job), "created_at": created, "seconds": perf_counter() - started, "error": None},
            "train_info": self._train_info(scored_step),
            "evaluation": evaluation,
            "meta_info": bench.meta,
        }
        bench.folder.write_json(self._name("result.json"), result)
        if self.tracker:
            self.tracker.finish(self._tracked(evaluation))

    # -----------------------------------------------------------------------------------------------------
    # What is there already

    def _deepest(self, steps: Sequence[int]) -> int | None:
        """The last of these steps that the store lets this job go on from, leaving nothing out."""
        return next((step for step in reversed(steps) if step > self.at and self._recallable(step)), None)

    def _recallable(self, step: int) -> bool:
        """Whether all up to a step is known: its state, the ends of links before, the looks and the knots between."""
        segment = self.states.get(step)
        ends = [link.last_step for link in self.links]
        # Training goes on from a state with its moments, or from the end of a link whose next needs none.
        fresh = [end for end in ends if end == self.n_steps or not carries(self.rules)]
        if segment is None or not (segment.resumable or step in fresh):
            return False
        for end in ends[len(self.knots) :]:
            if end < step and (self.states.get(end) is None or self.measured.known_knot(end) is None):
                return False
        best, looked = self.best, True
        for point in sorted(point for point in self.points if self.at < point <= step):
            scores = self.measured.known_scores("validation", point, "attached")
            if scores is not None:
                best = self._better(best, point, self._look_record(point, scores))
            elif point < step:
                return False
            else:
                looked = False
        if step == self.n_steps and looked and self.measured.known_knot(step) is not None:
            scored = best.step if best else step
            wanted = not self.job.trial and self.recipe.keep_full_weights and not self._has_weights(scored)
            asked = (*self.splits, "general") if self.general else self.splits
            if not wanted and all(self.measured.known_scores(name, scored, "tied") is not None for name in asked):
                return True  # nothing is left to be done, so no weights are needed
        return segment.has_weights and (best is None or best.step == step or self._has_weights(best.step))

    def _has_weights(self, step: int) -> bool:
        segment = self.states.get(step)
        return segment is not None and segment.has_weights

    def _recall(self, step: int, with_knot: bool) -> None:
        """Take the steps up to this one from the store, as if they had been made now, and a knot at its end."""
        for number, link in enumerate(self.links):
            if link.last_step <= self.at or link.first_step >= step:
                continue
            for row in self.states.there(min(link.last_step, step)).steps():
                if row["step"] > self.at:
                    self._note_step(row, number)
                    if row["step"] in self.points and (
                        scores := self.measured.known_scores("validation", row["step"], "attached")
                    ):
                        self._note_look(self._look_record(row["step"], scores))
            self.reused += min(link.last_step, step) - self.at
            self.at = min(link.last_step, step)
            looked = self.at not in self.points or self.at in self.looks
            tied = self.at == link.last_step and looked and (with_knot or self.at < step)
            if tied and (knot := self.measured.known_knot(self.at)):
                self._note_knot(knot)

    # -----------------------------------------------------------------------------------------------------
    # Training

    @cached_property
    def chain(self) -> Chain:
        """The base, loaded when it is first needed."""
        recipe, model = self.recipe, self._load()
        if self.general:
            self._general_before(model)  # now, while nothing is attached to it and nothing merged
        if recipe.training.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        base = Base(model, self.bench.source.files, quantized=self.quantization is not None)
        return Chain(model, base, self.rules)

    def _load(self) -> PreTrainedModel:
        self.bench.progress.stage("loading the model")
        self.loaded = True
        # Its name in the store says what the base was as the run began.
        if self.bench.source.fingerprint() != self.bench.meta["model"]["sha256"]:
            raise ModelError(
                f"model.name_or_path: {self.bench.source.name} has changed since this run began; put it back and go on "
                "with the same command, or start a new run"
            )
        ready = self.bench.ready.pop((self.dtype, self.quantization), None)
        self.bench.ready.clear()  # nor is a second one kept in memory
        if ready is not None:
            return ready
        return self.bench.source.load(self.dtype, self.accelerator.device, self.quantization)

    def _train(self) -> None:
        """Go on from what was found to the last knot."""
        retie(self.chain, self._tied([link.last_step for link in self.links[: len(self.knots)]], gone_on=False))
        try:
            for knot in run_chain(self.chain, self.links, self._tune, self._probe, self._gradients):
                self._record_knot(knot)
            self.placed = self.n_steps
        except NothingLeft:
            self._recall(self.n_steps, with_knot=True)

    def _tied(self, ends: Sequence[int], gone_on: bool) -> Residual:
        """What links that others follow have left in the chain, from the store.

        Args:
            ends: Their last steps.
            gone_on: Whether the link after them has begun; a pair that is kept is in that link's then.
        """
        pairs, share, kept = [self.states.pair(end) for end in ends], self.rules.merge_fraction or 1.0, self.rules.pair
        if kept == "keep" and pairs and not gone_on:
            return [*left_behind(pairs[:-1], share, True), pairs[-1]]
        return left_behind(pairs, share, kept == "keep")

    def _gradients(self, model: PreTrainedModel, link: Link, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Full gradients over the link's first batches, for a pair that is drawn along them."""
        self.bench.progress.stage("taking the full gradient")
        rows = self.order[link.first_step : link.last_step][: link.what.init_batches]
        batches = training_batches(self.rows_of["train"], rows, self.recipe.training.micro_batch_tokens)
        return full_gradients(model, names, batches, self.accelerator)

    def _put_back(self, chain: Chain, step: int) -> Moments | None:
        moments = self.states.put_back(chain.model, step)
        hold_out(chain.model, chain.base, chain.learned)
        return moments

    def _tune(self, chain: Chain, link: Link) -> None:
        """Bring the link's weights to its last step: from the store as far as it has them, else by training."""
        model, moments = chain.model, None
        if self.at > link.first_step:
            moments = self._put_back(chain, self.at)
            self._look_if_due(model)
        elif link.knot is not None and carries(link.knot):
            moments = carried(self.states.moments(link.first_step), link.knot, link.seed)
        while self.at < link.last_step:
            start = max(step for step in (link.first_step, *self.heads) if step <= self.at)
            stop = min(step for step in self.cuts if step > self.at)
            waiting = f"waiting for another process that trains steps {start + 1} to {stop}"
            say = partial(self.bench.progress.stage, waiting)
            with lock(self.bench.store.path, self.lineage.names[start + 1], say):
                # Another process may have trained all or a part of it, by now or before it was killed.
                if found := self._deepest(range(self.at + 1, stop + 1)):
                    if not self._has_weights(found):
                        raise NothingLeft
                    try:
                        moments = self._put_back(chain, found)
                    except FileNotFoundError:
                        self.states.forget(found)  # a run that cuts elsewhere has dropped it
                        continue
                    kind = self.states.there(found).kind
                    self._recall(found, with_knot=False)
                    self.checkpoint = found if kind == "checkpoint" else None
                    self._look_if_due(model)
                    if kind == "segment":
                        self.heads.append(found)  # from here on the lock is another one
                        continue
                if self.at < stop:
                    moments = self._advance(model, link, stop, moments)
        self.tied_from = perf_counter()

    def _advance(self, model: PreTrainedModel, link: Link, stop: int, moments: Moments | None) -> Moments | None:
        """Make the optimizer steps up to `stop`; returns the optimizer's state where the link goes on."""
        bench, training = self.bench, self.recipe.training
        rows = self.order[self.at : stop]
        try:
            with bench.signals.deferred():
                tune(
                    model,
                    link,
                    training_batches(self.rows_of["train"], rows, training.micro_batch_tokens),
                    self.accelerator,
                    lambda step, optimizer: self._on_step(model, step, optimizer, stop),
                    betas=training.betas,
                    epsilon=training.epsilon,
                    weight_decay=training.weight_decay,
                    max_grad_norm=training.max_grad_norm,
                    done=self.at - link.first_step,
                    moments=moments,
                )
        except Interrupted:
            if self.optimizer is not None and self.at < stop:
                bench.progress.stage(f"keeping a checkpoint at step {self.at}")
                self._keep_checkpoint(model, stop)
            raise
        state = self._moments(model) if self.at < link.last_step else None
        self.optimizer = None
        return state

    def _on_step(self, model: PreTrainedModel, step: Step, optimizer: AcceleratedOptimizer, stop: int) -> None:
        self.at, self.optimizer = step.step, optimizer
        self.placed = None
        number = self.lineage.link_of(self.at)
        self._note_step(asdict(step), number)
        if self.at == stop:
            name = self.lineage.names[stop]
            goes_on = self.links[number].method == "lora" or self.bench.tree.goes_on(name)
            self.states.keep(stop, "segment", model, self._moments(model) if goes_on else None, self._link_rows)
            self._leave_checkpoint()
        elif self.states.checkpoint_due():
            self._keep_checkpoint(model, stop)
        with self.bench.signals.at_once():
            self._look_if_due(model)

    def _keep_checkpoint(self, model: PreTrainedModel, stop: int) -> None:
        before, towards = self.checkpoint, self.lineage.names[stop]
        if before == self.at:
            return
        self.states.keep(self.at, "checkpoint", model, self._moments(model), self._link_rows, towards)
        self._leave_checkpoint()
        self.checkpoint = self.at

    def _leave_checkpoint(self) -> None:
        """A later state is kept: the checkpoint before it has served, and the bests that were outdone."""
        if self.checkpoint is not None:
            self.states.drop(self.checkpoint, "checkpoint")
        self.checkpoint = None
        for step in self.outdone:
            self.states.drop(step, "point")
        self.outdone = []

    def _moments(self, model: PreTrainedModel) -> Moments:
        assert self.optimizer is not None
        return read_moments(model, self.optimizer, self.accelerator)

    @property
    def _link_rows(self) -> list[dict[str, Any]]:
        """The metrics of the current link's steps so far."""
        first = self.links[self.lineage.link_of(self.at)].first_step
        return self.rows[first:]

    @cached_property
    def order(self) -> list[list[int]]:
        """Indices of the rows of each step."""
        lengths = [example.n_tokens for example in self.rows_of["train"]]
        return batch_order(lengths, self.recipe.training.batch_size, self.n_steps, self.job.seed)

    def _note_step(self, row: dict[str, Any], number: int) -> None:
        self.rows.append(row)
        self._write_metric("step", {"link": number + 1, **row})
        name = f"link {number + 1}/{len(self.links)}" if len(self.links) > 1 else "training"
        self.bench.progress.step(name, row["loss"], row["tokens"], row["seconds"])
        if self.tracker:
            curves = {f"train/{name}": row[name] for name in ("loss", "grad_norm", "learning_rate")}
            rate = row["tokens"] / max(row["seconds"], 1e-9)
            self.tracker.log(row["step"], {**curves, "train/tokens_per_second": rate})

    # -----------------------------------------------------------------------------------------------------
    # Evaluation points

    def _look_if_due(self, model: PreTrainedModel) -> None:
        """Score validation at an evaluation point, and keep the weights if they are the best so far."""
        if self.at not in self.points or self.at in self.looks:
            return
        at = f" at step {self.at}"
        compute = partial(self._score, model, "validation", at)
        scores = self.measured.scores("validation", self.at, "attached", compute)
        before = self.best
        self._note_look(self._look_record(self.at, scores))
        self.bench.write_references()
        if self.best is before:
            return
        if self._has_weights(self.at):
            self.states.keep_as_point(self.at)
        else:
            self.states.keep(self.at, "point", model, None, self._link_rows, towards=self.lineage.names[-1])
        if before:
            self.outdone.append(before.step)

    def _look_record(self, step: int, scores: list[ExampleScore]) -> dict[str, Any]:
        link = self.lineage.link_of(step) + 1
        return {"step": step, "link": link, "loss": mean_loss(scores), "score": mean_score(scores)}

    def _note_look(self, look: dict[str, Any]) -> None:
        self.looks[look["step"]] = look
        self.best = self._better(self.best, look["step"], look)
        self._write_metric("validation", look)
        if self.tracker:
            self.tracker.log(look["step"], {"validation/loss": look["loss"], "validation/score": look["score"]})

    def _better(self, best: Best | None, step: int, look: dict[str, Any]) -> Best | None:
        if self.recipe.evaluation.checkpoint != "best":
            return None
        key = selection_key(self.recipe.evaluation.select_by, look["loss"], look["score"])
        return Best(key, step) if best is None or key > best.key else best

    # -----------------------------------------------------------------------------------------------------
    # Knots

    def _check_drift(self, record: dict[str, Any]) -> None:
        """What a knot moved must be within what rounding can explain, unless its rules move the outputs themselves."""
        partial_merge = (self.rules.merge_fraction or 1) < 1 and record["link"] < len(self.links)
        moves = partial_merge or self.rules.merge == "naive"
        # On a GPU int8 products round the activations too, so that rounding moves codes.
        coarse = self.quantization == "int8" and self.accelerator.device.type == "cuda"
        allowed = self.rules.max_drift or (math.inf if moves else MAX_DRIFT["float16" if coarse else self.dtype])
        Drift(**{key: record[f"drift_{key}"] for key in Drift.__dataclass_fields__}).check(allowed)

    def _probe(self, model: PreTrainedModel) -> Outputs:
        return self.evaluator.outputs(model, self.bench.probe_rows)

    def _record_knot(self, knot: Knot) -> None:
        link = self.links[len(self.knots)]
        record = {
            "link": len(self.knots) + 1,
            "step": link.last_step,
            "seed": link.seed,
            "merge": self.measured.tie["merge"] if knot.applied else None,
            **{f"drift_{name}": value for name, value in asdict(knot.drift).items()},
            **_over_matrices(list(knot.applied.values())),
            "matrices": {name: asdict(applied) for name, applied in knot.applied.items()},
            "seconds": perf_counter() - self.tied_from,
        }
        self._check_drift(record)
        self.measured.keep_knot(link.last_step, record)
        self.bench.write_references()
        self._note_knot(record)

    def _note_knot(self, record: dict[str, Any]) -> None:
        self._check_drift(record)
        knot = {key: value for key, value in record.items() if key != "matrices"}
        self.knots.append(knot)
        if not record["matrices"]:
            return
        rows = [{"link": knot["link"], "module": name, **applied} for name, applied in record["matrices"].items()]
        self.ledger += rows
        self.bench.folder.write_jsonl(self._name("ledger.jsonl"), self.ledger)
        self._write_metric("knot", knot)
        if self.tracker:
            self.tracker.log(knot["step"], {f"knot/{key}": n for key, n in knot.items() if isinstance(n, float)})

    # -----------------------------------------------------------------------------------------------------
    # Scores

    def _score(self, model: PreTrainedModel, split: str, at: str) -> list[ExampleScore]:
        self.bench.progress.stage(f"scoring {split}{at}")
        return self.evaluator(model, self.rows_of[split])

    def _evaluate(self, step: int) -> dict[str, Any]:
        scores: dict[str, list[ExampleScore]] = {}
        for name in self.splits:
            compute = partial(self._score_tied, step, name)
            scores[name] = self.measured.scores(name, step, "tied", compute)
            self._write_scores(name, self.rows_of[name], scores[name])
        return evaluation_of(scores) | ({} if self.job.trial else {"general": self._forgetting(step)})

    def _forgetting(self, step: int) -> dict[str, Any] | None:
        """Loss on the general text after and before training; None where the recipe leaves it out."""
        if not self.general:
            return None
        after = []
        if step:
            compute = partial(self._score_general, lambda: self._scored_model(step), "")
            after = self.measured.scores("general", step, "tied", compute)
        # Asked for last: where a model had to be loaded for anything else, this was measured then.
        before = self._general_before(None)
        after = after or before  # without links nothing is forgotten
        self._write_scores("general", self.general, after)
        return forgetting_of(before, after)

    def _write_scores(self, name: str, examples: Sequence[Example], scores: Sequence[ExampleScore]) -> None:
        rows = score_rows(examples, scores, self.evaluator.tokenizer, self.recipe.evaluation.keep_prompts)
        self.bench.folder.write_jsonl(self._name(f"scores/{name}.jsonl"), rows)

    def _general_before(self, model: PreTrainedModel | None) -> list[ExampleScore]:
        """The general text by the untouched base, whose name all arms and seeds on it share.

        Args:
            model: The base, just loaded; None: load it if it is needed, since a chain's own has links in it by now.
        """
        compute = partial(self._score_general, lambda: model or self._load(), " of the untouched model")
        return self.measured.scores("general", 0, "attached", compute)

    def _score_general(self, model: Callable[[], PreTrainedModel], at: str) -> list[ExampleScore]:
        scored = model()
        self.bench.progress.stage(f"scoring the general text{at}")
        return self.evaluator.of_text()(scored, self.general)

    def _score_tied(self, step: int, split: str) -> list[ExampleScore]:
        return self._score(self._scored_model(step), split, "")

    def _scored_model(self, step: int) -> PreTrainedModel:
        """The model with the links up to a step tied."""
        if self.placed == step or step == 0:
            return self.chain.model
        number = self.lineage.link_of(step)
        ends = [link.last_step for link in self.links[:number]]
        for needed in (*ends, step):
            if not self._has_weights(needed):
                raise FileNotFoundError(f"{self.job.label}: the state after step {needed} has gone from the store")
        link, chain = self.links[number], self.chain
        if link.method == "lora":
            retie(chain, [*self._tied(ends, gone_on=True), self.states.pair(step)])
        else:
            chain.model = adapters.attach(chain.model, link.what, link.seed)
            self.states.put_back(chain.model, step)
            adapters.detach(chain.model)
        self.placed = step
        return self.chain.model

    # -----------------------------------------------------------------------------------------------------
    # Records

    def _hand_out(self, scored_step: int) -> None:
        """The knots, and the weights of full fine-tuning, into the run folder."""
        kept = [(f"knots/link-{number}", link.last_step, link) for number, link in enumerate(self.links, 1)]
        if 0 < scored_step < self.n_steps:
            number = self.lineage.link_of(scored_step)
            kept.append((f"knots/best-link-{number + 1}", scored_step, self.links[number]))
        for name, step, link in kept:
            full = link.method == "full"
            if (link.method != "lora" and step != scored_step) or not self._has_weights(step):
                continue
            if full and not self.recipe.keep_full_weights:
                continue
            folder = self.path / {"lora": name, "full": "model"}.get(link.method, "adapter")
            folder.mkdir(parents=True)
            segment = self.states.there(step)
            for file in segment.record["files"]:
                if adapters.is_export(file):
                    hand_out(segment.folder / file, folder / file, large=full and file.endswith(".safetensors"))
            if full:
                self.bench.evaluator.tokenizer.save_pretrained(folder)
                if (own := self.bench.source.folder / "generation_config.json").is_file():
                    shutil.copy(own, folder)

    def _refer(self, scored_step: int) -> None:
        names = {self.lineage.names[step] for step in (*self.cuts, scored_step) if step}
        self.bench.used["segments"] |= names
        self.bench.write_references()

    def _train_info(self, scored_step: int) -> dict[str, Any]:
        rates = [max(link.learning_rates) for link in self.links]
        train_seconds = sum(row["seconds"] for row in self.rows)
        return {
            "learning_rate": max(rates, default=None),
            "choice": dict(self.job.choice),
            "at_grid_edge": _at_edge(self.bench.recipe, self.job),
            "base": {"dtype": self.dtype, "quantization": self.quantization},
            "rules": self.rules.model_dump(mode="json") if self.links else None,
            "checkpoint": self.recipe.evaluation.checkpoint,
            "scored_step": scored_step,
            "looked_loss": self.looks[scored_step]["loss"] if scored_step in self.looks else None,
            "steps": self.n_steps,
            "reused_steps": self.reused,
            "segments": [self.lineage.names[step] for step in self.cuts],
            "segments_made": self._made(),
            "measured_made": self.measured.made_with,
            "final_state": self.lineage.names[-1],
            "scored_state": self.lineage.names[scored_step],
            "tokens": sum(row["tokens"] for row in self.rows),
            "flops": self.cost.flops,
            "positions": self.cost.positions,
            "without_gradient": min((row["without_gradient"] for row in self.rows), default=0),
            "num_trainable_params": self.n_trained,
            "num_total_params": sum(p.numel() for p in self.bench.skeleton.parameters()),
            "train_seconds": train_seconds,
            # What the result costs, whichever session made its parts.
            "total_seconds": train_seconds + self.measured.seconds + sum(knot["seconds"] for knot in self.knots),
            "accelerator_memory_max": self._peak("accelerator"),
            "process_memory_max": self._peak("process"),
            "links": [link_record(link) | {"cleared": self.rows[link.first_step]["cleared"]} for link in self.links],
            "knots": self.knots,
            "evaluations": [self.looks[step] for step in sorted(self.looks)],
        }

    @cached_property
    def cost(self) -> Cost:
        """FLOPs and positions of all the links' steps, whenever they were made."""
        meter, seed = self.bench.meter, self.job.seed
        costs = [meter.steps(link, self.order[link.first_step : link.last_step], seed) for link in self.links]
        return sum((cost for steps in costs for cost in steps), Cost(0.0, 0))

    def _peak(self, what: str) -> int | None:
        """The largest memory that training took, whichever sessions did it; None where nothing was trained, or where
        a state is from a version that did not note it."""
        kept = [segment.record for step in self.cuts if (segment := self.states.get(step)) is not None]
        known = [record.get("memory", {}).get(what) for record in kept]
        return None if None in known else max(known, default=None)

    def _made(self) -> list[dict[str, Any]]:
        """With what the segments were made, in this session or an earlier one; what they agree in is said once."""
        made = [segment.record["made"] for step in self.cuts if (segment := self.states.get(step)) is not None]
        return each_once({key: one[key] for key in MADE_WITH} for one in made)

    def _tracked(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """The final numbers under W&B's fixed names."""
        summary = {f"final/{s}_{key}": evaluation[s][key] for s in SPLITS for key in ("loss", "score")}
        summary |= {"gap/loss": evaluation["gap_loss"], "gap/acc": evaluation["gap_acc"]}
        if (general := evaluation["general"]) is not None:
            summary |= {"general/loss": general["loss"], "general/forgetting": general["forgetting"]}
        # Full fine-tuning is trained first in each seed, so that every other arm knows its distance to it.
        full = self.bench.folder.result(Job(arm=self.recipe.full_arm, seed=self.job.seed))
        if full and full["status"] == "ok" and evaluation["test"]["score"] is not None:
            summary["gap/ft"] = full["evaluation"]["test"]["score"] - evaluation["test"]["score"]
        return summary

    def _config(self) -> dict[str, Any]:
        return {
            "arm": self.job.arm,
            "seed": self.job.seed,
            "links": [link_record(link) for link in self.links],
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "model_sha256": self.bench.meta["model"]["sha256"],
            "data_sha256": self.bench.meta["data"]["sha256"],
            "state": self.lineage.names[-1],
        }

    def _name(self, name: str) -> Path:
        return (self.path / name).relative_to(self.bench.folder.path)

    def _write_metric(self, kind: str, row: dict[str, Any]) -> None:
        self.metrics.write(json.dumps({"kind": kind, **row}) + "\n")


def _over_matrices(entries: Sequence[Applied]) -> dict[str, float | None]:
    """Median and worst of what the matrices were given."""
    found: dict[str, float | None] = {}
    for key, worst in (("relative_size", max), ("unchanged", max), ("error", max), ("cosine", min)):
        values = [value for entry in entries if (value := getattr(entry, key)) is not None]
        found[f"{key}_median"] = float(np.median(values)) if values else None
        found[f"{key}_{worst.__name__}"] = worst(values, default=None)
    return found


def tracked_state(result: dict[str, Any]) -> str:
    """What identifies to W&B the arm, seed and last state of a result that came to its end."""
    return f"{result['run_info']['arm']} {result['run_info']['seed']} {result['train_info']['final_state']}"


def selection_key(select_by: str, loss: float, score: float | None) -> tuple[float, float]:
    """Orders looks at validation: the larger key is the better."""
    if not math.isfinite(loss):
        return (-math.inf, -math.inf)  # a model that has diverged is the worst, whatever it happens to score
    return (score if select_by == "score" and score is not None else 0.0, -loss)


def link_record(link: Link) -> dict[str, Any]:
    """A link for the records, its learning rates shortened to first, peak and last."""
    rates = link.learning_rates
    return {
        **link.what.model_dump(mode="json", exclude_none=True),
        "first_step": link.first_step,
        "last_step": link.last_step,
        "learning_rate_first": rates[0],
        "learning_rate_peak": max(rates),
        "learning_rate_last": rates[-1],
        "seed": link.seed,
    }


def _at_edge(recipe: Recipe, job: Job) -> list[str]:
    """The searched keys whose chosen number is the smallest or the largest that was tried."""
    searches, chosen = recipe.searches_of(job.arm), dict(job.choice)
    grids = {key: [v for v in search.search if type(v) in (int, float)] for key, search in searches.items()}
    return [key for key, grid in grids.items() if grid and chosen.get(key) in (min(grid), max(grid))]

"""One arm and seed: from the base weights through its links to a scored, recorded result."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cola import adapters, residual
from cola.batches import batch_order, collate, training_batches, training_row
from cola.chain import Chain, Knot, run_chain
from cola.data import Splits
from cola.evaluate import Evaluator, mean_loss, mean_score
from cola.forward import logits_at
from cola.model import Source
from cola.plan import Job, Link, evaluation_steps, plan_arm
from cola.recipe import SPLITS, Recipe, Search
from cola.record import FORMAT, RunFolder
from cola.residual import Base, Residual
from cola.terminal import RunProgress
from cola.tracking import Tracker
from cola.train import Step, tune

MAX_DRIFT = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}  # what rounding can explain, see knot.max_drift
PROBE_ROWS = 4  # training rows whose logits tell what a knot changed


def make_accelerator(dtype: str) -> Accelerator:
    """accelerate with the recipe's precision, on the device it finds.

    On a CPU accelerate has no fp16 autocast: the weights are fp16 there and a pair computes in float32.
    """
    return Accelerator(mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype])


@dataclass(frozen=True)
class Bench:
    """What all jobs of a run share."""

    recipe: Recipe
    folder: RunFolder
    source: Source
    splits: Splits
    evaluator: Evaluator
    progress: RunProgress
    tracker: Tracker
    meta: dict[str, Any]


@dataclass(frozen=True)
class Best:
    """The best evaluation point so far; its residual is `[{}]` for full fine-tuning, whose weights are in a file."""

    key: tuple[float, float]
    step: int
    link: int
    learned: Residual


class JobRun:
    """One job. `go` does all of it; the other methods are what happens at a step, a knot and the end."""

    def __init__(self, bench: Bench, job: Job) -> None:
        n_train = len(bench.splits.train)
        self.bench = bench
        self.job = job
        self.path = bench.folder.start_job(job)
        self.links = plan_arm(bench.recipe, job.arm, job.seed, n_train, job.learning_rate)
        self.n_steps = self.links[-1].last_step if self.links else 0
        lengths = [example.n_tokens for example in bench.splits.train]
        self.order = batch_order(lengths, bench.recipe.training.batch_size, self.n_steps, job.seed)
        # One accelerator per job: an arm that fails must not leave its optimizer or gradient scale to the next.
        self.accelerator = make_accelerator(bench.recipe.model.dtype)
        self.points = set(evaluation_steps(bench.recipe, self.links, n_train))
        self.tracker = None if job.trial else bench.tracker
        self.best: Best | None = None
        self.trainable = 0
        self.tokens = 0
        self.train_seconds = 0.0
        self.evaluations: list[dict[str, Any]] = []
        self.knots: list[dict[str, Any]] = []

    def go(self) -> None:
        """Train, select, score, record."""
        bench, job = self.bench, self.job
        started = perf_counter()
        if self.tracker:
            self.tracker.start(job.arm, job.seed, self._config())
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = bench.source.load(bench.recipe.model.dtype, self.accelerator.device)
        if bench.recipe.training.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.chain = Chain(model, Base(model, bench.source.files))
        try:
            with (self.path / "metrics.jsonl").open("w", encoding="utf-8", buffering=1) as self.metrics:
                max_drift = bench.recipe.knot.max_drift or MAX_DRIFT[bench.recipe.model.dtype]
                for knot in run_chain(self.chain, self.links, self._tune, self._probe, max_drift):
                    self._record_knot(knot)
            scored_step = self._select()
        finally:
            self.accelerator.free_memory()
            (self.path / "best.safetensors").unlink(missing_ok=True)
        evaluation = self._evaluate(("validation",) if job.trial else SPLITS)
        if bench.recipe.keep_full_weights and not job.trial and any(link.method == "full" for link in self.links):
            model.save_pretrained(self.path / "model")
            bench.evaluator.tokenizer.save_pretrained(self.path / "model")
            if (own := bench.source.folder / "generation_config.json").is_file():
                shutil.copy(own, self.path / "model")
        seconds = perf_counter() - started
        created = datetime.now().astimezone().isoformat(timespec="seconds")
        result = {
            "format": FORMAT,
            "status": "ok",
            "run_info": {**asdict(job), "created_at": created, "seconds": seconds, "error": None},
            "train_info": self._train_info(scored_step) | {"total_seconds": seconds},
            "evaluation": evaluation,
            "meta_info": bench.meta,
        }
        bench.folder.write_json(self._name("result.json"), result)
        if self.tracker:
            self.tracker.finish(self._tracked(evaluation))

    def _tune(self, model: PreTrainedModel, link: Link) -> None:
        bench, training = self.bench, self.bench.recipe.training
        number = len(self.knots) + 1
        self.trainable = max(self.trainable, sum(p.numel() for p in adapters.trainable(model)))
        rows = self.order[link.first_step : link.last_step]
        tune(
            model,
            link,
            training_batches(bench.splits.train, rows, training.micro_batch_tokens),
            self.accelerator,
            lambda step: self._on_step(step, number),
            betas=training.betas,
            epsilon=training.epsilon,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
        )

    def _on_step(self, step: Step, link: int) -> None:
        self.tokens += step.tokens
        self.train_seconds += step.seconds
        self._write_metric("step", {"link": link, **asdict(step)})
        name = f"link {link}/{len(self.links)}" if len(self.links) > 1 else "training"
        self.bench.progress.step(name, step.loss, step.tokens, step.seconds)
        if self.tracker:
            rate = step.tokens / max(step.seconds, 1e-9)
            curves = {"loss": step.loss, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate}
            curves = {f"train/{name}": value for name, value in curves.items()}
            self.tracker.log(step.step, {**curves, "train/tokens_per_second": rate})
        if step.step in self.points:
            self._look(step.step, link)

    def _look(self, step: int, link: int) -> None:
        """Score validation at an evaluation point, and keep the weights if they are the best so far."""
        bench, model = self.bench, self.chain.model
        bench.progress.stage(f"validation at step {step}")
        scores = bench.evaluator(model, bench.splits.validation)
        loss, score = mean_loss(scores), mean_score(scores)
        self.evaluations.append({"step": step, "link": link, "loss": loss, "score": score})
        self._write_metric("validation", self.evaluations[-1])
        if self.tracker:
            self.tracker.log(step, {"validation/loss": loss, "validation/score": score})
        key = selection_key(bench.recipe, loss, score)
        if bench.recipe.evaluation.checkpoint == "best" and (self.best is None or key > self.best.key):
            pair = adapters.read_pair(model)
            self.best = Best(key, step, link, [*self.chain.learned, pair])
            if not pair:
                weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
                save_file(weights, self.path / "best.safetensors")

    def _record_knot(self, knot: Knot) -> None:
        link = self.links[len(self.knots)]
        sizes = list(knot.relative_size.values())
        record = {
            "link": len(self.knots) + 1,
            "step": link.last_step,
            "seed": link.seed,
            **{f"drift_{name}": value for name, value in asdict(knot.drift).items()},
            "relative_size_median": float(np.median(sizes)) if sizes else None,
            "relative_size_max": max(sizes, default=None),
        }
        self.knots.append(record)
        if knot.weights:
            self._save_pair(f"knots/link-{record['link']}", knot.weights, link)
            self._write_metric("knot", record)
            if self.tracker:
                size = record["relative_size_median"]
                drift = knot.drift.relative
                self.tracker.log(link.last_step, {"knot/drift": drift, "knot/relative_size": size})

    def _save_pair(self, name: str, weights: residual.LinkWeights, link: Link) -> None:
        adapters.save_pair(self.path / name, self.chain.model, weights, link, self.bench.source.name)

    def _select(self) -> int:
        """Put the selected checkpoint's weights into the model; returns its step."""
        best, model = self.best, self.chain.model
        if best is None or best.step == self.n_steps:
            return self.n_steps
        if best.learned[-1]:
            residual.write(model, self.chain.base, best.learned, residual.modules_of(self.chain.learned))
            self._save_pair(f"knots/best-link-{best.link}", best.learned[-1], self.links[best.link - 1])
        else:
            weights = load_file(self.path / "best.safetensors")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
        return best.step

    def _evaluate(self, names: Sequence[str]) -> dict[str, Any]:
        evaluation: dict[str, Any] = {}
        for name in names:
            self.bench.progress.stage(f"scoring {name}")
            scores = self.bench.evaluator(self.chain.model, getattr(self.bench.splits, name))
            self.bench.folder.write_jsonl(self._name(f"scores/{name}.jsonl"), map(asdict, scores))
            evaluation[name] = {"loss": mean_loss(scores), "score": mean_score(scores), "n": len(scores)}
        if "test" in evaluation:
            train, test = evaluation["train"], evaluation["test"]
            evaluation["gap_loss"] = test["loss"] - train["loss"]
            evaluation["gap_acc"] = None if train["score"] is None else train["score"] - test["score"]
        return evaluation

    @torch.no_grad()
    def _probe(self, model: PreTrainedModel) -> torch.Tensor:
        rows = self.bench.splits.train[:PROBE_ROWS]
        batch = collate([training_row(example) for example in rows]).to(self.accelerator.device)
        with self.accelerator.autocast():
            return logits_at(model.eval(), batch.input_ids_BT, batch.predicts_BT)

    def _train_info(self, scored_step: int) -> dict[str, Any]:
        on_gpu = self.accelerator.device.type == "cuda"
        peaks = [max(link.learning_rates) for link in self.links]
        return {
            "learning_rate": max(peaks, default=None),
            "at_grid_edge": _at_edge(self.bench.recipe, self.job),
            "checkpoint": self.bench.recipe.evaluation.checkpoint,
            "scored_step": scored_step,
            "looked_loss": next((e["loss"] for e in self.evaluations if e["step"] == scored_step), None),
            "steps": self.n_steps,
            "tokens": self.tokens,
            "num_trainable_params": self.trainable,
            "num_total_params": sum(p.numel() for p in self.chain.model.parameters()),
            "train_seconds": self.train_seconds,
            "accelerator_memory_max": torch.cuda.max_memory_allocated() if on_gpu else None,
            "links": [link_record(link) for link in self.links],
            "knots": self.knots,
            "evaluations": self.evaluations,
        }

    def _tracked(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """The final numbers under W&B's fixed names."""
        summary = {f"final/{s}_{key}": evaluation[s][key] for s in SPLITS for key in ("loss", "score")}
        summary |= {"gap/loss": evaluation["gap_loss"], "gap/acc": evaluation["gap_acc"]}
        # Full fine-tuning is trained first in each seed, so that every other arm knows its distance to it.
        full = self.bench.folder.result(Job(arm=self.bench.recipe.full_arm, seed=self.job.seed))
        if full and full["status"] == "ok" and evaluation["test"]["score"] is not None:
            summary["gap/ft"] = full["evaluation"]["test"]["score"] - evaluation["test"]["score"]
        return summary

    def _config(self) -> dict[str, Any]:
        return {
            "arm": self.job.arm,
            "seed": self.job.seed,
            "links": [link_record(link) for link in self.links],
            "recipe": self.bench.recipe.model_dump(mode="json", exclude_none=True),
            "model_sha256": self.bench.meta["model"]["sha256"],
            "data_sha256": self.bench.meta["data"]["sha256"],
        }

    def _name(self, name: str) -> Path:
        return (self.path / name).relative_to(self.bench.folder.path)

    def _write_metric(self, kind: str, row: dict[str, Any]) -> None:
        self.metrics.write(json.dumps({"kind": kind, **row}) + "\n")


def selection_key(recipe: Recipe, loss: float, score: float | None) -> tuple[float, float]:
    """Orders validation results: the larger key is the better. Plain text has no score and goes by loss."""
    by_score = recipe.evaluation.select_by == "score" and score is not None
    return (score if by_score else 0.0, -loss)  # pyright: ignore[reportReturnType] - score is not None there


def link_record(link: Link) -> dict[str, Any]:
    """A link for the records, its learning rates shortened to first, peak and last."""
    record = asdict(link)
    rates = record.pop("learning_rates")
    shape = {"learning_rate_first": rates[0], "learning_rate_peak": max(rates), "learning_rate_last": rates[-1]}
    return record | {"last_step": link.last_step} | shape


def _at_edge(recipe: Recipe, job: Job) -> bool:
    rate = recipe.learning_rate_of(job.arm)
    return isinstance(rate, Search) and job.learning_rate in (min(rate.search), max(rate.search))

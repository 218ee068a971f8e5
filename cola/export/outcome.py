"""What one arm and seed of a run came to: its links and the model that was scored, from the run's folder alone.

The store may be gone and the folder may have been copied from another machine; only the base has to be there.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from cola.chain import Chain, retie
from cola.errors import ModelError, RunFolderError, did_you_mean, listed, quoted
from cola.link import adapter_files, adapters, residual
from cola.link.base import Base
from cola.link.find import find_model
from cola.link.model import Source
from cola.link.residual import Residual
from cola.recipe.methods import Adapter, Lora, Settings, settings_of
from cola.recipe.plan import Job
from cola.recipe.read import read_recipe
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import Rules
from cola.recipe.schema import is_remote
from cola.tree.made import Provenance
from cola.tree.manifest import check_folder, damaged_file
from cola.tree.records import Result, TrainInfo
from cola.tree.run_folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """One arm and seed of a run, at the checkpoint that was scored."""

    folder: RunFolder
    recipe: Recipe  # as it was resolved
    job: Job
    result: Result

    @property
    def path(self) -> Path:
        """Where the arm's and seed's files lie."""
        return self.folder.job(self.job)

    @property
    def info(self) -> TrainInfo:
        """How it was trained."""
        return self.result.train_info

    @cached_property
    def links(self) -> list[Settings]:
        """What each link trained; empty for the base."""
        return [settings_of(link.model_dump(exclude_unset=True)) for link in self.info.links]

    @property
    def method(self) -> str | None:
        """The links' method; None for the base."""
        return self.links[0].method if self.links else None

    @property
    def kind(self) -> type[Settings]:
        """What may be done with what its links trained, which are all of a kind; nothing with the base's."""
        return type(self.links[0]) if self.links else Settings

    @property
    def has_dora(self) -> bool:
        return any(isinstance(link, Lora) and link.use_dora for link in self.links)

    @property
    def dtype(self) -> str:
        """Number format of the frozen weights and the computation."""
        return self.info.base.dtype

    @property
    def quantization(self) -> str | None:
        return self.info.base.quantization

    @cached_property
    def provenance(self) -> Provenance:
        """What the run was made with."""
        if (provenance := self.folder.provenance()) is None:
            raise damaged_file(self.folder.path / "provenance.json", "it has gone")
        return provenance

    @property
    def scored_links(self) -> list[Path]:
        """Where the pairs of the links up to the scored step belong, in order; the last one may be a link at its best
        step."""
        ends = [link.last_step for link in self.info.links]
        step = self.info.scored_step
        folders = [self.path / "knots" / f"link-{number}" for number, end in enumerate(ends, 1) if end <= step]
        if step not in ends:
            folders.append(self.path / "knots" / f"best-link-{len(folders) + 1}")
        return folders

    def link_folders(self) -> list[Path]:
        """The same, where they are: raises ModelError if the arm has none, or they are not in the run's folder."""
        if not self.kind.is_pair:
            why = f"{self.method} leaves no low-rank pair" if self.method else "it trains nothing"
            raise ModelError(f"arm {self.job.arm} has no knots: {why}")
        for folder in self.scored_links:
            if not (folder / "adapter_model.safetensors").is_file():
                raise ModelError(f"{folder} is not there: the run's folder was not copied as a whole")
        return self.scored_links

    def residual(self) -> Residual:
        """What the chain had learned where it was scored, float32 on the CPU; raises as `link_folders` does, and where
        one is damaged."""
        *before, last = self._pairs()
        return [*residual.left_behind(before, self.info.shares(len(before)), self.rules.keeps_pair), last]

    def added(self) -> Residual:
        """What each link added to the chain; the same as `residual` but for a pair that goes on from link to link."""
        pairs = self._pairs()
        return residual.added(pairs, self.info.shares(len(pairs) - 1), self.rules.keeps_pair)

    def _pairs(self) -> Residual:
        pairs = []
        for folder in self.link_folders():
            self.check(folder.relative_to(self.path).as_posix())
            try:
                pairs.append(adapter_files.load_pair(folder))
            except (SafetensorError, ValueError, KeyError, OSError) as error:
                raise ModelError(f"the link in {folder} is damaged ({error}); run the recipe anew") from error
        return pairs

    @property
    def rules(self) -> Rules:
        """What happened at its knots."""
        assert self.info.rules is not None  # it has links
        return self.info.rules

    @cached_property
    def source(self) -> Source:
        """The base it was trained on. Raises ModelError if it is not there, or is another one now."""
        source, trained_on = find_model(self.recipe.model), self.provenance.model.sha256
        if source.fingerprint() != trained_on:
            raise ModelError(
                f"{self.recipe.model.name_or_path} is not the base of {self.folder.path}: its fingerprint is "
                f"{source.fingerprint()[:12]} and the run's is {trained_on[:12]}"
            )
        return source

    @property
    def base_name(self) -> str:
        """What other tools find the base by: its id on the hub, else its folder on this disk."""
        name = self.recipe.model.name_or_path
        return name if is_remote(name) and not name.startswith("package://") else str(self.source.folder)

    @property
    def tuned(self) -> Source:
        """All weights, of full fine-tuning. Raises ModelError if they were not kept."""
        self.check("model")
        if not (self.path / "model" / "config.json").is_file():
            raise ModelError(
                f"arm {self.job.arm}: the fully fine-tuned weights were not kept; run the recipe with "
                "keep_full_weights: true"
            )
        return Source(str(self.path / "model"), self.path / "model", self.recipe.model.trust_remote_code)

    def load(self, device: torch.device) -> PreTrainedModel:
        """The model that was scored; raises where a part of it is not there."""
        if self.kind.is_whole:
            return self.tuned.load("float32", device)  # as they were trained, whatever the base's dtype
        if self.kind.is_pair:
            return self.chain(device).model
        model = self.source.load(self.dtype, device, self.quantization)
        if self.method is None:
            return model
        folder = self.path / "adapter"
        if not folder.is_dir():
            raise ModelError(f"{folder} is not there: the run's folder was not copied as a whole")
        self.check("adapter")
        if not isinstance(self.links[0], Adapter):
            return adapter_files.load_adapter(model, folder)
        model = adapters.attach(model, self.links[0], seed=0)
        adapter_files.put_back(folder, model, self.links[0])
        adapters.detach(model)
        return model

    def check(self, name: str) -> None:
        """Raise a RunFolderError where a file of a folder of the arm's and seed's is not what was written."""
        check_folder(self.folder.path, (self.path / name).relative_to(self.folder.path))

    def chain(self, device: torch.device) -> Chain:
        """The base with the scored links tied; raises as `residual` does."""
        learned = self.residual()
        model = self.source.load(self.dtype, device, self.quantization)
        chain = Chain(model, Base(model, self.source.files, self.quantization is not None), self.rules)
        retie(chain, learned)
        return chain


def outcomes(
    run: Path, arm: str | None = None, seed: int | None = None, missing: list[str] | None = None
) -> list[Outcome]:
    """The arms and seeds of a run that came to their end, or those of one arm, of one seed; the others are added to
    `missing`, in words. Raises RunFolderError if it is no run folder, has no such arm or seed, or nothing of it came to
    its end."""
    folder = RunFolder.open(run)
    recipe = read_recipe(folder.recipe_file)
    if arm is not None and arm not in recipe.arms:
        hint = did_you_mean(arm, recipe.arms)
        raise RunFolderError(f"{run} has no arm {quoted(arm)}{hint} It has {listed(recipe.arms)}")
    if seed is not None and seed not in recipe.seeds:
        raise RunFolderError(f"{run} has no seed {seed}; it has {', '.join(map(str, recipe.seeds))}")
    arms, seeds = recipe.arms if arm is None else [arm], recipe.seeds if seed is None else [seed]
    jobs = [Job(arm=name, seed=number) for name in arms for number in seeds]
    done = [Outcome(folder, recipe, job, result) for job in jobs if (result := folder.result(job)) is not None]
    there = [outcome.job for outcome in done]
    lacking = [f"{job.label} ({folder.status(job) or 'not run'})" for job in jobs if job not in there]
    if not done:
        raise RunFolderError(f"{run}: no result of {', '.join(lacking)}; go on with it by `cola run --resume {run}`")
    if missing is not None:
        missing += lacking
    return done

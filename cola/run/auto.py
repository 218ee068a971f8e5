"""`--workers auto`: how many processes are fastest here, measured on real steps of the recipe's first training."""

import multiprocessing
import os
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing import connection
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from cola.data.batches import training_batches
from cola.errors import ColaError, ModelError
from cola.files import digest, store_path
from cola.link import adapters
from cola.link.accelerator import make_accelerator
from cola.link.find import find_model
from cola.link.train import tune
from cola.plan.tree import Planner
from cola.recipe.plan import Link, jobs_of
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.run.materials import Materials, gather
from cola.run.start import CORES
from cola.run.worker import Place, settle
from cola.tree.made import machine
from cola.tree.store import Store

STEPS = 4  # that are timed, after one that is not
VERSION = 1  # of the measurement


def fastest(recipe: Recipe, terminal: Terminal, ways: Sequence[Sequence[Place]]) -> Sequence[Place]:
    """The way to divide this machine in which most steps are made in a second, all its processes together. Measured
    once for a recipe, base, machine and versions; the store remembers it."""
    store = Store(store_path(recipe.store), terminal.warn)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    circumstances = {
        "measured": "workers",
        "version": VERSION,
        "state": find_model(recipe.model).fingerprint(),
        "recipe": digest(recipe.model_dump(mode="json")),
        "machine": {"device": device, "cores": CORES, "cpu": machine()["cpu"]},
        "packages": {name: version(name) for name in ("torch", "transformers", "peft")},
        "ways": [[[place.threads, place.card] for place in way] for way in ways],
    }
    rates, how = store.recall(circumstances), "measured before"
    if rates is None:
        terminal.say("workers: measuring how many are fastest on some steps of the first training")
        rates, how = [_rate(recipe, way) for way in ways], "measured now"
        store.remember(circumstances, rates)
    if not any(rates):
        raise ModelError("--workers auto: no step could be made in any way; say a number, and the run says why")
    told = [
        f"{len(way)} of {way[0].threads} thread{'s' if way[0].threads > 1 else ''} "
        + (f"{rate:.3g} steps/s" if rate else "failed")
        for way, rate in zip(ways, rates, strict=True)
    ]
    terminal.say(f"workers: {'; '.join(told)} ({how})")
    return ways[rates.index(max(rates))]


def _rate(recipe: Recipe, way: Sequence[Place]) -> float:
    """Steps in a second of all processes of a way, while they work at once; 0 where one of them cannot."""
    pipes, processes = [], []
    for place in way:
        context: Any = multiprocessing.get_context("spawn" if place.card is not None else "forkserver")
        mine, theirs = connection.Pipe()
        process = context.Process(target=step_along, args=(recipe, place, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        for pipe in pipes:
            pipe.recv()  # it has made its first step
        for pipe in pipes:
            pipe.send("go")
        times = [pipe.recv() for pipe in pipes]  # while the slowest goes on, the others do too
        return sum(steps / seconds for steps, seconds in times)
    except (EOFError, OSError):  # it has no memory, or the training fails as it will in the run
        return 0.0
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()


def step_along(recipe: Recipe, place: Place, pipe: Connection) -> None:
    """Make steps of the recipe's first training, time some of them, and go on until the process is ended."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    settle(place)
    materials = gather(recipe, Terminal(Console(quiet=True)))
    link, order, seed, base = _first_link(recipe, materials)
    accelerator = make_accelerator(base.dtype)
    model = adapters.attach(
        materials.source.load(base.dtype, accelerator.device, base.quantization), link.settings, link.seed
    )
    training, rows = recipe.training, materials.splits.train_of(seed)

    def steps(n_steps: int) -> int:
        batches = list(training_batches(rows, order[:n_steps], training.micro_batch_tokens))
        tune(
            model,
            link,
            batches,
            accelerator,
            lambda *_: None,
            betas=training.betas,
            epsilon=training.epsilon,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
        )
        return len(batches)

    steps(1)
    pipe.send("ready")
    pipe.recv()
    started = perf_counter()
    n_steps = steps(STEPS)
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    pipe.send((n_steps, perf_counter() - started))
    while True:
        steps(STEPS)


def _first_link(recipe: Recipe, materials: Materials) -> tuple[Link, list[list[int]], int, Any]:
    planner = Planner(materials.source, materials.skeleton, materials.splits, materials.device.type, materials.code)
    tree = planner.tree(recipe, planner.meter(recipe))
    for job in jobs_of(recipe):
        if links := tree.lineage(job).links:
            order = planner.order(recipe.training.batch_size, job.seed, links[0].last_step)
            return links[0], order, job.seed, recipe.resolved(job.arm, job.choice).base
    raise ColaError("--workers auto: no arm trains anything")

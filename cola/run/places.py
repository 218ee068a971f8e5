"""What each of several workers has of this machine: its threads, and its card."""

import os

import torch

from cola.errors import ModelError
from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.run.worker import Place


def places_for(workers: str, recipe: Recipe, terminal: Terminal) -> list[Place]:
    """The places of as many workers as are asked for, none of them for one; `auto`: as many as are fastest here."""
    n_workers = int(workers)
    places = places_of(n_workers)
    if places:
        # So that what this process says it was made with is what the workers make it with.
        torch.set_num_threads(places[0].threads)
        cards = f", cards {', '.join(sorted({place.card for place in places if place.card}))}" if places[0].card else ""
        terminal.say(f"workers: {n_workers}, each of {places[0].threads} threads{cards}")
    return places


def places_of(n_workers: int) -> list[Place]:
    """Threads and cards divided among so many workers; of several on one card each has all of it. Without more than one
    there are none. A ModelError where the machine has fewer cores than that."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n_workers > cores:
        raise ModelError(f"--workers {n_workers}: this process may use {cores} cores; at most so many workers")
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(1, cores // n_workers)
    cards = _cards()
    if n_workers == 1:
        return []
    return [
        Place(number, threads, cards[(number - 1) % len(cards)] if cards else None)
        for number in range(1, n_workers + 1)
    ]


def _cards() -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]

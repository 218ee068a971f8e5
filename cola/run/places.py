"""What each of several workers has of this machine: its threads, and its card."""

import os
from collections.abc import Sequence

import torch

from cola.recipe.recipe import Recipe
from cola.report.terminal import Terminal
from cola.run.auto import fastest
from cola.run.start import CORES, Workers
from cola.run.worker import Place, RayPlace


def places_for(workers: Workers, recipe: Recipe, terminal: Terminal) -> Sequence[Place]:
    """The places of as many workers as are asked for, none of them for one; `auto`: as many as are fastest here; on a
    cluster without a number: as many as it has room for."""
    if workers.on is not None:
        from cola.run.on_ray import places_on  # where Ray is installed

        places = places_on(workers.number)
    else:
        places = fastest(recipe, terminal, _ways()) if workers.number == "auto" else places_of(int(workers.number or 1))
        if len(places) == 1:
            return []
    # So that what this process says it was made with is what the workers make it with.
    torch.set_num_threads(places[0].threads)
    cards = f", cards {', '.join(sorted({place.card for place in places if place.card}))}" if places[0].card else ""
    if isinstance(places[0], RayPlace):
        cards = ", a card each" if places[0].cards else ""
    terminal.say(f"workers: {len(places)}, threads of each: {places[0].threads}{cards}")
    return places


def places_of(n_workers: int) -> list[Place]:
    """Threads and cards divided among so many workers; of several on one card each has all of it."""
    own = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None  # the user's word
    threads, cards = own or max(1, CORES // n_workers), _cards()
    return [
        Place(number, threads, cards[(number - 1) % len(cards)] if cards else None)
        for number in range(1, n_workers + 1)
    ]


def _ways() -> list[list[Place]]:
    """What is worth trying: one process with all, and twice as many each time; with cards from one for each on."""
    first = max(1, len(_cards()))
    numbers = [first * 2**doubled for doubled in range(4) if first * 2**doubled <= CORES]
    return [places_of(number) for number in numbers or [1]]


def _cards() -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]

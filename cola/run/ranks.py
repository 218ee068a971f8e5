"""One run over several processes, which torchrun or accelerate launch starts: what rank 0 asks of the others.

Rank 0 runs the recipe as a single process does: it alone reads recipe, data and store, decides, scores, writes, prints
and tracks. Beside it the others train (`helper.py`): for each part of a link they are told the base, what the chain has
learned, the link, the weights it has come to and the optimizer's state, and then of each step which rows are whose. So
a resume, a knot, a checkpoint, an end by a rule and an error of the recipe's are no other than in one process, and
nothing that the store holds depends on what another rank might have seen of it.

Where the base is in shards, more is told (`shards.py`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cola.chain import Chain
from cola.data.batches import MicroBatch, Share, collated
from cola.errors import ColaError, RanksLost, RecipeError, one_line
from cola.link import adapters, wires
from cola.link.moments import Moments
from cola.recipe.plan import Link
from cola.recipe.recipe import Recipe
from cola.run.assignment import Assignment
from cola.run.course import LinkEnded
from cola.run.interrupt import Interrupted
from cola.run.shards import packed, said


@contextmanager
def team() -> Iterator[bool]:
    """Meet the other processes of the launch; whether this one leads. It tells the others when it has ended."""
    leads = wires.join() == 0
    try:
        yield leads
    except (KeyboardInterrupt, Interrupted):
        raise  # perhaps in the middle of a sentence: the others hear the line go dead
    except BaseException:
        _end(leads)
        raise
    _end(leads)


def _end(leads: bool) -> None:
    with suppress(RanksLost):
        if leads:
            wires.send("end")
    wires.leave()


def need_ranks(recipe: Recipe) -> None:
    """Raise RecipeError where a step has fewer rows than there are processes, some of which would never have any, or a
    base is to be spread over one."""
    if recipe.model.shard and wires.count() == 1:
        raise RecipeError(
            "model.shard: true spreads the base over the processes of a launch, and this is a single one; start it by "
            "torchrun --nproc-per-node N -m cola run ..., or say false"
        )
    if recipe.training.batch_size < wires.count():
        raise RecipeError(
            f"training.batch_size: {recipe.training.batch_size}: the rows of a step are dealt to the {wires.count()} "
            "processes of this launch, and some would never have any; raise it, or start fewer processes"
        )


def tell_attached(given: Assignment, link: Link) -> None:
    """Let the others attach a link before a gradient is taken through a base in shards."""
    if given.recipe.model.shard:
        wires.send("attach", _asked(given, link))


def spread_of(recipe: Recipe) -> dict[str, Any]:
    """How the links are spread over processes, as causes of what they train."""
    if wires.count() == 1:
        return {}
    return {"dp": wires.count(), **({"shard": True} if recipe.model.shard else {})}


@contextmanager
def beside(
    given: Assignment, chain: Chain, link: Link, done: int, moments: Moments | None, steps: Iterable[list[Share]]
) -> Iterator[Iterable[list[MicroBatch]]]:
    """Let the others train a part of a link beside this process; gives the micro-batches of each step, of all ranks.

    Args:
        done: Steps of the link that were made before.
        moments: The optimizer's state after those.
        steps: What each rank reads of each.

    Raises:
        ModelError: another rank cannot.
    """
    if wires.count() == 1:
        yield map(collated, steps)
        return
    taken = adapters.taken_out(chain.model)
    pairs, tensors = packed("learned", [*chain.learned, taken] if taken else chain.learned)
    tensors |= {f"moments/{key}": value for key, value in (moments or {}).items()}
    wires.send("tune", _asked(given, link) | {"learned": pairs, "done": done, "moments": moments is not None}, tensors)
    wires.check_ready(None)
    wires.take_from_leader(adapters.trainable(chain.model))
    try:
        yield _told(steps)
    except (RanksLost, KeyboardInterrupt):
        raise
    except (ColaError, LinkEnded, Interrupted, OSError) as error:
        if isinstance(error, Interrupted) and given.recipe.model.shard:
            wires.fall_silent()  # they may be in a pass that is not gone through
        with suppress(RanksLost):  # else they have come to the same, or wait for the next step
            wires.send("stop")
        raise
    except Exception as error:
        raise RanksLost(f"rank 0 failed in a step that the others wait in: {one_line(error)}") from error
    wires.send("stop")


def _told(steps: Iterable[list[Share]]) -> Iterator[list[MicroBatch]]:
    """The steps, each told to the other ranks before it is taken here."""
    for shares in steps:
        wires.send("step", {"shares": shares})
        yield collated(shares)


def _asked(given: Assignment, link: Link) -> dict[str, Any]:
    """What another rank must know to train a link, as JSON."""
    training = given.recipe.training
    return {
        "job": str(given.path),
        "source": said(given.bench.materials.source),
        "fingerprint": given.bench.meta.model.sha256,
        "base": given.arm.base._asdict(),
        "shard": given.recipe.model.shard,
        "rules": given.arm.rules.model_dump(mode="json"),
        "code": given.bench.materials.code,
        "gradient_checkpointing": training.gradient_checkpointing,
        "optimizer": training.model_dump(include={"betas", "epsilon", "weight_decay", "max_grad_norm"}),
        "link": {
            "settings": link.settings.record(),
            "knot": None if link.knot is None else link.knot.model_dump(mode="json"),
            "first_step": link.first_step,
            "learning_rates": link.learning_rates,
            "seed": link.seed,
        },
    }

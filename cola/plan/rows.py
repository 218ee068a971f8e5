"""The rows that a plan counts by: those of the recipe, where they and the tokenizer are on this disk; else rows that
stand for them, as long as they may be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cola.data.batches import batch_order, by_tokens
from cola.data.encode import Example
from cola.data.passages import PASSAGE_TOKENS
from cola.data.splits import Splits, load_splits
from cola.plan.models import Planned
from cola.plan.passes import Shape
from cola.recipe.recipe import Recipe
from cola.recipe.schema import is_remote

STOOD_IN = {"train": 1000, "validation": 100, "test": 100}  # rows, where a recipe does not say how many
MOST_STOOD_IN = 50_000  # rows of a split
ANSWER_SHARE = 0.5  # of a row whose answer's length is not known
LOOKED_AT = 2_000  # steps whose passes are looked at


@dataclass(frozen=True)
class Rows:
    """Rows of a recipe, and whether they are its own."""

    splits: Splits
    said: str  # where they are from

    def lengths(self, seed: int) -> list[tuple[int, int]]:
        """Tokens and targets of each training row."""
        return [(e.n_tokens, len(e.answers[e.gold])) for e in self.splits.train_of(seed)]


def rows_of(recipe: Recipe, planned: Planned) -> Rows:
    """The recipe's rows, tokenized where that takes no network. Raises DataError where they do not fit the recipe."""
    data, name = recipe.data, recipe.model.name_or_path
    here = (not is_remote(name) or name.startswith("package://")) and data.hub is None
    if here and _has_tokenizer(planned, name):
        from cola.link.find import find_tokenizer

        tokenizer, ends = find_tokenizer(recipe.model)
        splits = load_splits(data, tokenizer, recipe.drawn_seeds, ends)
        return Rows(splits, "the recipe's own rows")
    targets = {"multiple_choice": 1, "text": data.max_length - 1}.get(data.task, int(ANSWER_SHARE * data.max_length))
    why = "the data set is on the hub" if data.hub is not None else "the model's tokenizer is not on this disk"
    sizes = {split: getattr(data.rows, split) or n for split, n in STOOD_IN.items()}
    unknown = [split for split in STOOD_IN if getattr(data.rows, split) is None]
    said = f"assumed: every row has {data.max_length} tokens (data.max_length), {targets} of them targets, since {why}"
    if unknown:
        said += f"; and there are {', '.join(f'{sizes[split]} rows of {split}' for split in unknown)}"
    examples = {split: _stand_in(min(n, MOST_STOOD_IN), data.max_length, targets) for split, n in sizes.items()}
    return Rows(Splits(**examples, notes=[], fingerprint="", redrawn={}), said)


def _has_tokenizer(planned: Planned, name: str) -> bool:
    if name.endswith(".gguf"):
        return True
    return Path(name).is_dir() and any(planned.source.folder.glob("tokenizer*"))


def _stand_in(n_rows: int, n_tokens: int, n_targets: int) -> list[Example]:
    prompt, answer = [0] * max(1, n_tokens - n_targets), [0] * n_targets
    # Numbered, so that no two batches are the same.
    return [Example(str(n), [n, *prompt[1:]], [answer], 0, [""], None) for n in range(n_rows)]


@dataclass(frozen=True)
class Passes:
    """The passes of an arm's steps: the heaviest one, how many there are, and the mean of them."""

    heaviest: Shape
    in_a_step: float
    positions: float  # of the mean pass, padding included
    several: bool  # whether a step has more than one


def passes_of(
    lengths: Sequence[tuple[int, int]],
    batch_size: int,
    n_steps: int,
    seed: int,
    budget: int,
    weight: tuple[float, float],
) -> Passes:
    """The micro-batches that training rows of these (tokens, targets) make.

    Args:
        budget: Tokens of a pass, padding included.
        weight: What a position and a target are taken to weigh, to tell which pass is the heaviest.
    """
    orders = batch_order([n for n, _ in lengths], batch_size, min(n_steps, LOOKED_AT), seed) or [[0]]
    shapes = [[_shape([lengths[i] for i in rows]) for rows in _grouped(lengths, order, budget)] for order in orders]
    every = [shape for step in shapes for shape in step]
    return Passes(
        max(every, key=lambda shape: weight[0] * shape.positions + weight[1] * shape.targets),
        len(every) / len(shapes),
        sum(shape.positions for shape in every) / len(every),
        any(len(step) > 1 for step in shapes),
    )


def _grouped(lengths: Sequence[tuple[int, int]], order: Sequence[int], budget: int) -> list[list[int]]:
    return list(by_tokens(order, lambda row: lengths[row][0], budget))


def _shape(rows: Sequence[tuple[int, int]]) -> Shape:
    return Shape(len(rows), max(n for n, _ in rows), sum(targets for _, targets in rows))


@dataclass(frozen=True)
class Scoring:
    """What is scored once, of one model."""

    shape: Shape  # of the heaviest pass
    positions: int  # in all
    answer: float  # mean tokens of an answer


def scoring_of(examples: Sequence[Example], budget: int) -> Scoring | None:
    """The passes that score some examples; None where there are none."""
    if not examples:
        return None
    groups = list(by_tokens(examples, lambda e: e.n_tokens, budget))
    targets = [len(e.answers[e.gold]) for e in examples]
    shapes = [Shape(len(g), g[0].n_tokens, sum(len(e.answers[e.gold]) for e in g)) for g in groups]
    heaviest = max(shapes, key=lambda shape: (shape.positions, shape.targets))
    return Scoring(heaviest, sum(shape.positions for shape in shapes), sum(targets) / len(targets))


GENERAL = Shape(1, PASSAGE_TOKENS, PASSAGE_TOKENS - 1)  # a passage of the general text

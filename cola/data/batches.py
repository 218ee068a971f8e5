"""Examples -> padded tensors. The only place that knows shifting and padding.

Axes: B rows, T tokens, N target tokens.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from cola.data.encode import Example
from cola.files import digest
from cola.recipe.plan import derived_seed

BUCKET = 20  # batches that are sorted by length together, as in PEFT's method comparison

Item = TypeVar("Item")
Row = tuple[str, list[int], list[int]]  # id, prompt, answer
Share = list[list[Row]]  # the rows of each of the micro-batches that one rank reads in a step


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, padded on the right (causal attention needs no mask for that)."""

    input_ids_BT: Tensor
    predicts_BT: Tensor  # True where the next token is a target
    targets_N: Tensor  # those next tokens, row by row
    ids: list[str]  # the rows'
    n_tokens: int  # without padding
    rank: int = 0  # of the process that reads it

    @property
    def n_targets(self) -> int:
        return self.targets_N.numel()

    def last_targets(self, n: int) -> "MicroBatch":
        """The same rows with the last n targets of each at most."""
        left_BT = self.predicts_BT.flip(1).cumsum(1).flip(1)  # targets from a position on
        keeps_BT = self.predicts_BT & (left_BT <= n)
        return replace(self, predicts_BT=keeps_BT, targets_N=self.targets_N[keeps_BT[self.predicts_BT]])

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on a device."""
        tensors = {"input_ids_BT": self.input_ids_BT, "predicts_BT": self.predicts_BT, "targets_N": self.targets_N}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def collate(rows: Sequence[Row], rank: int = 0) -> MicroBatch:
    """One micro-batch of (id, prompt, answer) rows; the answer's tokens are the targets."""
    lengths = [len(prompt) + len(answer) for _, prompt, answer in rows]
    input_ids_BT = torch.zeros(len(rows), max(lengths), dtype=torch.long)  # any id pads: nothing attends to it
    predicts_BT = torch.zeros(len(rows), max(lengths), dtype=torch.bool)
    for b, (length, (_, prompt, answer)) in enumerate(zip(lengths, rows, strict=True)):
        input_ids_BT[b, :length] = torch.tensor(prompt + answer)
        predicts_BT[b, len(prompt) - 1 : length - 1] = True
    targets_N = torch.tensor([token for _, _, answer in rows for token in answer])
    return MicroBatch(input_ids_BT, predicts_BT, targets_N, [name for name, _, _ in rows], sum(lengths), rank)


def training_row(example: Example) -> Row:
    """Prompt and right answer: what a model is trained on."""
    return example.id, example.prompt, example.answers[example.gold]


def batch_order(lengths: Sequence[int], batch_size: int, n_steps: int, seed: int) -> list[list[int]]:
    """Indices of the rows of each optimizer step: every epoch a new order, rows of like length together.

    Depends on the arguments alone, so all arms of a seed read the same rows in the same order.
    """
    steps: list[list[int]] = []
    size = BUCKET * batch_size
    for epoch in itertools.count():
        if len(steps) >= n_steps:
            break
        rng = random.Random(derived_seed("order", seed, epoch))
        rows = list(range(len(lengths)))
        rng.shuffle(rows)
        for start in range(0, len(rows), size):
            rows[start : start + size] = sorted(rows[start : start + size], key=lengths.__getitem__)
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        steps += batches
    return steps[:n_steps]


def by_tokens(items: Sequence[Item], length: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Items of like length in groups of at most `budget` tokens, padding included; longest first, so that a
    pass too large for the memory fails at once."""
    group: list[Item] = []
    for item in sorted(items, key=length, reverse=True):
        if group and length(group[0]) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def micro_batches(examples: Sequence[Example], rows: Sequence[int], micro_batch_tokens: int) -> list[list[Example]]:
    """The rows of one optimizer step, as they share forward passes."""
    return list(by_tokens([examples[i] for i in rows], lambda example: example.n_tokens, micro_batch_tokens))


def training_batches(
    examples: Sequence[Example], order: Sequence[Sequence[int]], micro_batch_tokens: int
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each optimizer step."""
    yield from map(collated, training_shares(examples, order, micro_batch_tokens, n_ranks=1))


def training_shares(
    examples: Sequence[Example], order: Sequence[Sequence[int]], micro_batch_tokens: int, n_ranks: int
) -> Iterator[list[Share]]:
    """What each rank reads of each optimizer step. The rows are dealt by length, so that all have about as much to do;
    of a step with fewer rows than ranks some have none."""
    for rows in order:
        dealt = [rows]
        if n_ranks > 1:
            longest_first = sorted(rows, key=lambda row: examples[row].n_tokens, reverse=True)
            dealt = [longest_first[rank::n_ranks] for rank in range(n_ranks)]
        groups = [micro_batches(examples, share, micro_batch_tokens) for share in dealt]
        yield [[list(map(training_row, group)) for group in own] for own in groups]


def collated(shares: Sequence[Share]) -> list[MicroBatch]:
    """The micro-batches of one optimizer step, of all ranks."""
    return [collate(group, rank) for rank, share in enumerate(shares) for group in share]


def batch_digests(
    examples: Sequence[Example], order: Sequence[Sequence[int]], micro_batch_tokens: int
) -> Iterator[str]:
    """What identifies each step's micro-batches: the tokens of their rows, in order; not what the rows are called."""
    names = {id(example): digest([example.prompt, example.answers[example.gold]]) for example in examples}
    for rows in order:
        groups = micro_batches(examples, rows, micro_batch_tokens)
        yield digest([[names[id(example)] for example in group] for group in groups])

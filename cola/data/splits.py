"""Rows -> prompts and answers -> tokens, drawn into splits that share nothing, and cached.

A row becomes a prompt and one or more answers (the choices of a multiple choice, or the one right answer). The
two are tokenized together and cut at the prompt's end, as lm-evaluation-harness does, so that the tokens are
those of the whole text. A token may span that end. The choices of a question are then all cut where the last token
ends that they and the prompt alone have in common, so that their likelihoods are of one condition; a prompt to be
answered keeps its tokens, since no right answer is known when a model is asked, and its answer is tokenized apart.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cola.data.chat import DAY, asks_for_the_date
from cola.data.encode import Encoded, Encoder, Example, fingerprint_of, tokenizer_fingerprint
from cola.data.labels import golds_of
from cola.data.sources import Pool, open_pools, shuffled
from cola.errors import DataError
from cola.files import cache_dir, sha256, write_text
from cola.recipe.data_section import Data
from cola.recipe.schema import SPLITS

CHUNK = 512  # rows tokenized in one call
CACHE_VERSION = 4  # part of every cached file's name: raise it when the same recipe must give other tokens


@dataclass(frozen=True)
class Splits:
    """The three splits; all but the training rows is the same for all seeds."""

    train: list[Example]  # empty where each seed draws its own
    validation: list[Example]
    test: list[Example]
    notes: list[str]  # what there is to say about them
    # Of their tokens. Where each seed draws its own rows: of validation, test and all that the draws follow from, so
    # that it is the same whichever seeds are drawn.
    fingerprint: str
    redrawn: dict[int, list[Example]]  # by seed, where each draws its own

    def items(self) -> Iterator[tuple[str, list[Example]]]:
        """Everything that is drawn, by split: the training rows of all seeds in one."""
        yield "train", [*self.train, *(example for rows in self.redrawn.values() for example in rows)]
        yield "validation", self.validation
        yield "test", self.test

    def of(self, seed: int) -> dict[str, list[Example]]:
        """The splits under one of the run's seeds."""
        return {"train": self.train_of(seed), "validation": self.validation, "test": self.test}

    def scored(self, seed: int, train_rows: int | None) -> dict[str, list[Example]]:
        """What is scored of the splits under one of the run's seeds: all, or of train a sample of so many examples. At
        which places they stand depends on the numbers alone, so that all arms and seeds have the same; a larger sample
        has all of a smaller one. Raises DataError where there are fewer."""
        parts = self.of(seed)
        if train_rows is not None:
            train = parts["train"]
            if train_rows > len(train):
                raise DataError(
                    f"evaluation.train_rows: {train_rows} training rows are to be scored and train has {len(train)}; "
                    "lower it, or leave it out: all are scored then"
                )
            places = sorted(islice(shuffled(range(len(train)), "scored"), train_rows))
            parts["train"] = [train[place] for place in places]
        return parts

    def train_of(self, seed: int) -> list[Example]:
        """The training rows under one of the run's seeds."""
        return self.redrawn[seed] if self.redrawn else self.train

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each split; every seed trains on equally many."""
        n_train = len(next(iter(self.redrawn.values()), self.train))
        return {"train": n_train, "validation": len(self.validation), "test": len(self.test)}


def load_splits(
    data: Data, tokenizer: PreTrainedTokenizerBase, seeds: Iterable[int] = (), ends: Sequence[int] = ()
) -> Splits:
    """Draw, render and tokenize the recipe's rows, or read them back from the cache.

    Args:
        seeds: For which training rows are wanted, where each draws its own.
        ends: The tokens that end an answer by the model, beside the tokenizer's own.

    Raises:
        DataError: a source, a field, a label, a length or a split's size does not fit.
    """
    if data.chat and tokenizer.chat_template is None:
        raise DataError("data.chat: the model's tokenizer has no chat template; remove chat: true")
    dated = data.chat and asks_for_the_date(tokenizer)
    if data.today and not dated:
        raise DataError("data.today: the model's chat template does not ask for the date; leave it out")
    pools = open_pools(data)
    causes = {
        "version": CACHE_VERSION,
        "pools": [pools[split].fingerprint for split in SPLITS],
        "shared": [[pools[a] is pools[b] for a in SPLITS] for b in SPLITS],
        "data": data.model_dump(mode="json", exclude={"files", "hub", "reasoning_gym", "today"}),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **({"today": data.today or DAY} if dated else {}),
    }
    if data.task == "answer" and any(end != tokenizer.eos_token_id for end in ends):
        causes["ends"] = list(ends)
    redrawn = sorted(set(seeds)) if data.redraw == "per_seed" else []
    key = _digest([causes, redrawn])
    path = cache_dir() / "tokens" / f"{key[:32]}.json"
    if (cached := _read_cache(path)) is not None:
        return cached
    splits = _Drawing(data, pools, Encoder(data, tokenizer, ends)).splits(redrawn)
    if dated:
        said = f"the model's chat template asks for the date and is told {data.today or DAY} on every day (data.today)"
        splits = replace(splits, notes=[said, *splits.notes])
    if redrawn:
        fixed = fingerprint_of({"validation": splits.validation, "test": splits.test})
        splits = replace(splits, fingerprint=_digest([causes, fixed]))
    write_text(path, json.dumps(asdict(splits) | {"tokens": _tokens_of(splits)}))
    return splits


def _read_cache(path: Path) -> Splits | None:
    try:
        raw = json.loads(path.read_text())
        drawn = {name: [Example(**example) for example in raw[name]] for name in SPLITS}
        redrawn = {int(seed): [Example(**example) for example in rows] for seed, rows in raw["redrawn"].items()}
        splits = Splits(**drawn, notes=raw["notes"], fingerprint=raw["fingerprint"], redrawn=redrawn)
        return splits if _tokens_of(splits) == raw["tokens"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: it is made anew


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True))  # in this spelling, which fingerprints have had from the beginning


def _tokens_of(splits: Splits) -> str:
    """Changes when anything does that a cached file holds of the splits' examples."""
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return fingerprint_of(parts | {f"train {seed}": rows for seed, rows in splits.redrawn.items()})


# ---------------------------------------------------------------------------------------------------------
# Drawing
@dataclass
class _Drawn:
    """What was drawn for a split, and rows that were met on the way."""

    examples: list[Example] = field(default_factory=list)
    marks: set[tuple[str, str | None]] = field(default_factory=set)  # by which no other split may have them
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    too_long: int = 0
    dropped: int = 0  # too long even for a cut
    overlapping: int = 0


class _Drawing:
    """Draws one split after the other; knows what those before hold."""

    def __init__(self, data: Data, pools: dict[str, Pool], encoder: Encoder) -> None:
        self.data, self.pools, self.encoder = data, pools, encoder
        self.seen: set[tuple[str, str | None]] = set()
        self.notes: list[str] = []

    def splits(self, seeds: Sequence[int]) -> Splits:
        """All three; `seeds`: those that draw training rows of their own."""
        orders = {pool: pool.order(self.data.seed) for pool in dict.fromkeys(self.pools.values())}
        drawn: dict[str, list[Example]] = {"train": []}
        redrawn: dict[int, list[Example]] = {}
        # Test first, so that neither more training rows nor a larger validation split change it.
        for split in ("test", "validation", "train"):
            pool = self.pools[split]
            wanted = getattr(self.data.rows, split)
            shared = [other for other in SPLITS if other != split and self.pools[other] is pool]
            if wanted is None and (pool.size is None or (shared and split != "train")):
                why = "a generator has no end" if pool.size is None else f"{shared[0]} rows come from {pool.name} too"
                raise DataError(f"data.rows.{split} must say how many rows to draw: {why}")
            if split == "train" and seeds:
                redrawn = self._redrawn(pool, list(orders[pool]), wanted, seeds)
                continue
            part = self._draw(split, pool, orders[pool], wanted)
            drawn[split] = part.examples
            self.seen |= part.marks
            self.notes += part.notes
        if self.data.task == "multiple_choice":
            golds = golds_of(self.encoder.labels)
            for examples in (*drawn.values(), *redrawn.values()):
                examples[:] = [replace(example, gold=golds[example.id]) for example in examples]
        drawn = {split: drawn[split] for split in SPLITS}
        return Splits(**drawn, notes=self.notes[::-1], fingerprint=fingerprint_of(drawn), redrawn=redrawn)

    def _redrawn(
        self, pool: Pool, left: Sequence[int], wanted: int | None, seeds: Sequence[int]
    ) -> dict[int, list[Example]]:
        """The training rows of each seed, drawn from what test and validation have left: a seed's depend on `data.seed`
        and on the seed itself, and not on which other seeds there are."""
        # A generator's rows have no end; a million of them are as good as that.
        assert wanted is not None  # the recipe says so
        if wanted >= len(left):
            raise DataError(
                f"data.redraw: per_seed: {wanted} of the {len(left)} rows that {pool.name} has left for train are no "
                "draw: every seed would get the same; lower data.rows.train, or set data.redraw to none"
            )
        trains: dict[int, list[Example]] = {}
        for seed in seeds:
            part = self._draw("train", pool, shuffled(left, "redraw", self.data.seed, seed), wanted)
            trains[seed] = part.examples
            self.notes += [f"{note} (seed {seed})" for note in part.notes]
        if len({len(rows) for rows in trains.values()}) > 1:
            told = ", ".join(f"{len(rows)} under seed {seed}" for seed, rows in trains.items())
            raise DataError(
                f"data.redraw: per_seed: the pieces of split texts are not equally many for all seeds ({told}); set "
                "data.too_long to truncate or drop"
            )
        if pool.size is not None:
            self.notes.append(
                f"train: each seed draws {wanted} of {len(left)} rows, so that two seeds share "
                f"{wanted / len(left):.0%} of theirs on average"
            )
        return trains

    def _draw(self, split: str, pool: Pool, order: Iterator[int], wanted: int | None) -> _Drawn:
        """As many rows as are wanted, or all that there are, without those that another split has."""
        part = _Drawn()
        while chunk := list(islice(order, CHUNK if wanted is None else min(CHUNK, wanted - part.rows))):
            for encoded in self.encoder.rows(pool, chunk):
                self._take(part, encoded)
            if pool.size is None and part.overlapping + part.too_long > 10_000 + 20 * part.rows:
                break  # the generator has no more rows that differ
        self._check(split, pool, part, wanted)
        return part

    def _take(self, part: _Drawn, encoded: Encoded) -> None:
        marks = {("prompt", encoded.row.prompt), ("group", encoded.row.group)}
        if marks & self.seen:
            part.overlapping += 1
            if self.data.overlap != "allow":
                return
        part.too_long += not encoded.fits and (bool(encoded.examples) or self.data.too_long != "truncate")
        if not encoded.examples:
            part.dropped += 1
            return
        part.examples += encoded.examples
        part.marks |= marks - {("group", None)}
        part.rows += 1

    def _check(self, split: str, pool: Pool, part: _Drawn, wanted: int | None) -> None:
        """Note what was met on the way, or refuse it."""
        data, notes = self.data, part.notes
        if part.too_long and data.too_long == "error":
            raise DataError(
                f"data.max_length: {part.too_long} of {part.rows + part.too_long} {split} rows of {pool.name} are "
                f"longer than {data.max_length} tokens; raise it, or set data.too_long to drop or truncate"
            )
        shares = "prompt or group" if data.group else "prompt"
        if part.overlapping and data.overlap == "error":
            raise DataError(
                f"data.overlap: {part.overlapping} {split} rows of {pool.name} have a {shares} that is in another split"
            )
        if part.too_long:
            cut = f"cut at the {'end' if data.task == 'text' else 'beginning'}"
            done = {"truncate": cut, "split": "split"}.get(data.too_long or "", "passed over")
            notes.append(f"{split}: {_rows(part.too_long)} longer than {data.max_length} tokens, {done}")
        if part.dropped and data.too_long == "truncate":
            alone = f"whose answer alone is longer than {data.max_length} tokens"
            notes.append(f"{split}: {_rows(part.dropped)} {alone}, passed over")
        if part.overlapping:
            done = "kept" if data.overlap == "allow" else "left out"
            notes.append(f"{split}: {_rows(part.overlapping)} with a {shares} that is in another split, {done}")
        if (wanted is not None and part.rows < wanted) or part.rows == 0:
            rest = f" ({'; '.join(notes)})" if notes else ""
            if part.overlapping and part.rows == 0:
                rest += "; does the template name a field of the row, so that prompts differ?"
            raise DataError(
                f"data.rows.{split}: {wanted or 'some'} rows are wanted and {pool.name} has {part.rows} left for "
                f"{split}{rest}"
            )


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"

"""Rows -> prompts and answers -> tokens, drawn into splits that share nothing, and cached.

A row becomes a prompt and one or more answers (the choices of a multiple choice, or the one right answer). The
two are tokenized together and cut at the prompt's end, as lm-evaluation-harness does, so that the tokens are
those of the whole text. A token may span that end. The choices of a question are then all cut where the last token
ends that they and the prompt alone have in common, so that their likelihoods are of one condition; a prompt to be
answered keeps its tokens, since no right answer is known when a model is asked, and its answer is tokenized apart.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cola.data.chat import DAY, asks_for_the_date
from cola.data.encode import Encoder, Example, fingerprint_of, golds_of, tokenizer_fingerprint
from cola.data.sources import Pool, open_pools, shuffled
from cola.errors import DataError
from cola.files import cache_dir
from cola.recipe.bounds import SPLITS
from cola.recipe.data_section import Data

CHUNK = 512  # rows tokenized in one call
CACHE_VERSION = 4  # part of every cached file's name: raise it when the same recipe must give other tokens


@dataclass(frozen=True)
class Splits:
    """The three splits.

    Attributes:
        train: The training rows of all seeds; empty where each draws its own.
        validation: The same for all seeds.
        test: Likewise.
        notes: What there is to say about them.
        fingerprint: Of their tokens. Where each seed draws its own rows: of validation, test and all that the draws
            follow from, so that it is the same whichever seeds are drawn.
        redrawn: The training rows of each seed, where it draws its own.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    notes: list[str]
    fingerprint: str
    redrawn: dict[int, list[Example]]

    def items(self) -> Iterator[tuple[str, list[Example]]]:
        """Everything that is drawn, by split: the training rows of all seeds in one."""
        yield "train", [*self.train, *(example for rows in self.redrawn.values() for example in rows)]
        yield "validation", self.validation
        yield "test", self.test

    def of(self, seed: int) -> dict[str, list[Example]]:
        """The splits under one of the run's seeds."""
        return {"train": self.train_of(seed), "validation": self.validation, "test": self.test}

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
        data: Where they come from.
        tokenizer: The model's.
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
    splits = _draw(data, pools, Encoder(data, tokenizer, ends), redrawn)
    if dated:
        said = f"the model's chat template asks for the date and is told {data.today or DAY} on every day (data.today)"
        splits = replace(splits, notes=[said, *splits.notes])
    if redrawn:
        fixed = fingerprint_of({"validation": splits.validation, "test": splits.test})
        splits = replace(splits, fingerprint=_digest([causes, fixed]))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(asdict(splits) | {"tokens": _tokens_of(splits)}))
    aside.replace(path)
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
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _tokens_of(splits: Splits) -> str:
    """Changes when anything does that a cached file holds of the splits' examples."""
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return fingerprint_of(parts | {f"train {seed}": rows for seed, rows in splits.redrawn.items()})


# ---------------------------------------------------------------------------------------------------------
# Drawing
def _draw(data: Data, pools: dict[str, Pool], encode: "Encoder", redrawn: Sequence[int]) -> Splits:
    orders: dict[int, Iterator[int]] = {}
    seen: dict[str, set[tuple[str, str | None]]] = {}
    drawn: dict[str, list[Example]] = {}
    notes: list[str] = []
    # Test first, so that neither more training rows nor a larger validation split change it.
    for split in ("test", "validation", "train"):
        pool = pools[split]
        wanted = getattr(data.rows, split)
        shared = [other for other in SPLITS if other != split and pools[other] is pool]
        if wanted is None and (pool.size is None or (shared and split != "train")):
            why = "a generator has no end" if pool.size is None else f"{shared[0]} rows come from {pool.name} too"
            raise DataError(f"data.rows.{split} must say how many rows to draw: {why}")
        order = orders.setdefault(id(pool), pool.order(data.seed))
        if split == "train" and redrawn:
            break
        drawn[split], marks, said = _draw_split(split, pool, order, wanted, encode, data, seen)
        seen[split] = marks
        notes += said
    trains: dict[int, list[Example]] = {}
    if redrawn:
        trains, said = _redraw(data, pools["train"], orders[id(pools["train"])], redrawn, encode, seen)
        drawn["train"] = []
        notes += said
    splits = {name: drawn[name] for name in SPLITS}
    if data.task == "multiple_choice":
        golds = golds_of(encode.labels)

        def read(examples: list[Example]) -> list[Example]:
            return [replace(example, gold=golds[example.id]) for example in examples]

        splits = {name: read(examples) for name, examples in splits.items()}
        trains = {seed: read(examples) for seed, examples in trains.items()}
    fingerprint = fingerprint_of(splits)
    return Splits(**splits, notes=notes[::-1], fingerprint=fingerprint, redrawn=trains)


def _redraw(
    data: Data,
    pool: Pool,
    left: Iterator[int],
    seeds: Sequence[int],
    encode: "Encoder",
    seen: dict[str, set[tuple[str, str | None]]],
) -> tuple[dict[int, list[Example]], list[str]]:
    """The training rows of each seed, drawn from what test and validation have left: a seed's depend on `data.seed` and
    on the seed itself, and not on which other seeds there are."""
    # A generator's rows have no end; a million of them are as good as that.
    rest, wanted = list(left), data.rows.train
    assert wanted is not None  # the recipe says so
    if wanted >= len(rest):
        raise DataError(
            f"data.redraw: per_seed: {wanted} of the {len(rest)} rows that {pool.name} has left for train are no draw: "
            "every seed would get the same; lower data.rows.train, or set data.redraw to none"
        )
    trains: dict[int, list[Example]] = {}
    notes = []
    for seed in seeds:
        order = shuffled(rest, "redraw", data.seed, seed)
        trains[seed], _, said = _draw_split("train", pool, order, wanted, encode, data, seen)
        notes += [f"{note} (seed {seed})" for note in said]
    if len({len(rows) for rows in trains.values()}) > 1:
        told = ", ".join(f"{len(rows)} under seed {seed}" for seed, rows in trains.items())
        raise DataError(
            f"data.redraw: per_seed: the pieces of split texts are not equally many for all seeds ({told}); set "
            "data.too_long to truncate or drop"
        )
    if pool.size is not None:
        notes.append(
            f"train: each seed draws {wanted} of {len(rest)} rows, so that two seeds share {wanted / len(rest):.0%} of "
            "theirs on average"
        )
    return trains, notes


def _draw_split(
    split: str,
    pool: Pool,
    order: Iterator[int],
    wanted: int | None,
    encode: "Encoder",
    data: Data,
    seen: dict[str, set[tuple[str, str | None]]],
) -> tuple[list[Example], set[tuple[str, str | None]], list[str]]:
    examples: list[Example] = []
    mine: set[tuple[str, str | None]] = set()
    rows = too_long = dropped = overlapping = 0
    while wanted is None or rows < wanted:
        chunk = list(islice(order, CHUNK if wanted is None else min(CHUNK, wanted - rows)))
        if not chunk:
            break
        for encoded in encode.rows(pool, chunk):
            marks = {("prompt", encoded.text), ("group", encoded.group)}
            if any(marks & others for others in seen.values()):
                overlapping += 1
                if data.overlap != "allow":
                    continue
            too_long += not encoded.fits and (bool(encoded.examples) or data.too_long != "truncate")
            if not encoded.examples:
                dropped += 1
                continue
            examples += encoded.examples
            mine |= marks - {("group", None)}
            rows += 1
        if pool.size is None and overlapping + too_long > 10_000 + 20 * rows:
            break  # the generator has no more rows that differ
    if too_long and data.too_long == "error":
        raise DataError(
            f"data.max_length: {too_long} of {rows + too_long} {split} rows of {pool.name} are longer than "
            f"{data.max_length} tokens; raise it, or set data.too_long to drop or truncate"
        )
    shares = "prompt or group" if data.group else "prompt"
    if overlapping and data.overlap == "error":
        raise DataError(
            f"data.overlap: {overlapping} {split} rows of {pool.name} have a {shares} that is in another split"
        )
    notes = []
    if too_long:
        done = {"drop": "passed over", "truncate": "cut at the beginning", "split": "split"}[data.too_long or "drop"]
        if data.task == "text" and data.too_long == "truncate":
            done = "cut at the end"
        notes.append(f"{split}: {_rows(too_long)} longer than {data.max_length} tokens, {done}")
    if dropped and data.too_long == "truncate":
        notes.append(
            f"{split}: {_rows(dropped)} whose answer alone is longer than {data.max_length} tokens, passed over"
        )
    if overlapping:
        done = "kept" if data.overlap == "allow" else "left out"
        notes.append(f"{split}: {_rows(overlapping)} with a {shares} that is in another split, {done}")
    if (wanted is not None and rows < wanted) or rows == 0:
        rest = f" ({'; '.join(notes)})" if notes else ""
        if overlapping and rows == 0:
            rest += "; does the template name a field of the row, so that prompts differ?"
        raise DataError(
            f"data.rows.{split}: {wanted or 'some'} rows are wanted and {pool.name} has {rows} left for {split}{rest}"
        )
    return examples, mine, notes


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"

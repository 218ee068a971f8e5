"""Rows -> prompts and answers -> tokens, drawn into splits that share nothing, and cached.

A row becomes a prompt and one or more answers (the choices of a multiple choice, or the one right answer). The
two are tokenized together and cut at the prompt's end, as lm-evaluation-harness does, so that the tokens are
those of the whole text. A token may span that end. The choices of a question are then all cut where the last token
ends that they and the prompt alone have in common, so that their likelihoods are of one condition; a prompt to be
answered keeps its tokens, since no right answer is known when a model is asked, and its answer is tokenized apart.
"""

import difflib
import hashlib
import json
import math
import os
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cola.answers import is_cut_short
from cola.cache import cache_dir
from cola.chat import DAY, after_answer, asks_for_the_date, chat_prompt
from cola.errors import DataError
from cola.files import Row
from cola.recipe import SAMPLE, SPLITS, Data, Files, label_text
from cola.sources import Pool, open_pools, open_texts, shuffled

CHUNK = 512  # rows tokenized in one call
GENERAL = "evaluation.general_text"  # the recipe's key
PASSAGE_TOKENS = 256  # of a general text, that are read at a time
CACHE_VERSION = 4  # part of every cached file's name: raise it when the same recipe must give other tokens


@dataclass(frozen=True)
class Example:
    """One row, ready for the model.

    Attributes:
        id: File and line (where it has no lines: row) in the source, from 1, `test.jsonl:18`; of a text that was cut,
            the piece too, `test.txt:18.2`.
        prompt: Token ids before the answer, special tokens included.
        answers: Token ids of each choice; one entry for tasks `answer` and `text`.
        gold: Index of the right answer.
        texts: The answers as text.
        group: What the row shares with others, where the recipe names such a field.
    """

    id: str
    prompt: list[int]
    answers: list[list[int]]
    gold: int
    texts: list[str]
    group: str | None

    @property
    def n_tokens(self) -> int:
        """Length of prompt and right answer."""
        return len(self.prompt) + len(self.answers[self.gold])


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
    splits = _draw(data, pools, _Encoder(data, tokenizer, ends), redrawn)
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


def load_passages(text: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Example]:
    """A general text in passages, in its own order, none of it left out.

    Args:
        text: A file, or the name of the sample that comes with cola.
        tokenizer: The model's.
        longest: Tokens of a passage at most, its special ones included; what is longer is cut into several.

    Raises:
        DataError: the file is not there, cannot be read, or has no text in it.
    """
    path = Path(__file__).with_name("general.jsonl") if text == SAMPLE else Path(text)
    pool = open_texts(path, GENERAL)
    places = [pool.place(n) for n in range(pool.size or 0)]
    texts = [fill("{text}", pool.row(n), place, GENERAL) for n, place in enumerate(places)]
    data = Data(files=Files(train=str(path)), task="text", text="{text}", max_length=longest, too_long="split")
    encode = _Encoder(data, tokenizer)
    passages = []
    for place, whole, tokens in zip(places, texts, encode._tokens(texts), strict=True):
        passages += encode._text(place, _Rendered(whole, [], [], None, None), tokens).examples
    if not passages:
        raise DataError(f"{GENERAL}: {path.name} holds no text of two tokens or more")
    return passages


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


def all_ends(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int]:
    """The tokens that end an answer: the tokenizer's own first, where it has one, and those that the model names."""
    eos = tokenizer.eos_token_id
    return list(dict.fromkeys([eos, *ends] if isinstance(eos, int) else ends))


def end_of_answer(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], chat: bool) -> int:
    """The token that a right answer ends with.

    Where a chat template is used, it is the first of the ends that the template writes after an assistant's message;
    else, and where it writes none of them, the tokenizer's own, or the first that the model names.

    Args:
        tokenizer: The model's.
        ends: From `all_ends`.
        chat: Whether prompts go through the chat template.

    Raises:
        DataError: there is none.
    """
    if not ends:
        raise DataError(
            "the model has no end-of-text token, which task answer needs to end an answer: neither its tokenizer nor "
            "eos_token_id in generation_config.json or config.json names one"
        )
    if not chat or len(ends) == 1:
        return ends[0]
    after = tokenizer(after_answer(tokenizer), add_special_tokens=False).input_ids
    return next((token for token in after if token in ends), ends[0])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes when the tokenizer could cut a text differently, or put one together differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cuts = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    told = f"{cuts}\n{special}\n{tokenizer.chat_template}"
    # What neither of them holds is added where it is out of the ordinary, so that all other names stay.
    if backend is None:  # a vocabulary does not say how a text is cut into it
        files = [Path(tokenizer.name_or_path) / str(name) for name in sorted(tokenizer.vocab_files_names.values())]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
        told += "\n" + json.dumps([digests, tokenizer.init_kwargs], sort_keys=True, default=str)
    if (module := type(tokenizer).__module__).startswith("transformers_modules"):
        told += f"\n{module}"  # the model's own code: transformers puts its content's digest, or commit, into the name
    if getattr(tokenizer, "split_special_tokens", False):
        told += "\nspecial tokens in a text are cut as text is"
    tokens = tokenizer("a .", add_special_tokens=False).input_ids
    if tokenizer.decode(tokens) != tokenizer.decode(tokens, clean_up_tokenization_spaces=False):
        told += "\nspaces are cleaned up"
    return hashlib.sha256(told.encode()).hexdigest()


def fingerprint_of(splits: dict[str, list[Example]]) -> str:
    """Changes when any token of any split does."""
    return hashlib.sha256(json.dumps({k: [asdict(e) for e in v] for k, v in splits.items()}).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Drawing


def _draw(data: Data, pools: dict[str, Pool], encode: "_Encoder", redrawn: Sequence[int]) -> Splits:
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
        golds = _golds(encode.labels)

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
    encode: "_Encoder",
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
    encode: "_Encoder",
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


@dataclass(frozen=True)
class _Label:
    """A row's label, and the choice that it means in each reading that fits the row."""

    place: str
    label: str
    texts: list[str]
    golds: dict[str, int]


def _golds(labels: dict[str, _Label]) -> dict[str, int]:
    """The right choice of each example, all labels read in one way.

    Raises:
        DataError: no reading fits all rows, or two of them mean different choices.
    """
    fitting = dict.fromkeys(reading for one in labels.values() for reading in one.golds)
    for one in labels.values():
        if not any(reading in one.golds for reading in fitting):
            last = next(other for other in labels.values() if not other.golds.keys() & one.golds.keys())
            raise DataError(
                f"{one.place}: data.label: {one.label!r} is the {' or '.join(one.golds)} of a choice, and "
                f"{last.label!r} of {last.place} the {' or '.join(last.golds)} of one; all labels must be of one kind"
            )
        fitting = dict.fromkeys(reading for reading in fitting if reading in one.golds)
    for one in labels.values():
        meant = {reading: one.texts[one.golds[reading]] for reading in fitting}
        if len(set(meant.values())) > 1:
            readings = " and ".join(f"the {reading} of {text!r}" for reading, text in meant.items())
            keys = " or ".join(f"data.label_is: {reading}" for reading in meant)
            raise DataError(f"{one.place}: data.label: {one.label!r} is {readings}; write {keys}")
    reading = next(iter(fitting))
    return {name: one.golds[reading] for name, one in labels.items()}


def _place_in(names: list[str], label: str) -> int | None:
    """Where a label stands among names, as it is written, or but for case and a number's form if one alone does."""
    if label in names:
        return names.index(label)
    folded = [_folded(name) for name in names]
    return folded.index(_folded(label)) if folded.count(_folded(label)) == 1 else None


def _folded(label: str) -> str:
    """CSV writes True and 1.0 where JSON writes true and 1."""
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", label.strip().casefold())


def _n_shared(prompt: list[int], whole: list[int]) -> int:
    """How many tokens of a prompt a longer text begins with, so that it has one or more beside them."""
    pairs = enumerate(zip(prompt, whole[:-1], strict=False))
    return next((n for n, (ours, theirs) in pairs if ours != theirs), max(0, min(len(prompt), len(whole) - 1)))


@dataclass(frozen=True)
class _Encoded:
    """One row's examples (several where a long text is split; none where it is passed over)."""

    text: str
    group: str | None
    fits: bool
    examples: list[Example]


@dataclass(frozen=True)
class _Rendered:
    prompt: str
    answers: list[str]
    texts: list[str]
    label: _Label | None
    group: str | None


class _Encoder:
    """Rows to tokens with one recipe's templates and one tokenizer."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.ends = all_ends(tokenizer, ends)
        plain = self._tokens(["a"])[0]
        special = self._tokens(["a"], special=True)[0]
        start = next((n for n in range(len(special) - len(plain) + 1) if special[n : n + len(plain)] == plain), 0)
        # A chat template writes its own special tokens; an end token has no place between prompt and answer.
        self.bos = [] if data.chat else list(special[:start])
        self.labels: dict[str, _Label] = {}  # of a multiple choice, by example; to be read once all are known

    @cached_property
    def end(self) -> int:
        return end_of_answer(self.tokenizer, self.ends, self.data.chat)

    def _tokens(self, texts: list[str], special: bool = False) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=special)
        return encoded.input_ids  # pyright: ignore[reportReturnType] - a list of texts gives a list of lists

    def rows(self, pool: Pool, indices: list[int]) -> Iterator[_Encoded]:
        places = [pool.place(i) for i in indices]
        rendered = [self._render(pool.row(i), place) for i, place in zip(indices, places, strict=True)]
        if self.data.task == "text":
            pieces = self._tokens([r.prompt for r in rendered])
            for place, row, tokens in zip(places, rendered, pieces, strict=True):
                yield self._text(place, row, tokens)
            return
        prompts = self._tokens([r.prompt for r in rendered])
        wholes = iter(self._tokens([r.prompt + answer for r in rendered for answer in r.answers]))
        for place, row, prompt in zip(places, rendered, prompts, strict=True):
            if row.label is not None:
                self.labels[place] = row.label
            texts = [next(wholes) for _ in row.answers]
            shared = min(_n_shared(prompt, whole) for whole in texts)
            if shared == len(prompt) or row.label is not None:
                kept, answers = prompt[:shared], [whole[shared:] for whole in texts]
            else:
                kept, answers = prompt, [self._apart(answer) for answer in row.answers]
            if not kept and not self.bos:
                why = "the choices begin within its first token" if prompt else "the prompt is empty"
                raise DataError(f"{place}: data.prompt: {why}")
            yield self._pair(place, row, kept, answers)

    def _apart(self, answer: str) -> list[int]:
        """An answer's own tokens, without the space that some tokenizers put before a text."""
        line, both = self._tokens(["\n", f"\n{answer}"])
        return both[len(line) :] if _n_shared(line, both) == len(line) else self._tokens([answer])[0]

    def _pair(self, name: str, row: _Rendered, prompt: list[int], answers: list[list[int]]) -> _Encoded:
        if self.data.task == "answer":
            if inside := set(self.ends).intersection(*answers):
                token = min(inside)
                raise DataError(
                    f"{name}: the right answer holds token {token}, {self.tokenizer.decode([token])!r:.80}, at which "
                    "decoding ends by the model's tokenizer or eos_token_id in its configs, so it can never be given; "
                    "take it out of the row, or out of eos_token_id"
                )
            answers = [[*answer, self.end] for answer in answers]
        room = self.data.max_length - len(self.bos) - max(map(len, answers))
        fits = len(prompt) <= room
        if not fits and (self.data.too_long != "truncate" or room < 1):
            return _Encoded(row.prompt, row.group, False, [])
        cut = prompt if fits else prompt[len(prompt) - room :]
        example = Example(name, [*self.bos, *cut], answers, 0, row.texts, row.group)
        return _Encoded(row.prompt, row.group, fits, [example])

    def _text(self, name: str, row: _Rendered, tokens: list[int]) -> _Encoded:
        # The first token has nothing before it to be predicted from, unless the tokenizer starts with one.
        limit = self.data.max_length - len(self.bos)
        if self.data.max_length < 2 or limit < 1:
            raise DataError("data.max_length: a text needs room for two tokens, one to predict the other from")
        fits = len(tokens) <= limit
        if not fits and self.data.too_long in ("drop", "error"):
            return _Encoded(row.prompt, row.group, False, [])
        starts = range(0, len(tokens), limit) if self.data.too_long == "split" else [0]
        examples = []
        for number, start in enumerate(starts, start=1):
            piece = [*self.bos, *tokens[start : start + limit]]
            if len(piece) > 1:
                whole = len(starts) == 1
                label, group = (name, row.group) if whole else (f"{name}.{number}", row.group or name)
                examples.append(Example(label, piece[:1], [piece[1:]], 0, [], group))
        return _Encoded(row.prompt, row.group, fits, examples)

    def _render(self, row: Row, place: str) -> _Rendered:
        data = self.data
        group = _text_of(row, data.group, place, "data.group") if data.group else None
        if data.task == "text":
            assert data.text is not None
            return _Rendered(fill(data.text, row, place, "data.text"), [], [], None, group)
        assert data.prompt is not None
        prompt = fill(data.prompt, row, place, "data.prompt")
        label = None
        if data.task == "multiple_choice":
            label = self._choices(row, place)
            texts = label.texts
        else:
            assert data.answer is not None
            texts = [fill(data.answer, row, place, "data.answer")]
            if stop := next((s for s in data.stop or () if is_cut_short(texts[0], s, data.normalize or ())), None):
                raise DataError(
                    f"{place}: data.stop: {stop!r} would cut the right answer short, {_shown(texts[0])}; leave it out"
                )
        if not all(text.strip() for text in texts):
            raise DataError(f"{place}: the answer is empty")
        if data.chat:
            prompt = chat_prompt(prompt, data, self.tokenizer, place)
        # Most vocabularies hold " Yes" and not "Yes", so blanks at the prompt's end go to the answer.
        blanks = "" if data.chat else prompt[len(prompt.rstrip(" ")) :]
        prompt = prompt.removesuffix(blanks) if blanks else prompt
        answers = [blanks + (data.answer_prefix or "") + text for text in texts]
        return _Rendered(prompt, answers, texts, label, group)

    def _choices(self, row: Row, place: str) -> _Label:
        data = self.data
        assert data.label is not None
        label = _text_of(row, data.label, place, "data.label")
        names = None
        if isinstance(data.choices, dict):
            texts, names = list(data.choices.values()), list(data.choices)
        elif isinstance(data.choices, list):
            texts = data.choices
        else:
            assert data.choices is not None
            own = lookup(row, data.choices, place, "data.choices")
            if not isinstance(own, list | tuple) or len(own) < 2:
                raise DataError(f"{place}: data.choices: field {data.choices!r} is no list of two or more answers")
            texts = _texts_of(own, data.choices, place, "data.choices")
            names = self._names(row, place, len(texts))
        readings = [data.label_is] if data.label_is else ["index", "text"] if names is None else ["name"]
        found: dict[str, int | None] = {}
        if re.fullmatch(r"[0-9]+(\.0+)?", label) and int(float(label)) < len(texts):
            found["index"] = int(float(label))
        found |= {"text": _place_in(texts, label), "name": _place_in(names or [], label)}
        golds = {reading: gold for reading in readings if (gold := found.get(reading)) is not None}
        if not golds:
            shown = names if readings == ["name"] and names else texts
            raise DataError(
                f"{place}: data.label: {label!r} is none of the choices: {', '.join(shown)}{_hint(label, readings)}"
            )
        return _Label(place, label, texts, golds)

    def _names(self, row: Row, place: str, n_choices: int) -> list[str] | None:
        """Names of a row's own choices, where the recipe says that they have any."""
        given = self.data.choice_labels
        if given is None:
            return None
        if isinstance(given, list):
            names = given[:n_choices]  # one row may have fewer choices than another
        else:
            value = lookup(row, given, place, "data.choice_labels")
            if not isinstance(value, list | tuple):
                raise DataError(f"{place}: data.choice_labels: field {given!r} is no list of names")
            names = _texts_of(value, given, place, "data.choice_labels")
        if len(names) != n_choices:
            raise DataError(f"{place}: data.choice_labels: {len(names)} names for {n_choices} choices")
        if len(set(names)) < n_choices:
            raise DataError(f"{place}: data.choice_labels: two choices have one name: {', '.join(names)}")
        return names


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _hint(label: str, readings: list[str]) -> str:
    """What may be meant by a label that fits no choice."""
    if "index" in readings and re.fullmatch(r"[0-9]+(\.0+)?", label):
        return "; an index counts from 0"
    if "index" in readings and re.fullmatch(r"[A-Za-z]", label):
        return "; letters that name the choices are said by data.choice_labels, as in [A, B, C, D]"
    if "index" in readings and label in ("true", "false"):
        return "; what true and false mean is said by a mapping, as in choices: {true: 'Yes', false: 'No'}"
    return f" (data.label_is: {readings[0]})" if len(readings) == 1 else ""


def lookup(row: Row, field: str, place: str, key: str) -> Any:
    """A field of a row; dots go into nested mappings and lists (`answers.text.0`).

    Raises:
        DataError: names the row, the recipe's key and the fields that there are.
    """
    value: Any = row
    for part in [field] if field in row else field.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
            continue
        if not isinstance(value, dict) or part not in value:
            names = list(row)
            near = difflib.get_close_matches(field, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(f"{key}: {place} has no field {field!r}; it has {', '.join(names)}{hint}")
        value = value[part]
    return _known(value, f"{key}: {place}: field {field!r}")


def _known(value: Any, what: str) -> Any:
    # What no value was known of is null, or NaN in a column of numbers and in the JSON that is made of one.
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        raise DataError(f"{what} is empty")
    return value


def _text_of(row: Row, field: str, place: str, key: str) -> str:
    return _as_text(lookup(row, field, place, key), field, f"{key}: {place}: field {field!r}")


def _texts_of(values: Sequence[Any], field: str, place: str, key: str) -> list[str]:
    """The items of a field that is a list."""
    names = [f"{field}.{number}" for number in range(len(values))]
    whats = [f"{key}: {place}: field {name!r}" for name in names]
    items = zip(values, names, whats, strict=True)
    return [_as_text(_known(value, what), name, what) for value, name, what in items]


def _as_text(value: Any, field: str, what: str) -> str:
    """A value as the text that it is trained on.

    Raises:
        DataError: it has none.
    """
    if isinstance(value, dict | list | tuple):
        kind, inside = ("mapping", list(value)) if isinstance(value, dict) else ("list", range(len(value)))
        entries = ", ".join(f"{{{field}.{part}}}" for part in inside) or "it has none"
        raise DataError(f"{what} is a {kind}; name one of its entries: {entries}")
    if isinstance(value, float | Decimal) and math.isinf(value):
        raise DataError(f"{what} is infinite, or a number too large to be read")
    try:
        # 0.0000001 as a file of decimals has it, and not Python's 1E-7.
        decimal = f"{value:f}" if isinstance(value, Decimal) else None
        text = value.decode() if isinstance(value, bytes) else decimal or label_text(value)
        text.encode()
    except UnicodeDecodeError:
        raise DataError(f"{what} holds bytes that are no UTF-8 text") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{what} holds half of a character, {half} alone") from None
    return text


def fill(template: str, row: Row, place: str, key: str) -> str:
    """The template with `{field}` and `{nested.field}` filled in; `{{` and `}}` are braces.

    Only fields are looked up: no format specification, index or attribute of Python's own str.format.
    """
    parts = []
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"{key}: {template!r}: {error}; a brace of the text itself is written twice") from None
    for literal, field, spec, conversion in pieces:
        parts.append(literal)
        if field is not None:
            if spec or conversion or not field:
                raise DataError(f"{key}: {template!r}: between braces stands a field's name, as in {{question}}")
            parts.append(_text_of(row, field, place, key))
    return "".join(parts)

"""Rows become examples: rendered by the templates or the chat template, then tokenized."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cola.data.answers import is_cut_short
from cola.data.chat import after_answer, chat_prompt
from cola.data.fields import fill, lookup, text_of, texts_of
from cola.data.rows import Row
from cola.data.sources import Pool
from cola.errors import DataError
from cola.recipe.data_section import Data


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


@dataclass(frozen=True)
class _Label:
    """A row's label, and the choice that it means in each reading that fits the row."""

    place: str
    label: str
    texts: list[str]
    golds: dict[str, int]


def golds_of(labels: dict[str, _Label]) -> dict[str, int]:
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
class Rendered:
    prompt: str
    answers: list[str]
    texts: list[str]
    label: _Label | None
    group: str | None


class Encoder:
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

    def _pair(self, name: str, row: Rendered, prompt: list[int], answers: list[list[int]]) -> _Encoded:
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

    def _text(self, name: str, row: Rendered, tokens: list[int]) -> _Encoded:
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

    def _render(self, row: Row, place: str) -> Rendered:
        data = self.data
        group = text_of(row, data.group, place, "data.group") if data.group else None
        if data.task == "text":
            assert data.text is not None
            return Rendered(fill(data.text, row, place, "data.text"), [], [], None, group)
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
        return Rendered(prompt, answers, texts, label, group)

    def _choices(self, row: Row, place: str) -> _Label:
        data = self.data
        assert data.label is not None
        label = text_of(row, data.label, place, "data.label")
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
            texts = texts_of(own, data.choices, place, "data.choices")
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
            names = texts_of(value, given, place, "data.choice_labels")
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

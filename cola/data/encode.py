"""Rows become examples: rendered as text, then tokenized."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cola.data.chat import after_answer
from cola.data.labels import Label
from cola.data.render import Rendered, render
from cola.data.sources import Pool
from cola.errors import DataError
from cola.files import file_digest, sha256
from cola.recipe.data_section import Data


@dataclass(frozen=True)
class Example:
    """One row, ready for the model."""

    id: str  # `Pool.place`, `test.jsonl:18`; of a text that was cut, the piece too, `test.txt:18.2`
    prompt: list[int]  # token ids before the answer, special tokens included
    answers: list[list[int]]  # token ids of each choice; one entry for tasks `answer` and `text`
    gold: int  # index of the right answer
    texts: list[str]  # the answers
    group: str | None  # what the row shares with others, where the recipe names such a field

    @property
    def n_tokens(self) -> int:
        """Length of prompt and right answer."""
        return len(self.prompt) + len(self.answers[self.gold])


def all_ends(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int]:
    """The tokens that end an answer: the tokenizer's own first, where it has one, and those that the model names."""
    eos = tokenizer.eos_token_id
    return list(dict.fromkeys([eos, *ends] if isinstance(eos, int) else ends))


def end_of_answer(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], chat: bool) -> int:
    """The token that a right answer ends with, of those of `all_ends`. Where prompts go through a chat template, it is
    the first of the ends that the template writes after an assistant's message; else, and where it writes none of them,
    the tokenizer's own, or the first that the model names. Raises DataError if there is none."""
    if not ends:
        raise DataError(
            "the model has no end-of-text token, which task answer needs to end an answer: neither its tokenizer nor "
            "eos_token_id in generation_config.json or config.json names one"
        )
    if not chat or len(ends) == 1:
        return ends[0]
    after = tokenizer(after_answer(tokenizer), add_special_tokens=False).input_ids
    return next((token for token in after if token in ends), ends[0])


@lru_cache(maxsize=1)  # a fiftieth of a second to write down, and every look into the store asks for it
def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes when the tokenizer could cut a text differently, or put one together differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cuts = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    told = f"{cuts}\n{special}\n{tokenizer.chat_template}"
    # What neither of them holds is added where it is out of the ordinary, so that all other names stay.
    if backend is None:  # a vocabulary does not say how a text is cut into it
        files = [Path(tokenizer.name_or_path) / str(name) for name in sorted(tokenizer.vocab_files_names.values())]
        digests = [file_digest(file) for file in files if file.is_file()]
        told += "\n" + json.dumps([digests, tokenizer.init_kwargs], sort_keys=True, default=str)
    if (module := type(tokenizer).__module__).startswith("transformers_modules"):
        told += f"\n{module}"  # the model's own code: transformers puts its content's digest, or commit, into the name
    if getattr(tokenizer, "split_special_tokens", False):
        told += "\nspecial tokens in a text are cut as text is"
    tokens = tokenizer("a .", add_special_tokens=False).input_ids
    if tokenizer.decode(tokens) != tokenizer.decode(tokens, clean_up_tokenization_spaces=False):
        told += "\nspaces are cleaned up"
    return sha256(told)


def fingerprint_of(splits: dict[str, list[Example]]) -> str:
    """Changes when any token of any split does."""
    return sha256(json.dumps({k: [asdict(e) for e in v] for k, v in splits.items()}))


def _n_shared(prompt: list[int], whole: list[int]) -> int:
    """How many tokens of a prompt a longer text begins with, so that it has one or more beside them."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole[:-1], strict=False)))


@dataclass(frozen=True)
class Encoded:
    """A row's examples (several where a long text is split; none where it is passed over), and whether it fits."""

    row: Rendered
    fits: bool
    examples: list[Example]


class Encoder:
    """Rows to tokens with one recipe's templates and one tokenizer."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()) -> None:
        self.data, self.tokenizer, self.ends = data, tokenizer, all_ends(tokenizer, ends)
        # Of the multiple choices that were encoded, by example. Which choice each means can be said once all are known
        # (`golds_of`); until then it is the first.
        self.labels: dict[str, Label] = {}
        plain = self._tokens(["a"])[0]
        special = self._tokens(["a"], special=True)[0]
        start = next((n for n in range(len(special) - len(plain) + 1) if special[n : n + len(plain)] == plain), 0)
        # A chat template writes its own special tokens; an end token has no place between prompt and answer.
        self.bos = [] if data.chat else list(special[:start])

    @cached_property
    def end(self) -> int:
        """The token that a right answer ends with."""
        return end_of_answer(self.tokenizer, self.ends, self.data.chat)

    def _tokens(self, texts: list[str], special: bool = False) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=special)
        return encoded.input_ids  # pyright: ignore[reportReturnType] - a list of texts gives a list of lists

    def rows(self, pool: Pool, indices: list[int]) -> Iterator[Encoded]:
        """The examples of some rows of a pool, in their order."""
        places = [pool.place(i) for i in indices]
        pairs = zip(map(pool.row, indices), places, strict=True)
        rendered = [render(row, place, self.data, self.tokenizer) for row, place in pairs]
        if self.data.task == "text":
            yield from self.texts(places, rendered)
            return
        prompts = self._tokens([row.prompt for row in rendered])
        wholes = iter(self._tokens([row.prompt + answer for row in rendered for answer in row.answers]))
        for place, row, prompt in zip(places, rendered, prompts, strict=True):
            yield self._with_answers(place, row, *self._cut(place, row, prompt, [next(wholes) for _ in row.answers]))

    def _cut(
        self, place: str, row: Rendered, prompt: list[int], wholes: list[list[int]]
    ) -> tuple[list[int], list[list[int]]]:
        """Where the prompt ends and the answers begin, given the prompt's tokens and those of each whole text."""
        shared = min(_n_shared(prompt, whole) for whole in wholes)
        if shared == len(prompt) or row.label is not None:
            kept, answers = prompt[:shared], [whole[shared:] for whole in wholes]
        else:
            kept, answers = prompt, [self._apart(answer) for answer in row.answers]
        if not kept and not self.bos:
            why = "the choices begin within its first token" if prompt else "the prompt is empty"
            raise DataError(f"{place}: data.prompt: {why}")
        return kept, answers

    def _apart(self, answer: str) -> list[int]:
        """An answer's own tokens, without the space that some tokenizers put before a text."""
        line, both = self._tokens(["\n", f"\n{answer}"])
        return both[len(line) :] if _n_shared(line, both) == len(line) else self._tokens([answer])[0]

    def _with_answers(self, place: str, row: Rendered, prompt: list[int], answers: list[list[int]]) -> Encoded:
        if row.label is not None:
            self.labels[place] = row.label
        if self.data.task == "answer":
            if inside := set(self.ends).intersection(*answers):
                token = min(inside)
                raise DataError(
                    f"{place}: the right answer holds token {token}, {self.tokenizer.decode([token])!r:.80}, at which "
                    "decoding ends by the model's tokenizer or eos_token_id in its configs, so it can never be given; "
                    "take it out of the row, or out of eos_token_id"
                )
            answers = [[*answer, self.end] for answer in answers]
        room = self.data.max_length - len(self.bos) - max(map(len, answers))
        fits = len(prompt) <= room
        if not fits and (self.data.too_long != "truncate" or room < 1):
            return Encoded(row, False, [])
        cut = prompt if fits else prompt[len(prompt) - room :]
        example = Example(place, [*self.bos, *cut], answers, 0, row.texts, row.group)
        return Encoded(row, fits, [example])

    def texts(self, places: Sequence[str], rows: Sequence[Rendered]) -> Iterator[Encoded]:
        """The examples of rows that are all text, target but for a first token."""
        for place, row, tokens in zip(places, rows, self._tokens([row.prompt for row in rows]), strict=True):
            yield self._pieces(place, row, tokens)

    def _pieces(self, place: str, row: Rendered, tokens: list[int]) -> Encoded:
        # The first token has nothing before it to be predicted from, unless the tokenizer starts with one.
        limit = self.data.max_length - len(self.bos)
        if self.data.max_length < 2 or limit < 1:
            raise DataError("data.max_length: a text needs room for two tokens, one to predict the other from")
        fits = len(tokens) <= limit
        if not fits and self.data.too_long in ("drop", "error"):
            return Encoded(row, False, [])
        starts = range(0, len(tokens), limit) if self.data.too_long == "split" else [0]
        examples = []
        for number, start in enumerate(starts, start=1):
            piece = [*self.bos, *tokens[start : start + limit]]
            if len(piece) > 1:
                whole = len(starts) == 1
                name, group = (place, row.group) if whole else (f"{place}.{number}", row.group or place)
                examples.append(Example(name, piece[:1], [piece[1:]], 0, [], group))
        return Encoded(row, fits, examples)

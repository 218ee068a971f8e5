"""cola data: how many rows each file has and which of them are drawn, and what is trained on, token by token.

Needs the tokenizer and no weights.
"""

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from cola.data.encode import Example
from cola.data.sources import open_pools
from cola.data.splits import load_splits
from cola.link.find import find_tokenizer
from cola.recipe.recipe import Recipe
from cola.recipe.schema import SPLITS
from cola.report.table import NONE, Shown, Table
from cola.report.terminal import Terminal

BETWEEN, TARGET, PART = "│", "▸", "‥"
SHOWN_AS = {" ": "·", "\n": "⏎", "\t": "⇥"}
LEGEND = (
    f"{BETWEEN} ends a token, {TARGET} is a target (the loss is taken on it), "
    f"· blank, ⏎ line end, ⇥ tab, {PART} part of a character"
)


def show(recipe: Recipe, terminal: Terminal, split: str, n_rows: int) -> None:
    """Print the counts, what is left out and why, and the first rows of a split. Raises ColaError if the data or the
    tokenizer cannot be used."""
    tokenizer, ends = find_tokenizer(recipe.model)
    splits = load_splits(recipe.data, tokenizer, recipe.drawn_seeds, ends)
    seed = recipe.seeds[0]
    drawn = splits.of(seed)
    whose = f", train as seed {seed} draws it" if splits.redrawn else ""
    columns = ["from", "rows", *SPLITS, "not drawn"]
    terminal.table(Table(f"{recipe.name}: rows{whose}", columns, _rows(recipe, drawn)))
    columns = ["split", "examples", "tokens", "targets", "longest"]
    terminal.table(Table(f"{recipe.name}: tokens{whose}", columns, [_tokens(name, drawn[name]) for name in SPLITS]))
    for note in splits.notes or ["no row is too long, or in two splits: none is left out or cut"]:
        terminal.say(note)
    examples = drawn[split]
    if n_rows:
        terminal.say(LEGEND)
    for number, example in enumerate(examples[:n_rows], start=1):
        targets = len(example.answers[example.gold])
        terminal.say()
        terminal.say(
            f"{split} {number} of {len(examples)}: {example.id}, {example.n_tokens} tokens, {targets} of them targets"
        )
        trained = pieces(tokenizer, [*example.prompt, *example.answers[example.gold]])
        _print(terminal, trained, len(example.prompt))
        for index, answer in enumerate(example.answers):
            if index != example.gold:
                terminal.say("another choice, scored and not trained on:")
                _print(terminal, pieces(tokenizer, [*example.prompt, *answer])[len(example.prompt) :], len(answer))


def _rows(recipe: Recipe, drawn: dict[str, list[Example]]) -> list[list[Shown]]:
    """Of each file: how many rows it has, and how many of them are in each split."""
    pools = open_pools(recipe.data)
    table: list[list[Shown]] = []
    for pool in dict.fromkeys(pools.values()):
        # A text that was cut is one row and several examples, `test.txt:18.1` and `test.txt:18.2`.
        rows = {split: {re.sub(r"\.\d+$", "", example.id) for example in drawn[split]} for split in SPLITS}
        used = {split: len(rows[split]) if pools[split] is pool else 0 for split in SPLITS}
        size, left = ("no end", NONE) if pool.size is None else (str(pool.size), str(pool.size - sum(used.values())))
        table.append([pool.name, size, *(str(used[s]) if pools[s] is pool else NONE for s in SPLITS), left])
    return table


def _tokens(split: str, examples: Sequence[Example]) -> list[Shown]:
    lengths = [example.n_tokens for example in examples]
    targets = sum(len(example.answers[example.gold]) for example in examples)
    return [split, *map(str, (len(examples), sum(lengths), targets, max(lengths)))]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token as it stands in the whole; of a character's tokens the last one has it.

    Following `detokenize_incrementally` of text-generation-inference and vLLM: a token's text is what it adds to that
    of the few tokens before it, since a tokenizer may write a token otherwise at a text's beginning.
    """

    def text(first: int, end: int) -> str:
        return str(tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False))

    found = []
    before = read = 0
    for end in range(1, len(ids) + 1):
        known, more = text(before, read), text(before, end)
        if more.endswith("\ufffd") and end < len(ids):
            found.append("")
        else:
            found.append(more[len(known) :])
            before, read = read, end
    return found


def _print(terminal: Terminal, texts: Sequence[str], n_prompt: int) -> None:
    """Tokens with marks between them, in lines that fit; a line of the text ends one."""
    for line in _lines(texts, n_prompt, terminal.console.width - 2):
        shown = Text("  ")
        for text, is_target in line:
            shown.append(text, style="bold green" if is_target else "")
            shown.append(BETWEEN, style="dim")
        terminal.console.print(shown)


def _lines(texts: Sequence[str], n_prompt: int, room: int) -> Iterator[list[tuple[str, bool]]]:
    line: list[tuple[str, bool]] = []
    width = 0
    for number, text in enumerate(texts):
        is_target = number >= n_prompt
        shown = (TARGET if is_target else "") + ("".join(map(_visible, text)) or PART)
        if line and width + cell_len(shown) + 1 > room:
            yield line
            line, width = [], 0
        line.append((shown, is_target))
        width += cell_len(shown) + 1
        if "\n" in text:
            yield line
            line, width = [], 0
    if line:
        yield line


def _visible(character: str) -> str:
    if character in SHOWN_AS:
        return SHOWN_AS[character]
    return character if character.isprintable() else character.encode("unicode_escape").decode()

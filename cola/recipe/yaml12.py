"""YAML as recipes are written in it: 1.2, safe, and every value with the line it stands on."""

import re
from typing import Any, NamedTuple

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from cola.errors import RecipeError, plain, quoted
from cola.recipe.data_section import label_text

MOST_BYTES = 1_000_000  # of a recipe's file
MOST_VALUES = 40_000  # in a recipe, what its aliases stand for counted each time
MOST_FAULTS = 100  # that are looked at
DEEPEST = 50  # mappings and lists inside each other


class Mark(NamedTuple):
    """Where a key or value of a recipe is."""

    line: int  # from 1; 0: in an override
    text: str | None = None  # how a value is written that is no text to YAML, such as `1e3`


Marks = dict[tuple[str, ...], Mark]

# YAML 1.1, which PyYAML speaks, takes yes, no, on and off for booleans (`wandb: off`, `choices: {yes: .., no: ..}`),
# 12:30 for a number in base 60, a date for a date, and 1e-4, as every learning rate is written, for text. These are
# the scalars of YAML 1.2's core schema.
SCALARS = {
    "null": r"~|null|Null|NULL|",
    "merge": r"<<",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]{1,300}",  # longer ones are no numbers to Python's int either
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
RESOLVERS = {None: [(f"tag:yaml.org,2002:{tag}", re.compile(f"^({text})$")) for tag, text in SCALARS.items()]}


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML whose scalars are read as YAML 1.2 reads them, and whose aliases are copies: who changes one of them
    later changes no other."""

    yaml_implicit_resolvers = RESOLVERS

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.open: list[str | None] = []  # anchors of the nodes that are being read, from the outermost in
        self.size = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.open:
                raise ComposerError(None, None, f"*{event.anchor} is inside itself", event.start_mark)
            node = super().compose_node(parent, index)
            return node and self._copy(node, len(self.open), event.start_mark)
        self._count(len(self.open), event.start_mark)
        self.open.append(getattr(event, "anchor", None))
        node = super().compose_node(parent, index)
        self.open.pop()
        return node

    def _copy(self, node: yaml.Node, depth: int, mark: yaml.Mark) -> yaml.Node:
        self._count(depth, mark)
        if isinstance(node, yaml.ScalarNode):
            return node
        if isinstance(node, yaml.MappingNode):
            value = [(self._copy(key, depth + 1, mark), self._copy(one, depth + 1, mark)) for key, one in node.value]
        else:
            value = [self._copy(one, depth + 1, mark) for one in node.value]
        return type(node)(node.tag, value, node.start_mark, node.end_mark)

    def _count(self, depth: int, mark: yaml.Mark) -> None:
        self.size += 1
        if self.size > MOST_VALUES:
            raise ComposerError(None, None, f"more than {MOST_VALUES} values, aliases counted", mark)
        if depth > DEEPEST:
            raise ComposerError(None, None, f"more than {DEEPEST} lists and mappings in another", mark)


# PyYAML's own reads 010 as 8, and fails at 08.
RecipeLoader.add_constructor("tag:yaml.org,2002:int", lambda _loader, node: int(node.value))

TEXT, MERGE, MAPPING, LIST = (f"tag:yaml.org,2002:{name}" for name in ("str", "merge", "map", "seq"))


class RecipeDumper(yaml.SafeDumper):
    """Quotes exactly the texts that `RecipeLoader` would read as something else."""

    yaml_implicit_resolvers = RESOLVERS


# Where numbers, true and false stand for their texts, as they do in data files.
LABELS = {("data", "choices"), ("data", "choice_labels")}
KINDS = {"int": "a number", "float": "a number", "bool": "true or false", "null": "nothing"}


# What PyYAML says -> what is mostly meant, and whether it is found where what is read begins, not where that fails.
ADVICE = {
    "mapping values are not allowed here": ("; a text with a colon in it is written in quotes", False),
    "found character '\\t' that cannot start any token": ("; lines are indented by blanks, not by tabs", False),
    "could not find expected ':'": ("; has this line lost its colon?", True),
    "found unexpected end of stream": ("; the quote that opens here is never closed", True),
}


def parse_yaml(text: str, where: str, base: tuple[str, ...] = ()) -> tuple[Any, Marks]:
    """The YAML document and the place of every key and list item, whose keys begin with `base`."""
    marks: Marks = {}

    def note(node: yaml.Node, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.ScalarNode):
            is_text = node.tag in (TEXT, MERGE)
            if not is_text and node.tag != loader.resolve(yaml.ScalarNode, node.value, (True, False)):
                raise _wrong_tag(node)
            if not is_unicode(node.value):
                raise ConstructorError(None, None, "half a character (a surrogate)", node.start_mark)
            if not is_text and path[:-1] in LABELS:  # whose text may not become another
                value = loader.construct_object(node)
                if not isinstance(value, bool) and label_text(value) != node.value:
                    fault = _in_quotes(node.value, node.tag)
                    raise RecipeError(f"{where}:{node.start_mark.line + 1}: {dotted_key(path)}: {fault}")
            line = marks[path].line if path in marks else node.start_mark.line + 1
            marks[path] = Mark(line, None if is_text else node.value)
            return
        marks.setdefault(path, Mark(node.start_mark.line + 1))
        if node.tag not in (MAPPING, LIST):
            raise _wrong_tag(node)
        seen: set[str] = set()
        for index, one in enumerate(node.value):
            key, value = one if isinstance(node, yaml.MappingNode) else (None, one)
            name = str(index if key is None else key.value)
            if key is not None:
                place = f"{where}:{key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode):
                    raise RecipeError(f"{place}: a key is a text, not a list or a mapping")
                if name in seen:
                    raise RecipeError(f"{place}: {dotted_key((*path, name))} is given twice")
                note(key, (*path, name))
                if key.tag not in (TEXT, MERGE) and path not in LABELS:
                    raise RecipeError(f"{place}: {dotted_key((*path, name))}: {_in_quotes(name, key.tag)}")
                seen.add(name)
                marks[(*path, name)] = Mark(key.start_mark.line + 1)
            note(value, (*path, name))

    try:
        loader = RecipeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{where}:{line}: not valid YAML: the character U+{error.character:04X} in it") from None
    try:
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{where}: the file is empty; see recipes/quickstart.yaml for an example")
        note(node, base)
        return loader.construct_document(node), marks
    except yaml.MarkedYAMLError as error:
        problem = plain(error.problem or error.context, 200)
        advice, is_about_beginning = ADVICE.get(problem, ("", False)) if not base else ("", False)
        mark = (error.context_mark if is_about_beginning else None) or error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{place}: not valid YAML: {problem}{advice}") from None
    finally:
        loader.dispose()


def _wrong_tag(node: yaml.Node) -> yaml.MarkedYAMLError:
    fault = f"could not determine a constructor for the tag {quoted(node.tag)} of this value"
    return ConstructorError(None, None, fault, node.start_mark)


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def dotted_key(path: tuple[str, ...]) -> str:
    return ".".join(map(plain, path))


def _in_quotes(text: str, tag: str) -> str:
    """What to do about a text that YAML takes for something else."""
    kind = KINDS[tag.rpartition(":")[2]]
    return f'{plain(text) or "a blank"} is {kind} to YAML; for the text write it in quotes: "{plain(text)}"'


def values_of(override: str) -> tuple[str, list[str]]:
    """The key of `dotted.key=value,value,...` and each value, as it is written; a list or mapping is one value. Raises
    RecipeError if it is not of this form."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"{quoted(override)}: write dotted.key=value,value,..., such as arms.chain3.links=1,2,3")
    flow = f"[{text}]"
    try:
        node = RecipeLoader(flow).get_single_node()
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(flow):
        raise RecipeError(
            f"{quoted(override)}: its values are no YAML; write lists as [a,b] and texts with commas in quotes"
        )
    return dotted, [flow[item.start_mark.index : item.end_mark.index] for item in node.value]

"""One YAML file, plus dotted overrides, read once into a frozen, fully resolved `Recipe`.

Unknown keys are errors that name the file, the line and the key that was probably meant.
"""

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from cola.errors import QUOTED, RecipeError, listed, plain, quoted
from cola.recipe import METHODS, SAMPLE, Arm, Files, LinkSettings, OneLink, Recipe, Search, is_remote, label_text

MOST_BYTES = 1_000_000  # of a recipe's file
MOST_VALUES = 40_000  # in a recipe, what its aliases stand for counted each time
MOST_FAULTS = 100  # that are looked at
DEEPEST = 50  # mappings and lists inside each other

# Keys that people paste from other tools -> the key that is meant here.
PASTED_KEYS = {
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "model_id": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "load_in_4bit": "model.quantization: nf4, or method: qlora under an arm",
    "load_in_8bit": "model.quantization: int8",
    "bnb_4bit_quant_type": "model.quantization: nf4",
    "lora_r": "link.rank",
    "lora_rank": "link.rank",
    "r": "rank (under link or an arm)",
    "lora_alpha": "link.alpha",
    "lora_dropout": "link.dropout",
    "init_lora_weights": "link.init",
    "schedule_scope": "knot.schedule",
    "relora_prune_ratio": "knot.optimizer: {prune_magnitude: ...}",
    "relora_prune_method": "knot.optimizer: {prune_magnitude: ...}",
    "jagged_restart_steps": "links (under an arm), with knot.schedule: link",
    "jagged_restart_warmup_steps": "knot.warmup_steps",
    "reduction_factor": "link.bottleneck (the inner width itself)",
    "bottleneck_size": "link.bottleneck",
    "lora_target": "link.target_modules",
    "lora_target_modules": "link.target_modules",
    "lora_target_linear": "link.target_modules: all-linear",
    "adapter": "link.method",
    "finetuning_type": "link.method",
    "tuner_type": "link.method",
    "train_type": "link.method",
    "lr": "training.learning_rate",
    "learning_rates": "training.learning_rate: {search: [...]}",
    "micro_batch_size": "training.batch_size (rows per optimizer step; micro-batches follow from micro_batch_tokens)",
    "per_device_train_batch_size": "training.batch_size (rows per optimizer step)",
    "train_batch_size": "training.batch_size (rows per optimizer step)",
    "per_device_eval_batch_size": "evaluation.batch_tokens",
    "gradient_accumulation_steps": "training.micro_batch_tokens (the loss does not depend on it)",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "max_steps": "training.steps",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup_steps (below 1 it is a fraction)",
    "gradient_clipping": "training.max_grad_norm",
    "optim": "no key: the optimizer is AdamW",
    "optimizer": "no key: the optimizer is AdamW",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.hub or data.files",
    "datasets": "data.hub or data.files",
    "dataset_name": "data.hub",
    "train_file": "data.files.train",
    "validation_file": "data.files.validation",
    "val_set_size": "data.rows.validation",
    "max_train_samples": "data.rows.train",
    "max_samples": "data.rows",
    "seed": "seeds (a list)",
    "output_dir": "output (the folder of all runs), or the --run-folder option",
    "report_to": "tracking.wandb",
    "wandb_project": "tracking.project",
    "wandb_entity": "tracking.entity",
    "wandb_mode": "tracking.wandb",
    "load_best_model_at_end": "evaluation.checkpoint: best",
    "metric_for_best_model": "evaluation.select_by",
    "eval_steps": "evaluation.every",
    "eval_strategy": "evaluation.every",
    "num_links": "links (under an arm)",
    "chain_length": "links (under an arm)",
    "relora": "links (under an arm)",
}


class Mark(NamedTuple):
    """Where a key or value of a recipe is.

    Attributes:
        line: From 1; 0: in an override.
        text: How a value is written that is no text to YAML, such as `1e3`.
    """

    line: int
    text: str | None = None


Marks = dict[tuple[str, ...], Mark]


class _Loader(yaml.SafeLoader):
    """Safe YAML whose scalars are read as YAML 1.2 reads them, and whose aliases are copies: who changes one of them
    later changes no other."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way

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


TEXT, MERGE, MAPPING, LIST = (f"tag:yaml.org,2002:{name}" for name in ("str", "merge", "map", "seq"))


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would read as something else."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way


# YAML 1.1, which PyYAML speaks, takes yes, no, on and off for booleans (`wandb: off`, `choices: {yes: .., no: ..}`),
# 12:30 for a number in base 60, a date for a date, and 1e-4, as every learning rate is written, for text. These are
# the scalars of YAML 1.2's core schema.
for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("merge", r"<<", ["<"]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]{1,300}", list("-+0123456789")),  # longer ones are no numbers to Python's int either
        (
            "float",
            r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            list("-+0123456789."),
        ),
    ):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _first)


# Where numbers, true and false stand for their texts, as they do in data files.
LABELS = {("data", "choices"), ("data", "choice_labels")}
KINDS = {"int": "a number", "float": "a number", "bool": "true or false", "null": "nothing"}


def _parse(text: str, where: str, base: tuple[str, ...] = ()) -> tuple[Any, Marks]:
    """The YAML document and the place of every key and list item, whose keys begin with `base`."""
    marks: Marks = {}

    def note(node: yaml.Node, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.ScalarNode):
            is_text = node.tag in (TEXT, MERGE)
            if not is_text and node.tag != loader.resolve(yaml.ScalarNode, node.value, (True, False)):
                raise _wrong_tag(node)
            if not _is_unicode(node.value):
                raise ConstructorError(None, None, "half a character (a surrogate)", node.start_mark)
            if not is_text and path[:-1] in LABELS and (fault := _not_as_written(node, loader)):
                raise RecipeError(f"{where}:{node.start_mark.line + 1}: {_dotted(path)}: {fault}")
            line = marks[path].line if path in marks else node.start_mark.line + 1
            marks[path] = Mark(line, None if is_text else node.value)
            return
        marks.setdefault(path, Mark(node.start_mark.line + 1))
        if node.tag not in (MAPPING, LIST):
            raise _wrong_tag(node)
        seen: set[str] = set()
        for index, one in enumerate(node.value):
            key, value = one if isinstance(node, yaml.MappingNode) else (None, one)
            name = str(index) if key is None else str(key.value)
            if key is not None:
                place = f"{where}:{key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode):
                    raise RecipeError(f"{place}: a key is a text, not a list or a mapping")
                if name in seen:
                    raise RecipeError(f"{place}: {_dotted((*path, name))} is given twice")
                note(key, (*path, name))
                if key.tag not in (TEXT, MERGE) and path not in LABELS:
                    raise RecipeError(f"{place}: {_dotted((*path, name))}: {_in_quotes(name, key.tag)}")
                seen.add(name)
                marks[(*path, name)] = Mark(key.start_mark.line + 1)
            note(value, (*path, name))

    try:
        loader = _Loader(text)
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
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{place}: not valid YAML: {plain(error.problem or error.context, 200)}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _not_as_written(node: yaml.ScalarNode, loader: _Loader) -> str | None:
    """Why a label or an answer's text that YAML takes for something else cannot stay so: its text would be another."""
    value = loader.construct_object(node)
    if isinstance(value, bool) or label_text(value) == node.value:
        return None
    return _in_quotes(node.value, node.tag)


def _wrong_tag(node: yaml.Node) -> yaml.MarkedYAMLError:
    what = f"could not determine a constructor for the tag {quoted(node.tag)} of this value"
    return ConstructorError(None, None, what, node.start_mark)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(map(plain, path))


def _in_quotes(text: str, tag: str) -> str:
    """What to do about a text that YAML takes for something else."""
    kind = KINDS[tag.rpartition(":")[2]]
    return f'{plain(text) or "a blank"} is {kind} to YAML; for the text write it in quotes: "{plain(text)}"'


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override, validate and resolve a recipe.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` strings, the value in YAML; `arms.NAME=null` removes an arm, and naming
            a data source replaces the recipe's.

    Raises:
        RecipeError: names file, line and key, one line for each fault.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe{_near_files(path)}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: cannot be read: it is no UTF-8 text at byte {error.start}") from None
    if len(text) > MOST_BYTES:
        raise RecipeError(f"{path}: a recipe has {MOST_BYTES} characters at most; is this one?")
    raw, marks = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is a {type(raw).__name__}")
    for override in overrides or []:
        _override(raw, override, marks)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(error, raw, str(path), marks))) from None
    for override in overrides or []:
        _refuse_idle_override(recipe, override.partition("=")[0])
    return _resolved(recipe, base=path.parent)


def values_of(override: str) -> tuple[str, list[str]]:
    """The key of `dotted.key=value,value,...` and each value, as it is written; a list or mapping is one value.

    Raises:
        RecipeError: it is not of this form.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"{quoted(override)}: write dotted.key=value,value,..., such as arms.chain3.links=1,2,3")
    flow = f"[{text}]"
    try:
        node = _Loader(flow).get_single_node()
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(flow):
        raise RecipeError(
            f"{quoted(override)}: its values are no YAML; write lists as [a,b] and texts with commas in quotes"
        )
    return dotted, [flow[item.start_mark.index : item.end_mark.index] for item in node.value]


def _refuse_idle_override(recipe: Recipe, dotted: str) -> None:
    """An override for all arms that every arm says otherwise (as in a resolved recipe) would be passed over."""
    section, _, key = dotted.partition(".")
    if section != "link" and dotted != "training.learning_rate":
        return
    trained = {name: arm for name, arm in recipe.arms.items() if arm.n_links}
    if key not in ("method", "learning_rate"):
        takes = {name: METHODS[recipe.links_of(name)[0].method or "lora"] for name in trained}
        trained = {name: arm for name, arm in trained.items() if key in takes[name]}

    def says(arm: Arm) -> bool:
        own = arm.links if isinstance(arm.links, list) else []
        if getattr(arm, key) is not None or key in (arm.search or {}):
            return True
        return bool(own) and all(getattr(link, key) is not None for link in own)

    nearer = section == "training" and recipe.link.learning_rate is not None
    if trained and (nearer or all(says(arm) for arm in trained.values())):
        name = next(iter(trained))
        raise RecipeError(
            f"override {quoted(dotted)} has no effect, since every arm says its own; write arms.{name}.{key}=..."
        )


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _override(raw: dict, override: str, marks: Marks) -> None:
    dotted, equals, text = override.partition("=")
    shown = f"override {quoted(dotted)}"
    if not equals or not dotted:
        raise RecipeError(f"override {quoted(override)}: write dotted.key=value, for example training.epochs=2")
    keys = dotted.split(".")
    if not _is_unicode(override) or len(keys) > DEEPEST:
        why = f"more than {DEEPEST} keys below each other" if len(keys) > DEEPEST else "it is no UTF-8 text"
        raise RecipeError(f"{shown}: {why}")
    try:
        value, told = _parse(text, shown, tuple(keys)) if text.strip() else (None, {})
    except RecipeError as error:
        # The shell takes one pair of quotes away.
        hint = f"; text with braces or colons is quoted for YAML too: \"{plain(dotted)}='...'\""
        raise RecipeError(f"{error}{hint if 'not valid YAML' in str(error) else ''}") from None
    node: Any = raw
    for depth, key in enumerate(keys[:-1]):
        below = f"{shown}: {_dotted(tuple(keys[: depth + 1]))} has no keys below it"
        if isinstance(node, list):
            node = node[_index(node, key, shown)]
            if not isinstance(node, dict | list):
                raise RecipeError(below)
            continue
        # A mapping's shorthand gives way to the mapping: files=a.jsonl, then files.test=b.jsonl.
        shorthand = {"hub": "name", "reasoning_gym": "name", "files": "train"}.get(key)
        if isinstance(node.get(key), str) and shorthand:
            node[key] = {shorthand: node[key]}
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict | list):
            raise RecipeError(below)
        node = node[key]
    last = keys[-1]
    if isinstance(node, list):
        node[_index(node, last, shown)] = value
    elif keys[:-1] == ["arms"] and value is None:
        if last not in node:
            raise RecipeError(f"override {quoted(override)}: there is no such arm; the arms are {listed(node)}")
        del node[last]
    else:
        node[last] = value
    sources = ("hub", "files", "reasoning_gym")
    if len(keys) > 1 and keys[0] == "data" and keys[1] in sources and value is not None:
        for other in sources:
            if other != keys[1]:
                raw["data"].pop(other, None)
    if last in ("steps", "epochs") and value is not None and isinstance(node, dict):
        node.pop("epochs" if last == "steps" else "steps", None)
    for path in [path for path in marks if path[: len(keys)] == tuple(keys)]:
        del marks[path]  # what the file says there is no longer what counts
    marks |= {path: Mark(0, mark.text) for path, mark in told.items()}
    marks.setdefault(tuple(keys), Mark(0))


def _index(node: list, key: str, shown: str) -> int:
    if re.fullmatch(r"[0-9]{1,6}", key) and int(key) < len(node):
        return int(key)
    raise RecipeError(f"{shown}: {plain(key)} is no place in a list of {len(node)}; they count from 0")


def _explain(error: ValidationError, raw: dict, where: str, marks: Marks) -> list[str]:
    """One line for each thing that is wrong, with its place and the remedy."""
    messages = []
    reasons: dict[tuple[tuple[str, ...], str], list[str]] = {}  # a value that may be of several kinds has several
    faults = [(fault, *_locate(fault, raw)) for fault in error.errors()]
    for fault, path, node in faults[:MOST_FAULTS]:
        # What was tried as something else too (learning_rate: {search: ..} as a number) is none, and that is no fault
        # of it where there is another: below it, or of what it says.
        others = [(one["type"], other) for one, other, _ in faults if other[: len(path)] == path]
        deeper = isinstance(node, dict | list) and any(other != path for _, other in others)
        told = deeper or any(not _is_other_kind(type) for type, other in others if other == path)
        if _is_other_kind(fault["type"]) and told:
            continue
        if fault["type"] == "extra_forbidden":
            found = _unknown(path)
        elif fault["type"] == "missing":
            found = "this key is required"
        else:
            found = fault["msg"].removeprefix("Value error, ")
            found = "a mapping of keys is expected here" if fault["type"] == "model_type" else found
            found = found[0].lower() + found[1:]
        own = found if fault["type"] == "value_error" else ""
        said = reasons.setdefault((path, own), [])
        if found not in said:
            said.append(found)
    for (path, own), said in reasons.items():
        mark = next((marks[path[:n]] for n in range(len(path), -1, -1) if path[:n] in marks), Mark(0))
        # A fault of the whole recipe names its keys itself; the file's first line would point at nothing.
        place = where if not path else f"{where}:{mark.line}" if mark.line else f"{where} (override)"
        text = said[0] if own else f"{_either(said)}{_got(path, faults, marks)}"
        messages.append(f"{place}: {_dotted(path)}: {text}" if path else f"{place}: {text}")
    return messages


def _either(reasons: list[str]) -> str:
    first, *others = reasons
    return " or ".join([first, *(other.removeprefix("input should be ") for other in others)])


def _is_other_kind(type: str) -> bool:
    """Whether a fault is that a value is not of the kind that was tried."""
    return type.endswith("_type") or type == "literal_error"


def _got(path: tuple[str, ...], faults: list[tuple[ErrorDetails, tuple[str, ...], Any]], marks: Marks) -> str:
    """What the recipe says at a key that is at fault, and what to do where YAML has taken a text for something else."""
    mine = [(fault, node) for fault, where, node in faults if where == path]
    types, node = {fault["type"] for fault, _ in mine}, mine[0][1]
    if types & {"extra_forbidden", "missing"}:
        return ""
    line, written = marks.get(path, Mark(0))
    got = f"; got {quoted(node) if written is None else plain(written) or 'nothing'}"
    if "string_type" in types and written and not isinstance(node, dict | list):
        quotes = f'"{plain(written)}"'
        quotes = quotes if line else f"{_dotted(path)}='{quotes}'"  # the shell takes one pair away
        return f"{got}, which is {KINDS[_tag_of(node)]} to YAML; for the text write it in quotes: {quotes}"
    return got


def _tag_of(value: Any) -> str:
    return {bool: "bool", int: "int", float: "float"}.get(type(value), "null")


def _locate(fault: ErrorDetails, raw: dict) -> tuple[tuple[str, ...], Any]:
    """The key that a fault is about, and what the recipe says there.

    pydantic puts the tried member of a union into the path ('int', 'Search', 'list[OneLink]'): those are dropped.
    """
    path: tuple[str, ...] = ()
    node: Any = raw
    for part in fault["loc"]:
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside:
            node, path = node[part], (*path, str(part))  # pyright: ignore[reportCallIssue, reportArgumentType]
        elif fault["type"] == "missing" and part == fault["loc"][-1]:
            path = (*path, str(part))
    return path, node


def _unknown(path: tuple[str, ...]) -> str:
    key = path[-1]
    known = _keys_at(path[:-1])
    if near := difflib.get_close_matches(key[:QUOTED], known, n=1, cutoff=0.75):
        return f"unknown key; did you mean {near[0]}?"
    if key in PASTED_KEYS:
        return f"unknown key; here it is {PASTED_KEYS[key]}"
    if places := [p for p in known_keys() if p.split(".")[-1] == key]:
        return f"unknown key here; it belongs at {places[0]}"
    if near := difflib.get_close_matches(key[:QUOTED], known, n=1, cutoff=0.5):
        return f"unknown key; did you mean {near[0]}?"
    return f"unknown key; known here are {', '.join(known)}"


def _keys_at(path: tuple[str, ...]) -> list[str]:
    section: type[BaseModel] | None = Recipe
    for depth, part in enumerate(path):
        if section is Recipe and part == "arms":
            section = Arm
        elif (section is Arm and depth == 1) or part.isdigit():
            continue  # an arm's own name, or a place in a list
        elif section is Arm and part == "links":
            section = OneLink
        else:
            section = _section_of(section, part)
        if section is None:
            return []
    return list(section.model_fields) if section else []


def _section_of(section: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    field = section.model_fields.get(key) if section else None
    told = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    options = [getattr(option, "__origin__", option) for option in told]  # what is under an Annotated
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of a recipe, arms as `arms.NAME.key`."""
    keys = []
    for name in section.model_fields:
        keys.append(prefix + name)
        if section is Recipe and name == "arms":
            keys += known_keys(Arm, "arms.NAME.")
        elif inner := _section_of(section, name):
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def _resolved(recipe: Recipe, base: Path) -> Recipe:
    """Every default that depends on another key made explicit, and relative paths made absolute."""
    data = recipe.data
    update: dict[str, Any] = {}
    if data.answer_prefix is None and data.task != "text":
        update["answer_prefix"] = "" if data.chat or (data.prompt or "")[-1:].isspace() else " "
    if data.label_is is None and (isinstance(data.choices, dict) or data.choice_labels is not None):
        update["label_is"] = "name"
    if data.normalize is None and data.task == "answer":
        update["normalize"] = ["whitespace"]
    if data.too_long is None:
        update["too_long"] = "split" if data.task == "text" else "drop"
    if data.files is not None:
        train = find_path(data.files.train, base)
        update["files"] = Files(
            train=train,
            validation=find_path(data.files.validation, base) if data.files.validation else train,
            test=find_path(data.files.test, base) if data.files.test else train,
        )
    evaluation, general = recipe.evaluation, recipe.evaluation.general_text
    if general not in (None, SAMPLE):
        evaluation = evaluation.model_copy(update={"general_text": find_path(general, base)})
    name = recipe.model.name_or_path
    model = recipe.model.model_copy(update={"name_or_path": name if is_remote(name) else find_path(name, base)})
    # Without an arm's own rules, what holds at every knot.
    rules = recipe.model_copy(update={"arms": {"all": Arm()}}).knot_of("all")
    knot = recipe.knot.model_copy(update=rules.model_dump(include={"merge", "pair", "merge_fraction", "schedule"}))
    knot = knot.model_copy(update={"optimizer": rules.optimizer})
    training = recipe.training
    if isinstance(rate := training.learning_rate, Search):
        training = training.model_copy(update={"learning_rate": _with_seeds(rate, [recipe.unscored_seed])})
    arms = {}
    for arm, settings in recipe.arms.items():
        links = recipe.links_of(arm)
        seeds, searches = recipe.search_seeds(arm), recipe.searches_of(arm)
        searched = {key: _with_seeds(search, seeds) for key, search in searches.items()}
        explicit: dict[str, Any] = {}
        # What is searched has no value yet, nor has what follows from it.
        open_keys = {*searched} | ({"alpha"} if "rank" in searched else set())
        open_keys |= {"init_batches"} if "init" in searched else set()
        if links and isinstance(settings.links, int):
            said = links[0].model_dump(exclude={"steps", "epochs", "learning_rate", *open_keys})
            explicit = {key: value for key, value in said.items() if key in LinkSettings.model_fields}
        elif isinstance(settings.links, list):
            own = zip(links, settings.links, strict=True)
            links = [one.model_copy(update={key: getattr(mine, key, None) for key in open_keys}) for one, mine in own]
        if "rank" in searched and "alpha" not in searched:
            # Written beside the rank that is still to be chosen, or as a multiple of any.
            common = recipe.link.alpha
            explicit["alpha"] = settings.alpha or (common if isinstance(common, str) else None)
        if links:
            explicit["search"] = searched or None
            explicit["learning_rate"] = None if "learning_rate" in searched else recipe.learning_rate_of(arm)
            explicit["quantization"] = recipe.base_of(arm)[1] or settings.quantization
        n_links = settings.links if isinstance(settings.links, int) else links
        arms[arm] = settings.model_copy(update=explicit | {"links": n_links})
    # The arms now say all of it: keeping it for all arms too would be a second place to change, without effect.
    parts = {"data": data.model_copy(update=update), "model": model, "knot": knot, "training": training}
    parts |= {"arms": arms, "link": LinkSettings(), "evaluation": evaluation}
    return recipe.model_copy(update=parts)


def _with_seeds(search: Search, seeds: list[int]) -> Search:
    """A search whose trials' seeds are explicit, unless each scored seed is its own trials'."""
    return search if search.per == "seed" or search.seeds else search.model_copy(update={"seeds": seeds})


def find_path(name: str, base: Path) -> str:
    """An existing path as absolute, looked for from the working directory, then beside the recipe.

    A link keeps its own name: what it leads to, in a hub's cache, may have no suffix that says how to read it.
    """
    path = Path(name).expanduser()
    for candidate in (path, base / path):
        if candidate.exists():
            return str(candidate.parent.resolve() / candidate.name)
    return str(path.absolute())


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `read_recipe` reads back to the same recipe."""
    # A null that has no other default says nothing; one that overrides a default (max_grad_norm) must stay.
    tree = _without_idle_nulls(recipe.model_dump(mode="json"), recipe)
    for arm in tree["arms"].values():
        arm |= arm.pop("search", {})  # each in the place of the value, where an override replaces it
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _without_idle_nulls(tree: dict[str, Any], section: BaseModel) -> dict[str, Any]:
    kept = {}
    for key, value in tree.items():
        own = getattr(section, key, None)
        field = type(section).model_fields.get(key)
        if isinstance(own, BaseModel):
            value = _without_idle_nulls(value, own)
            if not value:
                continue  # a section that holds defaults only, such as `link` once it is written out into the arms
        elif isinstance(own, dict):
            value = {
                k: _without_idle_nulls(v, own[k]) if isinstance(own[k], BaseModel) else v for k, v in value.items()
            }
        elif isinstance(own, list):
            value = [
                _without_idle_nulls(v, o) if isinstance(o, BaseModel) else v for v, o in zip(value, own, strict=True)
            ]
        elif value is None and field is not None and field.default is None:
            continue
        kept[key] = value
    return kept

"""What is wrong with a recipe, where, and what would be right: one line for each fault."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cola.errors import QUOTED, nearest, plain, quoted
from cola.recipe.arms import Arm, OneLink
from cola.recipe.recipe import Recipe
from cola.recipe.yaml12 import KINDS, MOST_FAULTS, Mark, Marks, is_dotted

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


def near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")])
    return f"; did you mean {path.parent / near}?" if near else ""


def explain(error: ValidationError, raw: dict, where: str, marks: Marks) -> list[str]:
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
        messages.append(f"{place}: {is_dotted(path)}: {text}" if path else f"{place}: {text}")
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
        quotes = quotes if line else f"{is_dotted(path)}='{quotes}'"  # the shell takes one pair away
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
    if near := nearest(key[:QUOTED], known, alike=0.75):
        return f"unknown key; did you mean {near}?"
    if key in PASTED_KEYS:
        return f"unknown key; here it is {PASTED_KEYS[key]}"
    if places := [p for p in known_keys() if p.split(".")[-1] == key]:
        return f"unknown key here; it belongs at {places[0]}"
    if near := nearest(key[:QUOTED], known, alike=0.5):
        return f"unknown key; did you mean {near}?"
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

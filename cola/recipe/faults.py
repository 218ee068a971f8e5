"""What is wrong with a recipe, where, and what would be right: one line for each fault."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cola.errors import QUOTED, nearest, plain, quoted
from cola.recipe.recipe import Recipe
from cola.recipe.yaml12 import KINDS, MOST_FAULTS, Mark, Marks, dotted_key

# What is meant here -> the keys that people paste from other tools.
MEANT = {
    "model.name_or_path": "model_name_or_path base_model model_id",
    "model.dtype": "torch_dtype",
    "model.dtype: bfloat16": "bf16",
    "model.dtype: float16": "fp16",
    "model.quantization: nf4, or method: qlora under an arm": "load_in_4bit",
    "model.quantization: int8": "load_in_8bit",
    "model.quantization: nf4": "bnb_4bit_quant_type",
    "link.rank": "lora_r lora_rank",
    "rank (under link or an arm)": "r",
    "link.alpha": "lora_alpha",
    "link.dropout": "lora_dropout",
    "link.init": "init_lora_weights",
    "knot.schedule": "schedule_scope",
    "knot.optimizer: {prune_magnitude: ...}": "relora_prune_ratio relora_prune_method",
    "links (under an arm), with knot.schedule: link": "jagged_restart_steps",
    "knot.warmup_steps": "jagged_restart_warmup_steps",
    "link.bottleneck (the inner width itself)": "reduction_factor",
    "link.bottleneck": "bottleneck_size",
    "link.target_modules": "lora_target lora_target_modules",
    "link.target_modules: all-linear": "lora_target_linear",
    "link.method": "adapter finetuning_type tuner_type train_type",
    "training.learning_rate": "lr",
    "training.learning_rate: {search: [...]}": "learning_rates",
    "training.batch_size (rows per optimizer step; micro-batches follow from micro_batch_tokens)": "micro_batch_size",
    "training.batch_size (rows per optimizer step)": "per_device_train_batch_size train_batch_size",
    "evaluation.batch_tokens": "per_device_eval_batch_size",
    "training.micro_batch_tokens (the loss does not depend on it)": "gradient_accumulation_steps",
    "training.epochs": "num_train_epochs num_epochs",
    "training.steps": "max_steps",
    "training.schedule": "lr_scheduler lr_scheduler_type",
    "training.warmup_steps (below 1 it is a fraction)": "warmup_ratio",
    "training.max_grad_norm": "gradient_clipping",
    "optimizer (under link or an arm)": "optim",
    "data.max_length": "sequence_len max_seq_length max_seq_len cutoff_len",
    "data.hub or data.files": "dataset datasets",
    "data.hub": "dataset_name",
    "data.files.train": "train_file",
    "data.files.validation": "validation_file",
    "data.rows.validation": "val_set_size",
    "data.rows.train": "max_train_samples",
    "data.rows": "max_samples",
    "seeds (a list)": "seed",
    "output (the folder of all runs), or the --run-folder option": "output_dir",
    "tracking.tracker": "report_to",
    "tracking.wandb": "wandb_mode",
    "tracking.project": "wandb_project",
    "tracking.entity": "wandb_entity",
    "evaluation.checkpoint: best": "load_best_model_at_end",
    "evaluation.select_by": "metric_for_best_model",
    "evaluation.every": "eval_steps eval_strategy",
    "links (under an arm)": "num_links chain_length relora",
}
PASTED_KEYS = {key: meant for meant, keys in MEANT.items() for key in keys.split()}
Located = tuple[ErrorDetails, tuple[str, ...], Any]  # a fault, the key that it is about, and what the recipe says there


def near_files(path: Path) -> str:
    near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")])
    return f"; did you mean {path.parent / near}?" if near else "; cola new lists recipes and writes one"


def explain(error: ValidationError, raw: dict, where: str, marks: Marks) -> list[str]:
    """One line for each thing that is wrong, with its place and the remedy."""
    faults = [(fault, *_locate(fault, raw)) for fault in error.errors()]
    reasons: dict[tuple[tuple[str, ...], str], list[str]] = {}  # a value that may be of several kinds has several
    for fault, path, node in faults[:MOST_FAULTS]:
        if _is_other_kind(fault["type"]) and _is_told_elsewhere(path, node, faults):
            continue
        reason = _reason(fault, path)
        told = reasons.setdefault((path, reason if fault["type"] == "value_error" else ""), [])
        told += [reason] if reason not in told else []
    messages = []
    for (path, own), told in reasons.items():
        mark = next((marks[path[:n]] for n in range(len(path), -1, -1) if path[:n] in marks), Mark(0))
        # A fault of the whole recipe names its keys itself; the file's first line would point at nothing.
        place = where if not path else f"{where}:{mark.line}" if mark.line else f"{where} (override)"
        either = " or ".join([told[0], *(other.removeprefix("input should be ") for other in told[1:])])
        text = own or f"{either}{_got(path, faults, marks)}"
        messages.append(f"{place}: {dotted_key(path)}: {text}" if path else f"{place}: {text}")
    return messages


def _is_other_kind(type: str) -> bool:
    """Whether a fault is that a value is not of the kind that was tried."""
    return type.endswith("_type") or type == "literal_error"


def _is_told_elsewhere(path: tuple[str, ...], node: Any, faults: list[Located]) -> bool:
    """Whether there is a better fault of a value that was tried as something else too (learning_rate: {search: ..} as a
    number): one of what is below it, or of what it says."""
    others = [(fault["type"], other) for fault, other, _ in faults if other[: len(path)] == path]
    if isinstance(node, dict | list) and any(other != path for _, other in others):
        return True
    return any(not _is_other_kind(type) for type, other in others if other == path)


def _reason(fault: ErrorDetails, path: tuple[str, ...]) -> str:
    match fault["type"]:
        case "extra_forbidden":
            return _unknown(path)
        case "missing":
            return "this key is required"
        case "model_type":
            return "a mapping of keys is expected here"
    reason = fault["msg"].removeprefix("Value error, ")
    return reason[0].lower() + reason[1:]


def _got(path: tuple[str, ...], faults: list[Located], marks: Marks) -> str:
    """What the recipe says at a key that is at fault, and what to do where YAML has taken a text for something else."""
    nodes = {fault["type"]: node for fault, other, node in faults if other == path}
    node = next(iter(nodes.values()))
    if nodes.keys() & {"extra_forbidden", "missing"}:
        return ""
    line, written = marks.get(path, Mark(0))
    got = f"; got {quoted(node) if written is None else plain(written) or 'nothing'}"
    if "string_type" in nodes and isinstance(node, dict):
        quotes = "in quotes" if line else f"in two pairs of quotes, {dotted_key(path)}='\"...\"'"  # the shell takes one
        return f"{got}, which is a mapping to YAML; a text with a colon or braces is written {quotes}"
    if "string_type" in nodes and written and not isinstance(node, dict | list):
        quotes = f'"{plain(written)}"'
        quotes = quotes if line else f"{dotted_key(path)}='{quotes}'"  # the shell takes one pair away
        kind = KINDS.get(type(node).__name__, KINDS["null"])
        return f"{got}, which is {kind} to YAML; for the text write it in quotes: {quotes}"
    return got


def _locate(fault: ErrorDetails, raw: dict) -> tuple[tuple[str, ...], Any]:
    """The key that a fault is about, and what the recipe says there.

    pydantic puts the tried member of a union into the path ('int', 'Search', 'list[OneLink]'): those are dropped.
    """
    path: tuple[str, ...] = ()
    node: Any = raw
    for part in fault["loc"]:
        if part in (node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
            node, path = node[part], (*path, str(part))  # pyright: ignore[reportCallIssue, reportArgumentType]
        elif fault["type"] == "missing" and part == fault["loc"][-1]:
            path = (*path, str(part))
    return path, node


def _unknown(path: tuple[str, ...]) -> str:
    key, known = path[-1], _keys_at(path[:-1])
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
        is_name = part.isdigit() or (depth == 1 and path[0] == "arms")  # a place in a list, or an arm's own name
        section = section if is_name else section and _section_of(section, part)
    return list(section.model_fields) if section else []


def _section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a key holds: itself, in a list, or by its name."""
    field = section.model_fields.get(key)
    kinds = [field.annotation] if field else []
    for kind in kinds:
        kinds += get_args(kind)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of a recipe, arms as `arms.NAME.key`."""
    keys = []
    for name in section.model_fields:
        keys.append(prefix + name)
        if (inner := _section_of(section, name)) and name not in ("links", "search"):
            keys += known_keys(inner, f"{prefix}{name}.{'NAME.' if name == 'arms' else ''}")
    return keys

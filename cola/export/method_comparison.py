"""cola export --as results: arms and seeds in the schema of PEFT's method_comparison, one file for each.

    run_info    what was run, its recipe in PEFT's words      train_info   what training took, and the scores
    meta_info   with what                                     cola         what the schema has no place for

The schema is that of https://github.com/huggingface/peft/tree/main/method_comparison: MetaMathQA/utils.py writes it and
processing.py reads it. A number that a run does not have is null and named in `cola.not_known`, and none stands in for
it. docs/export.md says what each key means here, and where that is not what it means there.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cola.errors import ModelError, listed
from cola.export.aside import folder_aside
from cola.export.outcome import Outcome
from cola.link import adapters
from cola.recipe.ideas import ADAMW
from cola.recipe.methods import Lora
from cola.report.terminal import Terminal
from cola.tree.made import Made, Provenance
from cola.tree.records import MetricRow
from cola.tree.shapes import Name, Seconds, Tokens

FORMAT = 1  # of `cola`, in each file
# Where null says something: the model's own attention, no prefix to begin with, a constant learning rate, full
# fine-tuning; a setting of PEFT's that is off.
SAYING = re.compile(r"run_info\.(train_config\.(attn|init|lr)_\w+|peft_config(\..*)?)$|cola\.")


class _Row(MetricRow):
    """A row of metrics.jsonl; what follows is there for steps."""

    tokens: Tokens = 0
    seconds: Seconds = 0.0
    rows: tuple[Name, ...] = ()


def write_results(found: Sequence[Outcome], missing: Sequence[str], to: Path, terminal: Terminal) -> None:
    """Write a file for each trained arm and seed into a new folder, and say what is left out. Raises ModelError where
    none of them trains anything.

    Args:
        missing: Arms and seeds that are not there, in words.
    """
    trained = [outcome for outcome in found if outcome.method is not None]
    idle = listed(dict.fromkeys(outcome.job.arm for outcome in found if outcome.method is None))
    if not trained:
        raise ModelError(
            f"{idle} trains nothing, and PEFT's tables call what has no PEFT config full fine-tuning; export a trained "
            "arm"
        )
    with folder_aside(to) as aside:
        for outcome in trained:
            name = _experiment(outcome).replace("/", "--")  # as PEFT names its files
            (aside / f"{name}.json").write_text(json.dumps(result(outcome), indent=2) + "\n", encoding="utf-8")
    if idle:
        terminal.say(f"left out: {idle}, which trains nothing")
    if missing:
        terminal.warn(f"no result of {listed(missing)}")
    terminal.say(f"export   {to} ({len(trained)} of an arm and seed)")


def result(outcome: Outcome) -> dict[str, Any]:
    """One arm and seed in PEFT's schema."""
    said = {
        "run_info": _run_info(outcome),
        "train_info": _train_info(outcome),
        "meta_info": _meta_info(outcome),
        "cola": _cola(outcome),
    }
    said["cola"]["not_known"] = [path for path in _nulls(said) if not SAYING.match(path)]
    return said


def _experiment(outcome: Outcome) -> str:
    return f"{outcome.job.arm}/{outcome.folder.path.resolve().name}-seed{outcome.job.seed}"


def _run_info(outcome: Outcome) -> dict[str, Any]:
    recipe, first = outcome.recipe, outcome.links[0]
    config = adapters.peft_config(first)
    if config is not None:
        packages = _trained_with(outcome).packages
        config |= {"base_model_name_or_path": recipe.model.name_or_path, "revision": recipe.model.revision}
        config |= {"peft_version": packages.get("peft")}
    elif not first.is_whole:  # PEFT's tables take null for full fine-tuning
        config = {"peft_type": None, **first.record()}
    return {
        "created_at": outcome.result.run_info.created_at,
        "total_time": outcome.info.total_seconds,
        "experiment_name": _experiment(outcome),
        "peft_branch": None,
        "peft_worktree_is_dirty": None,
        "train_config": _train_config(outcome),
        "peft_config": config,
        "error_msg": "",
    }


def _train_config(outcome: Outcome) -> dict[str, Any]:
    recipe, training, first = outcome.recipe, outcome.recipe.training, outcome.links[0]
    every = recipe.evaluation.every
    optimizer = {"lr": outcome.info.learning_rate, "weight_decay": training.weight_decay}
    optimizer |= {"betas": list(training.betas), "eps": training.epsilon}
    plus = first.loraplus_lr_ratio if isinstance(first, Lora) else 1.0
    adamw = "AdamW" if plus == 1.0 else "lora+"
    return {
        "model_id": recipe.model.name_or_path,
        "dtype": {None: outcome.dtype, "nf4": "int4"}.get(outcome.quantization, outcome.quantization),
        "max_seq_length": recipe.data.max_length,
        "batch_size": training.batch_size,
        "batch_size_eval": None,  # as many rows as make batch_tokens
        "max_steps": outcome.info.steps,
        "eval_steps": every if isinstance(every, int) else None,
        "compile": False,
        "use_gc": training.gradient_checkpointing,
        "query_template": recipe.data.prompt or recipe.data.text,
        "seed": outcome.job.seed,
        "grad_norm_clip": training.max_grad_norm or 0,
        "optimizer_type": adamw if first.optimizer == ADAMW else str(first.optimizer),
        "optimizer_kwargs": optimizer if plus == 1.0 else optimizer | {"loraplus_lr_ratio": plus},
        "lr_scheduler": None if training.schedule == "constant" else training.schedule,
        # accelerate has no float16 autocast on a CPU.
        "use_amp": outcome.dtype == "bfloat16" or (outcome.dtype == "float16" and not _on_cpu(outcome)),
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"do_sample": False} if recipe.data.task == "answer" else {},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _train_info(outcome: Outcome) -> dict[str, Any]:
    info = outcome.info
    return {
        "accelerator_memory_reserved_avg": None,
        "accelerator_memory_max": None,  # PEFT's is of what was reserved, the run's of what was allocated
        "accelerator_memory_reserved_99th": None,
        "train_time": info.train_seconds,
        "file_size": _file_size(outcome),
        "num_trainable_params": info.num_trainable_params,
        "num_total_params": info.num_total_params,
        "status": "success",
        "metrics": _metrics(outcome),
    }


def _file_size(outcome: Outcome) -> int | None:
    """Bytes of the weights that the run keeps of what was scored; None where they are not there."""
    if outcome.kind.is_pair:
        # One pair that goes on from link to link is all there in the last of them.
        folders = outcome.scored_links[-1:] if outcome.rules.keeps_pair else outcome.scored_links
        files = [folder / "adapter_model.safetensors" for folder in folders]
    else:
        files = list((outcome.path / ("model" if outcome.kind.is_whole else "adapter")).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files and all(file.is_file() for file in files) else None


def _metrics(outcome: Outcome) -> list[dict[str, Any]]:
    """What PEFT's script writes: an entry for each look at validation, with what was trained since the one before; then
    the one that its tables are made of, of the test rows at the step that was scored."""
    evaluation, scored, looks = outcome.result.evaluation, outcome.info.scored_step, outcome.info.evaluations
    rows = [row for row in outcome.folder.rows(outcome.path / "metrics.jsonl", _Row) if row.kind == "step"]
    entries = []
    for before, look in zip([0, *(look.step for look in looks)], looks, strict=False):
        steps = [row for row in rows if before < row.step <= look.step]
        tokens, seconds = sum(row.tokens for row in steps), sum(row.seconds for row in steps)
        entries.append(
            {
                "step": look.step,
                "valid accuracy": look.score,
                "valid loss": look.loss,
                **_trained(rows, before, look.step),
                "train time": seconds or None,
                "eval time": None,
                "tokens / sec": tokens / seconds if seconds else None,
                "mem allocated avg": None,
                "mem reserved avg": None,
                "elapsed time": None,
            }
        )
    last = {
        "step": scored,
        "test accuracy": evaluation.test.score,
        "test loss": evaluation.test.loss,
        **_trained(rows, max((look.step for look in looks if look.step < scored), default=0), scored),
        "train total tokens": sum(row.tokens for row in rows if row.step <= scored) or None,
        "forgetting": evaluation.general and evaluation.general.forgetting,
    }
    return [*entries, last]


def _trained(rows: list[_Row], before: int, step: int) -> dict[str, Any]:
    """Mean loss of the steps since another one, and how many rows were read since the first."""
    losses = [row.loss for row in rows if before < row.step <= step and row.loss is not None]
    samples = sum(len(row.rows) for row in rows if row.step <= step)
    return {"train loss": fmean(losses) if losses else None, "train samples": samples or None}


def _trained_with(outcome: Outcome) -> Made | Provenance:
    """Where and with what the last part of the training was made, which may be an earlier run."""
    return outcome.info.segments_made[-1] if outcome.info.segments_made else outcome.result.meta_info


def _on_cpu(outcome: Outcome) -> bool:
    return _trained_with(outcome).device.startswith("cpu")


def _meta_info(outcome: Outcome) -> dict[str, Any]:
    made, session, hub = _trained_with(outcome), outcome.result.meta_info, outcome.recipe.data.hub
    revision = hub.revision if hub is not None and re.fullmatch("[0-9a-f]{40}", hub.revision or "") else None
    installed = dict(package.split("==", 1) for package in session.all_packages if "==" in package)
    versions = {**made.packages, "bitsandbytes": installed.get("bitsandbytes")}
    return {
        "model_info": {"sha": session.model.revision, "created_at": None},
        "dataset_info": {} if hub is None else {hub.name: {"sha": revision, "created_at": None}},
        "package_info": {
            f"{name}-{key}": versions.get(name) if key == "version" else None
            for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
            for key in ("version", "commit-hash")
        },
        "system_info": {
            "system": made.machine.system,
            "release": None,
            "version": None,
            "machine": None,
            "processor": made.machine.cpu,
            "accelerator": None if _on_cpu(outcome) else made.device,
        },
        "pytorch_info": None,
    }


def _cola(outcome: Outcome) -> dict[str, Any]:
    """What the schema has no place for, as result.json has it."""
    info, session = outcome.info, outcome.result.meta_info
    return {
        "format": FORMAT,
        "version": session.cola,
        "run": outcome.folder.path.resolve().name,
        "arm": outcome.job.arm,
        "seed": outcome.job.seed,
        "task": outcome.recipe.data.task,
        "links": [link.model_dump(mode="json", exclude_unset=True) for link in info.links],
        "rules": info.rules and info.rules.model_dump(mode="json"),
        "knots": [knot.content() for knot in info.knots],
        "scored_step": info.scored_step,
        "evaluation": outcome.result.evaluation.content(),
        "flops": info.flops,
        "accelerator_memory_allocated_max": info.accelerator_memory_max,
        "process_memory_max": info.process_memory_max,
        "device": _trained_with(outcome).device,
        "recipe": session.recipe.sha256,
        "model": session.model.sha256,
        "data": session.data.sha256,
    }


def _nulls(value: Any, path: str = "") -> Iterator[str]:
    """The paths to what is null, each once: items of a list have one name."""
    found: dict[str, None] = {}
    items = (
        value.items() if isinstance(value, dict) else [("", item) for item in value] if isinstance(value, list) else ()
    )
    for key, item in items:
        place = f"{path}.{key}" if path and key else path or key
        found |= {place: None} if item is None else dict.fromkeys(_nulls(item, place))
    yield from found

"""cola eval: a run, an adapter or a model on a recipe's data, by the evaluator that scores arms."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cola import environment
from cola.data.splits import load_splits
from cola.errors import ModelError, RunFolderError
from cola.export.outcome import Outcome, outcomes
from cola.link import adapter_files
from cola.link.accelerator import dtype_warning, make_accelerator, quiet_libraries
from cola.link.find import find_adapter, find_model
from cola.link.model import Source, check_fit
from cola.measure.evaluate import Evaluator, Ways
from cola.measure.scores import evaluation_of, score_rows
from cola.measure.selfcheck import Subject, self_check
from cola.recipe.recipe import Recipe
from cola.recipe.schema import SPLITS, Model
from cola.report.terminal import Terminal
from cola.tree.records import EvaluationFile

NOTE = "cola.json"  # in what `cola export` writes: the base's fingerprint, how it was made, what the run measured


@dataclass(frozen=True)
class Trained:
    """How a run came to a model."""

    data: str  # digest of the data that it was scored on
    seed: int  # whose training rows it has, where each draws its own
    evaluation: dict[str, Any]  # what came out, by split


@dataclass(frozen=True)
class Target:
    """Something that can be scored."""

    label: str
    source: Source  # its base, which has its tokenizer
    dtype: str  # number format of the computation
    load: Callable[[torch.device], PreTrainedModel]
    n_virtual: int  # virtual tokens that stand before each row
    trained: Trained | None  # by which run; None: by none that is known


@dataclass(frozen=True)
class Scored:
    """What came of scoring one target."""

    label: str
    evaluation: dict[str, Any]  # loss, score and number of rows of each split, as in result.json
    rows: dict[str, list[dict[str, Any]]]  # of each split, for a file: every example's score and right answer
    reported: dict[str, Any] | None  # the same numbers as the run reported of these rows; None where it was other data
    selfcheck: dict[str, Any]  # what was found when the model was tried


def score(targets: Sequence[Target], data: Recipe, splits: Sequence[str], terminal: Terminal) -> list[Scored]:
    """Score targets one after the other on a recipe's data. Among several, one that does not load is told of and passed
    over. Raises ColaError if no target loads, or the data does not fit them."""
    quiet_libraries()
    if said := environment.note():
        terminal.warn(said)
    done = []
    for number, target in enumerate(targets, 1):
        try:
            done.append(_score(target, data, splits, terminal))
        except (ModelError, RunFolderError) as error:
            if not done and number == len(targets):
                raise
            terminal.warn(f"{target.label} is not scored: {error}")
    return done


def _score(target: Target, data: Recipe, splits: Sequence[str], terminal: Terminal) -> Scored:
    tokenizer, ends, trained = target.source.tokenizer(), target.source.ends(), target.trained
    seed = data.seeds[0] if trained is None else trained.seed
    loaded = load_splits(data.data, tokenizer, [*data.drawn_seeds, seed], ends)
    check_fit(target.source, target.source.skeleton(), loaded, target.n_virtual)
    accelerator = make_accelerator(target.dtype)
    if warning := dtype_warning(target.dtype, accelerator.device):
        terminal.warn(warning)
    evaluator = Evaluator.of(data.data, data.evaluation.batch_tokens, tokenizer, loaded, accelerator, ends)
    model = target.load(accelerator.device)
    examples = [example for _, part in loaded.items() for example in part]
    checked = self_check(Subject(target.label, model, evaluator, examples, target.n_virtual))
    for note in checked["notes"]:
        terminal.warn(f"{target.label}: {note}")
    evaluator = evaluator.asking(Ways(**checked["ways"]))
    scores, written, parts = {}, {}, loaded.scored(seed, data.evaluation.train_rows)
    for split in splits:
        rows = parts[split]
        whose = f" that seed {seed} draws" if split == "train" and loaded.redrawn else ""
        terminal.say(f"{target.label}: scoring {split} ({len(rows)} rows{whose})")
        scores[split] = evaluator(model, rows)
        written[split] = score_rows(rows, scores[split], tokenizer, data.evaluation.keep_prompts)
    reported = None
    if trained is not None and trained.data == loaded.fingerprint:  # train perhaps by another sample
        reported = {split: trained.evaluation[split] for split in splits}
        reported = {split: of for split, of in reported.items() if of["n"] == len(scores[split])}
    return Scored(target.label, evaluation_of(scores), written, reported, checked)


@dataclass(frozen=True)
class Loading:
    """How a model or an adapter is loaded, where that is not to be as it says itself."""

    base: str | None = None  # what an adapter is put on; default: what its cola.json or its config names
    dtype: str | None = None  # default: that of what `cola export` wrote, else that of the recipe
    quantization: str | None = None  # of the frozen weights, likewise
    trust_remote_code: bool = False

    def model(self, name: str, revision: str | None = None) -> Model:
        """A model of that name, as a recipe would say it."""
        return Model(name_or_path=name, revision=revision, trust_remote_code=self.trust_remote_code)


def targets_of(name: str, data: Recipe, loading: Loading, arm: str | None, seed: int | None) -> list[Target]:
    """What a command line names, to be scored on a recipe's data: the folder of a run (of one arm, one seed or all), of
    a PEFT adapter or of a model; a hub id; a GGUF file; `package://PACKAGE/FILE`. A run says itself how it is loaded.
    Raises ColaError if there is no such thing, or the options do not fit it."""
    if (Path(name) / "recipe.yaml").is_file():
        if loading != Loading():
            raise ModelError(
                f"{name} is a run, which says itself what its base is; leave out --base, --dtype, --quantization and "
                "--trust-remote-code"
            )
        return [_of_run(outcome) for outcome in outcomes(Path(name), arm, seed)]
    if arm is not None or seed is not None:
        raise ModelError(f"{name} is no run folder; --arm and --seed belong to a run")
    if (folder := find_adapter(loading.model(name))) is not None:
        return [_of_adapter(folder, name, data, loading)]
    return [_of_model(name, data, loading)]


def _label(name: str) -> str:
    """The last part of a path or of a hub id."""
    return Path(name).name or Path(name).resolve().name  # of `.`


def _of_run(outcome: Outcome) -> Target:
    virtual = outcome.links[0].virtual_tokens if outcome.links else 0
    trained = Trained(outcome.provenance.data.sha256, outcome.job.seed, outcome.result.evaluation.content())
    return Target(outcome.job.label, outcome.source, outcome.dtype, outcome.load, virtual, trained)


def _of_adapter(folder: Path, name: str, data: Recipe, loading: Loading) -> Target:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        virtual = int(config.get("num_virtual_tokens") or 0)
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} is damaged ({error})") from None
    note = read_note(folder)
    base_name = loading.base or (note and note.base_name) or config.get("base_model_name_or_path")
    if not base_name:
        raise ModelError(f"{name} does not say which base it is for; name it by --base")
    try:
        # At the commit that it was trained on; a branch may have moved on.
        revision = note.base_revision if note and not loading.base else None
        source = find_model(loading.model(base_name, revision))
    except ModelError as error:
        raise ModelError(f"the base of {name} cannot be had; name it by --base ({error})") from error
    if note and source.fingerprint() != note.base_sha256:
        raise ModelError(
            f"{name} is for another base: it was trained on the fingerprint {note.base_sha256[:12]}, and {base_name} "
            f"has {source.fingerprint()[:12]}"
        )
    dtype = loading.dtype or (note.dtype if note else data.model.dtype)
    quantization = loading.quantization or (note.quantization if note else None)

    def load(device: torch.device) -> PreTrainedModel:
        return adapter_files.load_adapter(source.load(dtype, device, quantization), folder)

    return Target(_label(name), source, dtype, load, virtual, note.trained if note else None)


def _of_model(name: str, data: Recipe, loading: Loading) -> Target:
    if (note := read_note(Path(name))) and note.form == "knots":
        raise ModelError(
            f"{name} holds a chain's links one by one, each for the base with those before it merged; score the run, "
            "or an export --as adapter or --as merged"
        )
    if loading.base is not None:
        raise ModelError(f"{name} is no PEFT adapter: it has no adapter_config.json, so --base says nothing")
    source = find_model(loading.model(name), quantized=True)
    note = read_note(source.folder)
    dtype, quantization = loading.dtype or (note.dtype if note else data.model.dtype), loading.quantization
    if quantization is not None and source.codes is not None:
        raise ModelError(f"{name} is quantized already; leave out --quantization")

    def load(device: torch.device) -> PreTrainedModel:
        return source.load(dtype, device, quantization)

    return Target(_label(name), source, dtype, load, 0, note.trained if note else None)


@dataclass(frozen=True)
class Note:
    """What `cola export` wrote beside the weights: their form and format, what they belong to, and who trained them."""

    form: str
    dtype: str
    base_name: str
    base_revision: str | None
    base_sha256: str
    quantization: str | None
    trained: Trained


def read_note(folder: Path) -> Note | None:
    """The note in a folder; None for what is not from cola. Raises ModelError if it is damaged."""
    file = folder / NOTE
    if not file.is_file():
        return None
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        run, base = note["run"], note["base"]
        evaluation = {split: _numbers(run["evaluation"][split]) for split in SPLITS}
        trained = Trained(run["data"], int(run["seed"]), evaluation)
        named = base["name"], base["revision"], base["sha256"], base["quantization"]
        return Note(str(note["form"]), str(note["dtype"]), *named, trained)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged ({type(error).__name__}: {error}); export it again") from None


def _numbers(numbers: dict[str, Any]) -> dict[str, Any]:
    score = numbers["score"]
    return {"loss": float(numbers["loss"]), "score": None if score is None else float(score), "n": int(numbers["n"])}


def write_scores(scored: Sequence[Scored], folder: Path) -> None:
    """eval.json, what the self-check found, and every example's score, into a new folder."""
    folder.mkdir(parents=True)
    evaluations = {target.label: target.evaluation for target in scored}
    EvaluationFile.model_validate(evaluations)  # written as they are: splits in the order in which they were asked for
    checks = {target.label: target.selfcheck for target in scored}
    for name, values in {"eval.json": evaluations, "selfcheck.json": checks}.items():
        (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for target in scored:
        own = folder / "scores" / target.label.replace(" ", "-") if len(scored) > 1 else folder / "scores"
        own.mkdir(parents=True, exist_ok=True)
        for split, rows in target.rows.items():
            (own / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

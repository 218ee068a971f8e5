"""cola export: what an arm has learned, as files that other tools load.

    adapter  one standard PEFT LoRA of rank Σ r_i: exact, a few MB; or virtual tokens as PEFT keeps them
    merged   a Hugging Face checkpoint: base + Σ s B A in float32, rounded once; on request as bitsandbytes' codes
    knots    the links one by one

Every export has a model card and a cola.json with the base's fingerprint and the run's own numbers.
"""

import json
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel

from cola.chain import Chain, retie
from cola.data.encode import Example
from cola.data.passages import PASSAGE_TOKENS
from cola.data.splits import load_splits
from cola.errors import ModelError, one_line
from cola.export import tensors
from cola.export.aside import folder_aside
from cola.export.card import model_card
from cola.export.hub_scores import card_scores, check_benchmark, write_benchmark
from cola.export.outcome import Outcome
from cola.export.score import NOTE
from cola.export.vllm import serving
from cola.files import need_package, sha256
from cola.link import adapter_files
from cola.link.accelerator import make_accelerator, quiet_libraries
from cola.link.base import Base
from cola.link.drift import Drift
from cola.link.model import Source, check_fit
from cola.link.residual import Residual, compressed, stacked
from cola.measure.evaluate import PROBE_ROWS, Evaluator
from cola.measure.scores import evaluation_of
from cola.measure.selfcheck import Subject, self_check
from cola.recipe.methods import Adapter
from cola.recipe.resolved import Rules
from cola.report.terminal import Terminal

FORMAT = 1  # of cola.json
WORDS = "The quick brown fox jumps over the lazy dog, again and again, until the evening comes."


@dataclass(frozen=True)
class Request:
    """What to write."""

    form: str  # `adapter`, `merged` or `knots`
    dtype: str | None  # of a merged checkpoint; default: the arm's
    rank: int | None  # at most which the chain has, compressed to one pair for each module; default: all of it
    quantization: str | None  # of a merged checkpoint's linear layers: `nf4` or `int8`
    benchmark: str | None  # the test score belongs under this task of the data set, a benchmark of the hub

    @property
    def is_another_function(self) -> bool:
        """Whether the run's scores are not this export's, but for one rounding."""
        return self.rank is not None or self.quantization is not None


def export(outcome: Outcome, request: Request, to: Path, terminal: Terminal, name: str | None) -> None:
    """Write an arm and seed into a new folder, which is there as a whole or not at all; its card tells others to load
    it by this name, or the folder's. Raises ModelError if the arm has no such form, or a part of it or a package is not
    there."""
    quiet_libraries()
    _check(outcome, request)
    with folder_aside(to) as aside:
        writing = _Writing(outcome, request, aside, terminal)
        writing.weights()
        (aside / NOTE).write_text(json.dumps(writing.record(), indent=1) + "\n", encoding="utf-8")
        parts = sorted(path.name for path in aside.glob("link-*"))
        scores = [] if request.is_another_function else card_scores(outcome)
        card = model_card(outcome, request.form, writing.dtype, writing.notes, parts, name or to.name, scores)
        (aside / "README.md").write_text(card, encoding="utf-8")
        if request.benchmark is not None:
            write_benchmark(outcome, request.benchmark, aside)


def _check(outcome: Outcome, request: Request) -> None:
    arm, method = outcome.job.arm, outcome.method
    if method is None:
        raise ModelError(f"arm {arm} trains nothing, so there is nothing to export; it is the base as it comes")
    if request.benchmark is not None:
        check_benchmark(outcome)
        if request.is_another_function:
            raise ModelError("--benchmark: the run's score is of what it trained, not of its compression or its codes")
    if request.form != "merged":
        for option, value in (("--dtype", request.dtype), ("--quantization", request.quantization)):
            if value is not None:
                raise ModelError(f"{option} belongs to --as merged; an adapter and its knots stay in float32")
    if outcome.kind is Adapter:
        where = outcome.path / "adapter"
        raise ModelError(
            f"arm {arm}: no other tool loads bottleneck adapters; cola eval scores the run, weights: {where}"
        )
    if request.form == "merged" and not outcome.kind.merges:
        raise ModelError(
            f"arm {arm}: {method} cannot be merged into the weights, nor quantized; export it --as adapter"
        )
    loads = request.form == "merged" or request.rank is not None
    if loads and (codes := request.quantization or outcome.quantization) is not None:
        need_package("bitsandbytes", f"quantization: {codes}", "quantized")
    if request.form == "adapter" and outcome.kind.is_whole:
        raise ModelError(f"arm {arm}: full fine-tuning is no adapter; export it --as merged")
    if request.form == "knots" or request.rank is not None:
        outcome.link_folders()  # says what is missing
    if request.rank is not None and request.form == "knots":
        raise ModelError("--rank compresses the chain as a whole; export it --as adapter or --as merged")
    dora = [link for link in outcome.residual() if link] if outcome.has_dora else []
    if dora and (request.rank is not None or (request.form == "adapter" and len(dora) > 1)):
        raise ModelError(
            f"arm {arm}: DoRA scales whole rows of the weight, which a chain of it leaves no low-rank pair for; export "
            "it --as merged or --as knots"
        )


class _Writing:
    """Makes one export in a folder."""

    def __init__(self, outcome: Outcome, request: Request, folder: Path, terminal: Terminal) -> None:
        self.outcome, self.request, self.folder, self.terminal = outcome, request, folder, terminal
        self.dtype = request.dtype or outcome.dtype  # of a merged checkpoint; else that of the base
        self.notes: list[str] = []  # what was found on the way, for the user and the card
        self.numbers: dict[str, Any] = {}  # the same for cola.json

    def _say(self, text: str, **numbers: Any) -> None:
        self.terminal.say(text)
        self.notes.append(text)
        self.numbers |= numbers

    def weights(self) -> None:
        """Write the weights in the form that is asked for, and what is loaded with them."""
        outcome, folder = self.outcome, self.folder
        if not outcome.kind.merges:
            outcome.check("adapter")
            _copy(outcome.path / "adapter", folder, outcome.base_name)
            return
        learned = outcome.residual() if outcome.kind.is_pair else []
        if self.request.rank is not None:
            learned = self._compressed(learned, self.request.rank)
        if self.request.form == "merged":
            self._checkpoint(learned)
        elif self.request.form == "knots":
            for number, (link, pair) in enumerate(zip(outcome.link_folders(), learned, strict=True), 1):
                if pair:  # the chain holds nothing of a link whose pair went on into the next
                    self._link(link, [pair], folder / f"link-{number}")
        else:
            self._link(outcome.link_folders()[-1], learned[-1:] if outcome.has_dora else learned, folder)
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            room, sentence = serving(config)
            self._say(sentence, vllm={"max_lora_rank": room})

    def _link(self, link: Path, learned: Residual, folder: Path) -> None:
        if any(pair.rows_O is not None for pair in learned[0].values()):
            _copy(link, folder, self.outcome.base_name)
        else:
            adapter_files.save_pair(folder, stacked(learned), self.outcome.base_name, self.outcome.source.skeleton())

    def _compressed(self, learned: Residual, rank: int) -> Residual:
        """The chain as one pair of a lower rank; says what that keeps and how it scores."""
        pairs, energy = compressed(learned, rank)
        kept, whole = (sum(values) for values in zip(*energy.values(), strict=True))
        shares = {name: part / all_of_it if all_of_it else 1.0 for name, (part, all_of_it) in energy.items()}
        least = min(shares, key=shares.__getitem__)
        self.terminal.say("scoring validation before and after the compression")
        trial = _Trial(self.outcome)
        chain = self.outcome.chain(trial.accelerator.device)
        before = trial.score(chain.model)
        retie(chain, [pairs])
        after = trial.score(chain.model)
        self._say(
            f"Compressed to rank {rank}: {kept / whole if whole else 1.0:.2%} of the update's energy is kept (least: "
            f"{shares[least]:.2%}, {least}); validation {_change(before, after)}.",
            compression={"rank": rank, "energy": shares, "validation_before": before, "validation_after": after},
        )
        return [pairs]

    def _checkpoint(self, learned: Residual) -> None:
        """Base + Σ s B A, rounded once, with tokenizer and code. What was trained beside codes is added to the weights
        that the codes stand for."""
        outcome, folder, source = self.outcome, self.folder, self.outcome.source
        if outcome.rules.merge == "naive":
            self._say("The run merged each link in place, which rounds each time; this checkpoint is rounded once.")
        state: dict[str, str] = {}
        if self.request.quantization is None:
            self.terminal.say(f"merging in float32, to be kept as {self.dtype}")
            model = _merged(outcome, learned, self.dtype, outcome.quantization)
            model.save_pretrained(folder)
            state = _state_digests(model)
            del model
        else:
            self._quantized(learned, self.request.quantization)
        source.tokenizer().save_pretrained(folder)
        # transformers writes one that knows no end token; where the base has none, the config's is used.
        (folder / "generation_config.json").unlink(missing_ok=True)
        for file in [source.folder / "generation_config.json", *source.folder.glob("*.py")]:
            if file.is_file() and (file.suffix != ".py" or source.trust_remote_code):
                shutil.copy(file, folder)
        self._try(state)
        if self.request.quantization is None:  # of codes nothing is equal to the base's
            self._say(tensors.compare(outcome, learned, folder))

    def _quantized(self, learned: Residual, quantization: str) -> None:
        """Codes of the dense base with the update; says what making them has changed. Codes made of codes with the
        update would round most of it straight back: each weight stands on the middle of its code already."""
        outcome = self.outcome
        with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".dense-") as dense:
            _merged(outcome, learned, "float32", None).save_pretrained(dense)
            merged = Source(str(self.folder), Path(dense), outcome.source.trust_remote_code)
            model = merged.load(self.dtype, torch.device("cpu"), quantization)
            model.save_pretrained(self.folder)
        self.terminal.say("scoring validation before and after the quantization")
        trial = _Trial(outcome)
        after, coded = trial.score(model), trial.outputs(model)
        del model
        start = trial.outputs(outcome.source.load(outcome.dtype, trial.accelerator.device, outcome.quantization))
        scored = outcome.load(trial.accelerator.device)
        before, uncoded = trial.score(scored), trial.outputs(scored)
        drift = Drift.between(start, uncoded, coded)
        learned_by = drift.of_learned
        moved = "as it was not moved by training" if learned_by is None else f"{learned_by:.1%} of what training did"
        numbers = {"of_learned": learned_by, "kl": drift.kl, "validation_before": before, "validation_after": after}
        self._say(
            f"Quantized to {quantization}: this moved the outputs by {moved} (KL {drift.kl:.2g} nats per token); "
            f"validation {_change(before, after)}.",
            quantized=numbers,
        )

    def _try(self, state: dict[str, str]) -> None:
        """Load a merged checkpoint as it was written: it must hold every tensor, and be what others rely on."""
        arm = self.outcome.job.arm
        written = Source(str(self.folder), self.folder, self.outcome.source.trust_remote_code)
        model = written.load(self.dtype, torch.device("cpu"))
        loaded = _state_digests(model) if state else {}
        if lost := [name for name, digest in state.items() if loaded.get(name) != digest]:
            raise ModelError(
                f"arm {arm}: it does not give back {len(lost)} of its {len(state)} tensors, the first is {lost[0]}; "
                "export it --as adapter"
            )
        tokenizer = written.tokenizer()
        words = tokenizer(WORDS)["input_ids"]
        examples = [Example("words", words[: len(words) // 2], [words[len(words) // 2 :]], 0, [WORDS], None)]
        evaluator = Evaluator("answer", tokenizer, [], PASSAGE_TOKENS, nullcontext, 1)
        checked = self_check(Subject(f"arm {arm}, as exported", model, evaluator, examples))
        for note in checked["notes"]:
            self.terminal.say(f"the checkpoint: {note}")
        self.numbers["selfcheck"] = checked

    def record(self) -> dict[str, Any]:
        """cola.json: what the files are, what they belong to, and what the run measured."""
        outcome, provenance = self.outcome, self.outcome.provenance
        quantization = None if self.request.form == "merged" else outcome.quantization
        return {
            "format": FORMAT,
            "cola": version("chain-of-lora"),
            "form": self.request.form,
            "dtype": self.dtype,
            "base": {**provenance.model.content(), "name": outcome.base_name, "quantization": quantization},
            "run": {
                "name": outcome.folder.path.name,
                "arm": outcome.job.arm,
                "seed": outcome.job.seed,
                "recipe": provenance.recipe.sha256,
                "data": provenance.data.sha256,
                "scored_step": outcome.info.scored_step,
                "evaluation": outcome.result.evaluation.content(),
                "knots": [knot.content() for knot in outcome.info.knots],
            },
            # Of the base, as the run found it; a merged checkpoint is tried itself.
            "selfcheck": provenance.selfcheck and provenance.selfcheck.content(),
            **self.numbers,
        }


def _copy(adapter: Path, folder: Path, base_name: str) -> None:
    """Copy what PEFT has written, with a name of the base that others find it by."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"base_model_name_or_path": base_name}, indent=2) + "\n", encoding="utf-8")


class _Trial:
    """The run's validation rows, and what a model makes of them."""

    def __init__(self, outcome: Outcome) -> None:
        recipe, source = outcome.recipe, outcome.source
        tokenizer, ends = source.tokenizer(), source.ends()
        splits = load_splits(recipe.data, tokenizer, recipe.drawn_seeds, ends)
        check_fit(source, source.skeleton(), splits)
        self.rows = splits.validation
        self.accelerator = make_accelerator(outcome.dtype)
        tokens = recipe.evaluation.batch_tokens
        self.evaluator = Evaluator.of(recipe.data, tokens, tokenizer, splits, self.accelerator, ends)

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        return evaluation_of({"validation": self.evaluator(model, self.rows)})["validation"]

    def outputs(self, model: PreTrainedModel) -> Any:
        return self.evaluator.outputs(model, self.rows[:PROBE_ROWS])


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What happened to loss and score."""
    text = f"loss {before['loss']:.4f} → {after['loss']:.4f}"
    return text if before["score"] is None else f"{text}, score {before['score']:.4f} → {after['score']:.4f}"


def _state_digests(model: PreTrainedModel) -> dict[str, str]:
    """A digest of each tensor of the state dict, for two models of which only one is in memory at a time. Some loaders
    keep a few tensors in float32 whatever the model's format, so it is of the numbers and not of their format."""
    state = model.state_dict()
    return {name: sha256(tensor.detach().double().contiguous().numpy().tobytes()) for name, tensor in state.items()}


def _merged(outcome: Outcome, learned: Residual, dtype: str, quantization: str | None) -> PreTrainedModel:
    """The dense model in a number format; with a quantization, on the weights that its codes stand for."""
    device, source = torch.device("cpu"), outcome.source
    if outcome.kind.is_whole:
        return outcome.tuned.load(dtype, device)
    if quantization is None:
        model = source.load(dtype, device)
        base = Base(model, source.files)
    else:
        model = source.load("float32", device, quantization).dequantize()
        base = Base(model)
    retie(Chain(model, base, Rules(merge="exact")), learned)
    # A dense one has been loaded in it, but for the few tensors that its class keeps finer.
    return model if quantization is None else model.to(getattr(torch, dtype))


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Upload an export to the Hugging Face hub; returns its address. Raises ModelError if the hub does not take it."""
    try:
        hub = HfApi()
        url = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Exported by cola")
    # The hub client, its http library and its cache raise errors without a common base.
    except Exception as error:
        raise ModelError(
            f"--push {repository}: the hub did not take it ({type(error).__name__}: {one_line(error, 200)}); the "
            f"export is in {folder}: log in by `hf auth login`, then `hf upload {repository} {folder}`"
        ) from error
    return str(url)

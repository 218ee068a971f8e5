"""What tying a knot loses, in every number format, and what it costs. Writes results/NAME.json beside this file.

    python experiments/003-precision/measure.py links FOLDER      trains sixteen links once, in float32, with `cola run`
    python experiments/003-precision/measure.py formats FOLDER    ties those links on every base, by cola and by PEFT
    python experiments/003-precision/measure.py memory FOLDER     peak memory of a chain of four and of a single LoRA
    python experiments/003-precision/measure.py time FOLDER       seconds of a knot and of the training of its link

FOLDER is where runs and their store go: any folder, kept from `links` to `formats`. The links are trained in float32
whatever the base is that they are tied on, so that what is measured is rounding and not training. For `memory` and
`time` nothing else should run on the machine.

Axes: O output features, I input features, R rank, N positions, V vocabulary.
"""

import copy
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import cola.run.training
from cola.chain import Chain, run_chain
from cola.link import adapter_files, adapters
from cola.link.accelerator import quiet_libraries
from cola.link.base import Base
from cola.link.drift import Outputs
from cola.link.find import find_model
from cola.link.model import Source
from cola.recipe.plan import plan_arm
from cola.recipe.read import read_recipe
from cola.recipe.schema import Model
from cola.recipe.write import dump_recipe
from cola.report.terminal import Terminal
from cola.run.run import run
from cola.tree.made import provenance
from cola.tree.run_holder import take_run

HERE = Path(__file__).parent
LINKS, SHORT = HERE / "links.yaml", HERE.parent.parent / "recipes/quickstart.yaml"
ONLY_CHAIN = ["arms.base=null", "arms.lora=null", "arms.full=null", "comparison.primary=null", "tracking.wandb=off"]
LENGTHS = (1, 4, 16)  # links after which the sum of what was tied is looked at
FORMATS = {  # dtype that the model computes in, and the codes of its linear layers
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "bfloat16 checkpoint": ("bfloat16", None),
    "nf4": ("float32", "nf4"),
    "int8": ("float32", "int8"),
}
PROMPTS = [
    "State the final answer to the following arithmetic problem: 47 + 38 =",
    "The capital of France is Paris, and the capital of Italy is",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Question: A shop sells pens at 3 euros each. How much do seven pens cost?\nAnswer:",
]

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)

# ---------------------------------------------------------------------------------------------------------
# links


@app.command()
def links(folder: Path, steps: int = 320) -> None:
    """Train sixteen links with `cola run`."""
    run_folder = cola_run(LINKS, folder / "links", [f"training.steps={steps}"])
    result, rows = read_run(run_folder)
    knots = []
    for link, knot in zip(result["train_info"]["links"], result["train_info"]["knots"], strict=True):
        of_link = [row for row in rows if link["first_step"] < row["step"] <= link["last_step"]]
        knots.append(
            {
                "loss": statistics.mean(row["loss"] for row in of_link),
                "size_median": knot["relative_size_median"],
                "size_max": knot["relative_size_max"],
                "drift_relative": knot["drift_relative"],
            }
        )
    write("links", {"steps_a_link": steps // len(knots), "knots": knots})


def cola_run(recipe: Path, folder: Path, settings: list[str]) -> Path:
    """The command itself, in a process of its own; returns its run folder."""
    where = [f"output={folder / 'runs'}", f"store={folder / 'store'}"]
    subprocess.run([sys.executable, "-m", "cola", "run", str(recipe), *settings, *where], check=True)
    return max((folder / "runs").iterdir())  # they are named by their time


def read_run(run_folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of a run's only arm, and its optimizer steps."""
    (path,) = run_folder.glob("arms/*/seed-0/result.json")
    rows = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
    return json.loads(path.read_text()), [row for row in rows if row["kind"] == "step"]


def write(name: str, found: dict[str, Any]) -> None:
    """results/NAME.json, with how it was made."""
    made = {key: value for key, value in provenance().items() if key != "all_packages"}
    made["packages"] |= {"bitsandbytes": version("bitsandbytes")}
    made["commit"].pop("changed")
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = " ".join(["python experiments/003-precision/measure.py", *words])
    text = json.dumps({"command": command, "made": made, **found}, indent=1, allow_nan=False)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / f"results/{name}.json").write_text(text + "\n")


# ---------------------------------------------------------------------------------------------------------
# formats

Weights = dict[str, Tensor]  # module name -> (O, I), on the CPU


@app.command()
def formats(folder: Path, only: list[str] = typer.Option(list(FORMATS), help="Formats to measure.")) -> None:  # noqa: B008
    """Tie the links of `links` on every base."""
    quiet_libraries()
    # PEFT says at every merge into codes that it rounds, which is what is measured here.
    warnings.filterwarnings("ignore", message="Merge lora module to")
    runs = sorted((folder / "links/runs").iterdir())
    (tied,) = runs[-1].glob("arms/*/seed-0/knots")
    links = [tied / f"link-{number}" for number in range(1, len(list(tied.iterdir())) + 1)]
    source = find_model(read_recipe(LINKS).model)
    found = {}
    for name in only:
        dtype, quantization = FORMATS[name]
        theirs = source
        if name == "bfloat16 checkpoint":  # as most models come; cola's base is then what the file holds
            theirs = bfloat16_checkpoint(source, folder / "bfloat16-checkpoint")
        found[name] = one_format(theirs, links, dtype, quantization)
        print(name, json.dumps(found[name], indent=1), flush=True)
    write("formats", {"links": len(links), "prompts": len(PROMPTS), "formats": found})


def bfloat16_checkpoint(source: Source, folder: Path) -> Source:
    """The model rounded to bfloat16 as a Hugging Face folder."""
    source.load("bfloat16", torch.device("cpu")).save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    return find_model(Model(name_or_path=str(folder), dtype="bfloat16"))


def one_format(source: Source, links: list[Path], dtype: str, quantization: str | None) -> dict[str, Any]:
    """What cola's knots and PEFT's merges make of the links on one base.

    What was learned is summed here from the files of the links, in float64, and the outputs that a knot should keep
    are those of plain PEFT with one unmerged LoRA of all links: neither goes through cola.
    """
    tokenizer = source.tokenizer()
    learned = {length: learned_after(links[:length]) for length in LENGTHS}
    names = list(learned[1])
    model = source.load(dtype, torch.device("cpu"), quantization)
    start = weights(model, names)  # codes stand for what they dequantize to: the links are beside those
    W0 = start if quantization else weights(source.load("float32", torch.device("cpu")), names)
    f_base = logits(model, tokenizer)
    f_attached = {}
    for length in LENGTHS:
        attached = attached_by_peft(model, links[:length])
        f_attached[length] = logits(attached, tokenizer)
        model = attached.unload()
    assert torch.equal(logits(model, tokenizer), f_base)

    def account(model: PreTrainedModel, f_tied: Tensor, length: int) -> dict[str, float | None]:
        kept = 1 - ((f_tied - f_attached[length]).norm() / (f_attached[length] - f_base).norm()).item()
        return {**compare(W0, start, learned[length], weights(model, names)), "kept": kept}

    cola_, drifts = {}, []
    chain = Chain(
        model, Base(model, source.files, quantization is not None), read_recipe(LINKS).resolved("chain").rules
    )
    plan = plan_arm(read_recipe(LINKS), "chain", 0, 640)
    pairs = list(map(adapter_files.load_pair, links))
    knots = run_chain(
        chain,
        plan,
        tune=lambda chain, _: adapters.set_pair(chain.model, pairs[len(chain.learned)]),  # what was trained before
        probe=lambda model: Outputs(logits(model, tokenizer), targets(tokenizer)),
        gradients=lambda *_: {},
    )
    for length, knot in enumerate(knots, 1):
        drifts.append(knot.drift.relative)
        if length in LENGTHS:
            cola_[length] = account(chain.model, knot.outputs.logits_NV, length)

    peft = {}
    model = source.load(dtype, torch.device("cpu"), quantization)
    for length, link in enumerate(links, 1):
        model = PeftModel.from_pretrained(model, str(link)).merge_and_unload()
        if length in LENGTHS:
            peft[length] = account(model, logits(model, tokenizer), length)

    after = {}
    for length in LENGTHS:
        after[length] = {"cola": cola_[length], "peft": peft[length]}
        if not quantization:
            rounded = {name: (W0[name].double() + learned[length][name]).to(getattr(torch, dtype)) for name in names}
            after[length]["one_rounding"] = compare(W0, start, learned[length], rounded)
    return {"drift_relative": drifts, "after": after}


def learned_after(links: list[Path]) -> Weights:
    """Σ s B A of links in float64, from their files."""
    total: Weights = {}
    for link in links:
        config, tensors = json.loads((link / "adapter_config.json").read_text()), load_file(link / FILE)
        for key in tensors:
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B_OR, A_RI = tensors[key.replace("lora_A", "lora_B")].double(), tensors[key].double()
                update_OI = config["lora_alpha"] / config["r"] * B_OR @ A_RI
                total[name] = total[name] + update_OI if name in total else update_OI
    return total


FILE = "adapter_model.safetensors"


@torch.no_grad()
def attached_by_peft(model: PreTrainedModel, links: list[Path]) -> PeftModel:
    """PEFT's own LoRA, unmerged, of all links: their A's on top of each other, their B's side by side."""
    first = json.loads((links[0] / "adapter_config.json").read_text())
    tensors = [load_file(link / FILE) for link in links]
    rank, alpha = first["r"] * len(links), first["lora_alpha"] * len(links)  # alpha / rank is that of each link
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=first["target_modules"], task_type="CAUSAL_LM")
    attached = get_peft_model(model, config)
    own = dict(attached.named_parameters())
    for key in tensors[0]:
        stacked = torch.cat([one[key] for one in tensors], dim=0 if "lora_A" in key else 1)
        own[key.replace(".weight", ".default.weight")].copy_(stacked)
    return attached.eval()


@torch.no_grad()
def weights(model: PreTrainedModel, names: list[str]) -> Weights:
    """What each module multiplies its input by, seen from outside: its outputs for unit vectors. So codes, and what
    lies beside them, count as what they do."""
    found = {}
    for name in names:
        module = model.get_submodule(name)
        unit_II = torch.eye(module.in_features, dtype=next(model.parameters()).dtype)
        found[name] = module(unit_II).T.contiguous()
    return found


@torch.no_grad()
def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(N, V) at all positions of the prompts. Computed in float32 from the weights as they are, whatever their format:
    what half precision does to activations comes and goes with every input and is no part of a knot."""
    if next(model.parameters()).dtype != torch.float32:
        model = copy.deepcopy(model).float()
    tokens = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    return torch.cat([model(input_ids=ids).logits[0] for ids in tokens])


def targets(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token after each position; the last of a prompt is followed by its first, for want of another."""
    tokens = [tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in PROMPTS]
    return torch.cat([ids.roll(-1) for ids in tokens])


def compare(W0: Weights, start: Weights, learned: Weights, tied: Weights) -> dict[str, float | None]:
    """What weights hold above W0, against what was learned; over all matrices together.

    Returns:
        `error`: ||(W - W0) - learned|| / ||learned||. `cosine` between the two. `unchanged`: share of the entries that
        are what they were when the model was loaded. In 16-bit formats `farther`: number of entries that are farther
        from W0 + learned than half a unit in the last place, and `beyond`: the largest distance beyond that, divided
        by |W0| + |learned|. Where the two nearly cancel, the unit in the last place of their sum is smaller than
        float32's own rounding of it, so a few entries are farther by about 1e-7 of what was added.
    """
    sums = dict.fromkeys(("error", "learned", "applied", "product", "same"), 0.0)
    beyond, farther, entries = 0.0, 0, 0
    for name, learned_OI in learned.items():
        W0_OI, tied_OI = W0[name].double(), tied[name].double()
        applied_OI, error_OI = tied_OI - W0_OI, tied_OI - (W0_OI + learned_OI)
        sums["error"] += error_OI.square().sum().item()
        sums["learned"] += learned_OI.square().sum().item()
        sums["applied"] += applied_OI.square().sum().item()
        sums["product"] += (applied_OI * learned_OI).sum().item()
        sums["same"] += (tied[name] == start[name]).sum().item()
        half_OI = half_ulp(W0_OI + learned_OI, tied[name].dtype)
        beyond_OI = (error_OI.abs() - half_OI) / (W0_OI.abs() + learned_OI.abs())
        beyond = max(beyond, beyond_OI.max().item())
        farther += (error_OI.abs() > 1.001 * half_OI).sum().item()
        entries += error_OI.numel()
    lengths = math.sqrt(sums["applied"] * sums["learned"])
    found = {
        "error": math.sqrt(sums["error"] / sums["learned"]),
        "cosine": sums["product"] / lengths if lengths else None,
        "unchanged": sums["same"] / entries,
        "entries": entries,
    }
    sixteen_bits = next(iter(tied.values())).dtype != torch.float32
    return found | ({"farther": farther, "beyond": beyond} if sixteen_bits else {})


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half of the distance of neighbours in a format, around each value: the most that one rounding can move it."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(values, info.eps / 2), exponent - 1)


# ---------------------------------------------------------------------------------------------------------
# memory


@app.command()
def memory(folder: Path, rounds: int = 3, links: int = 4, steps_a_link: int = 4) -> None:
    """Peak memory of a chain and of a single LoRA of as many steps, each in a process of its own, in turn.

    The quickstart's short rows and all linear layers: the activations, which both have, are small, and what a knot
    touches is large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for base, setting in (("float32", "null"), ("nf4", "nf4"), ("int8", "int8")):
        common = [*ONLY_CHAIN, f"training.steps={links * steps_a_link}", f"model.quantization={setting}"]
        common.append("data.rows={train: 32, validation: 16, test: 4}")
        peaks: dict[str, list[dict[str, int]]] = {"lora": [], "chain": []}
        for _ in range(rounds):
            for arm, length in (("lora", 1), ("chain", links)):
                # A store of its own, or what an earlier measurement trained would be taken from there.
                with tempfile.TemporaryDirectory(dir=folder) as where:
                    settings = [*common, f"arms.chain3.links={length}", f"output={where}/runs", f"store={where}/store"]
                    words = [sys.executable, __file__, "peak", str(SHORT), *settings]
                    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                peaks[arm].append(json.loads(done.stdout.splitlines()[-1]))
                print(base, arm, peaks[arm][-1], flush=True)
        (one,) = {peak["pair_bytes"] for peak in peaks["chain"]}
        # Tied pairs lie beside codes; elsewhere they are in the weights and none of them is needed to compute.
        factors = links * one if setting != "null" else 0
        medians = {
            f"{arm}_{key}": statistics.median(peak[key] for peak in peaks[arm])
            for arm in peaks
            for key in ("training_bytes", "process_bytes")
        }
        found[base] = {
            "factors_bytes": factors,
            "pair_bytes": one,
            **medians,
            "ratio": medians["chain_training_bytes"] / (medians["lora_training_bytes"] + factors),
            "ratio_process": medians["chain_process_bytes"] / (medians["lora_process_bytes"] + factors),
            "rounds": peaks,
        }
    write("memory", {"links": links, "steps_a_link": steps_a_link, "bases": found})


@app.command(hidden=True)
def peak(recipe_file: Path, settings: list[str]) -> None:
    """One run in this process; prints the largest memory it held, and that from the first optimizer step on.

    Loading holds the file's pages and the model at once, which is the same for every arm and would hide what comes
    after, so the high-water mark is set back when the first link is about to be trained.
    """
    inner, marks = cola.run.training.tune, []

    def tune(*args: Any, **keywords: Any) -> Any:
        if not marks:
            marks.append(high_water())
            Path("/proc/self/clear_refs").write_text("5")
        return inner(*args, **keywords)

    cola.run.training.tune = tune
    recipe = read_recipe(recipe_file, settings)
    with take_run(dump_recipe(recipe), Path(recipe.output) / recipe.name, dated=True) as (run_folder, _):
        summary = run(recipe, run_folder, Terminal(Console(file=sys.stderr)))
    assert not summary.interrupted
    assert not any(arm.errors for arm in summary.arms.values())
    training = high_water()
    result, _ = read_run(run_folder.path)
    found = {
        "training_bytes": training,
        "process_bytes": max(training, *marks),
        "pair_bytes": 4 * result["train_info"]["num_trainable_params"],
    }
    print(json.dumps(found))


def high_water() -> int:
    """Largest resident set of this process so far, in bytes."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


# ---------------------------------------------------------------------------------------------------------
# time


@app.command()
def time(folder: Path, steps_a_link: int = 200) -> None:
    """Seconds of each knot (`seconds` of result.json) and of the optimizer steps of its link (metrics.jsonl)."""
    folder.mkdir(parents=True, exist_ok=True)
    # The quickstart's short rows on all linear layers: the least training for the same knot.
    settings = [*ONLY_CHAIN, "arms.chain3.links=2", "data.rows.test=16", f"training.steps={2 * steps_a_link}"]
    with tempfile.TemporaryDirectory(dir=folder) as where:
        result, rows = read_run(cola_run(SHORT, Path(where), settings))
    links = []
    for link, knot in zip(result["train_info"]["links"], result["train_info"]["knots"], strict=True):
        seconds = sum(row["seconds"] for row in rows if link["first_step"] < row["step"] <= link["last_step"])
        links.append({"knot_seconds": knot["seconds"], "train_seconds": seconds, "share": knot["seconds"] / seconds})
    tokens = statistics.mean(row["tokens"] for row in rows)
    write("time", {"steps_a_link": steps_a_link, "tokens_a_step": tokens, "links": links})


if __name__ == "__main__":
    app()

"""Training on one NVIDIA GPU: cola against Trainer + PEFT and TRL with Liger, in parts of a few minutes each.

    make gpu                                        all parts, under 9 minutes: what has no time left is named
    make gpu PART=memory                            one of them
    python benchmarks/gpu.py steps --tiny           tries all of the code on a CPU, with tiny shapes

tests    the tests that are marked `gpu`
steps    tokens per second, share of the card's peak and memory: small models, the flagship recipe's
memory   the same with the shape of a 7B model, in 16 bits and on NF4 codes, one row a step and eight
arms     one process of `cola run`, and two of the same command side by side

Weights are random, made on the card. Rows are of one length, so that padding is nobody's advantage. A chain's step
that begins a link holds the knot before it; medians do without. Each case is written as it ends to gpu.json, in $OUT
if that is set and else in benchmarks/results; what was there of other parts stays.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would share its rows out to all cards

import torch
from machine import made
from step import RATE, SEED, TARGETS, Batches, Contender, Mark, Workload, by_cola, by_trainer, by_trl, tune_link
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from cola.chain import Chain, run_chain
from cola.link.accelerator import make_accelerator, quiet_libraries
from cola.link.base import Base
from cola.link.model import Source
from cola.measure.cost import Meter
from cola.measure.evaluate import Evaluator
from cola.measure.memory import peaks, restart_peaks
from cola.recipe.methods import Full, Lora, Settings
from cola.recipe.plan import Link
from cola.recipe.resolved import Rules

HERE = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Dense matrix products a second by the vendor's data sheets: in 16 bits, and in float32 without TF32, as cola has it.
PEAKS = {"H200": (989e12, 67e12), "H100": (989e12, 67e12), "A100": (312e12, 19.5e12)}
OTHERS = {  # tokens a second by others, on one H100; not measured here
    "NeMo AutoModel, Qwen2.5-7B, LoRA r = 16, rows of 4096 tokens": 14_110,
    "LoRAFusion (arXiv 2510.00206), Llama-3.1-8B": 14_875,
}


def shape(kind: type, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> Any:
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return kind(**sizes, num_attention_heads=heads, num_key_value_heads=kv, pad_token_id=0, eos_token_id=0, **more)


SHAPES = {  # as their config.json on the hub has them
    "SmolLM2-135M": shape(LlamaConfig, 49_152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "Qwen1.5-0.5B": shape(Qwen2Config, 151_936, 1024, 2816, 24, 16, 16, tie_word_embeddings=True),
    "Qwen1.5-1.8B": shape(Qwen2Config, 151_936, 2048, 5504, 24, 16, 16, tie_word_embeddings=False),
    "Qwen1.5-7B": shape(Qwen2Config, 151_936, 4096, 11_008, 32, 32, 32, tie_word_embeddings=False),
    "tiny": shape(Qwen2Config, 40_000, 64, 128, 1, 4, 4, tie_word_embeddings=False),
}


@dataclass(frozen=True)
class Case:
    """What is trained, and on which rows."""

    model: str
    dtype: str
    method: str = "lora"  # r = 8, alpha = 16, q and v; `chain3`: three of them; `full`
    quantization: str | None = None
    rows: int = 8
    tokens: int = 512  # of each row; the last quarter is the answer

    @property
    def name(self) -> str:
        return f"{self.model}, {self.quantization or self.dtype}, {self.method}, {self.rows} x {self.tokens}"

    def batches(self, n_steps: int) -> Batches:
        answer = self.tokens // 4
        return Workload(self.rows, (self.tokens - answer,) * 2, (answer,) * 2, n_steps - 1).batches()


STEPS = [
    Case("SmolLM2-135M", "bfloat16", rows=16, tokens=256),
    Case("Qwen1.5-0.5B", "bfloat16"),
    *(Case("Qwen1.5-1.8B", "bfloat16", method) for method in ("lora", "chain3", "full")),
    *(Case("Qwen1.5-1.8B", "float32", method) for method in ("lora", "full")),  # the flagship recipe's
]
MEMORY = [
    Case("Qwen1.5-7B", *how, rows=rows)
    for how in (("float16",), ("bfloat16", "lora", "nf4"), ("bfloat16",))
    for rows in (1, 8)
]
TINY = [Case("tiny", "float32", method, rows=2, tokens=16) for method in ("lora", "chain3", "full")]
TINY_CODES = [Case("tiny", "float32", quantization="nf4", rows=2, tokens=16)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token."""
    letters = {letter: i for i, letter in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made_of_bytes = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made_of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made_of_bytes.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made_of_bytes, eos_token="<end>", pad_token="<end>")


def source_of(name: str, scratch: Path) -> Source:
    """The random model of that shape in 16 bits, written once."""
    folder = scratch / name
    if not folder.exists():
        torch.manual_seed(SEED)
        with DEVICE:
            AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return Source(name, folder, False)


def settings_of(method: str) -> Settings:
    return Full() if method == "full" else Lora(rank=8, alpha=16, target_modules=("q_proj", "v_proj"))


def by_chain(model: Any, targets: Any, batches: Batches, mark: Mark, dtype: str) -> None:
    """Three links of cola, with their knots."""
    accelerator, cuts = make_accelerator(dtype), [i * len(batches) // 3 for i in range(4)]
    files, pair = [Path(model.config.name_or_path) / "model.safetensors"], settings_of("chain3")
    links = [
        Link(settings=pair, knot=Rules() if a else None, first_step=a, learning_rates=(RATE,) * (b - a), seed=SEED)
        for a, b in pairwise(cuts)
    ]

    def tune(chain: Chain, link: Link) -> None:
        tune_link(chain.model, link, batches[link.first_step : link.last_step], mark, accelerator)

    probe = partial(Evaluator("answer", tokenizer(), [], 4096, accelerator.autocast, 1).outputs, examples=batches[0])
    for knot in run_chain(Chain(model, Base(model, files), Rules()), links, tune, probe, lambda *_: {}):
        knot.drift.check(0.1)


def contenders(case: Case) -> dict[str, Contender | str]:
    """Who takes part, and why somebody does not."""
    if case.method == "chain3":
        return {"cola": by_chain}
    needed = ("trl", "liger_kernel") if DEVICE.type == "cuda" else ("trl",)
    lacking = [package for package in needed if find_spec(package) is None]
    absent = f"not installed: {', '.join(lacking)}"
    return {"cola": by_cola, "Trainer + PEFT": by_trainer, "TRL + Liger": absent if lacking else by_trl}


def block(source: Source, case: Case, run: Contender, batches: Batches) -> dict[str, Any]:
    """One contender from the base anew: seconds of each step but the first two, losses, and peak memory."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    theirs = case.method == "full" and run is not by_cola  # others keep all weights in float32 only if they are so
    model = source.load("float32" if theirs else case.dtype, DEVICE, case.quantization).requires_grad_(theirs)
    counted, times, losses = restart_peaks(DEVICE), [], []

    def mark(loss: float) -> None:  # whose value the device has been waited for
        times.append(time.perf_counter())
        losses.append(loss)

    run(model, TARGETS["full" if case.method == "full" else "q,v"], batches, mark, dtype=case.dtype)
    reserved = (
        torch.cuda.max_memory_reserved() if DEVICE.type == "cuda" else None
    )  # what the driver shows, but for CUDA
    seconds = [after - before for before, after in pairwise(times[1:])]
    return {"seconds": seconds, "losses": losses, "reserved": reserved, **peaks(DEVICE, counted)}


def compared(case: Case, scratch: Path, n_steps: int, rounds: int) -> dict[str, Any]:
    """All contenders on one case, in turn."""
    source, batches, found = source_of(case.model, scratch), case.batches(n_steps), contenders(case)
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
    for name, run in [*found.items()] * rounds:
        if not isinstance(found[name], str):
            try:
                blocks[name].append(block(source, case, run, batches))
            except Exception as error:  # out of memory, or a version that does not go along: the others are measured
                found[name] = f"{type(error).__name__}: {str(error)[:300]}"
    link = Link(settings=settings_of(case.method), knot=None, first_step=0, learning_rates=(RATE,), seed=SEED)
    lengths = [(row.n_tokens, len(row.answers[0])) for row in batches[0]]
    flops = Meter(source.skeleton(), lengths, False).steps(link, [range(len(lengths))], SEED)[0].flops
    numbers = {
        name: {"absent": why} if isinstance(why, str) else rates(case, flops, blocks[name])
        for name, why in found.items()
    }
    losses = [one["losses"] for runs in blocks.values() for one in runs]
    apart = max(max(step) - min(step) for step in zip(*losses, strict=True)) if losses else None
    return {"flops_a_step": flops, "largest_difference_of_losses": apart, "contenders": numbers}


def rates(case: Case, flops: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a contender's blocks come to."""
    median = statistics.median(second for one in runs for second in one["seconds"])
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    most = next((rate[case.dtype == "float32"] for name, rate in PEAKS.items() if name in card), None)
    return {
        "tokens_per_second": case.rows * case.tokens / median,
        "share_of_peak": flops / median / most if most else None,
        "peak_bytes": max(one["accelerator"] or one["process"] or 0 for one in runs),
        "reserved_bytes": runs[0]["reserved"],
        "seconds": [one["seconds"] for one in runs],
        "losses": runs[0]["losses"],
    }


def measured(cases: list[Case], scratch: Path, until: float, tiny: bool) -> Iterator[dict[str, Any]]:
    """All cases, told after each; none is begun that may have no time left."""
    found, longest = {}, 0.0
    for case in cases:
        began = time.monotonic()
        found[case.name] = {"left_out": "no time was left"}
        if began + longest < until:
            rounds = 1 if tiny or case.model == "Qwen1.5-7B" else 2
            found[case.name] = compared(case, scratch, 4 if tiny else 17, rounds)
            longest = max(longest, time.monotonic() - began)
        yield found


def tested(scratch: Path, until: float, tiny: bool) -> Iterator[dict[str, Any]]:
    """The tests that are marked `gpu`; on a CPU, that they are skipped."""
    report = scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command.append("tests/link/test_devices.py")
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=HERE.parent, timeout=max(1.0, until - time.monotonic()))
    cases = [*ElementTree.parse(report).iter("testcase")] if report.is_file() else []
    found: dict[str, Any] = {"tests": len(cases)}
    for kind in ("failure", "error", "skipped"):
        found[kind] = [case.get("name") for case in cases if case.find(kind) is not None]
    said = [(case.get("name"), one.get("name"), one.get("value")) for case in cases for one in case.iter("property")]
    yield found | {"said": said}


RECIPE = """
name: arms
model: {{name_or_path: {folder}, dtype: {dtype}}}
data:
  files: {rows}
  rows: {{train: {n}, validation: 8, test: 8}}
  task: answer
  prompt: "{{question}}="
  answer: "{{answer}}"
training: {{epochs: 2, batch_size: 8, learning_rate: 1e-4}}
arms: {{lora: {{links: 1}}, chain3: {{links: 3}}}}
evaluation: {{general_text: off}}
seeds: [0, 1]
tracking: {{wandb: off}}
output: {scratch}
"""


def shared(scratch: Path, until: float, tiny: bool) -> Iterator[dict[str, Any]]:
    """Wall clock of one process, and of two that share the work of one command, on one card."""
    model, rows = source_of("tiny" if tiny else "SmolLM2-135M", scratch), scratch / "rows.jsonl"
    sums = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(40) for b in range(40)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in sums))
    settings = {"folder": model.folder, "rows": rows, "n": 16 if tiny else 800, "scratch": scratch}
    (recipe := scratch / "arms.yaml").write_text(RECIPE.format(**settings, dtype="float32" if tiny else "bfloat16"))
    seconds: dict[str, float] = {}
    for n in (1, 2):
        command = [sys.executable, "-m", "cola", "run", str(recipe), f"store={scratch / f'store-{n}'}"]
        log, began = (scratch / f"log-{n}").open("w"), time.monotonic()
        together = [subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) for _ in range(n)]
        try:
            codes = [process.wait(timeout=max(1.0, until - time.monotonic())) for process in together]
        except subprocess.TimeoutExpired:
            for process in together:
                process.kill()
            codes = [1]
        if any(codes):
            yield {"failed": (scratch / f"log-{n}").read_text()[-500:] or "no time was left"}
            return
        seconds[f"{n} process{'es' if n > 1 else ''}"] = time.monotonic() - began
    yield {"seconds": seconds, "trainings": 4}


PARTS = {"tests": tested, "steps": partial(measured, STEPS), "memory": partial(measured, MEMORY), "arms": shared}
TINY_PARTS = PARTS | {"steps": partial(measured, TINY), "memory": partial(measured, TINY_CODES)}


def main(parts: list[str], seconds: float, tiny: bool) -> None:
    """Measure part by part, writing each as it goes."""
    if DEVICE.type == "cpu" and not tiny:
        sys.exit("torch finds no NVIDIA GPU here; --tiny tries the code on a CPU")
    quiet_libraries()
    until, last = time.monotonic() + seconds, HERE / "results" / "gpu.json"
    file = Path(os.environ.get("OUT", last.parent)) / ("gpu_tiny.json" if tiny else "gpu.json")
    known = next((path for path in (file, last) if path.is_file() and not tiny), None)
    record: dict[str, Any] = json.loads(known.read_text()) if known else {"others": OTHERS}
    card = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if DEVICE.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            for found in (TINY_PARTS if tiny else PARTS)[part](Path(scratch), until, tiny):
                record[part] = {"made": made() | {"device": card}, "found": found}
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(record, indent=1) + "\n")
            print(part, json.dumps(record[part]["found"])[:6000], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them where none is named")
    parser.add_argument("--seconds", type=float, default=500, help="after which nothing is begun")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    asked = parser.parse_args()
    if wrong := set(asked.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(wrong))}; there are {', '.join(PARTS)}")
    main(asked.parts or list(PARTS), asked.seconds, asked.tiny)

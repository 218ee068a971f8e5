"""A training step of cola against Trainer + PEFT, TRL's SFTTrainer and a loop by hand, and against its matrix products.

    python benchmarks/step.py [--only WORKLOAD] [--rounds 3]

A round is a block of steps by each contender in turn, each from the base anew, with the same draw, batches and rate,
so that the losses of all steps have to agree; the first step of a block, in which memory is taken, is not counted. Rows
are random tokens of stated lengths, so that no data set is needed; the model is the quickstart's, or a random one of
Qwen1.5-0.5B's shape. Writes benchmarks/results/step.json; with `--only`, for a look at a part, nothing.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import Accelerator
from machine import TOLERANCE, made
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cola.data.batches import training_batches
from cola.data.encode import Example
from cola.link import adapters
from cola.link.accelerator import make_accelerator, quiet_libraries
from cola.link.find import find_model
from cola.link.train import tune
from cola.measure.memory import peaks, restart_peaks
from cola.recipe.methods import Full, Lora
from cola.recipe.plan import Link
from cola.recipe.read import read_recipe

HERE = Path(__file__).parent
SEED, RATE, CPU = 7, 1e-4, torch.device("cpu")
TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear", "full": None}  # None: all weights are trained


@dataclass(frozen=True)
class Workload:
    """Rows of a step, by their shortest and longest lengths in tokens, and how many steps of a block are counted."""

    rows: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    steps: int
    qwen: bool = False  # on the random model of Qwen1.5-0.5B's shape

    def batches(self) -> list[list[Example]]:
        """The rows of each step, one that is not counted before the others: random tokens, the longest row first."""
        draw = random.Random(SEED)

        def row(name: str) -> Example:
            prompt, answer = (
                [draw.randrange(40_000) for _ in range(draw.randint(*n))] for n in (self.prompt, self.answer)
            )
            return Example(name, prompt, [answer], 0, [""], None)

        steps = [[row(f"{step}.{i}") for i in range(self.rows)] for step in range(1 + self.steps)]
        return [sorted(rows, key=lambda e: e.n_tokens, reverse=True) for rows in steps]


WORKLOADS = {
    "long": Workload(4, (100, 160), (2, 2), steps=1),  # BoolQ: a passage and a question, answered by a word
    "short": Workload(8, (17, 21), (3, 4), steps=5),  # sums
    "instructions": Workload(4, (15, 50), (15, 50), steps=2),
    "vocabulary": Workload(2, (30, 60), (10, 20), steps=1, qwen=True),  # of 151,936 words
}

Batches = list[list[Example]]
Mark = Callable[[float], None]  # told a step's loss as it ends
Contender = Callable[..., None]  # trains a model, given target modules or None, batches, a mark, and perhaps `dtype`


def by_cola(model: Any, targets: Any, batches: Batches, mark: Mark, dtype: str = "float32") -> None:
    settings = Full() if targets is None else Lora(rank=8, alpha=16, target_modules=targets)
    link = Link(settings=settings, knot=None, first_step=0, learning_rates=(RATE,) * len(batches), seed=SEED)
    tune_link(adapters.attach(model, settings, SEED), link, batches, mark, make_accelerator(dtype))


def tune_link(model: Any, link: Link, batches: Batches, mark: Mark, accelerator: Accelerator) -> None:
    """cola's own steps of a link that is attached."""
    size, rows = len(batches[0]), [row for batch in batches for row in batch]
    micro_batches = training_batches(rows, [range(i, i + size) for i in range(0, len(rows), size)], 4096)
    tune(
        model,
        link,
        micro_batches,
        accelerator,
        lambda step, _: mark(step.loss),
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )


def with_pair(model: Any, targets: Any) -> Any:
    """The model with PEFT's pair, drawn as cola draws it; as it is where all weights are trained."""
    if targets is None:
        return model
    torch.manual_seed(SEED)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))


def labelled(rows: list[Example]) -> list[dict[str, list[int]]]:
    """Rows as other libraries read them."""
    texts = [(e.prompt, e.answers[0]) for e in rows]
    return [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in texts]


class Marks(TrainerCallback):
    """Tells of each step's loss as Trainer logs it."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.mark(logs["loss"])


def by_trainer(
    model: Any,
    targets: Any,
    batches: Batches,
    mark: Mark,
    dtype: str = "float32",
    kinds: tuple[Any, Any] = (Trainer, TrainingArguments),
    **trl: Any,
) -> None:
    """No checkpointing, which TRL turns on by itself and which is slower."""
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    kind, arguments = kinds
    args = arguments(
        output_dir=f"{tempfile.gettempdir()}/step",
        per_device_train_batch_size=len(batches[0]),
        max_steps=len(batches),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        gradient_checkpointing=False,
        **trl,
    )
    data: Any = labelled([row for batch in batches for row in batch])
    if trl:
        from datasets import Dataset

        data = Dataset.from_list(data)
    collate = None if trl else DataCollatorForSeq2Seq(tokenizer, padding=True)
    more: dict[str, Any] = {"processing_class": tokenizer, "data_collator": collate, "callbacks": [Marks(mark)]}
    trainer = kind(with_pair(model, targets), args, train_dataset=data, **more)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def by_trl(model: Any, targets: Any, batches: Batches, mark: Mark, dtype: str = "float32") -> None:
    """On a GPU with Liger's kernels."""
    from trl import SFTConfig, SFTTrainer  # not on every machine with a GPU

    settings: dict[str, Any] = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    settings["use_liger_kernel"] = torch.cuda.is_available()
    by_trainer(model, targets, batches, mark, dtype, (SFTTrainer, SFTConfig), **settings)


def by_hand(model: Any, targets: Any, batches: Batches, mark: Mark) -> None:
    """As fast as one writes it: no mask, the head only where an answer is, the fused optimizer."""
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model.config.name_or_path), padding=True)
    with_pair(model, targets).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    for rows in batches:
        padded = collate(labelled(rows))
        labels = padded["labels"][:, 1:]
        hidden = model.get_decoder()(input_ids=padded["input_ids"], use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, :-1][labels != -100])
        loss = cross_entropy(logits, labels[labels != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        mark(loss.item())


@torch.no_grad()
def products(model: Any, targets: Any, batches: Batches, mark: Mark) -> None:
    """The limit: with each weight the product forward and that for its input's gradient (4NT in all), with one that is
    trained the product for its own gradient too (6NT; the pair's). The memory of the results is there already."""
    model = with_pair(model, targets)
    head, embeddings = (part.weight for part in (model.get_output_embeddings(), model.get_input_embeddings()))
    weights = [p for p in model.parameters() if p.ndim == 2 and p is not embeddings and p is not head] + [head]
    positions = [(len(rows) * rows[0].n_tokens, sum(len(e.answers[0]) for e in rows)) for rows in batches]
    most = max(n * max(W.shape) for ns in positions for W in weights for n in [ns[W is head]])
    given, result = torch.randn(most), torch.empty(most)
    gradient = torch.empty(max(W.numel() for W in weights if W.requires_grad))
    for ns in positions:
        for W_OI in weights:
            n, (n_out, n_in) = ns[W_OI is head], W_OI.shape
            x_NI, grad_NO = given[: n * n_in].view(n, n_in), given[: n * n_out].view(n, n_out)
            torch.mm(x_NI, W_OI.T, out=result[: n * n_out].view(n, n_out))
            torch.mm(grad_NO, W_OI, out=result[: n * n_in].view(n, n_in))
            if W_OI.requires_grad:
                torch.mm(grad_NO.T, x_NI, out=gradient[: W_OI.numel()].view_as(W_OI))
        mark(0.0)


CONTENDERS: dict[str, Contender] = {
    "cola": by_cola,
    "Trainer + PEFT": by_trainer,
    "TRL": by_trl,
    "by hand": by_hand,
    "products": products,
}


def block(folder: Path, run: Contender, targets: Any, batches: Batches) -> dict[str, Any]:
    """Seconds of each step but the first, losses, and peak memory, of one contender from the base."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the block before has left would count
    counted, model = restart_peaks(CPU), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    times, losses = [], []

    def mark(loss: float) -> None:
        times.append(time.perf_counter())
        losses.append(loss)

    run(model, targets, batches, mark)
    seconds = [after - before for before, after in pairwise(times)]
    return {"seconds": seconds, "losses": losses, "peak": peaks(CPU, counted)["process"]}


def compared(folder: Path, targets: Any, workload: Workload, rounds: int) -> dict[str, Any]:
    """All contenders on one workload: medians, and the ratio of each one's time to cola's in the same round."""
    batches, found = workload.batches(), {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, run in CONTENDERS.items():
            found[name].append(block(folder, run, targets, batches))
    losses = [one["losses"] for name, blocks in found.items() if name != "products" for one in blocks]
    contenders = {}
    for name, blocks in found.items():
        pairs = zip(blocks, found["cola"], strict=True)
        contenders[name] = {
            "seconds": (seconds := [s for one in blocks for s in one["seconds"]]),
            "median": statistics.median(seconds),
            "ratio": statistics.median(sum(one["seconds"]) / sum(ours["seconds"]) for one, ours in pairs),
            "peak_bytes": None if blocks[0]["peak"] is None else max(one["peak"] for one in blocks),
        }
    return {
        "tokens": statistics.mean(len(rows) * rows[0].n_tokens for rows in batches[1:]),
        "largest difference of losses": max(max(step) - min(step) for step in zip(*losses, strict=True)),
        "contenders": contenders,
    }


def qwen_shaped(folder: Path, tokenizer: Any) -> Path:
    """A random model of Qwen1.5-0.5B's shape, in a folder; the tokenizer is for padding."""
    size: dict[str, int] = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 2816}
    size |= {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(Qwen2Config(**size, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(only: list[str], rounds: int) -> None:
    """Measure, compare, write."""
    quiet_libraries()
    source = find_model(read_recipe(HERE.parent / "recipes/quickstart.yaml", []).model)
    workloads: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in only or WORKLOADS:
            workload = WORKLOADS[name]
            folder = qwen_shaped(Path(scratch), source.tokenizer()) if workload.qwen else source.folder
            workloads[name] = {place: compared(folder, targets, workload, rounds) for place, targets in TARGETS.items()}
            for place, found in workloads[name].items():
                medians = {who: round(numbers["median"], 3) for who, numbers in found["contenders"].items()}
                print(name, place, medians, f"losses within {found['largest difference of losses']:.1e}", flush=True)
    if not only:
        record = {"made": made(), "trl": version("trl"), "rounds": rounds, "workloads": workloads}
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "step.json").write_text(json.dumps(record, indent=1) + "\n")
    if any(one["largest difference of losses"] > TOLERANCE for w in workloads.values() for one in w.values()):
        sys.exit("the contenders do not agree")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=WORKLOADS, default=[])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    main(asked.only, asked.rounds)

"""Scoring by cola against batched `generate` and lm-evaluation-harness, on the same model and rows, results held equal.

    python benchmarks/evaluate.py [--rounds 7]

Answers: 200 sums of the quickstart, by the untouched model (all wrong) and after a short LoRA (about half right): loss
and greedy text by cola; greedy text alone by one batched `generate`, rows of like length together; loss and text as
benchmarks/by_hand.py takes them. Choices: sums of two to six terms with four answers of one to four tokens each, by
cola and by lm-eval's HFLM. Each contender once a round, in turn. Writes benchmarks/results/evaluate.json.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from by_hand import EVAL_BATCH, encoded, score
from lm_eval.models.huggingface import HFLM
from machine import made
from peft import LoraConfig, get_peft_model
from rich.console import Console
from study import as_text

from cola.data.encode import Example
from cola.measure.evaluate import Evaluator
from cola.recipe.read import read_recipe
from cola.report.terminal import Terminal
from cola.run.materials import gather

HERE = Path(__file__).parent
LORA_STEPS = 40


def trained(model: Any, examples: list[Example]) -> Any:
    """The model after a short LoRA, merged."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(LORA_STEPS):
        rows = sorted(examples, key=lambda e: e.n_tokens)[8 * step % len(examples) :][:8]
        width = max(e.n_tokens for e in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for b, e in enumerate(rows):
            ids[b, : e.n_tokens] = torch.tensor([*e.prompt, *e.answers[0]])
            labels[b, len(e.prompt) : e.n_tokens] = torch.tensor(e.answers[0])
        model(input_ids=ids, labels=labels).loss.backward()
        adamw.step()
        adamw.zero_grad()
    return model.merge_and_unload().eval()


@torch.inference_mode()
def generated(model: Any, tokenizer: Any, rows: list[dict[str, Any]], longest: int) -> dict[str, str]:
    """The greedy answer to each prompt, by `generate`."""
    texts = {}
    rows = sorted(rows, key=lambda row: len(row["prompt"]), reverse=True)
    for start in range(0, len(rows), EVAL_BATCH):
        group = rows[start : start + EVAL_BATCH]
        prompts = tokenizer.pad({"input_ids": [r["prompt"] for r in group]}, padding_side="left", return_tensors="pt")
        tokens = model.generate(**prompts, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        said = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        texts |= {row["id"]: text.split("\n")[0] for row, text in zip(group, said, strict=True)}
    return texts


def choice_rows(tokenizer: Any, n: int) -> list[Example]:
    """Sums with four answers, one of them right."""
    draw, rows = random.Random(0), []
    for i in range(n):
        terms = [draw.randint(1, 10 ** draw.randint(1, 4)) for _ in range(draw.randint(2, 6))]
        prompt = f"State the final answer to the following arithmetic problem: {' + '.join(map(str, terms))} ="
        answers = [sum(terms) + shift for shift in (0, 1, -draw.randint(2, 9), draw.randint(10, 99))]
        ids = tokenizer(prompt).input_ids
        choices = [tokenizer(f"{prompt} {answer}").input_ids[len(ids) :] for answer in answers]
        rows.append(Example(f"c{i}", ids, choices, 0, [str(a) for a in answers], None))
    return rows


def lm_eval_nats(harness: HFLM, rows: list[Example]) -> list[float]:
    """-log p of each choice, row by row."""
    asked = [(("", ""), e.prompt, answer) for e in rows for answer in e.answers]
    return [-nats for nats, _ in harness._loglikelihood_tokens(asked, disable_tqdm=True)]


def rounds_of(contenders: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What each gave, and the seconds of each round, in turn; a first round is not counted."""
    given, seconds = {}, {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            given[name] = run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return given, seconds


def told(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the ratio of each contender's time to cola's in the same round."""
    ours = seconds["cola"]
    return {
        name: {
            "seconds": times,
            "median": statistics.median(times),
            "ratio": statistics.median(t / o for t, o in zip(times, ours, strict=True)),
        }
        for name, times in seconds.items()
    }


def main(rounds: int) -> None:
    """Measure, compare, write."""
    recipe = read_recipe(HERE.parent / "recipes/quickstart.yaml", [])
    with contextlib.redirect_stdout(None):
        materials = gather(recipe, Terminal(Console(quiet=True)))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluator, tokenizer = materials.evaluator, materials.evaluator.tokenizer
    tests = materials.splits.test
    rows = [{**encoded(tokenizer, as_text(tokenizer, example)), "id": example.id} for example in tests]
    record: dict[str, Any] = {"made": made(), "rounds": rounds}
    model = materials.source.load("float32", materials.device)
    for name in ("untouched", "trained"):
        if name == "trained":
            model = trained(model, materials.splits.train)
        contenders = {
            "cola": partial(evaluator, model, tests),
            "generate": partial(generated, model, tokenizer, rows, evaluator.new_tokens),
            "loss and generate": partial(score, model, tokenizer, rows, decode=True),
        }
        given, seconds = rounds_of(contenders, rounds)
        differing = [s.id for s in given["cola"] if s.prediction.strip() != given["generate"][s.id].strip()]
        right = sum(s.score for s in given["cola"]) / len(tests)
        loss = sum(s.nats for s in given["cola"]) / sum(s.tokens for s in given["cola"])
        assert abs(loss - given["loss and generate"]["loss"]) < 1e-4
        record[f"answers, {name} model"] = {"rows": len(tests), "right": right, "differing texts": len(differing)}
        record[f"answers, {name} model"] |= told(seconds)
    choices = choice_rows(tokenizer, 100)
    chooser = Evaluator("multiple_choice", tokenizer, [], evaluator.batch_tokens, evaluator.autocast, 8)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=EVAL_BATCH)
    given, seconds = rounds_of(
        {"cola": lambda: chooser(model, choices), "lm-eval": lambda: lm_eval_nats(harness, choices)}, rounds
    )
    theirs = given["lm-eval"][::4]
    apart = max(abs(ours.nats - nats) for ours, nats in zip(given["cola"], theirs, strict=True))
    record["choices"] = {"rows": len(choices), "largest difference of nats": apart} | told(seconds)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "evaluate.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({task: summary(numbers) for task, numbers in record.items() if task != "made"}, indent=1))


def summary(numbers: Any) -> Any:
    """A task's numbers without the seconds of each round."""
    if not isinstance(numbers, dict):
        return numbers
    return {
        k: {n: round(x, 3) for n, x in v.items() if n != "seconds"} if isinstance(v, dict) else v
        for k, v in numbers.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)

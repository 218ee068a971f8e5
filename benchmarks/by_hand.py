"""The study as a researcher would write it today: transformers' Trainer, PEFT and `generate`, from their documentation.

    python benchmarks/by_hand.py study.json OUT.json

benchmarks/study.py writes study.json, runs this and cola in turn, and holds the two against each other. Nothing here
uses cola. What it is told is what a fair comparison has to share: the rows of each step, the learning rate of each step
and the seed of each draw. Batches come sorted by length, rows are padded to the batch's longest, optimizers are fused,
answers are decoded by one batched `generate` for rows of like length.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

EVAL_BATCH = 64
SPENT = {"steps": 0.0, "scoring": 0.0, "knots": 0.0}  # seconds


def main(study: dict[str, Any]) -> dict[str, Any]:
    """Every arm: the trials of its learning rate, then each seed at the best one."""
    tokenizer = AutoTokenizer.from_pretrained(study["model"])
    splits = {name: [encoded(tokenizer, row) for row in rows] for name, rows in study["rows"].items()}
    results: dict[str, Any] = {}
    for arm in study["arms"]:
        best = arm["rates"][0]
        if len(arm["rates"]) > 1:
            losses = [train_and_score(study, tokenizer, splits, arm, rate, trial=True) for rate in arm["rates"]]
            best = min(zip(losses, arm["rates"], strict=True), key=lambda pair: pair[0]["validation"]["loss"])[1]
        for seed in map(str, study["seeds"]):
            key = f"{arm['name']} {seed}"
            results[key] = train_and_score(study, tokenizer, splits, {**arm, "seed": seed}, best, trial=False)
            results[key]["learning_rate"] = best["learning_rate"]
    return results


def encoded(tokenizer: Any, row: dict[str, str]) -> dict[str, Any]:
    if "text" in row:
        tokens = tokenizer(row["text"]).input_ids
        return {"input_ids": tokens, "labels": tokens}
    prompt, answer = tokenizer(row["prompt"]).input_ids, tokenizer(row["answer"]).input_ids
    answer = [*answer, tokenizer.eos_token_id]
    return {
        "input_ids": prompt + answer,
        "labels": [-100] * len(prompt) + answer,
        "prompt": prompt,
        "answer": row["answer"],
    }


def train_and_score(
    study: dict[str, Any],
    tokenizer: Any,
    splits: dict[str, list],
    arm: dict[str, Any],
    rate: dict[str, Any],
    trial: bool,
) -> dict[str, Any]:
    """Train one arm from the base; returns loss and exact match of each split, and the training loss of each step."""
    model = AutoModelForCausalLM.from_pretrained(study["model"], dtype=torch.float32)
    seed, losses = arm["seed"], []
    order = study["order"][seed]

    def look(model: Any) -> None:
        score(model, tokenizer, splits["validation"], decode=True)

    first = 0
    for link_seed, rates in zip(arm["link_seeds"].get(seed, ()), rate["steps"], strict=False):
        torch.manual_seed(link_seed)
        if arm["method"] == "lora":
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **study["lora"]))
        rows = [splits["train"][i] for step in order[first : first + len(rates)] for i in step]
        started, scored = time.perf_counter(), SPENT["scoring"]
        losses += fit(study, tokenizer, model, rows, rates, looks=[step - first for step in study["looks"]], look=look)
        SPENT["steps"] += time.perf_counter() - started - (SPENT["scoring"] - scored)
        first += len(rates)
        if arm["method"] == "lora":
            started = time.perf_counter()
            model = model.merge_and_unload()  # a chain's next pair adapts the merged weights
            SPENT["knots"] += time.perf_counter() - started
    wanted = ["validation"] if trial else list(splits)
    scores = {name: score(model, tokenizer, splits[name], decode=name != "general") for name in wanted}
    return {**scores, "losses": losses}


def fit(
    study: dict[str, Any],
    tokenizer: Any,
    model: Any,
    rows: list[dict[str, Any]],
    rates: list[float],
    looks: list[int],
    look: Callable[[Any], None],
) -> list[float]:
    """The steps of one link by Trainer; returns their losses."""

    class Looks(TrainerCallback):
        """Scores validation after each epoch, as `eval_strategy` does, with exact match as well."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step in looks:
                look(model)
                model.train()

    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: rates[min(step, len(rates) - 1)])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="by_hand",
            per_device_train_batch_size=study["batch_size"],
            max_steps=len(rates),
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=[{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        optimizers=(adamw, schedule),
        callbacks=[Looks()],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.inference_mode()
def score(model: Any, tokenizer: Any, rows: list[dict[str, Any]], decode: bool) -> dict[str, float | None]:
    """Loss per target token and, by greedy decoding, exact match."""
    started = time.perf_counter()
    scores = scores_of(model.eval(), tokenizer, rows, decode)
    SPENT["scoring"] += time.perf_counter() - started
    return scores


def scores_of(model: Any, tokenizer: Any, rows: list[dict[str, Any]], decode: bool) -> dict[str, float | None]:
    collate, nats, targets, hits = DataCollatorForSeq2Seq(tokenizer, padding=True), 0.0, 0, 0
    rows = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    for start in range(0, len(rows), batch := EVAL_BATCH if decode else 4):
        group = rows[start : start + batch]
        padded = collate([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in group]).to(model.device)
        labels = padded.pop("labels")[:, 1:]
        logits = model(**padded).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        nats, targets = nats + loss.item(), targets + int((labels != -100).sum())
    if not decode:
        return {"loss": nats / targets, "score": None}
    longest = max(len(row["input_ids"]) - len(row["prompt"]) for row in rows) + 4
    for start in range(0, len(rows), EVAL_BATCH):
        group = rows[start : start + EVAL_BATCH]
        prompts = tokenizer.pad(
            {"input_ids": [row["prompt"] for row in group]}, padding_side="left", return_tensors="pt"
        )
        tokens = model.generate(
            **prompts.to(model.device), max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        hits += sum(said(text) == row["answer"].strip() for text, row in zip(texts, group, strict=True))
    return {"loss": nats / targets, "score": hits / len(rows)}


def said(text: str) -> str:
    """The answer: the first line."""
    return " ".join(text.split("\n")[0].split())


if __name__ == "__main__":
    started = time.perf_counter()
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record = {"seconds": time.perf_counter() - started, "peak_bytes": peak, "spent": SPENT, "results": found}
    assert all(math.isfinite(result["test"]["loss"]) for result in found.values())
    Path(sys.argv[2]).write_text(json.dumps(record))

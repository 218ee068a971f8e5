"""Summaries for the tests of the page: the committed quickstart as FORMAT 3 has it, and one of many arms and seeds."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from cola.compare.records import Contrast, Summary
from cola.tree.records import MetricRow
from cola.tree.run_folder import FORMAT, RunFolder

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "experiments/000-quickstart"
EVIL = "<script>alert(1)</script><img src=http://example.org/x.png onerror=alert(2)>&amp;"
SPLITS = ("train", "validation", "test")


def made() -> dict[str, Any]:
    """With what a state was made."""
    return {
        "cola": "1",
        "commit": {"hash": "a" * 40, "dirty": False, "changed": []},
        "python": "3.11",
        "packages": {"torch": "2.13", "wandb": "0.1"},
        "machine": {"cpu": "x", "cores": 2},
        "device": "cpu",
    }


def provenance(rows: dict[str, int]) -> dict[str, Any]:
    """What provenance.json holds."""
    return {
        "format": FORMAT,
        "started": "2026-11-01T12:00:00+00:00",
        **made(),
        "recipe": {"sha256": "r"},
        "model": {"name": "some/model", "revision": None, "sha256": "m"},
        "data": {"sha256": "d", "notes": []},
        "rows": rows,
        "general_text": {"name": None, "sha256": "g", "passages": 0, "longest": 0},
    }


def result(arm: str, seed: int, evaluation: dict[str, Any], **info: Any) -> dict[str, Any]:
    """What result.json holds of an arm that came to its end.

    Args:
        arm: Its name.
        seed: Under which it ran.
        evaluation: What was measured.
        info: Of `train_info`, what is not as below.
    """
    return {
        "format": FORMAT,
        "status": "ok",
        "run_info": {"arm": arm, "seed": seed, "choice": [], "trial": False, "seconds": 1.0, "error": None},
        "train_info": {
            "learning_rate": 2e-4,
            "choice": {},
            "at_grid_edge": [],
            "base": {"dtype": "float32", "quantization": None},
            "rules": {"merge_fraction": 1.0},
            "checkpoint": "last",
            "scored_step": 10,
            "looked_loss": None,
            "steps": 10,
            "reused_steps": 0,
            "segments": [],
            "segments_made": [],
            "final_state": "whatever",
            "scored_state": "whatever",
            "tokens": 1000,
            "flops": 1e9,
            "positions": 1000,
            "without_gradient": 0,
            "num_trainable_params": 64,
            "num_total_params": 1000,
            "train_seconds": 1.0,
            "total_seconds": 2.0,
            "links": [],
            "knots": [],
            "evaluations": [],
            **info,
        },
        "evaluation": evaluation,
        "meta_info": provenance({split: evaluation[split]["n"] for split in SPLITS}),
    }


def knot(link: int, size: float, error: float, cosine: float | None = 0.999) -> dict[str, Any]:
    return {
        "link": link,
        "merge": "exact",
        "fraction": 1.0,
        "cleared": 1.0,
        "relative_size_median": size,
        "relative_size_max": 3 * size,
        "unchanged_median": 0.02,
        "error_max": error,
        "cosine_min": cosine,
        "drift_max_logit_change": error / 3,
        "drift_relative": error / 9,
        "drift_of_learned": error,
        "drift_kl": error**2,
        "drift_loss_change": -error / 10,
    }


def contrast(first: str, second: str, value: float, half: float | None, **more: Any) -> Contrast:
    numbers = {
        "first": first,
        "second": second,
        "role": "secondary",
        "metric": "score",
        "value": value,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
        "p": 0.03125,
        "p_holm": 0.25,
        "p_rows": 0.0625,
        "p_rows_smallest": 0.03125,
        "p_rows_error": None,
        "minimum_detectable": 0.041,
        "n_seeds": 6,
        "n_examples": 200,
        "n_groups": 200,
        "claim": False,
        **more,
    }
    return Contrast.model_validate(numbers)


def spectrum(links: int) -> dict[str, Any]:
    names = [f"link {k}" for k in range(1, links + 1)]
    values = {name: (np.arange(1, 9) ** -(0.6 + 0.2 * k)).tolist() for k, name in enumerate(names)}
    values["chain"] = (np.arange(1, 8 * links + 1) ** -0.7).tolist()
    rows = [
        {
            "what": name,
            "rank": len(values[name]),
            "relative_size": 0.01,
            "effective_rank": 3.21,
            "rank_90": 4.0,
            "stable_rank": 1.7,
            "intruders": 0.3 if name == "chain" else None,
        }
        for name in values
    ]
    matrix = [[1.0 if i == j else 0.5 / (1 + abs(i - j)) for j in range(links)] for i in range(links)]
    with_full = {"labels": list(values), "values": [0.2 + 0.02 * k for k in range(links + 1)], "random": 0.03}
    return {
        "rows": rows,
        "values": values,
        "overlap": {"labels": names, "matrix": matrix, "random": 0.03} if links > 1 else None,
        "with_full": with_full,
    }


def full_spectrum() -> dict[str, Any]:
    row = {"what": "all weights", "rank": None, "relative_size": 0.02, "effective_rank": 41.0, "rank_90": 60.0}
    row |= {"stable_rank": 5.0, "intruders": None}
    return {
        "rows": [row],
        "values": {"all weights": (np.arange(1, 65) ** -0.4).tolist()},
        "overlap": None,
        "with_full": None,
    }


def searched(
    rates: list[float], best: int, rng: np.random.Generator, per: str = "arm", seeds: int = 2
) -> dict[str, Any]:
    """A search of learning rates whose losses are lowest at one of them; the last one failed."""

    def choice(of: int | None) -> dict[str, Any]:
        under = list(range(1000, 1000 + seeds)) if of is None else [of]
        rows: list[dict[str, Any]] = []
        for number, rate in enumerate(rates):
            loss = [1.5 + 0.1 * (number - best) ** 2 + float(rng.normal(0, 0.05)) for _ in under]
            each = [{"seed": s, "loss": one, "score": 1.1 - one / 3} for s, one in zip(under, loss, strict=True)]
            mean, share = float(np.mean(loss)), (0.54 if number == best else 0.46 / (len(rates) - 2))
            row = {"values": {"learning_rate": rate}, "loss": mean, "score": 1.1 - mean / 3, "failed": False}
            rows.append({**row, "each": each, "share": share})
        rows[-1] |= {"loss": None, "score": None, "failed": True, "each": [], "share": None}
        chosen = min(range(len(rates) - 1), key=lambda n: rows[n]["loss"])
        return {"seed": of, "chosen": chosen, "seeds": under, "trials": rows}

    choices = [choice(None)] if per == "arm" else [choice(seed) for seed in range(6)]
    return {"per": per, "select_by": "loss", "choices": choices}


def over_seeds(values: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def quickstart() -> Summary:
    """The committed run with what FORMAT 3 adds to it."""
    summary = json.loads((QUICKSTART / "summary.json").read_text())
    for arm in summary["arms"].values():
        keys = [f"{split}_{kind}" for split in SPLITS for kind in ("loss", "score")]
        numbers = {key: arm[key]["mean"] for key in (*keys, "gap_loss", "gap_acc")}
        arm["seeds"] = [{"seed": 0, **numbers, "forgetting": None}]
        arm |= {"peak_memory": 2.31e9, "forgetting": None, "knots": arm.get("knots") or []}
    summary["arms"]["lora"]["knots"] = [knot(1, 0.0123, 3e-8)]
    summary["arms"]["chain3"]["knots"] = [knot(k, 0.009 / k, 4e-8 * k) for k in (1, 2, 3)]
    summary.pop("primary", None)
    summary["unpaired"] = []
    one = {"p": 0.02, "p_holm": None, "p_rows": None, "p_rows_smallest": None, "n_seeds": 1, "minimum_detectable": 0.09}
    summary["contrasts"] = [
        contrast("chain3", "lora", 0.025, 0.033, role="primary", **one),
        contrast("lora", "full", -0.015, 0.05, role="later", **one),
        contrast("chain3", "full", 0.01, 0.05, role="later", **one),
        contrast("base", "full", -0.45, 0.07, role="later", **one),
    ]
    summary["trials"] = {"lora": searched([1e-4, 3e-4, 1e-3, 3e-3, 1e-2], 2, np.random.default_rng(2))}
    summary["spectra"] = {"lora": spectrum(1), "chain3": spectrum(3), "full": full_spectrum()}
    return Summary.model_validate(summary)


def many(arms: int = 30, seeds: int = 6) -> Summary:
    """Arms with long names, foreign text wherever a summary takes any, seeds that failed, an arm without numbers."""
    rng = np.random.default_rng(0)
    summary = quickstart().content()
    names = ["base", "lora", "full", *[f"chain-of-{k % 6 + 2}-links_with.rank{k}-and-more" for k in range(arms - 4)]]
    names.append("interrupted-arm")
    summary |= {"seeds": list(range(seeds)), "interrupted": True, "arms": {}, "spectra": {}, "trials": {}}
    summary["meta"]["model"]["name"] = EVIL
    summary["notes"] = [f"data {EVIL}: 2 rows left out"]
    summary["same_outputs"] = [(names[3], names[4], 0)]
    for number, name in enumerate(names):
        links = (
            0
            if name == "base"
            else 1
            if name in ("lora", "full")
            else int(name.split("-")[2])
            if "chain" in name
            else 1
        )
        states = {str(seed): "ok" for seed in range(seeds)}
        arm: dict[str, Any] = {"links": links, "states": states, "errors": {}, "n_seeds": seeds}
        summary["arms"][name] = arm
        if name == "interrupted-arm":
            states |= {"0": "interrupted", **{str(seed): "missing" for seed in range(1, seeds)}}
            arm["n_seeds"] = 0
            continue
        if number == 5:
            states["2"], arm["errors"], arm["n_seeds"] = "failed", {"2": EVIL}, seeds - 1
        score = 0.1 if name == "base" else 0.45 + 0.2 * rng.random()
        rows = []
        for seed in range(arm["n_seeds"]):
            test = float(np.clip(score + rng.normal(0, 0.015), 0, 1))
            train = min(1.0, test + 0.05 + 0.2 * (links > 0) * rng.random())
            row: dict[str, Any] = {
                "seed": seed,
                "train_score": train,
                "validation_score": test + 0.01,
                "test_score": test,
            }
            row |= {f"{s}_loss": 1.4 * (1 - row[f"{s}_score"]) for s in SPLITS}
            row |= {
                "gap_loss": row["test_loss"] - row["train_loss"],
                "gap_acc": train - test,
                "forgetting": 0.05 * links,
            }
            rows.append(row)
        arm["seeds"] = rows
        arm |= {key: over_seeds([row[key] for row in rows]) for key in rows[0] if key != "seed"}
        arm |= {
            "num_trainable_params": 134e6 if name == "full" else 2.4e6 * (links > 0),
            "steps": 90.0,
            "tokens": 15957.0,
            "positions": 15957.0,
            "flops": 0.0 if name == "base" else 1.07e13 if name == "full" else 7.4e12 * (1 + number % 5),
            "train_seconds": 60.0,
            "total_seconds": 27.0 + 9 * number,
            "total_cpu_seconds": 20.0 + 9 * number,
            "scored_step": [90],
            "learning_rate": [6e-4, 3e-4] if number % 7 == 3 else [6e-4],
            "base": {"dtype": "bfloat16" if number % 9 == 8 else "float32", "quantization": None},
            "without_gradient": 0,
            "at_grid_edge": {},
            "max_drift": 1e-6,
            "max_lost": 0.31 if number == 8 else 1e-6,
            "peak_memory": 1.2e9 + 1e8 * number,
            "knots": [knot(k + 1, 0.02 / (k + 1), 10 ** -float(rng.integers(1, 9))) for k in range(links)],
            "ft_gap": {"value": 0.01, "low": -0.02, "high": 0.04},
            "closed": "undefined" if number % 2 else {"value": 0.4, "low": -0.2, "high": 1.1},
        }
        if name == "full":
            arm["knots"] = []
        if links and name != "full":
            summary["spectra"][name] = spectrum(links)
    summary["spectra"]["full"] = full_spectrum()
    parts = (
        "weights",
        "quantization",
        "pairs",
        "residual",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "allocator",
    )
    expected = {name: {part: int(4e8 * rng.random()) for part in [*parts, "libraries"]} for name in names}
    summary["foreseen"] = {
        "device": "cpu",
        "times": None,
        "arms": {name: {"memory": of, "peak": sum(of.values()), "seconds": None} for name, of in expected.items()},
    }
    searches = [name for name in names if summary["arms"][name]["links"]][:9]
    for number, name in enumerate(searches):
        per = "seed" if number == 2 else "arm"
        summary["trials"][name] = searched([1e-4, 3e-4, 1e-3, 3e-3, 1e-2], number % 4, rng, per)
    search = {"per": "arm", "keys": ["learning_rate"], "seeds": [1000, 1001], "scored": []}
    summary["intervals"] |= {"seeds": seeds, "search": search, "by_validation": True}
    chains = names[3:-1]
    summary["contrasts"] = [contrast(chains[0], "lora", 0.041, 0.03, role="primary", p_holm=None, claim=True)]
    for number, name in enumerate(chains[1:]):
        value = float(rng.normal(0, 0.03))
        claim = number in (3, 4)
        value = (0.08, -0.07)[number - 3] if claim else value
        summary["contrasts"].append(contrast(name, "lora", value, 0.04, claim=claim, p_holm=0.0312 if claim else 0.6))
    for name in ("lora", chains[0]):
        summary["contrasts"].append(contrast(name, "full", -0.02, None, role="later", p_holm=None, p=None))
    summary["matched"]["used"] = [90.0, 90.0]
    return Summary.model_validate(summary)


def curves_of(summary: Summary, steps: int = 90) -> dict[str, dict[int, list[MetricRow]]]:
    """Metric rows as a run of these arms would have left them."""
    rng = np.random.default_rng(1)
    curves = {}
    for number, (name, arm) in enumerate(summary.arms.items()):
        if not arm.links or not arm.n_seeds or arm.validation_loss is None:
            continue
        curves[name] = {}
        for seed in range(arm.n_seeds):
            floor = arm.validation_loss.mean
            rows: list[dict[str, Any]] = []
            for step in range(1, steps + 1):
                link = 1 + (step - 1) * arm.links // steps
                loss = floor + 2 * np.exp(-step / (8 + number % 5))
                about = {"step": step, "link": link, "learning_rate": 1e-3}
                rows.append({"kind": "step", **about, "loss": float(0.9 * loss * rng.uniform(0.7, 1.3))})
                if step % (steps // 10) == 0:
                    rows.append(
                        {"kind": "validation", "step": step, "link": link, "loss": float(loss + rng.normal(0, 0.004))}
                    )
                if step % (steps // arm.links) == 0:
                    rows.append({"kind": "knot", "step": step, "link": link})
            curves[name][seed] = [MetricRow(**row) for row in rows]
    return curves


def write_run(path: Path, summary: Summary) -> RunFolder:
    """A run folder with this summary and curves, as `cola report` reads it."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    folder.write("summary.json", summary)
    if summary.meta is not None:
        folder.write("provenance.json", summary.meta)
    folder.write_text("recipe.yaml", (QUICKSTART / "recipe.yaml").read_text() + f"# {EVIL}\n")
    for arm, seeds in curves_of(summary).items():
        for seed, rows in seeds.items():
            where = Path("arms") / arm / f"seed-{seed}"
            folder.write_text(
                where / "result.json", json.dumps({"status": "interrupted", "run_info": {"arm": arm, "seed": seed}})
            )
            folder.write_jsonl(where / "metrics.jsonl", [row.content() for row in rows])
    return folder

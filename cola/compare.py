"""From results to the numbers of the table. numpy only; the generator is passed in; no torch.

    gap_loss   test loss - train loss, nats per target token
    gap_acc    train score - test score
    ft_gap     score(full) - score(arm), on test
    closed     (score(arm) - score(lora)) / (score(full) - score(lora)), on test; undefined where the interval of
               the denominator contains 0, and no gap where full fine-tuning is the worse one

Arms are paired by seed and example. An interval is a percentile bootstrap over test examples (over groups of
them where the recipe names a group) and, from two seeds on, over seeds as well; with one seed it says nothing
about another seed, and the table says so.

Axes: S seeds, N examples.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola.errors import RunFolderError
from cola.plan import derived_seed
from cola.recipe import SPLITS, Recipe
from cola.record import RunFolder

RESAMPLES = 4000
METRICS = {"multiple_choice": "accuracy", "answer": "exact match", "text": "perplexity"}

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; the interval is None where the data cannot give one."""

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(
    statistic: Callable[..., Any],
    scores: Sequence[Scores],
    groups: Sequence[str | int],
    rng: np.random.Generator,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """A statistic of paired score matrices, with a percentile bootstrap interval.

    Args:
        statistic: Takes the mean score of each matrix and gives a number.
        scores: Matrices (S, N) of the arms, rows and columns paired.
        groups: Group of each of the N examples; examples of one group are drawn together.
        rng: Source of the resamples.
        weights: Weight of each of the N examples in a mean (a text's tokens); None: all alike.
    """
    matrices_SN = np.stack(scores)  # (arms, S, N)
    n_seeds = matrices_SN.shape[1]
    weights_N = np.ones(matrices_SN.shape[2]) if weights is None else np.asarray(weights, dtype=float)
    value = float(statistic(*np.average(matrices_SN.mean(axis=1), axis=1, weights=weights_N)))
    names, member_N = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    sums = np.zeros((*matrices_SN.shape[:2], len(names)))
    for a, s in np.ndindex(*sums.shape[:2]):
        sums[a, s] = np.bincount(member_N, weights=matrices_SN[a, s] * weights_N, minlength=len(names))
    sizes = np.bincount(member_N, weights=weights_N, minlength=len(names))
    drawn_RG = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    seeds_RS = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=RESAMPLES) / n_seeds
    totals_aSR = sums @ drawn_RG.T / (drawn_RG @ sizes)
    draws = np.array([statistic(*means) for means in np.einsum("asr,rs->ra", totals_aSR, seeds_RS)])
    finite = draws[np.isfinite(draws)]
    # Where all resamples agree (one example, or no difference anywhere) the data says nothing about spread.
    if len(finite) < RESAMPLES or np.ptp(finite) <= 1e-9 * max(1.0, abs(value)):
        return Estimate(value, None, None)
    low, high = np.quantile(finite, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def sign_flip_p(first_SN: Scores, second_SN: Scores, weights: Sequence[float], rng: np.random.Generator) -> float:
    """Two-sided sign-flip test over seeds: the share of sign patterns whose mean difference is as far from 0 as the
    one seen. Exact over all 2**S patterns, so it cannot fall below 2 / 2**S (five seeds reach .0625); from 17 seeds on
    over 2**16 patterns drawn at random, the one seen among them."""
    differences_S = np.average(first_SN - second_SN, axis=1, weights=weights)
    n_seeds = len(differences_S)
    if n_seeds <= 16:
        signs_PS = np.array(list(itertools.product((1, -1), repeat=n_seeds)))
    else:
        signs_PS = rng.choice((1, -1), size=(2**16, n_seeds))
        signs_PS[0] = 1
    means_P = np.abs(signs_PS @ differences_S)
    return float(np.mean(means_P >= abs(differences_S.sum()) * (1 - 1e-12)))


def closed_share(full: float, lora: float, arm: float) -> float:
    """The share of full fine-tuning's lead over LoRA that an arm has closed; nan where there is no lead."""
    return (arm - lora) / (full - lora) if full != lora else np.nan


def summarize(recipe: Recipe, folder: RunFolder, rng: np.random.Generator) -> dict[str, Any]:
    """Everything the table and the page show, from the results of a run folder."""
    results = {(r["run_info"]["arm"], r["run_info"]["seed"]): r for r in folder.results()}
    arms = {name: _arm(recipe, name, results) for name in recipe.arms}
    contrasts = _contrasts(recipe, folder, results, rng)
    for name, contrast in contrasts.pop("arms").items():
        arms[name] |= contrast
    meta = folder.provenance()
    trials, damaged = _trials(recipe, folder)
    states = {state for arm in arms.values() for state in arm["states"].values()}
    return {
        "meta": meta,
        "notes": [*(meta["data"]["notes"] if meta else []), *damaged],
        "interrupted": bool(states & {"interrupted", "missing"}),
        "metric": METRICS[recipe.data.task],
        "checkpoint": recipe.evaluation.checkpoint,
        "select_by": recipe.evaluation.select_by,
        "seeds": list(recipe.seeds),
        "matched": _matched(recipe, arms),
        "trials": trials,
        "same_outputs": _same_outputs(recipe, folder, results),
        "rows": next((r["meta_info"]["rows"] for r in results.values() if r["status"] == "ok"), None),
        "arms": arms,
        **contrasts,
    }


def _arm(recipe: Recipe, name: str, results: dict[tuple[str, int], dict]) -> dict[str, Any]:
    mine = [results[name, seed] for seed in recipe.seeds if (name, seed) in results]
    states = {seed: results[name, seed]["status"] if (name, seed) in results else "missing" for seed in recipe.seeds}
    done = [r for r in mine if r["status"] == "ok"]
    summary: dict[str, Any] = {
        "links": recipe.arms[name].n_links,
        "states": states,
        "errors": {r["run_info"]["seed"]: r["run_info"]["error"] for r in mine if r["status"] == "failed"},
        "n_seeds": len(done),
    }
    if not done:
        return summary
    if "links" in recipe.searches_of(name):
        summary["links"] = len(done[0]["train_info"]["links"])
    for split in SPLITS:
        for key in ("loss", "score"):
            summary[f"{split}_{key}"] = _over_seeds([r["evaluation"][split][key] for r in done])
    summary["gap_loss"] = _over_seeds([r["evaluation"]["gap_loss"] for r in done])
    summary["gap_acc"] = _over_seeds([r["evaluation"]["gap_acc"] for r in done])
    general = [r["evaluation"].get("general") or {} for r in done]  # none where the recipe leaves it out
    summary["forgetting"] = _over_seeds([one.get("forgetting") for one in general])
    keys = ("num_trainable_params", "steps", "tokens", "positions", "flops", "train_seconds", "total_seconds")
    for key in keys:
        summary[key] = float(np.mean([r["train_info"][key] for r in done]))
    summary["scored_step"] = [r["train_info"]["scored_step"] for r in done]
    summary["learning_rate"] = [r["train_info"]["learning_rate"] for r in done]
    summary["peak_memory"] = max((peak for r in done if (peak := _peak(r["train_info"])) is not None), default=None)
    summary["base"] = done[0]["train_info"]["base"]
    summary["without_gradient"] = max(r["train_info"]["without_gradient"] for r in done)
    summary["at_grid_edge"] = done[0]["train_info"]["at_grid_edge"]
    summary["knots"] = _ledger(done)
    summary["max_drift"] = max((k["drift_relative"] for r in done for k in r["train_info"]["knots"]), default=None)
    # A knot that lets a part of its pair go moves the outputs on purpose.
    infos = [r["train_info"] for r in done]
    whole = [i for i in infos if i["rules"] and (i["rules"]["merge_fraction"] == 1 or len(i["knots"]) == 1)]
    lost = [k["drift_of_learned"] for i in whole for k in i["knots"]]
    summary["max_lost"] = max((share for share in lost if share is not None), default=None)
    return summary


def _peak(info: dict[str, Any]) -> int | None:
    """Memory that a training took: the GPU's where there is one, else the process's."""
    on_gpu = info.get("accelerator_memory_max")
    return info.get("process_memory_max") if on_gpu is None else on_gpu


def _ledger(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each knot that tied a pair, over seeds: the mean of what was learned, the worst of what was lost."""
    rows = []
    for number in range(max(len(r["train_info"]["knots"]) for r in done)):
        infos = [r["train_info"] for r in done if len(r["train_info"]["knots"]) > number]
        knots = [info["knots"][number] for info in infos if info["knots"][number]["merge"] is not None]
        if not knots:
            continue
        row = {"link": number + 1, "merge": knots[0]["merge"]}
        part = infos[0]["rules"]["merge_fraction"]
        row["fraction"] = 1.0 if number + 1 == len(infos[0]["links"]) else part
        row["cleared"] = float(np.mean([info["links"][number]["cleared"] for info in infos]))
        for key in ("relative_size_median", "unchanged_median"):
            row[key] = float(np.mean([knot[key] for knot in knots]))
        worst = {"relative_size_max": max, "error_max": max, "cosine_min": min, "drift_max_logit_change": max}
        for key, pick in {**worst, "drift_relative": max, "drift_of_learned": max, "drift_kl": max}.items():
            row[key] = pick((knot[key] for knot in knots if knot[key] is not None), default=None)
        row["drift_loss_change"] = max((knot["drift_loss_change"] for knot in knots), key=abs)
        rows.append(row)
    return rows


def _matched(recipe: Recipe, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What all trained arms were given the same of, and how much of it each used, smallest and largest."""
    key = {"steps": "steps", "tokens": "positions", "flops": "flops"}[recipe.training.match]
    used = [arm[key] for name, arm in arms.items() if arm["n_seeds"] and recipe.arms[name].n_links]
    per_link = recipe.training.protocol == "grow"
    return {"by": recipe.training.match, "per_link": per_link, "used": [min(used), max(used)] if used else None}


def _trials(recipe: Recipe, folder: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """What each arm's search tried, and what is wrong with a record that cannot be read, which spoils no other."""
    found, damaged = {}, []
    for name in recipe.arms:
        try:
            found[name] = folder.trials(name)
        except RunFolderError as error:
            damaged.append(str(error))
    return {name: trials for name, trials in found.items() if trials is not None}, damaged


def _same_outputs(
    recipe: Recipe, folder: RunFolder, results: dict[tuple[str, int], dict]
) -> list[tuple[str, str, int]]:
    """Arms whose test losses are the same to the bit under a seed though their weights have other causes: what one of
    them does differently has done nothing."""
    found = []
    for seed in recipe.seeds:
        seen: dict[tuple[float, ...], tuple[str, str]] = {}
        for arm in recipe.arms:
            if results.get((arm, seed), {}).get("status") != "ok":
                continue
            state = results[arm, seed]["train_info"]["scored_state"]
            losses = tuple(row["loss"] for row in folder.scores(arm, seed, "test"))
            other, its_state = seen.setdefault(losses, (arm, state))
            if its_state != state:
                found.append((other, arm, seed))
    return found


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds (None with one seed); None where the task has no such number."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return None
    return {"mean": float(np.mean(numbers)), "sd": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None}


def _contrasts(
    recipe: Recipe, folder: RunFolder, results: dict[tuple[str, int], dict], rng: np.random.Generator
) -> dict[str, Any]:
    ok = {arm: [s for s in recipe.seeds if results.get((arm, s), {}).get("status") == "ok"] for arm in recipe.arms}
    full, lora = recipe.full_arm, recipe.lora_arm
    out: dict[str, Any] = {"arms": {name: {} for name in recipe.arms}, "primary": None}
    base = int(rng.integers(2**32))

    def rng_of(*contrast: str) -> np.random.Generator:
        # Each contrast draws for itself, so that adding an arm changes no other's interval.
        return np.random.default_rng([base, derived_seed(*contrast)])

    for name in recipe.arms:
        if ok.get(full) and ok[name] and name != full:
            pair = _paired(folder, [full, name], ok)
            if pair:
                out["arms"][name]["ft_gap"] = asdict(
                    estimate(lambda f, a: f - a, *pair[:2], rng_of("ft_gap", name), pair[2])
                )
        if ok.get(full) and ok.get(lora) and ok[name] and name not in (full, lora):
            three = _paired(folder, [full, lora, name], ok)
            if three:
                gap = estimate(lambda f, lo, _: f - lo, *three[:2], rng_of("gap", name), three[2])
                closed = estimate(closed_share, *three[:2], rng_of("closed", name), three[2])
                no_gap = gap.excludes_zero and gap.value < 0
                out["arms"][name]["closed"] = (
                    "no gap" if no_gap else asdict(closed) if gap.excludes_zero else "undefined"
                )
    if recipe.comparison.primary:
        first, second = recipe.comparison.primary
        pair = _paired(folder, [first, second], ok) if ok[first] and ok[second] else None
        if pair:
            difference = estimate(lambda a, b: a - b, *pair[:2], rng_of("primary"), pair[2])
            out["primary"] = {
                "arms": [first, second],
                **asdict(difference),
                "excludes_zero": difference.excludes_zero,
                "n_seeds": pair[0][0].shape[0],
                "p_sign_flip": sign_flip_p(pair[0][0], pair[0][1], pair[2], rng_of("sign-flip")),
                "n_examples": pair[0][0].shape[1],
            }
    return out


def _paired(
    folder: RunFolder, arms: Sequence[str], ok: dict[str, list[int]]
) -> tuple[list[Scores], list[str], list[float]] | None:
    """Score matrices of the arms over their common seeds and examples; each example's group and weight.

    A text has no score: there it is minus the loss per token, weighted by tokens, so that an arm's mean is minus its
    loss in the table.
    """
    seeds = [s for s in ok[arms[0]] if all(s in ok[arm] for arm in arms)]
    if not seeds:
        return None
    tables = {(arm, s): {row["id"]: row for row in folder.scores(arm, s, "test")} for arm in arms for s in seeds}
    first = tables[arms[0], seeds[0]]
    ids = list(first)
    for (arm, seed), table in tables.items():
        if table.keys() != first.keys() or not ids:
            raise RunFolderError(
                f"{folder.path}: the test scores of {arm} seed {seed} ({len(table)}) and of {arms[0]} seed {seeds[0]} "
                f"({len(ids)}) are of different examples; delete the damaged seed folder and run `cola run --resume`"
            )
    groups = [first[i]["group"] or i for i in ids]
    scored = first[ids[0]]["score"] is not None
    weights = [1.0 if scored else float(first[i]["tokens"]) for i in ids]

    def value(row: dict[str, Any]) -> float:
        return row["score"] if scored else -row["loss"] / row["tokens"]

    return [np.array([[value(tables[arm, s][i]) for i in ids] for s in seeds]) for arm in arms], groups, weights

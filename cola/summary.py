"""From a run's results to every number that the terminal, the page and W&B show. No torch.

    gap_loss   test loss - train loss, nats per target token
    gap_acc    train score - test score
    ft_gap     score(full) - score(arm), on test
    closed     (score(arm) - score(lora)) / (score(full) - score(lora)), on test; undefined where the interval of
               the denominator contains 0, and no gap where full fine-tuning is the worse one

What the numbers are worth is computed in `cola.compare`; nothing is drawn, so that a contrast has the same digits in
every report that shows it.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cola.choice import Trials
from cola.compare import FEWEST_RUNS, Estimate, Table, closed_share, estimate, holm, sign_flips
from cola.errors import RunFolderError, listed, quoted
from cola.plan import trials_of
from cola.recipe import SPLITS, Recipe
from cola.record import RunFolder, choice_file, damaged_file
from cola.scope import scope_of
from cola.spectra import spectra_of

FEW = 4  # arms that a sentence names
METRICS = {"multiple_choice": "accuracy", "answer": "exact match", "text": "perplexity"}

Results = dict[tuple[str, int], dict[str, Any]]  # by arm and seed
Rows = dict[str, dict[str, Any]]  # scores of one arm, seed and split, by example


def summarize(recipe: Recipe, folder: RunFolder, later: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Everything the table and the page show, from the results of a run folder.

    Args:
        recipe: The resolved recipe.
        folder: The run's.
        later: Contrasts that are asked for now and that the recipe does not name: shown, never claimed.

    Raises:
        RunFolderError: an arm that is asked for is not one of the recipe's.
    """
    for pair in later:
        check_arms(pair, recipe.arms)
    damaged: list[str] = []
    results = {(r["run_info"]["arm"], r["run_info"]["seed"]): r for r in folder.results(damaged)}
    arms = {name: _arm(recipe, name, results) for name in recipe.arms}
    comparer = Comparer(recipe, folder, results, damaged)
    for name in recipe.arms:
        arms[name] |= comparer.against_full(name) | comparer.gaps(name)
    meta = folder.provenance()
    trials = _trials(recipe, folder, damaged)
    done = {name: [seed for seed, state in arm["states"].items() if state == "ok"] for name, arm in arms.items()}
    spectra, unread = spectra_of(folder, done)
    states = {state for arm in arms.values() for state in arm["states"].values()}
    rows = next((r["meta_info"]["rows"] for r in results.values() if r["status"] == "ok"), None)
    return {
        "meta": meta,
        "interrupted": bool(states & {"interrupted", "missing"}),
        "metric": METRICS[recipe.data.task],
        "checkpoint": recipe.evaluation.checkpoint,
        "select_by": recipe.evaluation.select_by,
        "seeds": list(recipe.seeds),
        "matched": _matched(recipe, arms),
        "trials": trials,
        "intervals": scope_of(recipe, rows["train"] if rows else None),
        "same_outputs": _same_outputs(recipe, folder, results, damaged),
        "rows": rows,
        "arms": arms,
        "spectra": spectra,
        "contrasts": comparer.contrasts(later),
        "unpaired": comparer.unpaired,
        "notes": [
            *(meta["data"]["notes"] if meta else []),
            *(meta.get("selfcheck", {}).get("notes", []) if meta else []),
            *made_differently(results),
            *dict.fromkeys([*damaged, *unread]),
        ],
    }


def _arm(recipe: Recipe, name: str, results: Results) -> dict[str, Any]:
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
    summary["seeds"] = [_of_seed(r) for r in done]
    summary["forgetting"] = _over_seeds([_forgetting(r) for r in done])
    keys = ("num_trainable_params", "steps", "tokens", "positions", "flops", "train_seconds", "total_seconds")
    for key in keys:
        summary[key] = float(np.mean([r["train_info"][key] for r in done]))
    summary["scored_step"] = [r["train_info"]["scored_step"] for r in done]
    summary["learning_rate"] = [r["train_info"]["learning_rate"] for r in done]
    summary["peak_memory"] = max((peak for r in done if (peak := _peak(r["train_info"])) is not None), default=None)
    summary["base"] = done[0]["train_info"]["base"]
    summary["without_gradient"] = max(r["train_info"]["without_gradient"] for r in done)
    edges = [(key, r["run_info"]["seed"]) for r in done for key in r["train_info"]["at_grid_edge"]]
    summary["at_grid_edge"] = {key: [seed for one, seed in edges if one == key] for key, _ in edges}
    summary["knots"] = _ledger(done)
    summary["max_drift"] = max((k["drift_relative"] for r in done for k in r["train_info"]["knots"]), default=None)
    # A knot that lets a part of its pair go moves the outputs on purpose.
    infos = [r["train_info"] for r in done]
    whole = [i for i in infos if i["rules"] and (i["rules"]["merge_fraction"] == 1 or len(i["knots"]) == 1)]
    lost = [k["drift_of_learned"] for i in whole for k in i["knots"]]
    summary["max_lost"] = max((share for share in lost if share is not None), default=None)
    return summary


def _of_seed(result: dict[str, Any]) -> dict[str, Any]:
    """One seed's numbers: the dots of a figure."""
    evaluation = result["evaluation"]
    numbers = {f"{split}_{key}": evaluation[split][key] for split in SPLITS for key in ("loss", "score")}
    gaps = {key: evaluation[key] for key in ("gap_loss", "gap_acc")}
    return {"seed": result["run_info"]["seed"], **numbers, **gaps, "forgetting": _forgetting(result)}


def _forgetting(result: dict[str, Any]) -> float | None:
    """None where the recipe leaves the general text out."""
    return (result["evaluation"].get("general") or {}).get("forgetting")


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


def _trials(recipe: Recipe, folder: RunFolder, damaged: list[str]) -> dict[str, Any]:
    """What each arm's search tried and chose; what is wrong with a file that cannot be read is added to `damaged`."""
    found = {}
    for name, search in recipe.search_rules.items():
        choices = []
        for seed in recipe.seeds if search.per == "seed" else [None]:
            try:
                if (choice := folder.choice(name, seed)) is not None:
                    choices.append(_choice(recipe, folder, name, seed, choice))
            except RunFolderError as error:
                damaged.append(str(error))
        if choices:
            found[name] = {"per": search.per, "select_by": search.select_by, "choices": choices}
    return found


def _choice(recipe: Recipe, folder: RunFolder, arm: str, seed: int | None, choice: dict[str, Any]) -> dict[str, Any]:
    """What a search tried, with the numbers of each seed of the trials, and the share of resampled trials that choose
    each value; None where their scores have gone."""
    jobs = trials_of(recipe, arm, recipe.seeds[0] if seed is None else seed)
    by_value = [jobs[n : n + len(choice["seeds"])] for n in range(0, len(jobs), len(choice["seeds"]))]
    if len(by_value) != len(choice["trials"]):
        path = folder.path / choice_file(arm, seed)
        raise damaged_file(path, f"it has {len(choice['trials'])} trials, and the recipe {len(by_value)}")
    rows = []
    for tried, of_value in zip(choice["trials"], by_value, strict=True):
        each = []
        for job in of_value:
            result = folder.result(job)
            if result is not None and result["status"] == "ok":
                validation = result["evaluation"]["validation"]
                each.append({"seed": job.seed, "loss": validation["loss"], "score": validation["score"]})
        rows.append({**tried, "each": each, "share": None})
    whole = [n for n, row in enumerate(rows) if not row["failed"]]
    scores = [[{row["id"]: row for row in folder.trial_scores(job)} for job in by_value[n]] for n in whole]
    if (trials := _trial_scores(scores)) is not None:
        search = recipe.search_rules[arm]
        shares = trials.shares(search.select_by, arm if seed is None else f"{arm} seed {seed}")
        for n, share in zip(whole, shares, strict=True):
            rows[n]["share"] = share
    return {"seed": seed, "chosen": choice["chosen"], "seeds": choice["seeds"], "trials": rows}


def _trial_scores(scores: list[list[Rows]]) -> Trials | None:
    """Of each value (outer) and seed (inner) on validation; None where they are not all of the same examples."""
    first = scores[0][0] if scores else {}
    if not first or any(one.keys() != first.keys() for of_value in scores for one in of_value):
        return None

    def numbers(key: str) -> np.ndarray:
        return np.array([[[one[i][key] for i in first] for one in of_value] for of_value in scores], dtype=float)

    rows = list(first.values())
    scored = None if rows[0]["score"] is None else numbers("score")
    groups = [f"group {row['group']}" if row["group"] else f"row {row['id']}" for row in rows]
    return Trials(numbers("nats"), np.array([float(row["tokens"]) for row in rows]), scored, groups)


def _same_outputs(
    recipe: Recipe, folder: RunFolder, results: Results, damaged: list[str]
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
            try:
                nats = tuple(row["nats"] for row in folder.scores(arm, seed, "test"))
            except RunFolderError as error:
                damaged.append(str(error))
                continue
            other, its_state = seen.setdefault(nats, (arm, state))
            if its_state != state:
                found.append((other, arm, seed))
    return found


def made_differently(results: Mapping[tuple[str, int], dict[str, Any]]) -> list[str]:
    """What arms and seeds that are set beside each other were not all made with, in words, one sentence for each.

    Args:
        results: By arm, or run and arm, and seed.
    """
    done = {key: result["train_info"] for key, result in results.items() if result["status"] == "ok"}
    users: dict[str, dict[str, list[tuple[str, int]]]] = {}  # of each kind of thing: its values, and who has them
    for key, info in done.items():
        facts = {("dtype", info["base"]["dtype"])}
        for made in (*info.get("segments_made", ()), *info.get("measured_made", ())):
            facts |= set(_makers(made).items())
        for what, value in facts:
            users.setdefault(what, {}).setdefault(value, []).append(key)
    told = []
    for what in sorted(what for what, values in users.items() if len(values) > 1):
        parts = [f"{value} ({_named(keys, list(done))})" for value, keys in sorted(users[what].items())]
        told.append(
            f"Not all was made with one {what}: {'; '.join(parts)}. A difference between these may be due to that."
        )
    return told


def _makers(made: dict[str, Any]) -> dict[str, str]:
    """What may move a number, of what a state or a measurement says of its making."""
    commit = made["commit"]
    found = {
        "version of cola": made["cola"],
        "commit": commit["hash"] and commit["hash"][:10] + (" with changes" if commit["dirty"] else ""),
        "version of Python": made["python"],
        "CPU": made["machine"]["cpu"],
        "device": made["device"],
    }
    found |= {f"version of {name}": version for name, version in made["packages"].items() if name != "wandb"}
    return {what: str(value) for what, value in found.items()}


def _named(keys: Sequence[tuple[str, int]], of: Sequence[tuple[str, int]]) -> str:
    """Arms by name, those of which not all seeds are meant with their seeds."""
    parts = []
    for arm in dict.fromkeys(arm for arm, _ in keys):
        mine = sorted(seed for name, seed in keys if name == arm)
        whole = mine == sorted(seed for name, seed in of if name == arm)
        parts.append(arm if whole else f"{arm} seed {', '.join(map(str, mine))}")
    return ", ".join(parts) if len(parts) <= FEW else f"{len(keys)} results of {len(parts)} arms"


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds (None with one seed); None where the task has no such number."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return None
    return {"mean": float(np.mean(numbers)), "sd": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None}


class Comparer:
    """Pairs a run's arms by seed and test example.

    What keeps two arms from being compared as the recipe asks (no common seed, damaged scores, other examples) is told
    in `damaged` or `unpaired`, and costs that comparison and no other.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, results: Results, damaged: list[str]) -> None:
        self.recipe = recipe
        self.folder = folder
        self.results = results
        self.damaged = damaged
        self.unpaired: list[str] = []
        self.ok = {a: [s for s in recipe.seeds if results.get((a, s), {}).get("status") == "ok"] for a in recipe.arms}
        self._scores: dict[tuple[str, int], Rows | None] = {}

    def against_full(self, name: str) -> dict[str, Any]:
        """`ft_gap` and `closed` of an arm, where they can be had."""
        full, lora = self.recipe.full_arm, self.recipe.lora_arm
        found: dict[str, Any] = {}
        if name == full or not self.ok.get(full):
            return found
        if (pair := self.table([full, name])) is not None:
            found["ft_gap"] = _record(estimate((1, -1), [pair]))
        if name == lora or not self.ok.get(lora):
            return found
        if (three := self.table([full, lora, name])) is not None:
            lead = estimate((1, -1, 0), [three])
            if not lead.excludes_zero:
                found["closed"] = "undefined"
            else:
                found["closed"] = _record(closed_share(three)) if lead.value > 0 else "no gap"
        return found

    def gaps(self, name: str) -> dict[str, Any]:
        """Intervals of `gap_loss` and `gap_acc` of an arm, over seeds and test examples.

        What was trained on is what it is: each seed's own loss and score on it are subtracted from those of its test
        examples. How the gap would be with other training rows is not in it.
        """
        done = [(s, rows) for s in self.ok[name] if (rows := self.rows(name, s)) is not None]
        found: dict[str, Any] = {}
        for key, what, sign in (("gap_loss", "loss", -1), ("gap_acc", "score", 1)):
            table = paired([[rows for _, rows in done]], by_loss=what == "loss") if done else None
            train_S = [self.results[name, s]["evaluation"]["train"][what] for s, _ in done]
            if table is None or None in train_S:
                continue
            # A loss comes as minus itself, so that both gaps are train - test of something of which more is better.
            gap_1SN = sign * np.array(train_S)[None, :, None] - table.scores_ASN
            gap = Table(gap_1SN, table.groups, table.weights)
            found[f"{key}_interval"] = _record(estimate((1,), [gap]))
        return found

    def contrasts(self, later: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """The recipe's contrasts, the primary one first; then those that are asked for now, and each trained arm
        against full fine-tuning."""
        comparison, full = self.recipe.comparison, self.recipe.full_arm
        named = [("primary", comparison.primary)] if comparison.primary else []
        named += [("secondary", pair) for pair in comparison.secondary]
        named += [("later", pair) for pair in later if {*pair} not in [{*one} for _, one in named]]
        said = [{*pair} for _, pair in named]
        trained = [arm for arm in self.recipe.arms if self.recipe.arms[arm].n_links and arm != full]
        if full in self.recipe.arms:
            named += [("later", (arm, full)) for arm in trained if {arm, full} not in said]
        found = [one for role, pair in named if (one := self._contrast(role, *pair)) is not None]
        settle(found)
        return found

    def _contrast(self, role: str, first: str, second: str) -> dict[str, Any] | None:
        by_loss = self.recipe.metric == "loss"
        table = self.table([first, second], by_loss)
        if table is None:
            return None
        named = {"first": first, "second": second, "role": role, "metric": self.recipe.metric}
        return named | contrast_record([table])

    def table(self, arms: Sequence[str], by_loss: bool = False) -> Table | None:
        """The arms' test scores over their common seeds, as `paired` has them; None where they have none."""
        if any(not self.ok[arm] for arm in arms):
            return None  # the table of arms says so
        seeds = [s for s in self.ok[arms[0]] if all(s in self.ok[arm] for arm in arms)]
        tables = {(arm, s): rows for s in seeds for arm in arms if (rows := self.rows(arm, s)) is not None}
        seeds = [s for s in seeds if all((arm, s) in tables for arm in arms)]
        if not seeds:
            self._say_unpaired(f"{', '.join(arms)} have no seed in common, so they are not compared")
            return None
        if dropped := sorted({s for arm in arms for s in self.ok[arm]} - set(seeds)):
            left = ", ".join(map(str, dropped))
            self._say_unpaired(f"{', '.join(arms)} are compared over the seeds that all of them have, without {left}")
        table = paired([[tables[arm, s] for s in seeds] for arm in arms], by_loss)
        if table is None:
            self._say_unpaired(
                f"{', '.join(arms)} were not all scored on the same test examples, so they are not compared; delete "
                "the damaged seed folder and run `cola run --resume`"
            )
        return table

    def rows(self, arm: str, seed: int) -> Rows | None:
        """Test scores by example; None where they are damaged."""
        if (arm, seed) not in self._scores:
            try:
                rows = {row["id"]: row for row in self.folder.scores(arm, seed, "test")}
            except RunFolderError as error:
                self.damaged.append(str(error))
                rows = None
            self._scores[arm, seed] = rows
        return self._scores[arm, seed]

    def _say_unpaired(self, text: str) -> None:
        if text not in self.unpaired:
            self.unpaired.append(text)


def check_arms(pair: Sequence[str], known: Collection[str]) -> None:
    """That a contrast which is asked for is of two arms that there are.

    Raises:
        RunFolderError: it is not.
    """
    for arm in pair:
        if arm not in known:
            near = difflib.get_close_matches(arm, known, 1)
            raise RunFolderError(
                f"--contrast {','.join(pair)}: no arm is called {quoted(arm)}"
                + (f"; did you mean {quoted(near[0])}?" if near else f"; there are {listed(known)}")
            )
    if pair[0] == pair[1]:
        raise RunFolderError(f"--contrast {','.join(pair)}: an arm is not compared with itself; name two")


def contrast_record(tables: Sequence[Table]) -> dict[str, Any]:
    """The first arm of each table against the second, on one task or over several: the difference, its interval, its
    test for other seeds and examples, and the sign flips' for other seeds on these rows."""
    found = estimate((1, -1), tables)
    n_runs = sum(table.scores_ASN.shape[1] for table in tables)
    flips = sign_flips(tables) if n_runs > 1 else None
    return {
        **_record(found),
        "p": found.p,
        "p_holm": None,
        "p_rows": flips and flips.p,
        "p_rows_smallest": flips and flips.smallest,
        "p_rows_error": flips and flips.error,
        "minimum_detectable": found.minimum_detectable,
        "n_seeds": n_runs,
        "n_examples": sum(table.scores_ASN.shape[2] for table in tables),
        "n_groups": sum(len(set(table.groups)) for table in tables),
    }


def settle(contrasts: Sequence[dict[str, Any]]) -> None:
    """Correct the secondary contrasts for their number, and say which contrasts carry a claim."""
    tested = [one for one in contrasts if one["role"] == "secondary" and one["p"] is not None]
    for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_holm"] = p
    for one in contrasts:
        p = one["p_holm"] if one["role"] == "secondary" else one["p"]
        away = one["low"] is not None and (one["low"] > 0 or one["high"] < 0)
        # What was not named before the run is shown and not claimed.
        named = one["role"] != "later" and one["n_seeds"] >= FEWEST_RUNS
        one["claim"] = bool(named and away and p is not None and p < 0.05)


def paired(rows: Sequence[Sequence[Rows]], by_loss: bool) -> Table | None:
    """Scores of some arms (outer) under some seeds (inner), paired by example; None where they are not of the same
    examples.

    Where `by_loss`, and for a text, which has no score, a score is minus the loss per token, weighted by tokens, so
    that an arm's mean is minus its loss in the table of results.
    """
    first = rows[0][0]
    ids = list(first)
    if not ids or any(one.keys() != first.keys() for of_arm in rows for one in of_arm):
        return None
    scored = first[ids[0]]["score"] is not None and not by_loss

    def value(row: dict[str, Any]) -> float:
        return row["score"] if scored else -row["nats"] / row["tokens"]

    scores = [[[value(one[i]) for i in ids] for one in of_arm] for of_arm in rows]
    groups = [first[i]["group"] or i for i in ids]
    return Table(np.array(scores), groups, None if scored else [float(first[i]["tokens"]) for i in ids])


def _record(found: Estimate) -> dict[str, float | None]:
    return {key: value for key, value in asdict(found).items() if key not in ("df", "p")}

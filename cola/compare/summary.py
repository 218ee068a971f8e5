"""From a run's results to every number that terminal, page and tracker show; docs/numbers.md says what each is.

Nothing is drawn, so that a contrast has the same digits in every report that shows it. No torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cola.compare import records
from cola.compare.choice import Trials
from cola.compare.contrasts import FEW, METRICS, Comparer, Rows, check_arms
from cola.compare.scope import scope_of
from cola.compare.spectra import spectra_of
from cola.errors import RunFolderError
from cola.recipe.plan import trials_of
from cola.recipe.recipe import Recipe
from cola.recipe.schema import SPLITS
from cola.tree.foreseen import Foreseen
from cola.tree.made import Made
from cola.tree.manifest import damaged_file
from cola.tree.records import Chosen, Result, TrainInfo
from cola.tree.run_folder import RunFolder, choice_file

COSTS = ("num_trainable_params", "steps", "tokens", "positions", "flops", "train_seconds", "total_seconds")
NOT_ALWAYS = ("train_cpu_seconds", "total_cpu_seconds", "optimizer_flops", "start_flops")  # noted, or counted
# Of a knot's numbers over seeds.
MEANS = ("relative_size_median", "unchanged_median")
WORST = {"relative_size_max": max, "error_max": max, "cosine_min": min, "drift_max_logit_change": max}
WORST |= {"drift_relative": max, "drift_of_learned": max, "drift_kl": max}


def summarize(recipe: Recipe, folder: RunFolder, later: Sequence[tuple[str, str]] = ()) -> records.Summary:
    """Everything the table and the page show, from the results of a run folder. `later`: contrasts that are asked for
    now and that the recipe does not name: shown, never claimed.

    Raises:
        RunFolderError: an arm that is asked for is not one of the recipe's.
    """
    for pair in later:
        check_arms(pair, recipe.arms)
    damaged: list[str] = []
    comparer = Comparer(recipe, folder, damaged)
    arms = {name: _arm(comparer, name) for name in recipe.arms}
    meta = folder.provenance()
    trials = _trials(comparer)
    spectra, unread = spectra_of(folder, comparer.ok)
    states = {state for arm in arms.values() for state in arm.states.values()}
    key = {"steps": "steps", "tokens": "positions", "flops": "flops"}[recipe.training.match]
    used = [getattr(arm, key) for name, arm in arms.items() if arm.n_seeds and recipe.arms[name].n_links]
    rows, n_scored = next(((r.meta_info.rows, r.evaluation.train.n) for r in comparer.done.values()), (None, 0))
    return records.Summary(
        meta=meta,
        interrupted=bool(states & {"interrupted", "missing"}),
        metric=METRICS[recipe.data.task],
        checkpoint=recipe.evaluation.checkpoint,
        select_by=recipe.evaluation.select_by,
        seeds=list(recipe.seeds),
        matched=records.Matched(
            by=recipe.training.match,
            per_link=recipe.training.protocol == "grow",
            used=[min(used), max(used)] if used else None,
        ),
        trials=trials,
        intervals=scope_of(recipe, rows["train"] if rows else None),
        same_outputs=_same_outputs(comparer),
        rows=rows,
        train_sample=n_scored if rows and n_scored < rows["train"] else None,
        arms=arms,
        foreseen=_foreseen(folder, damaged),
        spectra=spectra,
        contrasts=comparer.contrasts(later),
        unpaired=list(dict.fromkeys(comparer.unpaired)),
        notes=[
            *(meta.data.notes if meta else []),
            *(meta.selfcheck.notes if meta and meta.selfcheck else []),
            *made_differently(comparer.done),
            *dict.fromkeys([*damaged, *unread]),
        ],
    )


def _foreseen(folder: RunFolder, damaged: list[str]) -> Foreseen | None:
    try:
        return folder.foreseen()
    except RunFolderError as error:
        damaged.append(str(error))
        return None


def _arm(comparer: Comparer, name: str) -> records.ArmSummary:
    recipe, results = comparer.recipe, comparer.results
    mine = {seed: results[name, seed] for seed in recipe.seeds if (name, seed) in results}
    done = [result for result in mine.values() if isinstance(result, Result)]
    searched = done and "links" in recipe.searches_of(name)
    state = {
        "links": len(done[0].train_info.links) if searched else recipe.arms[name].n_links,
        "states": {seed: mine[seed].status if seed in mine else "missing" for seed in recipe.seeds},
        "errors": {seed: r.run_info.error for seed, r in mine.items() if r.status == "failed" and r.run_info.error},
        "n_seeds": len(done),
    }
    if not done:
        return records.ArmSummary(**state)
    infos = [r.train_info for r in done]
    edges: dict[str, list[int]] = {}
    for result in done:
        for key in result.train_info.at_grid_edge:
            edges.setdefault(key, []).append(result.run_info.seed)
    peaks = [i.process_memory_max if i.accelerator_memory_max is None else i.accelerator_memory_max for i in infos]
    held = _each(infos, "optimizer_bytes")
    # A knot that lets a part of its pair go moves the outputs on purpose.
    whole = [i for i in infos if i.rules and (i.rules.merge_fraction == 1 or len(i.knots) == 1)]
    lost = [k.drift_of_learned for i in whole for k in i.knots]
    seeds = [_of_seed(r) for r in done]
    keys = [key for key in records.SeedNumbers.model_fields if key != "seed"]
    compared: dict[str, Any] = {**comparer.against_full(name), **comparer.gaps(name)}
    return records.ArmSummary(
        **state,
        **{key: over_seeds([getattr(seed, key) for seed in seeds]) for key in keys},
        **{key: float(np.mean([getattr(info, key) for info in infos])) for key in COSTS},
        **{key: float(np.mean(known)) for key in NOT_ALWAYS if None not in (known := _each(infos, key))},
        **compared,
        seeds=seeds,
        scored_step=[info.scored_step for info in infos],
        learning_rate=[info.learning_rate for info in infos],
        optimizer_bytes=None if None in held else max(held, default=None),
        peak_memory=max((peak for peak in peaks if peak is not None), default=None),
        base=infos[0].base,
        without_gradient=max(info.without_gradient for info in infos),
        at_grid_edge=edges,
        knots=_ledger(infos),
        max_drift=max((knot.drift_relative for info in infos for knot in info.knots), default=None),
        max_lost=max((share for share in lost if share is not None), default=None),
    )


def _each(infos: list[TrainInfo], key: str) -> list[Any]:
    return [getattr(info, key) for info in infos]


def _of_seed(result: Result) -> records.SeedNumbers:
    """One seed's numbers: the dots of a figure."""
    scores = result.evaluation
    numbers = {f"{split}_{key}": getattr(getattr(scores, split), key) for split in SPLITS for key in ("loss", "score")}
    forgetting = scores.general and scores.general.forgetting  # None where the recipe leaves the general text out
    return records.SeedNumbers(
        seed=result.run_info.seed, **numbers, gap_loss=scores.gap_loss, gap_acc=scores.gap_acc, forgetting=forgetting
    )


def _ledger(infos: list[TrainInfo]) -> list[records.KnotLedger]:
    """One row for each knot that tied a pair, over seeds: the mean of what was learned, the worst of what was lost."""
    rows = []
    for number in range(max(len(info.knots) for info in infos)):
        there = [info for info in infos if len(info.knots) > number]
        knots = [info.knots[number] for info in there if info.knots[number].merge is not None]
        if not knots:
            continue
        known: dict[str, Any] = {
            key: [v for knot in knots if (v := getattr(knot, key)) is not None] for key in (*MEANS, *WORST)
        }
        last = number + 1 == len(there[0].links)
        rows.append(
            records.KnotLedger(
                link=number + 1,
                merge=knots[0].merge or "",
                fraction=1.0 if last else _share_kept(there, number),
                cleared=float(np.mean([info.links[number].cleared for info in there])),
                **{key: float(np.mean(known[key])) for key in MEANS},
                **{key: pick(known[key], default=None) for key, pick in WORST.items()},
                drift_loss_change=max((knot.drift_loss_change for knot in knots), key=abs),
            )
        )
    return rows


def _share_kept(infos: list[TrainInfo], number: int) -> float:
    """Which share of its pair the knot of that number kept, another link following: the mean over matrices and seeds,
    where a rule says it of each."""
    shares = [info.shares(number + 1)[number] for info in infos]
    means = [float(np.mean([*share.values()])) if isinstance(share, dict) else share for share in shares]
    return float(np.mean(means))


def _trials(comparer: Comparer) -> dict[str, records.Search]:
    """What each arm's search tried and chose, where that can be read."""
    trials = {}
    for name, search in comparer.recipe.search_rules.items():
        choices = []
        for seed in comparer.recipe.seeds if search.per == "seed" else [None]:
            try:
                if (choice := comparer.folder.choice(name, seed)) is not None:
                    choices.append(_choice(comparer.recipe, comparer.folder, name, seed, choice))
            except RunFolderError as error:
                comparer.damaged.append(str(error))
        if choices:
            trials[name] = records.Search(per=search.per, select_by=search.select_by, choices=choices)
    return trials


def _choice(recipe: Recipe, folder: RunFolder, arm: str, seed: int | None, choice: Chosen) -> records.SummaryChoice:
    """What a search tried, with the numbers of each seed of the trials, and the share of resampled trials that choose
    each value; None where their scores have gone."""
    jobs = trials_of(recipe, arm, recipe.seeds[0] if seed is None else seed)
    by_value = [jobs[n : n + len(choice.seeds)] for n in range(0, len(jobs), len(choice.seeds))]
    if len(by_value) != len(choice.trials):
        path = folder.path / choice_file(arm, seed)
        raise damaged_file(path, f"it has {len(choice.trials)} trials, and the recipe {len(by_value)}")
    whole = [n for n, tried in enumerate(choice.trials) if not tried.failed]
    scores = [[{row.id: row for row in folder.trial_scores(job)} for job in by_value[n]] for n in whole]
    shares: dict[int, float] = {}
    if (trials := _trial_scores(scores)) is not None:
        of_each = trials.shares(recipe.search_rules[arm].select_by, arm if seed is None else f"{arm} seed {seed}")
        shares = dict(zip(whole, of_each, strict=True))
    tried = []
    for n, (row, jobs) in enumerate(zip(choice.trials, by_value, strict=True)):
        scored = {job.seed: trial.evaluation.validation for job in jobs if (trial := folder.trial(job)) is not None}
        each = [records.OfSeed(seed=of, loss=numbers.loss, score=numbers.score) for of, numbers in scored.items()]
        tried.append(records.SummaryTrial(**dict(row), each=each, share=shares.get(n)))
    return records.SummaryChoice(seed=seed, chosen=choice.chosen, seeds=choice.seeds, trials=tried)


def _trial_scores(scores: list[list[Rows]]) -> Trials | None:
    """Of each value (outer) and seed (inner) on validation; None where they are not all of the same examples."""
    first = scores[0][0] if scores else {}
    if not first or any(one.keys() != first.keys() for of_value in scores for one in of_value):
        return None
    rows = list(first.values())
    nats, scored = (
        np.array([[[getattr(rows[i], key) for i in first] for rows in of_value] for of_value in scores], dtype=float)
        for key in ("nats", "score")
    )
    groups = [f"group {row.group}" if row.group else f"row {row.id}" for row in rows]
    tokens = np.array([float(row.tokens) for row in rows])
    return Trials(nats, tokens, None if rows[0].score is None else scored, groups)


def _same_outputs(comparer: Comparer) -> list[tuple[str, str, int]]:
    """Arms whose test losses are the same to the bit under a seed though their weights have other causes: what one of
    them does differently has done nothing."""
    same = []
    for seed in comparer.recipe.seeds:
        seen: dict[tuple[float, ...], tuple[str, str]] = {}
        for arm in comparer.ok:
            if (arm, seed) not in comparer.done or (rows := comparer.rows(arm, seed)) is None:
                continue
            state = comparer.done[arm, seed].train_info.scored_state
            other, its_state = seen.setdefault(tuple(row.nats for row in rows.values()), (arm, state))
            if its_state != state:
                same.append((other, arm, seed))
    return same


def made_differently(done: Mapping[tuple[str, int], Result]) -> list[str]:
    """What arms and seeds that are set beside each other were not all made with, in words, one sentence for each; by
    arm, or run and arm, and seed."""
    users: dict[str, dict[str, list[tuple[str, int]]]] = {}  # of each kind of thing: its values, and who has them
    for key, result in done.items():
        info = result.train_info
        facts = {("dtype", info.base.dtype)}
        for made in (*info.segments_made, *info.measured_made):
            facts |= _makers(made)
        for what, value in facts:
            users.setdefault(what, {}).setdefault(value, []).append(key)
    told = []
    for what, values in sorted(users.items()):
        if len(values) > 1:
            parts = "; ".join(f"{value} ({_named(keys, list(done))})" for value, keys in sorted(values.items()))
            told.append(f"Not all was made with one {what}: {parts}. A difference between these may be due to that.")
    return told


def _makers(made: Made) -> set[tuple[str, str]]:
    """What may move a number, of what a state or a measurement says of its making."""
    commit = made.commit
    facts = {f"version of {name}": version for name, version in made.packages.items() if name != "wandb"}
    facts |= {
        "version of cola": made.cola,
        "commit": commit.hash and commit.hash[:10] + (" with changes" if commit.dirty else ""),
        "version of Python": made.python,
        "CPU": made.machine.cpu,
        "device": made.device,
    }
    return {(what, str(value)) for what, value in facts.items()}


def _named(keys: Sequence[tuple[str, int]], of: Sequence[tuple[str, int]]) -> str:
    """Arms by name, those of which not all seeds are meant with their seeds."""
    parts = []
    for arm in dict.fromkeys(arm for arm, _ in keys):
        mine = sorted(seed for name, seed in keys if name == arm)
        whole = mine == sorted(seed for name, seed in of if name == arm)
        parts.append(arm if whole else f"{arm} seed {', '.join(map(str, mine))}")
    return ", ".join(parts) if len(parts) <= FEW else f"{len(keys)} results of {len(parts)} arms"


def over_seeds(values: Sequence[float | None]) -> records.Spread | None:
    """Mean and standard deviation over seeds (None with one seed); None where the task has no such number."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return None
    return records.Spread(mean=float(np.mean(numbers)), sd=float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None)

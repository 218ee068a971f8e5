"""Two arms compared, example by example and seed by seed."""

from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np

from cola.compare.records import Contrast, Difference, Interval, Role, TaskContrast
from cola.compare.statistics import FEWEST_RUNS, Estimate, Table, closed_share, estimate, holm, sign_flips
from cola.errors import RunFolderError, listed, nearest, quoted
from cola.recipe.recipe import Recipe
from cola.tree.records import Result, ScoreRow
from cola.tree.run_folder import RunFolder

FEW = 4  # arms that a sentence names
METRICS = {"multiple_choice": "accuracy", "answer": "exact match", "text": "perplexity"}

C = TypeVar("C", Contrast, TaskContrast)

Rows = dict[str, ScoreRow]  # scores of one arm, seed and split, by example


class Comparer:
    """A run's results, its arms paired by seed and test example.

    What keeps two arms from being compared as the recipe asks (no common seed, damaged scores, other examples) is told
    in `damaged` or `unpaired`, and costs that comparison and no other.

    Attributes:
        results: By arm and seed, of whatever status.
        done: Those that came to their end.
        ok: The seeds of each arm that are to be compared.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, damaged: list[str]) -> None:
        self.recipe = recipe
        self.folder = folder
        self.damaged = damaged
        self.unpaired: list[str] = []
        self.results = {(r.run_info.arm, r.run_info.seed): r for r in folder.results(damaged)}
        self.done = {key: result for key, result in self.results.items() if isinstance(result, Result)}
        self.ok = {arm: [seed for seed in recipe.seeds if (arm, seed) in self.done] for arm in recipe.arms}
        self._scores: dict[tuple[str, int], Rows | None] = {}

    def against_full(self, name: str) -> dict[str, Interval | str]:
        """`ft_gap` and `closed` of an arm, where they can be had."""
        full, lora = self.recipe.full_arm, self.recipe.lora_arm
        numbers: dict[str, Interval | str] = {}
        if name == full or not self.ok.get(full):
            return numbers
        if (pair := self.table([full, name])) is not None:
            numbers["ft_gap"] = interval_of(estimate((1, -1), [pair]))
        if name == lora or not self.ok.get(lora) or (three := self.table([full, lora, name])) is None:
            return numbers
        lead = estimate((1, -1, 0), [three])
        if not lead.excludes_zero:
            return numbers | {"closed": "undefined"}
        return numbers | {"closed": interval_of(closed_share(three)) if lead.value > 0 else "no gap"}

    def gaps(self, name: str) -> dict[str, Interval]:
        """Intervals of `gap_loss` and `gap_acc` of an arm, over seeds and test examples.

        What was trained on is what it is: each seed's own loss and score on it are subtracted from those of its test
        examples. How the gap would be with other training rows is not in it.
        """
        done = [(seed, rows) for seed in self.ok[name] if (rows := self.rows(name, seed)) is not None]
        intervals: dict[str, Interval] = {}
        for key, kind, sign in (("gap_loss", "loss", -1), ("gap_acc", "score", 1)):
            table = paired([[rows for _, rows in done]], by_loss=kind == "loss") if done else None
            train_S = [getattr(self.done[name, seed].evaluation.train, kind) for seed, _ in done]
            if table is None or None in train_S:
                continue
            # A loss comes as minus itself, so that both gaps are train - test of something of which more is better.
            gap_1SN = sign * np.array(train_S)[None, :, None] - table.scores_ASN
            gap = Table(gap_1SN, table.groups, table.weights)
            intervals[f"{key}_interval"] = interval_of(estimate((1,), [gap]))
        return intervals

    def contrasts(self, later: Sequence[tuple[str, str]]) -> list[Contrast]:
        """The recipe's contrasts, the primary one first; then those that are asked for now, and each trained arm
        against full fine-tuning."""
        comparison, full, arms = self.recipe.comparison, self.recipe.full_arm, self.recipe.arms
        to_full = [(arm, full) for arm in arms if arms[arm].n_links and arm != full and full in arms]
        roles: dict[frozenset[str], tuple[Role, tuple[str, str]]] = {}
        for pair in [comparison.primary] if comparison.primary else []:
            roles[frozenset(pair)] = "primary", pair
        for pair in comparison.secondary:
            roles[frozenset(pair)] = "secondary", pair
        for pair in (*later, *to_full):
            roles.setdefault(frozenset(pair), ("later", pair))
        contrasts = []
        for role, (first, second) in roles.values():
            if (table := self.table([first, second], by_loss=self.recipe.metric == "loss")) is not None:
                about = {"first": first, "second": second, "role": role, "metric": self.recipe.metric}
                contrasts.append(Contrast(**about, **dict(difference_of([table])), claim=False))
        return settle(contrasts)

    def table(self, arms: Sequence[str], by_loss: bool = False) -> Table | None:
        """The arms' test scores over their common seeds, as `paired` has them; None where they have none."""
        if any(not self.ok[arm] for arm in arms):
            return None  # the table of arms says so
        scored = self.scored(arms)
        if not scored:
            self.unpaired.append(f"{', '.join(arms)} have no seed in common, so they are not compared")
            return None
        if dropped := sorted({seed for arm in arms for seed in self.ok[arm]} - set(scored)):
            left = ", ".join(map(str, dropped))
            self.unpaired.append(f"{', '.join(arms)} are compared over the seeds that all of them have, without {left}")
        table = paired(list(zip(*scored.values(), strict=True)), by_loss)
        if table is None:
            self.unpaired.append(
                f"{', '.join(arms)} were not all scored on the same test examples, so they are not compared; delete "
                "the damaged seed folder and run `cola run --resume`"
            )
        return table

    def scored(self, arms: Sequence[str]) -> dict[int, list[Rows]]:
        """Test scores of some arms by example, under each seed that all of them have."""
        common = [seed for seed in self.ok.get(arms[0], ()) if all(seed in self.ok.get(arm, ()) for arm in arms)]
        scores = {s: [rows for arm in arms if (rows := self.rows(arm, s)) is not None] for s in common}
        return {seed: of_arms for seed, of_arms in scores.items() if len(of_arms) == len(arms)}

    def rows(self, arm: str, seed: int) -> Rows | None:
        """Test scores by example; None where they are damaged."""
        if (arm, seed) not in self._scores:
            try:
                rows = {row.id: row for row in self.folder.scores(arm, seed, "test")}
            except RunFolderError as error:
                self.damaged.append(str(error))
                rows = None
            self._scores[arm, seed] = rows
        return self._scores[arm, seed]


def check_arms(pair: Sequence[str], known: Collection[str]) -> None:
    """That a contrast which is asked for is of two arms that there are.

    Raises:
        RunFolderError: it is not.
    """
    for arm in pair:
        if arm not in known:
            near = nearest(arm, known)
            raise RunFolderError(
                f"--contrast {','.join(pair)}: no arm is called {quoted(arm)}"
                + (f"; did you mean {quoted(near)}?" if near else f"; there are {listed(known)}")
            )
    if pair[0] == pair[1]:
        raise RunFolderError(f"--contrast {','.join(pair)}: an arm is not compared with itself; name two")


def difference_of(tables: Sequence[Table]) -> Difference:
    """The first arm of each table against the second, on one task or over several: the difference, its interval, its
    test for other seeds and examples, and the sign flips' for other seeds on these rows."""
    found = estimate((1, -1), tables)
    n_runs = sum(table.scores_ASN.shape[1] for table in tables)
    flips = sign_flips(tables) if n_runs > 1 else None
    return Difference(
        **dict(interval_of(found)),
        p=found.p,
        p_holm=None,
        p_rows=flips and flips.p,
        p_rows_smallest=flips and flips.smallest,
        p_rows_error=flips and flips.error,
        minimum_detectable=found.minimum_detectable,
        n_seeds=n_runs,
        n_examples=sum(table.scores_ASN.shape[2] for table in tables),
        n_groups=sum(len(set(table.groups)) for table in tables),
    )


def settle(contrasts: Sequence[C]) -> list[C]:
    """The contrasts, the secondary ones corrected for their number, each with whether it carries a claim."""
    tested = {n: one.p for n, one in enumerate(contrasts) if one.role == "secondary" and one.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    settled = []
    for n, one in enumerate(contrasts):
        p = corrected.get(n) if one.role == "secondary" else one.p
        away = one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
        # What was not named before the run is shown and not claimed.
        claim = away and p is not None and p < 0.05 and one.role != "later" and one.n_seeds >= FEWEST_RUNS
        settled.append(one.model_copy(update={"p_holm": corrected.get(n), "claim": claim}))
    return settled


def paired(rows: Sequence[Sequence[Rows]], by_loss: bool) -> Table | None:
    """Scores of some arms (outer) under some seeds (inner), paired by example; None where they are not of the same
    examples.

    Where `by_loss`, and for a text, which has no score, a score is minus the loss per token, weighted by tokens, so
    that an arm's mean is minus its loss in the table of results.
    """
    first = rows[0][0]
    if not first or any(one.keys() != first.keys() for of_arm in rows for one in of_arm):
        return None
    examples = first.values()
    scored = next(iter(examples)).score is not None and not by_loss

    def value(row: ScoreRow) -> float | None:
        return row.score if scored else -row.nats / row.tokens

    scores = [[[value(one[i]) for i in first] for one in of_arm] for of_arm in rows]
    groups = [row.group or row.id for row in examples]
    return Table(np.array(scores), groups, None if scored else [float(row.tokens) for row in examples])


def across(runs: Sequence[Comparer], arm: str, by_loss: bool) -> Table | None:
    """An arm's test scores in some runs, under the seeds that all have, as `paired` has them; None without any."""
    seeds = [seed for seed in runs[0].ok.get(arm, ()) if all(seed in run.ok.get(arm, ()) for run in runs)]
    rows = [[rows for run in runs if (rows := run.rows(arm, seed)) is not None] for seed in seeds]
    of_all = [of_seed for of_seed in rows if len(of_seed) == len(runs)]
    return paired(list(zip(*of_all, strict=True)), by_loss) if of_all else None


def interval_of(found: Estimate) -> Interval:
    """An estimate as the records have it."""
    return Interval(value=found.value, low=found.low, high=found.high, se=found.se)

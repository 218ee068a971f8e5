"""Two arms compared, example by example and seed by seed."""

from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np

from cola.compare.records import Contrast, Difference, Interval, Role, TaskContrast
from cola.compare.statistics import FEWEST_RUNS, Estimate, Table, closed_share, estimate, holm, sign_flips
from cola.errors import RunFolderError, listed, nearest, quoted
from cola.recipe.recipe import Recipe
from cola.tree.records import Ended, Result, ScoreRow
from cola.tree.run_folder import RunFolder

FEW = 4  # arms that a sentence names
METRICS = {"multiple_choice": "accuracy", "answer": "exact match", "text": "perplexity"}

C = TypeVar("C", Contrast, TaskContrast)

Results = dict[tuple[str, int], Result | Ended]  # by arm and seed
Rows = dict[str, ScoreRow]  # scores of one arm, seed and split, by example


class Comparer:
    """Pairs a run's arms by seed and test example.

    What keeps two arms from being compared as the recipe asks (no common seed, damaged scores, other examples) is told
    in `damaged` or `unpaired`, and costs that comparison and no other.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, results: Results, damaged: list[str]) -> None:
        self.recipe = recipe
        self.folder = folder
        self.done = {key: result for key, result in results.items() if isinstance(result, Result)}
        self.damaged = damaged
        self.unpaired: list[str] = []
        self.ok = {arm: [seed for seed in recipe.seeds if (arm, seed) in self.done] for arm in recipe.arms}
        self._scores: dict[tuple[str, int], Rows | None] = {}

    def against_full(self, name: str) -> dict[str, Interval | str]:
        """`ft_gap` and `closed` of an arm, where they can be had."""
        full, lora = self.recipe.full_arm, self.recipe.lora_arm
        found: dict[str, Interval | str] = {}
        if name == full or not self.ok.get(full):
            return found
        if (pair := self.table([full, name])) is not None:
            found["ft_gap"] = interval_of(estimate((1, -1), [pair]))
        if name == lora or not self.ok.get(lora):
            return found
        if (three := self.table([full, lora, name])) is not None:
            lead = estimate((1, -1, 0), [three])
            if not lead.excludes_zero:
                found["closed"] = "undefined"
            else:
                found["closed"] = interval_of(closed_share(three)) if lead.value > 0 else "no gap"
        return found

    def gaps(self, name: str) -> dict[str, Interval]:
        """Intervals of `gap_loss` and `gap_acc` of an arm, over seeds and test examples.

        What was trained on is what it is: each seed's own loss and score on it are subtracted from those of its test
        examples. How the gap would be with other training rows is not in it.
        """
        done = [(s, rows) for s in self.ok[name] if (rows := self.rows(name, s)) is not None]
        found: dict[str, Interval] = {}
        for key, what, sign in (("gap_loss", "loss", -1), ("gap_acc", "score", 1)):
            table = paired([[rows for _, rows in done]], by_loss=what == "loss") if done else None
            train_S = [getattr(self.done[name, s].evaluation.train, what) for s, _ in done]
            if table is None or None in train_S:
                continue
            # A loss comes as minus itself, so that both gaps are train - test of something of which more is better.
            gap_1SN = sign * np.array(train_S)[None, :, None] - table.scores_ASN
            gap = Table(gap_1SN, table.groups, table.weights)
            found[f"{key}_interval"] = interval_of(estimate((1,), [gap]))
        return found

    def contrasts(self, later: Sequence[tuple[str, str]]) -> list[Contrast]:
        """The recipe's contrasts, the primary one first; then those that are asked for now, and each trained arm
        against full fine-tuning."""
        comparison, full = self.recipe.comparison, self.recipe.full_arm
        primary: list[tuple[Role, tuple[str, str]]] = [("primary", comparison.primary)] if comparison.primary else []
        secondary: list[tuple[Role, tuple[str, str]]] = [("secondary", pair) for pair in comparison.secondary]
        asked = [pair for pair in later if {*pair} not in [{*known} for _, known in (*primary, *secondary)]]
        said = [{*pair} for pair in (*(known for _, known in (*primary, *secondary)), *asked)]
        trained = [arm for arm in self.recipe.arms if self.recipe.arms[arm].n_links and arm != full]
        to_full = [(arm, full) for arm in trained if full in self.recipe.arms and {arm, full} not in said]
        unnamed: list[tuple[Role, tuple[str, str]]] = [("later", pair) for pair in (*asked, *to_full)]
        named = (*primary, *secondary, *unnamed)
        found = [one for role, pair in named if (one := self._contrast(role, *pair)) is not None]
        return settle(found)

    def _contrast(self, role: Role, first: str, second: str) -> Contrast | None:
        by_loss = self.recipe.metric == "loss"
        table = self.table([first, second], by_loss)
        if table is None:
            return None
        difference = dict(difference_of([table]))
        return Contrast(first=first, second=second, role=role, metric=self.recipe.metric, **difference, claim=False)

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
                rows = {row.id: row for row in self.folder.scores(arm, seed, "test")}
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
    for number, one in enumerate(contrasts):
        p_holm = corrected.get(number)
        p = p_holm if one.role == "secondary" else one.p
        away = one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
        # What was not named before the run is shown and not claimed.
        named = one.role != "later" and one.n_seeds >= FEWEST_RUNS
        claim = bool(named and away and p is not None and p < 0.05)
        settled.append(one.model_copy(update={"p_holm": p_holm, "claim": claim}))
    return settled


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
    scored = first[ids[0]].score is not None and not by_loss

    def value(row: ScoreRow) -> float | None:
        return row.score if scored else -row.nats / row.tokens

    scores = [[[value(one[i]) for i in ids] for one in of_arm] for of_arm in rows]
    groups = [first[i].group or i for i in ids]
    return Table(np.array(scores), groups, None if scored else [float(first[i].tokens) for i in ids])


def interval_of(found: Estimate) -> Interval:
    """An estimate as the records have it."""
    return Interval(value=found.value, low=found.low, high=found.high, se=found.se)

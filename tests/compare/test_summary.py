"""The table's numbers counted by hand, and what the verdict dares to say. Run: pytest tests/compare/test_summary.py"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from summaries import contrast, result
from test_statistics import rng, two_arms

from cola.compare.records import Interval, Spread, Summary
from cola.compare.summary import summarize
from cola.recipe.arms import Arm
from cola.recipe.plan import Job
from cola.recipe.recipe import Recipe
from cola.report.tables import contrasts_table, named_tables
from cola.report.verdict import verdict
from cola.tree.run_folder import RunFolder


def recipe(task: str = "answer", seeds: Sequence[int] = (0,), arms: Sequence[str] = (), **settings: Any) -> Recipe:
    kinds = {"base": {"links": 0}, "lora": {}, "chain3": {"links": 3}, "full": {"method": "full"}}
    templates = {
        "answer": {"prompt": "{q}", "answer": "{a}"},
        "multiple_choice": {"prompt": "{q}", "choices": ["x", "y"], "label": "l"},
        "text": {"text": "{t}"},
    }
    return Recipe.model_validate(
        {
            "name": "by-hand",
            "model": {"name_or_path": "some/model"},
            "data": {"hub": "some/set", "task": task, **templates[task]},
            "training": {"steps": 10},
            "arms": {name: kinds[name] for name in arms or kinds},
            "seeds": list(seeds),
            "comparison": {"primary": ["chain3", "lora"]},
            **settings,
        }
    )


class ByHand:
    """A run folder whose results are written here and by no training."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.folder = RunFolder(path)

    def ok(
        self,
        arm: str,
        seed: int,
        test: Sequence[float] | None = None,
        *,
        train: Sequence[float] = (1.0, 1.0),
        test_loss: Sequence[float] | None = None,
        train_loss: float = 0.5,
        groups: Sequence[str | None] | None = None,
        ids: Sequence[str] | None = None,
        **info: Any,
    ) -> None:
        """A finished job: per-example test scores (or, for text, losses), and a mean training score and loss."""
        n = len(test if test is not None else test_loss or ())
        losses = list(test_loss or [1.0] * n)
        names = ids or [f"test-{i}" for i in range(n)]
        rows = [
            {
                "id": names[i],
                "nats": losses[i],
                "tokens": 2,
                "score": None if test is None else float(test[i]),
                "prediction": None,
                "group": groups[i] if groups else None,
            }
            for i in range(n)
        ]
        train_score = None if test is None else sum(train) / len(train)
        test_score = None if test is None else sum(test) / n
        loss = sum(losses) / (2 * n)
        evaluation = {
            "train": {"loss": train_loss, "score": train_score, "n": len(train)},
            "validation": {"loss": 0.75, "score": None if test is None else 0.5, "n": 4},
            "test": {"loss": loss, "score": test_score, "n": n},
            "gap_loss": loss - train_loss,
            "gap_acc": None if test is None else train_score - test_score,
        }
        where = self.folder.job(Job(arm=arm, seed=seed)).relative_to(self.folder.path)
        self.folder.write_text(where / "result.json", json.dumps(result(arm, seed, evaluation, **info)))
        self.folder.write_jsonl(where / "scores" / "test.jsonl", rows)

    def failed(self, arm: str, seed: int, error: str, status: str = "failed") -> None:
        where = self.folder.job(Job(arm=arm, seed=seed)).relative_to(self.folder.path)
        info = {"arm": arm, "seed": seed, "choice": [], "trial": False, "seconds": 1.0, "error": error}
        self.folder.write_text(where / "result.json", json.dumps({"format": 1, "status": status, "run_info": info}))

    def summary(self, plan: Recipe) -> Summary:
        return summarize(plan, self.folder)


@pytest.fixture
def run(tmp_path: Path) -> ByHand:
    return ByHand(tmp_path / "run")


def first_right(right: int, n: int = 200) -> list[float]:
    """Scores of n examples of which the first are right."""
    return [1.0] * right + [0.0] * (n - right)


def test_gaps_are_those_of_a_count_by_hand(run: ByHand) -> None:
    run.ok("base", 0, first_right(40), train=[0.25], train_loss=3.0)
    run.ok("lora", 0, first_right(100), train=[0.9], train_loss=0.2, test_loss=[1.0] * 200)
    run.ok("chain3", 0, first_right(130), train=[1.0], train_loss=0.1, test_loss=[1.2] * 200)
    run.ok("full", 0, first_right(140), train=[1.0], train_loss=0.05, test_loss=[1.6] * 200)
    summary = run.summary(recipe())
    arms = summary.arms
    assert {name: arm.gap_acc.mean for name, arm in arms.items()} == pytest.approx(
        {"base": 0.25 - 0.2, "lora": 0.9 - 0.5, "chain3": 1.0 - 0.65, "full": 1.0 - 0.7}
    )
    # 200 examples of two tokens each: 1.0, 1.2 and 1.6 nats an example are 0.5, 0.6 and 0.8 a token.
    assert {name: arm.gap_loss.mean for name, arm in arms.items() if name != "base"} == pytest.approx(
        {"lora": 0.5 - 0.2, "chain3": 0.6 - 0.1, "full": 0.8 - 0.05}
    )
    assert {name: arm.ft_gap.value for name, arm in arms.items() if name != "full"} == pytest.approx(
        {"base": 0.5, "lora": 0.2, "chain3": 0.05}
    )
    assert arms["full"].ft_gap is None
    assert arms["chain3"].closed.value == pytest.approx((0.65 - 0.5) / (0.7 - 0.5))
    assert arms["base"].closed.value == pytest.approx((0.2 - 0.5) / (0.7 - 0.5))
    assert arms["lora"].closed is None
    assert arms["full"].closed is None
    assert summary.contrasts[0].value == pytest.approx(0.65 - 0.5)
    assert (summary.contrasts[0].n_seeds, summary.contrasts[0].n_examples) == (1, 200)
    assert summary.rows == {"train": 1, "validation": 4, "test": 200}
    assert [arm.n_seeds for arm in arms.values()] == [1, 1, 1, 1]


def test_the_interval_of_ft_gap_is_scipys(run: ByHand) -> None:
    full, chain = two_arms(200, seed=3)
    run.ok("full", 0, full[0].tolist())
    run.ok("chain3", 0, chain[0].tolist())
    gap = run.summary(recipe()).arms["chain3"].ft_gap
    theirs = stats.bootstrap((full[0] - chain[0],), np.mean, method="BCa", n_resamples=100_000, rng=rng(1))
    tolerance = 0.04 * theirs.standard_error
    assert gap.low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert gap.high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)


def test_the_interval_of_a_gap_is_that_of_the_test_examples_less_what_was_trained_on(run: ByHand) -> None:
    scores, losses = rng(3).permutation(first_right(90)), rng(4).uniform(0.5, 3.0, 200)
    run.ok("lora", 0, scores.tolist(), train=[1.0, 1.0, 1.0, 0.0], train_loss=0.2, test_loss=losses.tolist())
    arm = run.summary(recipe()).arms["lora"]
    for key, values in (("gap_acc", 0.75 - scores), ("gap_loss", losses / 2 - 0.2)):
        low, high = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
        found = getattr(arm, f"{key}_interval")
        assert found.value == pytest.approx(getattr(arm, key).mean) == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))
    assert named_tables(run.summary(recipe()))["loss"].texts[1][4].startswith(f"{arm.gap_loss.mean:+.3f} [")


def test_seeds_whose_gaps_differ_widen_its_interval(run: ByHand) -> None:
    for seed, train_loss in enumerate((0.1, 0.4, 0.9, 0.2)):
        run.ok("lora", seed, first_right(100), train_loss=train_loss, test_loss=[2.0] * 200)
    found = run.summary(recipe(seeds=range(4))).arms["lora"].gap_loss_interval
    gaps = 1.0 - np.array([0.1, 0.4, 0.9, 0.2])
    assert found.se == pytest.approx(stats.sem(gaps))
    low, high = stats.t.interval(0.95, 3, gaps.mean(), stats.sem(gaps))
    assert found.high - found.low == pytest.approx(high - low, rel=0.2)


def test_over_seeds_the_table_has_mean_and_sample_standard_deviation(run: ByHand) -> None:
    for seed, right in ((0, 90), (1, 100), (2, 140)):
        run.ok("lora", seed, first_right(right))
    arm = run.summary(recipe(seeds=[0, 1, 2])).arms["lora"]
    assert arm.test_score.mean == pytest.approx(0.55)
    assert arm.test_score.sd == pytest.approx(math.sqrt((0.1**2 + 0.05**2 + 0.15**2) / 2))


def test_with_one_seed_there_is_no_standard_deviation(run: ByHand) -> None:
    run.ok("lora", 0, first_right(90))
    assert run.summary(recipe()).arms["lora"].test_score == Spread(mean=0.45, sd=None)


def test_closed_is_undefined_where_full_and_lora_cannot_be_told_apart(run: ByHand) -> None:
    scores = rng(1).permutation(first_right(100))
    run.ok("lora", 0, scores.tolist())
    run.ok("full", 0, rng(2).permutation(first_right(102)).tolist())
    run.ok("chain3", 0, first_right(150))
    summary = run.summary(recipe())
    gap = summary.arms["lora"].ft_gap
    assert gap.low < 0 < gap.high
    assert summary.arms["chain3"].closed == "undefined"


def test_closed_is_undefined_where_full_and_lora_agree_on_every_example(run: ByHand) -> None:
    run.ok("lora", 0, first_right(100))
    run.ok("full", 0, first_right(100))
    run.ok("chain3", 0, first_right(150))
    assert run.summary(recipe()).arms["chain3"].closed == "undefined"


def test_there_is_no_gap_to_close_where_full_fine_tuning_is_the_worse_one(run: ByHand) -> None:
    run.ok("lora", 0, first_right(150))
    run.ok("full", 0, first_right(100))
    run.ok("chain3", 0, first_right(120))
    summary = run.summary(recipe())
    assert summary.arms["chain3"].closed == "no gap"
    assert summary.arms["chain3"].ft_gap.value == pytest.approx(-0.1)


def test_a_group_that_the_recipe_names_widens_the_interval(tmp_path: Path) -> None:
    scores = np.repeat(rng(3).random(25) < 0.6, 8).astype(float).tolist()
    widths = []
    for name, groups in (("grouped", [f"p{i // 8}" for i in range(200)]), ("alone", None)):
        run = ByHand(tmp_path / name)
        run.ok("full", 0, first_right(200), groups=groups)
        run.ok("chain3", 0, scores, groups=groups)
        gap = run.summary(recipe()).arms["chain3"].ft_gap
        widths.append(gap.high - gap.low)
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(8), rel=0.12)


def test_examples_are_paired_by_their_name_and_not_by_their_line(run: ByHand) -> None:
    names = [f"test-{i}" for i in range(200)]
    run.ok("full", 0, first_right(140), ids=names)
    run.ok("chain3", 0, first_right(140)[::-1], ids=names[::-1])
    gap = run.summary(recipe()).arms["chain3"].ft_gap
    assert gap == Interval(value=0.0, low=None, high=None, se=None)  # the same examples are right


def test_arms_are_compared_over_the_seeds_that_both_have(run: ByHand) -> None:
    for seed, right in ((0, 100), (1, 120), (2, 140)):
        run.ok("lora", seed, first_right(right))
    for seed, right in ((1, 150), (2, 180)):
        run.ok("chain3", seed, first_right(right))
    run.failed("chain3", 0, "loss is nan")
    run.ok("full", 2, first_right(190))
    summary = run.summary(recipe(seeds=[0, 1, 2]))
    arms = summary.arms
    assert summary.contrasts[0].value == pytest.approx((0.75 + 0.9) / 2 - (0.6 + 0.7) / 2)
    assert summary.contrasts[0].n_seeds == 2
    assert arms["chain3"].ft_gap.value == pytest.approx(0.95 - 0.9)
    assert arms["chain3"].closed.value == pytest.approx((0.9 - 0.7) / (0.95 - 0.7))
    assert arms["lora"].test_score.mean == pytest.approx(0.6)
    assert {name: arm.n_seeds for name, arm in arms.items()} == {"base": 0, "lora": 3, "chain3": 2, "full": 1}
    assert arms["chain3"].states == {0: "failed", 1: "ok", 2: "ok"}
    assert arms["chain3"].errors == {0: "loss is nan"}
    assert arms["full"].states == {0: "missing", 1: "missing", 2: "ok"}
    said = "\n".join(verdict(summary))
    assert "chain3 seed 0 failed: loss is nan" in said
    assert "chain3: 2 of 3 seeds are there; its means are over those." in said
    assert "full: 1 of 3 seeds" in said
    assert "lora:" not in said


def test_arms_without_a_common_seed_are_not_compared(run: ByHand) -> None:
    run.ok("lora", 0, first_right(100))
    run.ok("chain3", 1, first_right(150))
    run.ok("full", 1, first_right(160))
    summary = run.summary(recipe(seeds=[0, 1]))
    assert [(one.first, one.second) for one in summary.contrasts] == [("chain3", "full")]
    assert "chain3, lora have no seed in common, so they are not compared" in verdict(summary)
    assert summary.arms["lora"].ft_gap is None
    assert summary.arms["chain3"].closed is None
    assert summary.arms["chain3"].ft_gap.value == pytest.approx(0.05)


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_an_arm_that_did_not_finish_has_no_numbers_and_takes_no_other_along(run: ByHand, status: str) -> None:
    run.ok("lora", 0, first_right(100))
    run.failed("full", 0, "out of memory", status)
    summary = run.summary(recipe())
    assert summary.arms["full"].states == {0: status}
    assert summary.arms["full"].test_score is None
    assert summary.arms["lora"].test_score.mean == 0.5
    assert summary.arms["lora"].ft_gap is None
    tables = list(named_tables(summary).values())
    assert all(len(row) == len(table.columns) for table in tables for row in table.texts)
    assert ["full", status] in [row[:2] for row in tables[0].texts]


def test_an_empty_run_folder_has_no_numbers_at_all(run: ByHand) -> None:
    summary = run.summary(recipe())
    assert {name: arm.states for name, arm in summary.arms.items()} == {
        name: {0: "missing"} for name in ("base", "lora", "chain3", "full")
    }
    assert summary.contrasts == []
    assert summary.rows is None
    assert all(row[1] == "missing" for table in named_tables(summary).values() for row in table.texts)


def test_results_of_arms_and_seeds_that_the_recipe_does_not_name_are_left_out(run: ByHand) -> None:
    run.ok("lora", 0, first_right(100))
    run.ok("lora", 7, first_right(200))
    run.ok("stranger", 0, first_right(200))
    summary = run.summary(recipe())
    assert summary.arms["lora"].test_score.mean == 0.5
    assert "stranger" not in summary.arms


def test_a_text_is_compared_by_the_loss_per_token_more_being_better(run: ByHand) -> None:
    losses = rng(1).uniform(4.0, 5.0, 100)
    run.ok("lora", 0, test_loss=losses.tolist())
    run.ok("chain3", 0, test_loss=(losses - 0.5 + rng(2).normal(0, 0.1, 100)).tolist())
    run.ok("full", 0, test_loss=(losses - 1.0 + rng(3).normal(0, 0.1, 100)).tolist())
    summary = run.summary(recipe("text"))
    assert summary.metric == "perplexity"
    # Half a nat less an example of two tokens is a quarter of a nat a token.
    assert summary.contrasts[0].value == pytest.approx(0.25, abs=0.02)
    assert summary.arms["chain3"].closed.value == pytest.approx(0.5, abs=0.05)
    assert summary.arms["chain3"].gap_acc is None
    assert "chain3 does better here, but 1 seed cannot carry a claim" in verdict(summary)[0]
    table = named_tables(summary)["loss"]
    assert table.columns[-3:] == ["test perplexity", "ft_gap", "closed"]
    assert {row[0]: row[-3] for row in table.texts}["lora"] == f"{math.exp(losses.sum() / 200):.2f}"


def test_a_text_difference_is_per_token_as_the_loss_is(run: ByHand) -> None:
    """Texts of unequal length: the difference of the arms is the difference of their losses in the table."""
    for arm, losses in (("lora", [10.0, 3.0, 30.0]), ("chain3", [9.0, 1.0, 29.0])):
        run.ok(arm, 0, test_loss=losses)
        where = run.folder.path / "arms" / arm / "seed-0" / "scores" / "test.jsonl"
        rows = run.folder.scores(arm, 0, "test")
        lengths = [10, 1, 50]
        run.folder.write_jsonl(
            where.relative_to(run.folder.path),
            [{**row.content(), "tokens": tokens} for row, tokens in zip(rows, lengths, strict=True)],
        )
    primary = run.summary(recipe("text", arms=["lora", "chain3"])).contrasts[0]
    assert primary.value == pytest.approx(43 / 61 - 39 / 61)


# ---------------------------------------------------------------------------------------------------------
# The verdict


@pytest.mark.parametrize("right", [100, 101, 98])
def test_no_arm_is_called_the_better_one_inside_the_interval(run: ByHand, right: int) -> None:
    run.ok("lora", 0, rng(1).permutation(first_right(100)).tolist())
    run.ok("chain3", 0, rng(2).permutation(first_right(right)).tolist())
    summary = run.summary(recipe())
    assert summary.contrasts[0].low <= 0 <= summary.contrasts[0].high
    said = "\n".join(verdict(summary))
    assert "the two cannot be told apart" in said
    assert "better" not in said


@pytest.mark.parametrize(("right", "winner"), [(160, "chain3"), (40, "lora")])
@pytest.mark.parametrize("n_seeds", [1, 5, 6])
def test_outside_the_interval_the_better_arm_is_named_and_a_claim_takes_six_seeds(
    run: ByHand, right: int, winner: str, n_seeds: int
) -> None:
    for seed in range(n_seeds):
        run.ok("lora", seed, first_right(100))
        run.ok("chain3", seed, first_right(right))
    said = verdict(run.summary(recipe(seeds=range(n_seeds))))[0]
    assert f"chain3 − lora = {(right - 100) / 200:+.3f} test exact match" in said
    assert (f", p < 0.0001: {winner} is the better one" in said) is (n_seeds == 6)
    few = f"{winner} does better here, but {n_seeds} seed{'s' * (n_seeds > 1)} cannot carry a claim about the methods"
    assert (f"{few} (p < 0.0001; no claim is made of fewer than 6)" in said) is (n_seeds < 6)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.3), (0.0, 0.3), (-0.3, 0.0), (None, None)])
@pytest.mark.parametrize("value", [0.2, -0.2])
@pytest.mark.parametrize("metric", ["accuracy", "exact match", "perplexity"])
def test_the_verdict_claims_nothing_from_an_interval_with_zero_or_none(
    run: ByHand, low: float | None, high: float | None, value: float, metric: str
) -> None:
    numbers = {"low": low, "high": high, "p": 0.03, "p_holm": None, "minimum_detectable": None if low is None else 0.25}
    contrasts = [contrast("chain3", "lora", value, None, role="primary", **numbers)]
    said = "\n".join(verdict(run.summary(recipe()).model_copy(update={"metric": metric, "contrasts": contrasts})))
    assert "better" not in said
    assert ("cannot be told apart" in said) is (low is not None)
    assert ("nothing is claimed" in said) is (low is None)


def six_seeds(run: ByHand, **right: int) -> None:
    """Arms that have so many of 200 examples right, and one more or less with each seed."""
    for seed in range(6):
        for arm, n in right.items():
            run.ok(arm, seed, rng(seed).permutation(first_right(n + seed % 2)).tolist())


def test_secondary_contrasts_are_corrected_for_their_number_and_the_primary_is_not(run: ByHand) -> None:
    six_seeds(run, base=85, lora=100, chain3=150, full=160)
    comparison = {"primary": ["chain3", "lora"], "secondary": [["full", "lora"], ["lora", "base"]]}
    contrasts = run.summary(recipe(seeds=range(6), comparison=comparison)).contrasts
    assert [(c.first, c.second, c.role) for c in contrasts] == [
        ("chain3", "lora", "primary"),
        ("full", "lora", "secondary"),
        ("lora", "base", "secondary"),
        ("chain3", "full", "later"),
    ]
    ours = [c.p for c in contrasts]
    assert [c.p_holm for c in contrasts[1:3]] == pytest.approx(multipletests(ours[1:3], method="holm")[1].tolist())
    assert contrasts[0].p_holm is contrasts[3].p_holm is None
    # Of these rows six seeds that agree are surer than that of others: all reach 2 / 2**6.
    assert [c.p_rows for c in contrasts] == pytest.approx([2 / 64] * len(contrasts))
    assert [c.claim for c in contrasts] == [True, True, contrasts[2].p_holm < 0.05, False]
    said = verdict(run.summary(recipe(seeds=range(6), comparison=comparison)))
    assert "p < 0.0001: chain3 is the better one." in said[0]
    assert "Holm-corrected p < 0.0001: full is the better one." in said[1]


def test_a_secondary_contrast_whose_interval_leaves_out_zero_may_carry_no_claim_after_holm(run: ByHand) -> None:
    six_seeds(run, base=85, lora=100, chain3=103)
    comparison = {"primary": ["chain3", "base"], "secondary": [["lora", "base"], ["chain3", "lora"]]}
    settled = run.summary(recipe(seeds=range(6), comparison=comparison)).contrasts[1]
    assert settled.low > 0
    assert settled.p < 0.05
    assert settled.p_holm == pytest.approx(2 * settled.p)
    assert settled.claim is (settled.p_holm < 0.05)


def test_the_table_of_contrasts_says_which_were_named_before(run: ByHand) -> None:
    six_seeds(run, lora=100, chain3=150, full=160)
    table = contrasts_table(run.summary(recipe(seeds=range(6))))
    assert table.title == "Contrasts on test: exact match, more is better"
    assert [row[:2] for row in table.texts] == [
        ["chain3 − lora", "primary"],
        ["lora − full", "not named before"],
        ["chain3 − full", "not named before"],
    ]
    assert all(len(row) == len(table.columns) for row in table.texts)
    assert table.texts[0][-2:] == ["6", "200"]


def test_a_contrast_of_losses_is_minus_the_loss_per_token(run: ByHand) -> None:
    run.ok("lora", 0, first_right(100), test_loss=[1.0, 1.4] * 100)
    run.ok("chain3", 0, first_right(100), test_loss=[0.8, 1.1] * 100)
    summary = run.summary(recipe(comparison={"primary": ["chain3", "lora"], "metric": "loss"}))
    one = summary.contrasts[0]
    assert one.metric == "loss"
    assert one.value == pytest.approx((0.2 + 0.3) / 2 / 2)  # two tokens an example
    assert "test -loss" in verdict(summary)[0]
    assert contrasts_table(summary).title == "Contrasts on test: −loss, nats per target token, more is better"


def test_what_a_study_of_this_size_would_miss_is_said_where_nothing_was_found(run: ByHand) -> None:
    run.ok("lora", 0, rng(1).permutation(first_right(100)).tolist())
    run.ok("chain3", 0, rng(2).permutation(first_right(102)).tolist())
    summary = run.summary(recipe())
    smallest = summary.contrasts[0].minimum_detectable
    assert f"a difference below {smallest:.3f} would mostly be missed by this study." in verdict(summary)[0]
    # 200 differences of standard deviation near .7: (1.97 + 0.84) × .7 / sqrt(200).
    assert smallest == pytest.approx(0.139, rel=0.1)


def test_a_damaged_result_is_named_and_takes_no_other_along(run: ByHand) -> None:
    for seed in (0, 1):
        run.ok("lora", seed, first_right(100))
        run.ok("chain3", seed, first_right(120))
    path = run.folder.job(Job(arm="chain3", seed=1)) / "result.json"
    path.write_text('{"status": "ok", "run')
    summary = run.summary(recipe(seeds=[0, 1]))
    assert summary.arms["lora"].n_seeds == 2
    assert summary.arms["chain3"].n_seeds == 1
    assert summary.contrasts[0].n_seeds == 1
    [note] = [note for note in summary.notes if "damaged" in note]
    assert note.startswith(f"{path} is damaged (")
    assert "chain3, lora are compared over the seeds that all of them have, without 1" in verdict(summary)


@pytest.mark.parametrize("damage", ["not json\n", '{"id": "test-0", "nats"\n'])
def test_damaged_scores_cost_the_comparison_that_needs_them(run: ByHand, damage: str) -> None:
    for arm, right in (("lora", 100), ("chain3", 120), ("full", 140)):
        run.ok(arm, 0, first_right(right))
    path = run.folder.job(Job(arm="chain3", seed=0)) / "scores" / "test.jsonl"
    path.write_text(damage)
    summary = run.summary(recipe())
    assert [(c.first, c.second) for c in summary.contrasts] == [("lora", "full")]
    assert summary.arms["chain3"].test_score.mean == 0.6
    assert any(note.startswith(f"{path} is damaged (") for note in summary.notes)


def test_arms_that_were_scored_on_other_examples_are_not_compared(run: ByHand) -> None:
    run.ok("lora", 0, first_right(100))
    run.ok("full", 0, first_right(140))
    run.ok("chain3", 0, first_right(120)[:150])
    summary = run.summary(recipe())
    assert [(c.first, c.second) for c in summary.contrasts] == [("lora", "full")]
    assert summary.arms["lora"].ft_gap is not None
    assert any("were not all scored on the same test examples" in line for line in verdict(summary))


def test_without_a_primary_question_no_arm_is_named(run: ByHand) -> None:
    run.ok("lora", 0, first_right(20))
    run.ok("chain3", 0, first_right(190))
    said = "\n".join(verdict(run.summary(recipe(comparison={}))))
    assert "better" not in said
    assert "chain3" not in said


def test_one_seed_is_said_to_prove_nothing_about_another(run: ByHand) -> None:
    run.ok("lora", 0, first_right(100))
    assert any(line.startswith("One seed: ") for line in verdict(run.summary(recipe())))
    assert not any(line.startswith("One seed: ") for line in verdict(run.summary(recipe(seeds=[0, 1]))))


def test_a_learning_rate_at_the_edge_of_its_grid_is_pointed_out(run: ByHand) -> None:
    run.ok("lora", 0, first_right(100), at_grid_edge=["learning_rate", "rank"])
    run.ok("chain3", 0, first_right(100))
    said = verdict(run.summary(recipe()))
    assert [line.split(" is at")[0] for line in said if "edge of its grid" in line] == [
        "lora: the chosen learning rate",
        "lora: the chosen rank",
    ]


def test_arms_that_were_trained_otherwise_and_answer_alike_to_the_bit_are_pointed_out(run: ByHand) -> None:
    for arm, state, last in (("lora", "a", 1.0), ("chain3", "b", 1.0), ("full", "c", 1.0 + 1e-12), ("base", "a", 1.0)):
        run.ok(arm, 0, first_right(2, 3), test_loss=[1.0, 1.5, last], scored_state=state)
    summary = run.summary(recipe(comparison={}, arms=["lora", "chain3", "full", "base"]))
    assert summary.same_outputs == [("lora", "chain3", 0)]  # base and lora have one state, so they ought to agree
    (line,) = [line for line in verdict(summary) if "to the bit" in line]
    assert line.startswith(
        "lora and chain3 give the same test losses to the bit under seed 0, though not trained alike"
    )


@pytest.mark.parametrize(
    ("training", "text"),
    [
        ({"steps": 10}, "matched: optimizer steps (10)"),
        ({"steps": 10, "match": "tokens"}, "matched: positions (1.00 k to 1.20 k)"),
        ({"steps": 10, "match": "flops"}, "matched: training FLOPs (2.00 B)"),
        ({"steps": 10, "protocol": "grow"}, "matched: optimizer steps of each link"),
    ],
)
def test_every_table_says_what_the_arms_were_given_the_same_of(
    run: ByHand, training: dict[str, Any], text: str
) -> None:
    run.ok("base", 0, first_right(10), steps=0, positions=0, flops=0.0)  # trains nothing, so nothing is matched
    run.ok("lora", 0, first_right(10), positions=1000, flops=2e9)
    run.ok("chain3", 0, first_right(10), positions=1200, flops=2e9)
    tables = named_tables(run.summary(recipe(training=training))).values()
    assert [table.title.rpartition("; ")[2] for table in tables] == [text] * 3


def test_arms_of_unequal_steps_are_said_to_differ_by_that_unless_something_else_was_matched(run: ByHand) -> None:
    run.ok("base", 0, first_right(10), steps=0)
    run.ok("lora", 0, first_right(10), steps=10)
    run.ok("chain3", 0, first_right(10), steps=30)
    said = "The arms were trained for 10 to 30 optimizer steps"
    assert any(line.startswith(said) for line in verdict(run.summary(recipe())))
    matched = recipe(training={"steps": 10, "match": "tokens"})
    assert not any(line.startswith(said) for line in verdict(run.summary(matched)))


def test_every_trial_of_a_search_has_its_row_and_the_chosen_one_is_marked(run: ByHand) -> None:
    run.ok("lora", 0, first_right(10))
    trials = [
        {"values": {"rank": 4, "init": "default"}, "loss": 0.5, "score": 0.25, "failed": False},
        {"values": {"rank": 4, "init": "pissa"}, "loss": 0.25, "score": 0.75, "failed": False},
        {"values": {"rank": 8, "init": "default"}, "loss": None, "score": None, "failed": True},
        {"values": {"rank": 8, "init": "pissa"}, "loss": 0.75, "score": 0.125, "failed": False},
    ]
    run.folder.write_text(Path("trials/lora/chosen.json"), json.dumps({"chosen": 1, "seeds": [1000], "trials": trials}))
    arm = Arm.model_validate({"search": {"rank": [4, 8], "init": ["default", "pissa"]}})
    searched = recipe(comparison={}).model_copy(update={"arms": {"lora": arm}})
    table = named_tables(run.summary(searched))["trials"]
    assert table.title.startswith("Trials of the search, on validation, by loss; matched: optimizer steps")
    assert table.texts == [
        ["lora", "rank=4, init=default", "0.500", "0.250", "", "–"],
        ["lora", "rank=4, init=pissa", "0.250", "0.750", "chosen", "–"],
        ["lora", "rank=8, init=default", "failed", "failed", "", "–"],
        ["lora", "rank=8, init=pissa", "0.750", "0.125", "", "–"],
    ]


def test_a_base_has_a_column_only_where_the_arms_bases_differ(run: ByHand) -> None:
    run.ok("lora", 0, first_right(10))
    run.ok("chain3", 0, first_right(10))
    assert "base" not in named_tables(run.summary(recipe()))["cost"].columns
    run.ok("chain3", 0, first_right(10), base={"dtype": "bfloat16", "quantization": "nf4"})
    cost = named_tables(run.summary(recipe()))["cost"]
    place = cost.columns.index("base")
    assert {row[0]: row[place] for row in cost.texts if row[0] in ("lora", "chain3")} == {
        "lora": "float32",
        "chain3": "nf4",
    }


@pytest.mark.parametrize(
    ("evaluation", "rule"),
    [
        ({}, "Scored checkpoint: the last step."),
        ({"checkpoint": "best"}, "the step that was best on validation (loss)"),
        ({"checkpoint": "best", "select_by": "score"}, "the step that was best on validation (score)"),
    ],
)
def test_the_rule_of_the_scored_checkpoint_is_stated(run: ByHand, evaluation: dict[str, str], rule: str) -> None:
    run.ok("lora", 0, first_right(100))
    assert any(rule in line for line in verdict(run.summary(recipe(evaluation=evaluation))))


def test_the_same_folder_gives_the_same_summary(run: ByHand) -> None:
    for arm, scores in zip(("lora", "chain3"), two_arms(100), strict=True):
        run.ok(arm, 0, scores[0].tolist())
    assert run.summary(recipe()) == run.summary(recipe())

"""Intervals against scipy and closed forms, the table's numbers counted by hand, and what the verdict dares to say.

Run: pytest tests/test_compare.py
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cola.compare import Estimate, estimate, sign_flip_p, summarize
from cola.plan import Job
from cola.recipe import Recipe
from cola.record import RunFolder
from cola.tables import result_tables, verdict

Z = stats.norm.ppf(0.975)


def difference(a: float, b: float) -> float:
    return a - b


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def two_arms(n: int, n_seeds: int = 1, seed: int = 0) -> list[np.ndarray]:
    """0/1 scores of two arms that agree on most of n examples, one row a seed."""
    generator = rng(seed)
    first = generator.random((n_seeds, n)) < 0.7
    second = np.where(generator.random((n_seeds, n)) < 0.25, generator.random((n_seeds, n)) < 0.4, first)
    return [first.astype(float), second.astype(float)]


def width(result: Estimate) -> float:
    assert result.low is not None
    assert result.high is not None
    return result.high - result.low


# ---------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize("n", [40, 300])
def test_with_one_seed_the_interval_is_scipys_percentile_bootstrap_over_examples(n: int) -> None:
    arms = two_arms(n, seed=n)
    ours = estimate(difference, arms, range(n), rng())
    differences = (arms[0] - arms[1])[0]
    theirs = stats.bootstrap((differences,), np.mean, n_resamples=20_000, method="percentile", rng=rng(1))
    assert ours.value == pytest.approx(differences.mean())
    # The 2.5 % quantile of 4000 resamples has a standard error of sqrt(.025 × .975 / 4000) / .0584 = .042 of theirs.
    tolerance = 0.25 * theirs.standard_error + 1 / n  # and a resample's mean moves in steps of 1 / n
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)


def test_a_ratio_has_scipys_interval_too() -> None:
    n = 400
    generator = rng(5)
    full, lora = generator.normal(0.8, 0.2, n), generator.normal(0.5, 0.2, n)
    arm = 0.5 * (full + lora) + generator.normal(0, 0.1, n)

    def closed(f: Any, lo: Any, a: Any) -> Any:
        return (a - lo) / (f - lo)

    ours = estimate(closed, [x[None] for x in (full, lora, arm)], range(n), rng())
    theirs = stats.bootstrap(
        (full, lora, arm),
        lambda f, lo, a, axis: closed(f.mean(axis), lo.mean(axis), a.mean(axis)),
        paired=True,
        vectorized=True,
        n_resamples=9_999,
        method="percentile",
        rng=rng(1),
    )
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.25 * theirs.standard_error)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.25 * theirs.standard_error)


def test_arms_are_paired_by_example() -> None:
    """Two arms whose scores move together differ far less than each of them spreads."""
    n = 500
    common = rng(2).normal(0, 1, n)
    differences = rng(3).normal(0.1, 0.05, n)
    result = estimate(difference, [(common + differences)[None], common[None]], range(n), rng())
    assert width(result) == pytest.approx(2 * Z * differences.std() / math.sqrt(n), rel=0.1)
    assert result.excludes_zero


def test_one_generator_seed_gives_one_interval_whatever_numpys_global_state_is() -> None:
    arms = two_arms(60)
    np.random.seed(1)  # noqa: NPY002 - the state that must not matter
    first = estimate(difference, arms, range(60), rng(7))
    np.random.seed(2)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert estimate(difference, arms, range(60), rng(7)) == first
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert estimate(difference, arms, range(60), rng(8)) != first


def test_examples_that_share_a_passage_are_drawn_together() -> None:
    """Fifty passages of eight alike examples are worth fifty examples, not four hundred."""
    effects = rng(4).normal(0.05, 0.3, 50)
    scores = np.repeat(effects, 8)[None]
    arms = [scores, np.zeros_like(scores)]
    passages = np.repeat(np.arange(50), 8)
    grouped = estimate(difference, arms, [f"p{p}" for p in passages], rng())
    alone = estimate(difference, arms, range(400), rng())
    assert grouped.value == alone.value == pytest.approx(effects.mean())
    assert width(grouped) == pytest.approx(2 * Z * effects.std() / math.sqrt(50), rel=0.1)
    assert width(grouped) / width(alone) == pytest.approx(math.sqrt(8), rel=0.1)


def test_groups_of_unequal_size_count_by_their_examples() -> None:
    """The cluster-robust standard error of a mean: sqrt(sum over groups of (sum of residuals)²) / N."""
    generator = rng(6)
    sizes = generator.integers(1, 12, 80)
    groups = np.repeat(np.arange(80), sizes)
    scores = np.repeat(generator.normal(2, 0.4, 80), sizes) + generator.normal(0, 0.2, sizes.sum())
    result = estimate(difference, [scores[None], np.zeros((1, len(scores)))], list(groups), rng())
    residuals = np.bincount(groups, weights=scores - scores.mean())
    error = math.sqrt((residuals**2).sum()) / len(scores)
    assert result.value == pytest.approx(scores.mean())
    assert width(result) == pytest.approx(2 * Z * error, rel=0.12)


def test_the_order_of_examples_that_share_a_group_does_not_matter() -> None:
    arms = two_arms(60)
    groups = [f"g{i % 20}" for i in range(60)]
    shuffled = rng(9).permutation(60)
    ours = estimate(difference, arms, groups, rng())
    again = estimate(difference, [arm[:, shuffled] for arm in arms], [groups[i] for i in shuffled], rng())
    assert (again.low, again.high) == pytest.approx((ours.low, ours.high))


def test_seeds_that_disagree_widen_the_interval() -> None:
    """No spread over examples, two seeds 0.2 and 0.4 ahead: the resamples are 0.2, 0.3 and 0.4 at 1:2:1."""
    ahead = np.array([[0.2] * 50, [0.4] * 50])
    result = estimate(difference, [ahead, np.zeros_like(ahead)], range(50), rng())
    assert (result.value, result.low, result.high) == pytest.approx((0.3, 0.2, 0.4))


def test_seeds_are_drawn_for_all_arms_at_once() -> None:
    """Seeds that lift both arms alike say nothing about their difference."""
    lift = np.array([[0.0] * 50, [0.5] * 50])
    assert estimate(difference, [lift + 0.1, lift], range(50), rng()).value == pytest.approx(0.1)
    spread = rng(3).normal(0, 0.1, 50)
    paired = estimate(difference, [lift + spread, lift], range(50), rng())
    assert width(paired) == pytest.approx(2 * Z * spread.std() / math.sqrt(50), rel=0.1)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([[1.0, 0.0, 1.0]], [[1.0, 0.0, 1.0]], 0.0),
        ([[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]], 1.0),
        ([[0.7]], [[0.2]], 0.5),
    ],
    ids=["the-same-everywhere", "apart-alike-everywhere", "one-example"],
)
def test_there_is_no_interval_where_nothing_spreads(first: list, second: list, value: float) -> None:
    result = estimate(difference, [np.array(first), np.array(second)], range(len(first[0])), rng())
    assert result == Estimate(pytest.approx(value), None, None)
    assert not result.excludes_zero


def test_one_group_alone_gives_no_interval() -> None:
    assert estimate(difference, two_arms(40), ["all"] * 40, rng()).low is None


def test_rounding_is_no_spread() -> None:
    """Every resample has the same difference, so only rounding tells resamples apart: [0.1, 0.1] is no interval."""
    right, wrong = np.ones((3, 10)), np.zeros((3, 10))
    common = rng(1).normal(2.0, 0.5, (1, 30))
    cases = [[right, wrong], [np.full((1, 7), 0.1), np.zeros((1, 7))], [common + 0.1, common]]
    results = [estimate(difference, arms, range(arms[0].shape[1]), rng()) for arms in cases]
    assert [result.value for result in results] == pytest.approx([1.0, 0.1, 0.1])
    assert [(result.low, result.high) for result in results] == [(None, None)] * 3


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [
        (0.1, 0.2, True),
        (-0.2, -0.1, True),
        (-0.1, 0.2, False),
        (0.0, 0.2, False),
        (-0.2, 0.0, False),
        (None, None, False),
    ],
)
def test_an_interval_excludes_zero_only_if_it_lies_on_one_side(
    low: float | None, high: float | None, excludes: bool
) -> None:
    assert Estimate(0.1, low, high).excludes_zero is excludes


# ---------------------------------------------------------------------------------------------------------
# Run folders written by hand


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
                "loss": losses[i],
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
        result = {
            "format": 1,
            "status": "ok",
            "run_info": {
                "arm": arm,
                "seed": seed,
                "choice": [],
                "trial": False,
                "seconds": 1.0,
                "error": None,
            },
            "train_info": {
                "learning_rate": 2e-4,
                "choice": {},
                "at_grid_edge": [],
                "base": {"dtype": "float32", "quantization": None},
                "rules": {"merge_fraction": 1.0},
                "scored_step": 10,
                "scored_state": "whatever",
                "steps": 10,
                "tokens": 1000,
                "positions": 1000,
                "flops": 1e9,
                "without_gradient": 0,
                "num_trainable_params": 64,
                "train_seconds": 1.0,
                "total_seconds": 2.0,
                "knots": [],
                **info,
            },
            "evaluation": {
                "train": {"loss": train_loss, "score": train_score, "n": len(train)},
                "validation": {"loss": 0.75, "score": None if test is None else 0.5, "n": 4},
                "test": {"loss": loss, "score": test_score, "n": n},
                "gap_loss": loss - train_loss,
                "gap_acc": None if test is None else train_score - test_score,
            },
            "meta_info": {"rows": {"train": len(train), "validation": 4, "test": n}},
        }
        where = self.folder.job(Job(arm=arm, seed=seed)).relative_to(self.folder.path)
        self.folder.write_json(where / "result.json", result)
        self.folder.write_jsonl(where / "scores" / "test.jsonl", rows)

    def failed(self, arm: str, seed: int, error: str, status: str = "failed") -> None:
        where = self.folder.job(Job(arm=arm, seed=seed)).relative_to(self.folder.path)
        info = {"arm": arm, "seed": seed, "choice": [], "trial": False, "seconds": 1.0, "error": error}
        self.folder.write_json(where / "result.json", {"format": 1, "status": status, "run_info": info})

    def summary(self, plan: Recipe, seed: int = 0) -> dict[str, Any]:
        return summarize(plan, self.folder, rng(seed))


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
    arms = summary["arms"]
    assert {name: arm["gap_acc"]["mean"] for name, arm in arms.items()} == pytest.approx(
        {"base": 0.25 - 0.2, "lora": 0.9 - 0.5, "chain3": 1.0 - 0.65, "full": 1.0 - 0.7}
    )
    # 200 examples of two tokens each: 1.0, 1.2 and 1.6 nats an example are 0.5, 0.6 and 0.8 a token.
    assert {name: arm["gap_loss"]["mean"] for name, arm in arms.items() if name != "base"} == pytest.approx(
        {"lora": 0.5 - 0.2, "chain3": 0.6 - 0.1, "full": 0.8 - 0.05}
    )
    assert {name: arm["ft_gap"]["value"] for name, arm in arms.items() if name != "full"} == pytest.approx(
        {"base": 0.5, "lora": 0.2, "chain3": 0.05}
    )
    assert "ft_gap" not in arms["full"]
    assert arms["chain3"]["closed"]["value"] == pytest.approx((0.65 - 0.5) / (0.7 - 0.5))
    assert arms["base"]["closed"]["value"] == pytest.approx((0.2 - 0.5) / (0.7 - 0.5))
    assert "closed" not in arms["lora"]
    assert "closed" not in arms["full"]
    assert summary["primary"]["value"] == pytest.approx(0.65 - 0.5)
    assert (summary["primary"]["n_seeds"], summary["primary"]["n_examples"]) == (1, 200)
    assert summary["rows"] == {"train": 1, "validation": 4, "test": 200}
    assert [arm["n_seeds"] for arm in arms.values()] == [1, 1, 1, 1]


def test_the_interval_of_ft_gap_is_scipys(run: ByHand) -> None:
    full, chain = two_arms(200, seed=3)
    run.ok("full", 0, full[0].tolist())
    run.ok("chain3", 0, chain[0].tolist())
    gap = run.summary(recipe())["arms"]["chain3"]["ft_gap"]
    theirs = stats.bootstrap((full[0] - chain[0],), np.mean, method="percentile", n_resamples=20_000, rng=rng(1))
    tolerance = 0.25 * theirs.standard_error
    assert gap["low"] == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert gap["high"] == pytest.approx(theirs.confidence_interval.high, abs=tolerance)


def test_over_seeds_the_table_has_mean_and_sample_standard_deviation(run: ByHand) -> None:
    for seed, right in ((0, 90), (1, 100), (2, 140)):
        run.ok("lora", seed, first_right(right))
    arm = run.summary(recipe(seeds=[0, 1, 2]))["arms"]["lora"]
    assert arm["test_score"]["mean"] == pytest.approx(0.55)
    assert arm["test_score"]["sd"] == pytest.approx(math.sqrt((0.1**2 + 0.05**2 + 0.15**2) / 2))


def test_with_one_seed_there_is_no_standard_deviation(run: ByHand) -> None:
    run.ok("lora", 0, first_right(90))
    assert run.summary(recipe())["arms"]["lora"]["test_score"] == {"mean": 0.45, "sd": None}


def test_closed_is_undefined_where_full_and_lora_cannot_be_told_apart(run: ByHand) -> None:
    scores = rng(1).permutation(first_right(100))
    run.ok("lora", 0, scores.tolist())
    run.ok("full", 0, rng(2).permutation(first_right(102)).tolist())
    run.ok("chain3", 0, first_right(150))
    summary = run.summary(recipe())
    gap = summary["arms"]["lora"]["ft_gap"]
    assert gap["low"] < 0 < gap["high"]
    assert summary["arms"]["chain3"]["closed"] == "undefined"


def test_closed_is_undefined_where_full_and_lora_agree_on_every_example(run: ByHand) -> None:
    run.ok("lora", 0, first_right(100))
    run.ok("full", 0, first_right(100))
    run.ok("chain3", 0, first_right(150))
    assert run.summary(recipe())["arms"]["chain3"]["closed"] == "undefined"


def test_there_is_no_gap_to_close_where_full_fine_tuning_is_the_worse_one(run: ByHand) -> None:
    run.ok("lora", 0, first_right(150))
    run.ok("full", 0, first_right(100))
    run.ok("chain3", 0, first_right(120))
    summary = run.summary(recipe())
    assert summary["arms"]["chain3"]["closed"] == "no gap"
    assert summary["arms"]["chain3"]["ft_gap"]["value"] == pytest.approx(-0.1)


def test_a_group_that_the_recipe_names_widens_the_interval(tmp_path: Path) -> None:
    scores = np.repeat(rng(3).random(25) < 0.6, 8).astype(float).tolist()
    widths = []
    for name, groups in (("grouped", [f"p{i // 8}" for i in range(200)]), ("alone", None)):
        run = ByHand(tmp_path / name)
        run.ok("full", 0, first_right(200), groups=groups)
        run.ok("chain3", 0, scores, groups=groups)
        gap = run.summary(recipe())["arms"]["chain3"]["ft_gap"]
        widths.append(gap["high"] - gap["low"])
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(8), rel=0.12)


def test_examples_are_paired_by_their_name_and_not_by_their_line(run: ByHand) -> None:
    names = [f"test-{i}" for i in range(200)]
    run.ok("full", 0, first_right(140), ids=names)
    run.ok("chain3", 0, first_right(140)[::-1], ids=names[::-1])
    gap = run.summary(recipe())["arms"]["chain3"]["ft_gap"]
    assert gap == {"value": 0.0, "low": None, "high": None}  # the same examples are right


def test_arms_are_compared_over_the_seeds_that_both_have(run: ByHand) -> None:
    for seed, right in ((0, 100), (1, 120), (2, 140)):
        run.ok("lora", seed, first_right(right))
    for seed, right in ((1, 150), (2, 180)):
        run.ok("chain3", seed, first_right(right))
    run.failed("chain3", 0, "loss is nan")
    run.ok("full", 2, first_right(190))
    summary = run.summary(recipe(seeds=[0, 1, 2]))
    arms = summary["arms"]
    assert summary["primary"]["value"] == pytest.approx((0.75 + 0.9) / 2 - (0.6 + 0.7) / 2)
    assert summary["primary"]["n_seeds"] == 2
    assert arms["chain3"]["ft_gap"]["value"] == pytest.approx(0.95 - 0.9)
    assert arms["chain3"]["closed"]["value"] == pytest.approx((0.9 - 0.7) / (0.95 - 0.7))
    assert arms["lora"]["test_score"]["mean"] == pytest.approx(0.6)
    assert {name: arm["n_seeds"] for name, arm in arms.items()} == {"base": 0, "lora": 3, "chain3": 2, "full": 1}
    assert arms["chain3"]["states"] == {0: "failed", 1: "ok", 2: "ok"}
    assert arms["chain3"]["errors"] == {0: "loss is nan"}
    assert arms["full"]["states"] == {0: "missing", 1: "missing", 2: "ok"}
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
    assert summary["primary"] is None
    assert "ft_gap" not in summary["arms"]["lora"]
    assert "closed" not in summary["arms"]["chain3"]
    assert summary["arms"]["chain3"]["ft_gap"]["value"] == pytest.approx(0.05)


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_an_arm_that_did_not_finish_has_no_numbers_and_takes_no_other_along(run: ByHand, status: str) -> None:
    run.ok("lora", 0, first_right(100))
    run.failed("full", 0, "out of memory", status)
    summary = run.summary(recipe())
    assert summary["arms"]["full"]["states"] == {0: status}
    assert "test_score" not in summary["arms"]["full"]
    assert summary["arms"]["lora"]["test_score"]["mean"] == 0.5
    assert "ft_gap" not in summary["arms"]["lora"]
    tables = result_tables(summary)
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert ["full", status] in [row[:2] for row in tables[0].rows]


def test_an_empty_run_folder_has_no_numbers_at_all(run: ByHand) -> None:
    summary = run.summary(recipe())
    assert {name: arm["states"] for name, arm in summary["arms"].items()} == {
        name: {0: "missing"} for name in ("base", "lora", "chain3", "full")
    }
    assert summary["primary"] is None
    assert summary["rows"] is None
    assert all(row[1] == "missing" for table in result_tables(summary) for row in table.rows)


def test_results_of_arms_and_seeds_that_the_recipe_does_not_name_are_left_out(run: ByHand) -> None:
    run.ok("lora", 0, first_right(100))
    run.ok("lora", 7, first_right(200))
    run.ok("stranger", 0, first_right(200))
    summary = run.summary(recipe())
    assert summary["arms"]["lora"]["test_score"]["mean"] == 0.5
    assert "stranger" not in summary["arms"]


def test_a_text_is_compared_by_the_loss_per_token_more_being_better(run: ByHand) -> None:
    losses = rng(1).uniform(4.0, 5.0, 100)
    run.ok("lora", 0, test_loss=losses.tolist())
    run.ok("chain3", 0, test_loss=(losses - 0.5 + rng(2).normal(0, 0.1, 100)).tolist())
    run.ok("full", 0, test_loss=(losses - 1.0 + rng(3).normal(0, 0.1, 100)).tolist())
    summary = run.summary(recipe("text"))
    assert summary["metric"] == "perplexity"
    # Half a nat less an example of two tokens is a quarter of a nat a token.
    assert summary["primary"]["value"] == pytest.approx(0.25, abs=0.02)
    assert summary["arms"]["chain3"]["closed"]["value"] == pytest.approx(0.5, abs=0.05)
    assert summary["arms"]["chain3"]["gap_acc"] is None
    assert "chain3 does better on these rows, but 1 seed cannot carry a claim" in verdict(summary)[0]
    table = result_tables(summary)[0]
    assert table.columns[-3:] == ["test perplexity", "ft_gap", "closed"]
    assert {row[0]: row[-3] for row in table.rows}["lora"] == f"{math.exp(losses.sum() / 200):.2f}"


def test_a_text_difference_is_per_token_as_the_loss_is(run: ByHand) -> None:
    """Texts of unequal length: the difference of the arms is the difference of their losses in the table."""
    for arm, losses in (("lora", [10.0, 3.0, 30.0]), ("chain3", [9.0, 1.0, 29.0])):
        run.ok(arm, 0, test_loss=losses)
        where = run.folder.path / "arms" / arm / "seed-0" / "scores" / "test.jsonl"
        rows = run.folder.scores(arm, 0, "test")
        lengths = [10, 1, 50]
        run.folder.write_jsonl(
            where.relative_to(run.folder.path),
            [{**row, "tokens": tokens} for row, tokens in zip(rows, lengths, strict=True)],
        )
    primary = run.summary(recipe("text", arms=["lora", "chain3"]))["primary"]
    assert primary["value"] == pytest.approx(43 / 61 - 39 / 61)


# ---------------------------------------------------------------------------------------------------------
# The verdict


@pytest.mark.parametrize("right", [100, 101, 98])
def test_no_arm_is_called_the_better_one_inside_the_interval(run: ByHand, right: int) -> None:
    run.ok("lora", 0, rng(1).permutation(first_right(100)).tolist())
    run.ok("chain3", 0, rng(2).permutation(first_right(right)).tolist())
    summary = run.summary(recipe())
    assert summary["primary"]["low"] <= 0 <= summary["primary"]["high"]
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
    # Five seeds that all agree reach p = 2 / 2**5 = .0625, six reach .031.
    assert (f"sign-flip p = 0.0312: {winner} is the better one" in said) is (n_seeds == 6)
    assert (f"{winner} does better on these rows, but" in said) is (n_seeds < 6)


def test_the_sign_flip_test_of_many_seeds_is_near_the_t_test() -> None:
    differences = rng(3).normal(0.5, 1.0, 30)
    p = sign_flip_p(differences[:, None], np.zeros((30, 1)), [1.0], rng())
    assert p == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue, rel=0.25)
    assert p > 0


@pytest.mark.parametrize("differences", [[1, 2, 3, 4, 5, 6], [1, -2, 3, 4], [2, 2, -1, 0, 3, 1, 1]])
def test_the_sign_flip_test_is_scipys_exact_permutation_test(differences: list[float]) -> None:
    first = np.array(differences, dtype=float)[:, None] + np.zeros((1, 3))
    zeros = np.zeros_like(first)
    reference = stats.permutation_test(
        (np.array(differences, dtype=float),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(first, zeros, [1.0, 1.0, 1.0], rng()) == pytest.approx(reference.pvalue)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.3), (0.0, 0.3), (-0.3, 0.0), (None, None)])
@pytest.mark.parametrize("value", [0.2, -0.2])
@pytest.mark.parametrize("metric", ["accuracy", "exact match", "perplexity"])
def test_the_verdict_claims_nothing_from_an_interval_with_zero_or_none(
    run: ByHand, low: float | None, high: float | None, value: float, metric: str
) -> None:
    summary = run.summary(recipe())
    given = Estimate(value, low, high)
    summary["metric"] = metric
    summary["primary"] = {"arms": ["chain3", "lora"], **asdict(given), "excludes_zero": given.excludes_zero}
    summary["primary"] |= {"n_seeds": 6, "p_sign_flip": 0.03}
    said = "\n".join(verdict(summary))
    assert "better" not in said
    assert ("cannot be told apart" in said) is (low is not None)
    assert ("nothing is claimed" in said) is (low is None)


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
    assert summary["same_outputs"] == [("lora", "chain3", 0)]  # base and lora have one state, so they ought to agree
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
    tables = result_tables(run.summary(recipe(training=training)))
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
        {"values": {"rank": 8, "init": "default"}, "loss": None, "score": None, "failed": True},
        {"values": {"rank": 4, "init": "pissa"}, "loss": 0.25, "score": 0.75, "failed": False},
    ]
    run.folder.write_json(Path("trials/lora/chosen.json"), {"chosen": 2, "seeds": [0], "trials": trials})
    table = result_tables(run.summary(recipe()))[-1]
    assert table.title.startswith("Trials of the search, on validation; matched: optimizer steps")
    assert table.rows == [
        ["lora", "rank=4, init=default", "0.500", "0.250", ""],
        ["lora", "rank=8, init=default", "failed", "failed", ""],
        ["lora", "rank=4, init=pissa", "0.250", "0.750", "chosen"],
    ]


def test_a_base_has_a_column_only_where_the_arms_bases_differ(run: ByHand) -> None:
    run.ok("lora", 0, first_right(10))
    run.ok("chain3", 0, first_right(10))
    assert "base" not in result_tables(run.summary(recipe()))[-1].columns
    run.ok("chain3", 0, first_right(10), base={"dtype": "bfloat16", "quantization": "nf4"})
    cost = result_tables(run.summary(recipe()))[-1]
    place = cost.columns.index("base")
    assert {row[0]: row[place] for row in cost.rows if row[0] in ("lora", "chain3")} == {
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
    assert run.summary(recipe(), seed=0) == run.summary(recipe(), seed=0)
    assert run.summary(recipe(), seed=0)["primary"] != run.summary(recipe(), seed=1)["primary"]

"""Intervals, tests and corrections against scipy, statsmodels and closed forms; coverage by simulation.

Run: pytest tests/test_compare.py
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from cola import compare
from cola.compare import (
    Estimate,
    Parts,
    Table,
    bca,
    closed_share,
    difference,
    estimate,
    holm,
    iqm,
    iqm_estimate,
    iqm_sign_flip_p,
    sign_flip_p,
    smallest_p,
)

Z = stats.norm.ppf(0.975)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def two_arms(n: int, n_seeds: int = 1, seed: int = 0) -> list[np.ndarray]:
    """0/1 scores of two arms that agree on most of n examples, one row a seed."""
    generator = rng(seed)
    first = generator.random((n_seeds, n)) < 0.7
    second = np.where(generator.random((n_seeds, n)) < 0.25, generator.random((n_seeds, n)) < 0.4, first)
    return [first.astype(float), second.astype(float)]


def estimated(
    statistic: Any, arms: Sequence[np.ndarray], groups: Sequence[str | int], generator: np.random.Generator
) -> Estimate:
    return estimate(statistic, Table(np.stack(arms), groups), generator)


def width(result: Estimate) -> float:
    assert result.low is not None
    assert result.high is not None
    return result.high - result.low


# ---------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize("n", [40, 300])
def test_with_one_seed_the_interval_is_scipys_bca_bootstrap_over_examples(n: int) -> None:
    arms = two_arms(n, seed=n)
    ours = estimated(difference, arms, range(n), rng())
    differences = (arms[0] - arms[1])[0]
    theirs = stats.bootstrap((differences,), np.mean, n_resamples=20_000, method="BCa", rng=rng(1))
    assert ours.value == pytest.approx(differences.mean())
    # Ours is wider by Student's quantile and by n / (n - 1). The 2.5 % quantile of 4000 resamples has a standard error
    # of sqrt(.025 × .975 / 4000) / .0584 = .042 of theirs.
    wider = stats.t.ppf(0.975, n - 1) / Z * math.sqrt(n / (n - 1))
    tolerance = 0.25 * theirs.standard_error + 1 / n  # and a resample's mean moves in steps of 1 / n
    for end in ("low", "high"):
        expected = ours.value + wider * (getattr(theirs.confidence_interval, end) - ours.value)
        assert getattr(ours, end) == pytest.approx(expected, abs=tolerance)


def test_the_ends_are_scipys_bca_on_the_same_resamples() -> None:
    """Skewed data, so that bias correction and acceleration both matter."""
    sample = rng(2).exponential(size=60)
    theirs = stats.bootstrap((sample,), np.mean, n_resamples=9_999, method="BCa", rng=rng(1))
    centred = sample - sample.mean()
    # The jackknife's acceleration of a mean is a sixth of the sample's skewness by sqrt(n).
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    low, high = bca(theirs.bootstrap_distribution, sample.mean(), acceleration)
    percentiles = np.quantile(theirs.bootstrap_distribution, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), rel=2e-3)
    assert (low, high) != pytest.approx(tuple(percentiles), rel=1e-2)


def test_a_ratio_has_scipys_interval_too() -> None:
    n = 400
    generator = rng(5)
    full, lora = generator.normal(0.8, 0.2, n), generator.normal(0.5, 0.2, n)
    arm = 0.5 * (full + lora) + generator.normal(0, 0.1, n)
    ours = estimated(closed_share, [x[None] for x in (full, lora, arm)], range(n), rng())
    theirs = stats.bootstrap(
        (full, lora, arm),
        lambda f, lo, a, axis: closed_share(f.mean(axis), lo.mean(axis), a.mean(axis)),
        paired=True,
        vectorized=True,
        n_resamples=9_999,
        method="BCa",
        rng=rng(1),
    )
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.25 * theirs.standard_error)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.25 * theirs.standard_error)


def crossed(
    generator: np.random.Generator,
    n_seeds: int,
    n_examples: int,
    spread: tuple[float, float, float],
    true: float = 0.3,
    n_groups: int | None = None,
) -> Table:
    """Two arms whose differences have a part for each seed, for each example (or group of them), and a rest."""
    of_seed, of_example, rest = spread
    member_N = np.arange(n_examples) % (n_groups or n_examples)
    differences_SN = true + of_seed * generator.standard_normal((n_seeds, 1))
    differences_SN = differences_SN + of_example * generator.standard_normal(member_N.max() + 1)[member_N]
    differences_SN = differences_SN + rest * generator.standard_normal((n_seeds, n_examples))
    second_SN = generator.standard_normal((n_seeds, n_examples))
    return Table(np.stack([second_SN + differences_SN, second_SN]), member_N.tolist())


def binary(generator: np.random.Generator, n_seeds: int, n_examples: int) -> tuple[Table, float]:
    """0/1 scores, as exact match gives them; and the true difference of the two arms' probabilities."""
    hard_N = generator.normal(0, 1.5, n_examples)
    probabilities = []
    for shift in (0.4, 0.0):
        drift_S = generator.normal(0, 0.15, (n_seeds, 1))
        probabilities.append(stats.norm.cdf(shift + drift_S + hard_N))
    scores = [(generator.random(p.shape) < p).astype(float) for p in probabilities]
    # Over all examples and seeds: a normal with the sum of the variances.
    spread = math.sqrt(1 + 1.5**2 + 0.15**2)
    return Table(np.stack(scores), range(n_examples)), stats.norm.cdf(0.4 / spread) - 0.5


SPREADS = {"seeds": (0.3, 0.1, 0.3), "examples": (0.0, 1.0, 0.3), "rest": (0.0, 0.0, 1.0), "all": (0.08, 0.3, 0.7)}


@pytest.mark.parametrize("n_seeds", [3, 6, 10])
@pytest.mark.parametrize("spread", SPREADS)
def test_95_percent_intervals_cover_the_truth_as_often_as_they_say(
    n_seeds: int, spread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 experiments: a coverage of .95 is measured with a standard error of .011."""
    monkeypatch.setattr(compare, "RESAMPLES", 500)
    generator = rng(n_seeds)
    results = [estimate(difference, crossed(generator, n_seeds, 100, SPREADS[spread]), generator) for _ in range(400)]
    assert 0.92 <= np.mean([one.low <= 0.3 <= one.high for one in results]) <= 0.98


def test_with_two_seeds_that_matter_fewer_intervals_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer 90 % than 95, as docs/numbers.md says."""
    monkeypatch.setattr(compare, "RESAMPLES", 500)
    generator = rng(2)
    results = [estimate(difference, crossed(generator, 2, 100, SPREADS["all"]), generator) for _ in range(400)]
    assert 0.85 <= np.mean([one.low <= 0.3 <= one.high for one in results]) < 0.94


def test_what_a_plain_bootstrap_of_six_seeds_would_cover_is_what_the_module_says() -> None:
    """In closed form, for many examples: where seeds alone vary, and where the rest alone does."""
    assert 2 * stats.t.cdf(Z * math.sqrt(5 / 6), 5) - 1 == pytest.approx(0.87, abs=0.005)
    assert 2 * stats.norm.cdf(Z * math.sqrt(2 - 1 / 6)) - 1 == pytest.approx(0.99, abs=0.005)


@pytest.mark.parametrize("n_seeds", [4, 6])
def test_intervals_of_right_and_wrong_answers_cover_too(n_seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RESAMPLES", 500)
    generator = rng(10 + n_seeds)
    hits = []
    for _ in range(400):
        table, true = binary(generator, n_seeds, 150)
        found = estimate(difference, table, generator)
        hits.append(found.low <= true <= found.high)
    assert 0.92 <= np.mean(hits) <= 0.98


def test_intervals_over_groups_cover_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RESAMPLES", 500)
    generator = rng(21)
    tables = [crossed(generator, 6, 120, (0.1, 0.5, 0.3), n_groups=30) for _ in range(400)]
    results = [estimate(difference, table, generator) for table in tables]
    assert 0.92 <= np.mean([one.low <= 0.3 <= one.high for one in results]) <= 0.98


def test_an_interquartile_mean_over_tasks_covers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks are three that were chosen; seeds and examples vary. All is symmetric, so that the IQM is the mean."""
    monkeypatch.setattr(compare, "RESAMPLES", 500)
    generator = rng(22)
    hits = []
    for _ in range(400):
        found = iqm_estimate([crossed(generator, 6, 80, (0.05, 0.3, 0.5)) for _ in range(3)], generator)
        hits.append(found.low <= 0.3 <= found.high)
    assert 0.92 <= np.mean(hits) <= 0.98


def test_the_parts_of_the_variance_are_those_of_the_analysis_of_variance() -> None:
    pandas = pytest.importorskip("pandas")
    from statsmodels.formula.api import ols

    n_seeds, n_examples = 5, 12
    table = crossed(rng(3), n_seeds, n_examples, (0.4, 0.6, 0.5))
    differences_SN = table.scores_ASN[0] - table.scores_ASN[1]
    parts = Parts.of(differences_SN, np.ones(n_examples))
    s, n = np.indices(differences_SN.shape)
    frame = pandas.DataFrame({"d": differences_SN.ravel(), "s": s.ravel(), "n": n.ravel()})
    squares = anova_lm(ols("d ~ C(s) + C(n)", frame).fit())
    squares = squares["sum_sq"] / squares["df"]
    size = n_seeds * n_examples
    assert parts.of_groups == pytest.approx(squares["C(n)"] / size)
    assert parts.of_seeds == pytest.approx((squares["C(s)"] - squares["Residual"]) / size)


def test_the_standard_error_of_one_seed_is_that_of_a_mean() -> None:
    arms = two_arms(90)
    differences = (arms[0] - arms[1])[0]
    found = estimated(difference, arms, range(90), rng())
    assert found.se == pytest.approx(stats.sem(differences))
    assert found.df == pytest.approx(89)


def test_what_is_detectable_is_what_a_t_test_detects_in_four_of_five() -> None:
    """The noncentral t distribution gives the power at the difference that is named."""
    found = estimated(difference, two_arms(60), range(60), rng())
    assert found.minimum_detectable is not None
    power = stats.nct.sf(stats.t.ppf(0.975, 59), 59, found.minimum_detectable / found.se)
    assert power == pytest.approx(0.8, abs=0.01)
    assert Estimate(0.0, None, None, None, None).minimum_detectable is None


def test_arms_are_paired_by_example() -> None:
    """Two arms whose scores move together differ far less than each of them spreads."""
    n = 500
    common = rng(2).normal(0, 1, n)
    differences = rng(3).normal(0.1, 0.05, n)
    result = estimated(difference, [(common + differences)[None], common[None]], range(n), rng())
    assert width(result) == pytest.approx(2 * Z * differences.std() / math.sqrt(n), rel=0.1)
    assert result.excludes_zero


def test_one_generator_seed_gives_one_interval_whatever_numpys_global_state_is() -> None:
    arms = two_arms(60)
    np.random.seed(1)  # noqa: NPY002 - the state that must not matter
    first = estimated(difference, arms, range(60), rng(7))
    np.random.seed(2)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert estimated(difference, arms, range(60), rng(7)) == first
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert estimated(difference, arms, range(60), rng(8)) != first


def test_examples_that_share_a_passage_are_drawn_together() -> None:
    """Fifty passages of eight alike examples are worth fifty examples, not four hundred."""
    effects = rng(4).normal(0.05, 0.3, 50)
    scores = np.repeat(effects, 8)[None]
    arms = [scores, np.zeros_like(scores)]
    passages = np.repeat(np.arange(50), 8)
    grouped = estimated(difference, arms, [f"p{p}" for p in passages], rng())
    alone = estimated(difference, arms, range(400), rng())
    assert grouped.value == alone.value == pytest.approx(effects.mean())
    assert width(grouped) == pytest.approx(2 * Z * effects.std() / math.sqrt(50), rel=0.1)
    assert width(grouped) / width(alone) == pytest.approx(math.sqrt(8), rel=0.1)


def test_groups_of_unequal_size_count_by_their_examples() -> None:
    """The cluster-robust standard error of a mean: sqrt(sum over groups of (sum of residuals)²) / N."""
    generator = rng(6)
    sizes = generator.integers(1, 12, 80)
    groups = np.repeat(np.arange(80), sizes)
    scores = np.repeat(generator.normal(2, 0.4, 80), sizes) + generator.normal(0, 0.2, sizes.sum())
    result = estimated(difference, [scores[None], np.zeros((1, len(scores)))], list(groups), rng())
    residuals = np.bincount(groups, weights=scores - scores.mean())
    error = math.sqrt((residuals**2).sum()) / len(scores)
    assert result.value == pytest.approx(scores.mean())
    assert width(result) == pytest.approx(2 * Z * error, rel=0.12)


def test_the_order_of_examples_that_share_a_group_does_not_matter() -> None:
    arms = two_arms(60)
    groups = [f"g{i % 20}" for i in range(60)]
    shuffled = rng(9).permutation(60)
    ours = estimated(difference, arms, groups, rng())
    again = estimated(difference, [arm[:, shuffled] for arm in arms], [groups[i] for i in shuffled], rng())
    assert (again.low, again.high) == pytest.approx((ours.low, ours.high))


def test_seeds_that_disagree_give_students_interval_where_examples_do_not_matter() -> None:
    ahead_S = rng(5).normal(0.3, 0.1, 8)
    result = estimated(difference, [np.repeat(ahead_S[:, None], 50, 1), np.zeros((8, 50))], range(50), rng())
    low, high = stats.t.interval(0.95, 7, ahead_S.mean(), stats.sem(ahead_S))
    assert (result.value, result.se, result.df) == pytest.approx((ahead_S.mean(), stats.sem(ahead_S), 7))
    assert width(result) == pytest.approx(high - low, rel=0.12)


def test_seeds_are_drawn_for_all_arms_at_once() -> None:
    """Seeds that lift both arms alike say nothing about their difference."""
    lift = np.array([[0.0] * 50, [0.5] * 50])
    assert estimated(difference, [lift + 0.1, lift], range(50), rng()).value == pytest.approx(0.1)
    spread = rng(3).normal(0, 0.1, 50)
    paired = estimated(difference, [lift + spread, lift], range(50), rng())
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
    result = estimated(difference, [np.array(first), np.array(second)], range(len(first[0])), rng())
    assert result == Estimate(pytest.approx(value), None, None, None, None)
    assert not result.excludes_zero


def test_one_group_alone_gives_no_interval() -> None:
    assert estimated(difference, two_arms(40), ["all"] * 40, rng()).low is None


def test_rounding_is_no_spread() -> None:
    """Every resample has the same difference, so only rounding tells resamples apart: [0.1, 0.1] is no interval."""
    right, wrong = np.ones((3, 10)), np.zeros((3, 10))
    common = rng(1).normal(2.0, 0.5, (1, 30))
    cases = [[right, wrong], [np.full((1, 7), 0.1), np.zeros((1, 7))], [common + 0.1, common]]
    results = [estimated(difference, arms, range(arms[0].shape[1]), rng()) for arms in cases]
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
    assert Estimate(0.1, low, high, 0.05, 9).excludes_zero is excludes


# ---------------------------------------------------------------------------------------------------------
# Tests and corrections


def test_the_sign_flip_test_of_many_seeds_is_near_the_t_test() -> None:
    differences = rng(3).normal(0.5, 1.0, 30)
    p = sign_flip_p(differences, rng())
    assert p == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue, rel=0.25)
    assert p > 0


@pytest.mark.parametrize("differences", [[1, 2, 3, 4, 5, 6], [1, -2, 3, 4], [2, 2, -1, 0, 3, 1, 1]])
def test_the_sign_flip_test_is_scipys_exact_permutation_test(differences: list[float]) -> None:
    values = np.array(differences, dtype=float)
    reference = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(values, rng()) == pytest.approx(reference.pvalue)


@pytest.mark.parametrize("n_seeds", [1, 5, 6, 8])
def test_the_smallest_p_is_what_seeds_that_all_agree_reach(n_seeds: int) -> None:
    assert sign_flip_p(np.arange(1.0, n_seeds + 1), rng()) == pytest.approx(smallest_p(n_seeds))
    assert (smallest_p(n_seeds) < 0.05) is (n_seeds >= 6)


@pytest.mark.parametrize("p_values", [[0.01], [0.04, 0.01, 0.03], [0.2, 0.2, 0.001, 0.9], [0.6, 0.7]])
def test_holms_correction_is_that_of_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())
    assert holm([]) == []


# ---------------------------------------------------------------------------------------------------------
# Several tasks


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    assert iqm(np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 100.0]])) == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_over_one_task_whose_seeds_agree_the_interval_is_that_of_the_mean() -> None:
    table = crossed(rng(4), 4, 200, (0.0, 0.5, 0.0))
    found, mean = iqm_estimate([table], rng()), estimate(difference, table, rng())
    assert found.value == pytest.approx(mean.value)
    assert width(found) == pytest.approx(width(mean), rel=0.08)
    assert found.se == pytest.approx(mean.se, rel=0.05)


def test_a_task_on_which_the_arms_are_far_apart_does_not_carry_the_interquartile_mean() -> None:
    near = [crossed(rng(seed), 6, 100, (0.02, 0.1, 0.2), true=0.0) for seed in range(3)]
    far = crossed(rng(9), 6, 100, (0.02, 0.1, 0.2), true=5.0)
    found = iqm_estimate([*near, far], rng())
    assert abs(found.value) < 0.1
    assert width(found) < 0.5


def test_the_test_over_tasks_is_exact_where_the_runs_are_few() -> None:
    """Two tasks of two seeds: 16 patterns of signs, counted by hand."""
    tables = [crossed(rng(seed), 2, 20, (0.2, 0.2, 0.2), true=0.2) for seed in range(2)]
    differences = np.concatenate([t.means_AS[0] - t.means_AS[1] for t in tables])
    sizes = [
        abs(stats.trim_mean(differences * signs, 0.25))
        for signs in np.array(np.meshgrid(*[(1, -1)] * 4)).reshape(4, -1).T
    ]
    seen = abs(stats.trim_mean(differences, 0.25))
    assert iqm_sign_flip_p(tables, rng()) == pytest.approx(np.mean(np.array(sizes) >= seen - 1e-15))

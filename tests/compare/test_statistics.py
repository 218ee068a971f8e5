"""Intervals, tests and corrections against scipy, statsmodels and closed forms; coverage by simulation.

Run: pytest tests/compare/test_statistics.py
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from cola.compare import statistics
from cola.compare.statistics import (
    Estimate,
    Parts,
    Resampled,
    Table,
    bca_level,
    closed_share,
    estimate,
    holm,
    iqm,
    iqm_estimate,
    sign_flips,
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


DIFFERENCE = (1, -1)


def estimated(arms: Sequence[np.ndarray], groups: Sequence[str | int]) -> Estimate:
    """The first arm less the second."""
    return estimate(DIFFERENCE, [Table(np.stack(arms), groups)])


def width(result: Estimate) -> float:
    assert result.low is not None
    assert result.high is not None
    return result.high - result.low


# ---------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize("n", [40, 300])
def test_with_one_seed_the_interval_is_scipys_bca_bootstrap_over_examples(n: int) -> None:
    arms = two_arms(n, seed=n)
    ours = estimated(arms, range(n))
    differences = (arms[0] - arms[1])[0]
    theirs = stats.bootstrap((differences,), np.mean, n_resamples=100_000, method="BCa", rng=rng(1))
    assert ours.value == pytest.approx(differences.mean())
    # Ours is wider by Student's quantile and by n / (n - 1). The 2.5 % quantile of 100,000 resamples has a standard
    # error of sqrt(.025 × .975 / 100,000) / .0584 = .008 of theirs.
    wider = stats.t.ppf(0.975, n - 1) / Z * math.sqrt(n / (n - 1))
    tolerance = 0.04 * theirs.standard_error + 1 / n  # and a resample's mean moves in steps of 1 / n
    for end in ("low", "high"):
        expected = ours.value + wider * (getattr(theirs.confidence_interval, end) - ours.value)
        assert getattr(ours, end) == pytest.approx(expected, abs=tolerance)


def test_skewed_examples_have_scipys_bca_interval_and_not_the_percentiles() -> None:
    """Bias correction and acceleration both matter here."""
    sample = rng(2).exponential(size=60)
    ours = estimated([sample[None], np.zeros((1, 60))], range(60))
    theirs = stats.bootstrap((sample,), np.mean, n_resamples=200_000, method="BCa", rng=rng(1))
    wider = stats.t.ppf(0.975, 59) / Z * math.sqrt(60 / 59)
    expected = [sample.mean() + wider * (end - sample.mean()) for end in theirs.confidence_interval]
    assert [ours.low, ours.high] == pytest.approx(expected, abs=0.02 * theirs.standard_error)
    percentiles = np.quantile(theirs.bootstrap_distribution, [0.025, 0.975])
    assert np.abs(np.subtract(theirs.confidence_interval, percentiles)).min() > 0.05 * theirs.standard_error


def test_the_resampling_distribution_is_that_of_all_resamples_gone_through_one_by_one() -> None:
    """Four seeds and five groups: all 4**4 × 5**5 resamples, 800,000 of them."""
    seeds_S, groups_G = rng(1).exponential(size=4) / 4, rng(2).normal(size=5) / 5
    seeds_S, groups_G = seeds_S - seeds_S.mean(), groups_G - groups_G.mean()
    sums = [np.zeros(1)]
    for values in (seeds_S, groups_G):
        of_values = np.zeros(1)
        for _ in values:
            of_values = np.add.outer(of_values, values).ravel()
        sums.append(of_values)
    everything = np.add.outer(*sums[1:]).ravel()
    ours = Resampled.of([(seeds_S, 4), (groups_G, 5)])
    for level in (0.001, 0.025, 0.2, 0.5, 0.9, 0.975, 0.999):
        assert ours.quantile(level) == pytest.approx(np.quantile(everything, level), abs=0.004 * everything.std())
    assert stats.norm.cdf(ours.bias) == pytest.approx(np.mean(everything < 0), abs=0.002)


def test_a_wholly_different_order_of_seeds_and_examples_gives_the_same_digits() -> None:
    first, second = two_arms(80, n_seeds=5)
    seeds, rows = rng(1).permutation(5), rng(2).permutation(80)
    names = [f"row {n}" for n in range(80)]
    ours = estimated([first, second], names)
    again = estimated([arm[seeds][:, rows] for arm in (first, second)], [names[n] for n in rows])
    assert [f"{x:.9f}" for x in (ours.low, ours.high, ours.p)] == [f"{x:.9f}" for x in (again.low, again.high, again.p)]


def test_the_level_that_bca_reads_off_is_efrons() -> None:
    """Equation 14.10 of Efron & Tibshirani (1993), written out."""
    z, bias, acceleration = -1.96, 0.1, 0.05
    assert bca_level(z, bias, acceleration) == pytest.approx(
        stats.norm.cdf(0.1 + (0.1 - 1.96) / (1 - 0.05 * (0.1 - 1.96)))
    )
    assert bca_level(z, 0.0, 0.0) == pytest.approx(stats.norm.cdf(z))


# ---------------------------------------------------------------------------------------------------------
# The share closed


def normals(lead: float, closed: float, seed: int = 5, n: int = 400) -> Table:
    """Scores of full fine-tuning, LoRA and an arm that closes so much of the lead, on n examples."""
    generator = rng(seed)
    common = generator.normal(0.5, 0.2, n)
    full, lora = common + lead + generator.normal(0, 0.2, n), common + generator.normal(0, 0.2, n)
    arm = common + closed * lead + generator.normal(0, 0.2, n)
    return Table(np.stack([full, lora, arm])[:, None], range(n))


@pytest.mark.parametrize("lead", [0.3, 0.08, 0.05])
def test_the_share_closed_has_fiellers_interval(lead: float) -> None:
    """The roots of (a - c l)² = t² (s_aa - 2 c s_al + c² s_ll) for the means a of arm - lora and l of full - lora."""
    table = normals(lead, 0.5)
    full, lora, arm = table.scores_ASN[:, 0]
    (s_aa, s_al), (_, s_ll) = np.cov(arm - lora, full - lora) / 400
    a, led, t = (arm - lora).mean(), (full - lora).mean(), stats.t.ppf(0.975, 399)
    roots = np.roots([led**2 - t**2 * s_ll, -2 * (a * led - t**2 * s_al), a**2 - t**2 * s_aa])
    found = closed_share(table)
    assert found.value == pytest.approx(a / led)
    assert [found.low, found.high] == pytest.approx(sorted(roots), abs=0.03 * (max(roots) - min(roots)))


def test_a_share_is_in_the_interval_exactly_if_the_arm_may_have_closed_it() -> None:
    table = normals(0.08, 0.5)
    found = closed_share(table)
    for share in np.linspace(found.low - 0.5, found.high + 0.5, 15):
        left = estimate((-share, share - 1, 1), [table])  # arm - lora - share (full - lora)
        assert (left.low <= 0 <= left.high) == (found.low <= share <= found.high)


# ---------------------------------------------------------------------------------------------------------
# Coverage and size, by simulation


def crossed(
    generator: np.random.Generator,
    n_seeds: int,
    n_examples: int,
    spread: tuple[float, float, float],
    true: float = 0.3,
    n_groups: int | None = None,
    skewed: bool = False,
) -> Table:
    """Two arms whose differences have a part for each seed, for each example (or group of them), and a rest."""
    of_seed, of_example, rest = spread
    member_N = np.arange(n_examples) % (n_groups or n_examples)
    seeds_S1 = generator.exponential(size=(n_seeds, 1)) - 1 if skewed else generator.standard_normal((n_seeds, 1))
    differences_SN = true + of_seed * seeds_S1
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


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends that are right to a hundredth of a standard error, in a fraction of the time."""
    monkeypatch.setattr(statistics, "GRID", 2**11)


def covered(make: Callable[[], Sequence[Table]], true: float, times: int = 800) -> float:
    """The share of experiments whose interval holds the truth: one of .95 is measured with an error of .008."""
    results = [estimate(DIFFERENCE, make()) for _ in range(times)]
    return float(np.mean([one.low <= true <= one.high for one in results]))


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("n_seeds", [3, 6, 10])
@pytest.mark.parametrize("spread", SPREADS)
def test_95_percent_intervals_cover_the_truth_as_often_as_they_say(n_seeds: int, spread: str) -> None:
    generator = rng(n_seeds)
    assert 0.92 <= covered(lambda: [crossed(generator, n_seeds, 100, SPREADS[spread])], 0.3) <= 0.98


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
def test_with_two_seeds_that_matter_fewer_intervals_hold_the_truth() -> None:
    """Nearer 90 % than 95, as docs/numbers.md says."""
    generator = rng(2)
    assert 0.85 <= covered(lambda: [crossed(generator, 2, 100, SPREADS["all"])], 0.3) < 0.94


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
def test_one_task_whose_seeds_are_skewed_and_decide_alone_has_nine_in_ten() -> None:
    """As Student's interval of six exponential values has; docs/numbers.md says so."""
    generator = rng(5)
    assert 0.87 <= covered(lambda: [crossed(generator, 6, 100, SPREADS["seeds"], skewed=True)], 0.3) < 0.94


def test_what_a_plain_bootstrap_of_six_seeds_would_cover_is_what_the_module_says() -> None:
    """In closed form, for many examples: where seeds alone vary, and where the rest alone does."""
    assert 2 * stats.t.cdf(Z * math.sqrt(5 / 6), 5) - 1 == pytest.approx(0.87, abs=0.005)
    assert 2 * stats.norm.cdf(Z * math.sqrt(2 - 1 / 6)) - 1 == pytest.approx(0.99, abs=0.005)


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("n_seeds", [4, 6])
def test_intervals_of_right_and_wrong_answers_cover_too(n_seeds: int) -> None:
    generator = rng(10 + n_seeds)
    assert 0.92 <= covered(lambda: [binary(generator, n_seeds, 150)[0]], binary(generator, 1, 1)[1]) <= 0.98


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
def test_intervals_over_groups_cover_too() -> None:
    generator = rng(21)
    assert 0.92 <= covered(lambda: [crossed(generator, 6, 120, (0.1, 0.5, 0.3), n_groups=30)], 0.3) <= 0.98


# Three tasks on which the arms differ otherwise: what counts is the mean of the three, not the middle one.
TASKS = ((0.06, -0.03, -0.03), (-0.08, 0.0, 0.0))
SEEDS_ON_TASKS = {
    "normal": ((0.03, 0.2, 0.4),) * 3,
    "skewed": ((0.3, 0.1, 0.3),) * 3,
    "unlike": ((0.08, 0.1, 0.2), (0.01, 0.3, 0.1), (0.0, 0.2, 0.4)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("n_seeds", [3, 6])
@pytest.mark.parametrize("seeds", SEEDS_ON_TASKS)
def test_over_tasks_the_interval_covers_the_equal_weight_mean(seeds: str, n_seeds: int) -> None:
    generator, spreads = rng(22 + n_seeds), SEEDS_ON_TASKS[seeds]
    for effects in TASKS:

        def make(effects: Sequence[float] = effects) -> list[Table]:
            skewed = seeds == "skewed"
            each = zip(effects, spreads, strict=True)
            return [crossed(generator, n_seeds, 80, spread, true=true, skewed=skewed) for true, spread in each]

        assert 0.92 <= covered(make, float(np.mean(effects)), times=500) <= 0.98


NULLS = {
    "seeds decide": (0.3, 0.1, 0.3),
    "the test rows decide": (0.0, 1.0, 0.3),
    "the rest decides": (0.0, 0.0, 1.0),
    "all": (0.08, 0.3, 0.7),
}


def sizes(spread: tuple[float, float, float], n_seeds: int, n_tasks: int) -> tuple[float, float]:
    """How often p, and the sign flips', are below .05 where new rows and seeds have no difference: 1000 experiments,
    so that .05 has a standard error of .007."""
    generator = rng(31)
    rejected = np.zeros(2)
    for _ in range(1000):
        tables = [crossed(generator, n_seeds, 60, spread, true=0.0) for _ in range(n_tasks)]
        p, flips = estimate(DIFFERENCE, tables).p, sign_flips(tables).p
        rejected += [p < 0.05, flips < 0.05]
    return rejected[0] / 1000, rejected[1] / 1000


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("null", NULLS)
def test_p_rejects_a_true_null_for_new_rows_and_seeds_as_often_as_it_says(null: str) -> None:
    ours, flips = sizes(NULLS[null], 6, 1)
    assert 0.03 <= ours <= 0.07
    # The sign flips hold the rows fixed: where these decide, they reject far too often to speak of new ones.
    assert bool(flips > 0.07) is (null in ("the test rows decide", "all"))


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
def test_over_tasks_p_has_its_size_where_the_test_rows_decide() -> None:
    ours, flips = sizes(NULLS["the test rows decide"], 6, 3)
    assert 0.03 <= ours <= 0.07 < flips


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
    found = estimated(arms, range(90))
    assert found.se == pytest.approx(stats.sem(differences))
    assert found.df == pytest.approx(89)


def test_what_is_detectable_is_what_a_t_test_detects_in_four_of_five() -> None:
    """The noncentral t distribution gives the power at the difference that is named."""
    found = estimated(two_arms(60), range(60))
    assert found.minimum_detectable is not None
    power = stats.nct.sf(stats.t.ppf(0.975, 59), 59, found.minimum_detectable / found.se)
    assert power == pytest.approx(0.8, abs=0.01)
    assert Estimate(0.0, None, None, None, None).minimum_detectable is None


def test_arms_are_paired_by_example() -> None:
    """Two arms whose scores move together differ far less than each of them spreads."""
    n = 500
    common = rng(2).normal(0, 1, n)
    differences = rng(3).normal(0.1, 0.05, n)
    result = estimated([(common + differences)[None], common[None]], range(n))
    assert width(result) == pytest.approx(2 * Z * differences.std() / math.sqrt(n), rel=0.1)
    assert result.excludes_zero


def test_nothing_of_numpys_global_state_is_in_an_estimate() -> None:
    arms = two_arms(60, n_seeds=24)
    table = Table(np.stack(arms), range(60))
    found = []
    for state in (1, 2):
        np.random.seed(state)  # noqa: NPY002 - the state that must not matter
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        found.append((estimate(DIFFERENCE, [table]), sign_flips([table]), iqm_estimate([table] * 8)))
        assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert found[0] == found[1]


def test_examples_that_share_a_passage_are_drawn_together() -> None:
    """Fifty passages of eight alike examples are worth fifty examples, not four hundred."""
    effects = rng(4).normal(0.05, 0.3, 50)
    scores = np.repeat(effects, 8)[None]
    arms = [scores, np.zeros_like(scores)]
    passages = np.repeat(np.arange(50), 8)
    grouped = estimated(arms, [f"p{p}" for p in passages])
    alone = estimated(arms, range(400))
    assert grouped.value == alone.value == pytest.approx(effects.mean())
    assert width(grouped) == pytest.approx(2 * Z * effects.std() / math.sqrt(50), rel=0.1)
    assert width(grouped) / width(alone) == pytest.approx(math.sqrt(8), rel=0.1)


def test_groups_of_unequal_size_count_by_their_examples() -> None:
    """The cluster-robust standard error of a mean: sqrt(sum over groups of (sum of residuals)²) / N."""
    generator = rng(6)
    sizes = generator.integers(1, 12, 80)
    groups = np.repeat(np.arange(80), sizes)
    scores = np.repeat(generator.normal(2, 0.4, 80), sizes) + generator.normal(0, 0.2, sizes.sum())
    result = estimated([scores[None], np.zeros((1, len(scores)))], list(groups))
    residuals = np.bincount(groups, weights=scores - scores.mean())
    error = math.sqrt((residuals**2).sum()) / len(scores)
    assert result.value == pytest.approx(scores.mean())
    assert width(result) == pytest.approx(2 * Z * error, rel=0.12)


def test_the_order_of_examples_that_share_a_group_does_not_matter() -> None:
    arms = two_arms(60)
    groups = [f"g{i % 20}" for i in range(60)]
    shuffled = rng(9).permutation(60)
    ours = estimated(arms, groups)
    again = estimated([arm[:, shuffled] for arm in arms], [groups[i] for i in shuffled])
    assert (again.low, again.high) == pytest.approx((ours.low, ours.high))


def test_seeds_that_disagree_give_students_interval_where_examples_do_not_matter() -> None:
    ahead_S = rng(5).normal(0.3, 0.1, 8)
    result = estimated([np.repeat(ahead_S[:, None], 50, 1), np.zeros((8, 50))], range(50))
    low, high = stats.t.interval(0.95, 7, ahead_S.mean(), stats.sem(ahead_S))
    assert (result.value, result.se, result.df) == pytest.approx((ahead_S.mean(), stats.sem(ahead_S), 7))
    assert width(result) == pytest.approx(high - low, rel=0.12)


def test_seeds_are_drawn_for_all_arms_at_once() -> None:
    """Seeds that lift both arms alike say nothing about their difference."""
    lift = np.array([[0.0] * 50, [0.5] * 50])
    assert estimated([lift + 0.1, lift], range(50)).value == pytest.approx(0.1)
    spread = rng(3).normal(0, 0.1, 50)
    paired = estimated([lift + spread, lift], range(50))
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
    result = estimated([np.array(first), np.array(second)], range(len(first[0])))
    assert result == Estimate(pytest.approx(value), None, None, None, None)
    assert not result.excludes_zero


def test_one_group_alone_gives_no_interval() -> None:
    assert estimated(two_arms(40), ["all"] * 40).low is None


def test_rounding_is_no_spread() -> None:
    """Every resample has the same difference, so only rounding tells resamples apart: [0.1, 0.1] is no interval."""
    right, wrong = np.ones((3, 10)), np.zeros((3, 10))
    common = rng(1).normal(2.0, 0.5, (1, 30))
    cases = [[right, wrong], [np.full((1, 7), 0.1), np.zeros((1, 7))], [common + 0.1, common]]
    results = [estimated(arms, range(arms[0].shape[1])) for arms in cases]
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


def alike(differences: Sequence[float]) -> Table:
    """Runs with these differences, the same on every one of four rows."""
    values = np.repeat(np.array(differences, dtype=float)[:, None], 4, axis=1)
    return Table(np.stack([values, np.zeros_like(values)]), range(4))


def test_p_is_below_5_percent_exactly_where_the_interval_leaves_out_zero() -> None:
    generator = rng(1)
    for true in np.linspace(0.0, 0.25, 120):
        found = estimate(DIFFERENCE, [crossed(generator, 5, 40, (0.05, 0.2, 0.3), true=true)])
        assert (found.p < 0.05) is found.excludes_zero


@pytest.mark.parametrize("shift", [0.02, 0.05, 0.09])
def test_where_nothing_is_skewed_p_is_that_of_students_test(shift: float) -> None:
    half = np.abs(rng(4).normal(0, 0.3, 100))
    values = np.concatenate([half, -half]) + shift
    found = estimated([values[None], np.zeros((1, 200))], range(200))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, rel=0.05)


def test_an_effect_far_beyond_its_error_has_a_p_near_zero_and_none_has_one() -> None:
    values = rng(4).normal(0.0, 0.1, 200)
    assert estimated([values[None] + 5, np.zeros((1, 200))], range(200)).p <= 1e-7
    symmetric = np.array([[1.0, -1.0] * 50])
    assert estimated([symmetric, np.zeros((1, 100))], range(100)).p == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "differences", [[1, 2, 3, 4, 5, 6], [1, -2, 3, 4], [2, 2, -1, 0, 3, 1, 1], list(rng(8).normal(0.4, 1, 14))]
)
def test_the_sign_flip_test_is_scipys_exact_permutation_test(differences: list[float]) -> None:
    values = np.array(differences, dtype=float)
    reference = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    found = sign_flips([alike(differences)])
    assert found.p == pytest.approx(reference.pvalue)
    assert found.error is None


@pytest.mark.parametrize("n_seeds", [1, 5, 6, 8, 20])
def test_the_smallest_p_is_what_seeds_that_all_agree_reach(n_seeds: int) -> None:
    found = sign_flips([alike(np.arange(1.0, n_seeds + 1))])
    assert found.p == found.smallest == pytest.approx(2 / 2**n_seeds)
    assert (found.smallest < 0.05) is (n_seeds >= 6)


def test_beyond_twenty_runs_patterns_are_drawn_and_the_error_is_told() -> None:
    """All 2**22 patterns of 22 runs are the reference."""
    differences = rng(3).normal(0.35, 1.0, 22)
    sums = np.zeros(1)
    for one in differences:
        sums = np.concatenate([sums + one, sums - one])
    exact = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-12)
    found = sign_flips([alike(differences)])
    assert 0.02 < exact < 0.5
    assert found.error == pytest.approx(math.sqrt(exact * (1 - exact) / 2**20), rel=0.05)
    assert abs(found.p - exact) < 4 * found.error
    assert sign_flips([alike(differences[::-1])]) == found
    # All of one sign: no pattern that is drawn reaches it, and still p is not 0.
    assert sign_flips([alike(np.arange(1.0, 41.0))]).p == pytest.approx(1 / (2**20 + 1))


def test_sign_flips_over_tasks_weigh_each_task_alike() -> None:
    """Two tasks, of two seeds and of three: 32 patterns of signs, counted by hand."""
    tables = [alike([0.3, 0.2]), alike([0.1, -0.2, 0.25])]
    shares = np.array([0.3 / 4, 0.2 / 4, 0.1 / 6, -0.2 / 6, 0.25 / 6])
    patterns = np.array(list(itertools.product((1, -1), repeat=5)))
    expected = np.mean(np.abs(patterns @ shares) >= shares.sum() - 1e-12)
    assert sign_flips(tables).p == pytest.approx(expected)


@pytest.mark.parametrize("p_values", [[0.01], [0.04, 0.01, 0.03], [0.2, 0.2, 0.001, 0.9], [0.6, 0.7]])
def test_holms_correction_is_that_of_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())
    assert holm([]) == []


# ---------------------------------------------------------------------------------------------------------
# Several tasks


def test_over_tasks_the_estimate_is_the_mean_of_the_tasks_means_and_not_the_middle_one() -> None:
    """The interquartile mean of 3 tasks × 6 seeds weighs these tasks by .2, .6 and .2 and calls the first arm worse."""
    tables = [crossed(rng(k), 6, 100, (0.02, 0.1, 0.2), true=true) for k, true in enumerate((0.9, -0.3, -0.4))]
    means = [np.mean(table.scores_ASN[0] - table.scores_ASN[1]) for table in tables]
    found = estimate(DIFFERENCE, tables)
    assert found.value == pytest.approx(np.mean(means))
    assert found.low > 0 > iqm(np.concatenate([t.means_AS[0] - t.means_AS[1] for t in tables]))
    # Independent tasks: variances add, and so do Satterthwaite's terms.
    each = [estimate(DIFFERENCE, [table]) for table in tables]
    assert found.se == pytest.approx(math.sqrt(sum(one.se**2 for one in each)) / 3)
    assert found.df == pytest.approx(sum(o.se**2 for o in each) ** 2 / sum(o.se**4 / o.df for o in each))


def test_a_task_on_which_nothing_differs_widens_nothing_but_dilutes_the_mean() -> None:
    """Its one degree of freedom entered a plain mean of widenings once, which made what is detectable 2.8 times it."""
    table = crossed(rng(4), 6, 100, (0.05, 0.2, 0.3), true=0.2)
    same = Table(np.ones((2, 6, 100)), range(100))
    alone, both = estimate(DIFFERENCE, [table]), estimate(DIFFERENCE, [table, same])
    for key in ("value", "low", "high", "se", "minimum_detectable"):
        assert getattr(both, key) == pytest.approx(getattr(alone, key) / 2)
    assert (both.df, both.p) == pytest.approx((alone.df, alone.p))
    wide = estimate(DIFFERENCE, [table, same, same])
    assert wide.minimum_detectable == pytest.approx(alone.minimum_detectable / 3)


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    assert iqm(np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 100.0]])) == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_an_interquartile_mean_takes_eight_tasks() -> None:
    tables = [crossed(rng(k), 4, 40, (0.05, 0.1, 0.2)) for k in range(8)]
    assert iqm_estimate(tables[:7]) is None
    assert iqm_estimate(tables).value == pytest.approx(
        stats.trim_mean([one for t in tables for one in t.means_AS[0] - t.means_AS[1]], 0.25)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
def test_the_interquartile_mean_of_tasks_that_are_alike_covers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is symmetric, so that the truth is that of every task."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    generator = rng(23)
    hits = []
    for _ in range(200):
        found = iqm_estimate([crossed(generator, 4, 40, (0.05, 0.3, 0.5)) for _ in range(8)])
        hits.append(found.low <= 0.3 <= found.high)
    assert 0.92 <= np.mean(hits) <= 0.99  # of .95 with an error of .015


def test_a_task_on_which_the_arms_are_far_apart_does_not_carry_the_interquartile_mean() -> None:
    near = [crossed(rng(seed), 6, 100, (0.02, 0.1, 0.2), true=0.0) for seed in range(7)]
    far = crossed(rng(9), 6, 100, (0.02, 0.1, 0.2), true=5.0)
    found = iqm_estimate([*near, far])
    assert abs(found.value) < 0.1
    assert width(found) < 0.5
    assert estimate(DIFFERENCE, [*near, far]).value > 0.5

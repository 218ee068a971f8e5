"""Paired statistics over seeds and examples. numpy and scipy only; the generator is passed in; no files, no torch.

Two arms are compared by the differences d_sn of what they score under the same seed s on the same example n. Seeds and
examples are crossed (every seed is scored on the same examples), so that

    d_sn = θ + seed_s + example_n + rest_sn        Var(mean d) = σ²_seed / S + σ²_example / N + σ²_rest / (S N)

An interval has to hold for other seeds *and* other examples. To draw seeds, and examples within them, with replacement
counts σ²_rest about twice and the seeds' part (S - 1) / S times, and with few seeds the normal quantile is too small:
for six seeds such intervals cover 87 % where seeds dominate and 99 % where the rest does. Here both are drawn, each
part is scaled to its unbiased variance (ANOVA of the two-way table; Searle, Casella & McCulloch, Variance Components,
1992, ch. 4) and to Student's t with Satterthwaite's degrees of freedom, and the ends are read off by BCa (Efron, JASA
82, 1987), with the skewness of both parts. `tests/test_compare.py` measures the coverage.

Axes: A arms, S seeds, N examples, G groups of examples that were drawn together, R resamples, T tasks.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit
from scipy.stats import trim_mean

RESAMPLES = 4000
POWER = 0.8  # of the smallest difference that counts as detectable
FEWEST_SEEDS = 6  # with fewer, no sign-flip p can fall below .05

Array = NDArray[np.float64]
Statistic = Callable[..., Any]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: The statistic of the means.
        low: Lower end; None where the data cannot give an interval (no two examples or seeds differ).
        high: Upper end, likewise.
        se: Standard error, over seeds and examples.
        df: Its degrees of freedom.
    """

    value: float
    low: float | None
    high: float | None
    se: float | None
    df: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def minimum_detectable(self) -> float | None:
        """The smallest true difference that would be told from 0 in four of five such experiments."""
        if self.se is None or self.df is None:
            return None
        return float(self.se * (stdtrit(self.df, 0.975) + stdtrit(self.df, POWER)))


@dataclass(frozen=True)
class Table:
    """Scores of some arms, paired by seed and example.

    Attributes:
        scores_ASN: One matrix for each arm.
        groups: Group of each of the N examples; examples of one group are drawn together.
        weights: Weight of each of the N examples in a mean (a text's tokens); None: all alike.
    """

    scores_ASN: Array
    groups: Sequence[str | int]
    weights: Sequence[float] | None = None

    @property
    def weights_N(self) -> Array:
        return np.ones(self.scores_ASN.shape[2]) if self.weights is None else np.asarray(self.weights, dtype=float)

    @property
    def means_AS(self) -> Array:
        """Each arm's score under each seed."""
        return np.average(self.scores_ASN, axis=2, weights=self.weights_N)

    def of_groups(self) -> tuple[Array, Array]:
        """Weighted sums of each group (A, S, G), and the groups' weights (G)."""
        names, member_N = np.unique(np.asarray([str(group) for group in self.groups]), return_inverse=True)

        def summed(values_N: Array) -> Array:
            return np.bincount(member_N, values_N * self.weights_N, len(names)).astype(np.float64)

        return np.apply_along_axis(summed, 2, self.scores_ASN), summed(np.ones(len(member_N)))


@dataclass(frozen=True)
class Parts:
    """What the uncertainty of a mean difference is made of.

    Attributes:
        seeds_S: What each seed moves the mean by (influence values: their mean is 0).
        groups_G: What each group of examples moves it by.
        of_seeds: Part of the variance that is due to seeds, beyond what the rest makes them differ.
        of_groups: Part due to examples, the rest included.
    """

    seeds_S: Array
    groups_G: Array
    of_seeds: float
    of_groups: float

    @classmethod
    def of(cls, sums_SG: Array, sizes_G: Array) -> "Parts":
        """From the weighted sums of differences of each seed and group."""
        n_seeds, n_groups = sums_SG.shape
        mean = sums_SG.sum() / (n_seeds * sizes_G.sum())
        # Of a weighted mean of groups that differ in size, which is a ratio: linearized about the mean.
        moved_SG = (sums_SG - mean * sizes_G) / sizes_G.mean()
        seeds_S, groups_G = moved_SG.mean(axis=1), moved_SG.mean(axis=0)
        rest_SG = moved_SG - seeds_S[:, None] - groups_G
        of_groups = _variance(groups_G)
        of_seeds = 0.0
        if n_seeds > 1:
            of_rest = np.square(rest_SG).sum() / (n_seeds * n_groups * (n_seeds - 1) * max(n_groups - 1, 1))
            # Seeds differ by the rest alone too; that share is in of_groups already.
            of_seeds = max(_variance(seeds_S) - of_rest * (n_groups > 1), 0.0)
        return cls(seeds_S, groups_G, float(of_seeds), float(of_groups))

    @property
    def variance(self) -> float:
        return self.of_seeds + self.of_groups

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom of the variance. Where seeds have a part at all, all that was seen of them
        carries S - 1: to count that part alone would take a chance excess for a well-known one."""
        seen = _variance(self.seeds_S) if self.of_seeds else 0.0
        squared = seen**2 / max(len(self.seeds_S) - 1, 1) + self.of_groups**2 / max(len(self.groups_G) - 1, 1)
        return self.variance**2 / squared if squared else 1.0

    @property
    def widening(self) -> float:
        """Student's quantile by the normal one."""
        return float(stdtrit(self.df, 0.975) / ndtri(0.975))

    @property
    def scales(self) -> tuple[float, float]:
        """What the deviations of drawn seeds and of drawn groups are multiplied by, to vary as they should."""
        n_seeds, n_groups = len(self.seeds_S), len(self.groups_G)
        drawn = self.seeds_S @ self.seeds_S / n_seeds**2
        seeds = (self.of_seeds / drawn) ** 0.5 if drawn else 0.0
        groups = (n_groups / (n_groups - 1)) ** 0.5 if n_groups > 1 else 0.0
        return float(self.widening * seeds), float(self.widening * groups)

    @property
    def acceleration(self) -> float:
        """BCa's: a sixth of the skewness of the estimate, which is a sum over seeds and groups."""
        if not self.variance:
            return 0.0
        n_seeds, n_groups = len(self.seeds_S), len(self.groups_G)
        drawn = self.seeds_S @ self.seeds_S / n_seeds**2
        share = (self.of_seeds / drawn) ** 1.5 if drawn else 0.0
        third = share * (self.seeds_S**3).sum() / n_seeds**3 + (self.groups_G**3).sum() / n_groups**3
        return float(third / (6 * self.variance**1.5))


def _variance(influence_K: Array) -> float:
    """Of a mean, from what each of K independent parts moves it by."""
    n = len(influence_K)
    return float(influence_K @ influence_K / (n * (n - 1))) if n > 1 else 0.0


def bca(draws_R: Array, value: float, acceleration: float) -> tuple[float, float]:
    """The ends of the 95 % interval, bias-corrected and accelerated (Efron 1987; as scipy.stats.bootstrap has it)."""
    below = (np.mean(draws_R < value) + np.mean(draws_R <= value)) / 2
    bias = ndtri(np.clip(below, 0.5 / len(draws_R), 1 - 0.5 / len(draws_R)))
    z = bias + ndtri(np.array([0.025, 0.975]))
    low, high = np.quantile(draws_R, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def estimate(statistic: Statistic, table: Table, rng: np.random.Generator) -> Estimate:
    """A smooth statistic of the arms' mean scores with its interval over seeds and examples; with one seed over
    examples alone.

    Args:
        statistic: Takes the mean score of each arm and gives a number; called on arrays of means too.
        table: The scores.
        rng: Source of the resamples.
    """
    sums_ASG, sizes_G = table.of_groups()
    means_A = table.means_AS.mean(axis=1)
    value = float(statistic(*means_A))
    if not np.isfinite(value):
        return Estimate(value, None, None, None, None)
    parts = Parts.of(np.tensordot(_gradient(statistic, means_A), sums_ASG, axes=1), sizes_G)
    if parts.variance <= (1e-9 * max(1.0, abs(value))) ** 2:  # nothing but rounding
        return Estimate(value, None, None, None, None)
    seeds_AR, groups_AR = _drawn(table, parts, rng)
    draws_R = np.asarray(statistic(*(means_A[:, None] + seeds_AR + groups_AR)), dtype=float)
    finite_R = draws_R[np.isfinite(draws_R)]
    if len(finite_R) < RESAMPLES:
        return Estimate(value, None, None, None, None)
    low, high = bca(finite_R, value, parts.acceleration)
    return Estimate(value, low, high, parts.variance**0.5, parts.df)


def _drawn(table: Table, parts: Parts, rng: np.random.Generator) -> tuple[Array, Array]:
    """Deviations of each arm's mean (A, R) by drawing seeds, and by drawing groups."""
    sums_ASG, sizes_G = table.of_groups()
    means_AS = table.means_AS
    means_A = means_AS.mean(axis=1, keepdims=True)
    n_seeds, n_groups = means_AS.shape[1], len(sizes_G)
    drawn_RS = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=RESAMPLES)
    drawn_RG = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=RESAMPLES)
    of_seeds, of_groups = parts.scales
    seeds_AR = of_seeds * (means_AS @ drawn_RS.T / n_seeds - means_A)
    groups_AR = of_groups * (sums_ASG.mean(axis=1) @ drawn_RG.T / (drawn_RG @ sizes_G) - means_A)
    return seeds_AR, groups_AR


def _gradient(statistic: Statistic, means_A: Array) -> Array:
    """By central differences; the statistics here are differences and one ratio of them."""
    steps_AA = 1e-6 * np.eye(len(means_A))
    return np.array(
        [(statistic(*(means_A + step_A)) - statistic(*(means_A - step_A))) / 2e-6 for step_A in steps_AA], dtype=float
    )


def difference(first: Any, second: Any) -> Any:
    """Of two arms' scores."""
    return first - second


def closed_share(full: Any, lora: Any, arm: Any) -> Any:
    """The share of full fine-tuning's lead over LoRA that an arm has closed; not finite where there is no lead."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(arm - lora, full - lora)


def sign_flip_p(differences_S: Array, rng: np.random.Generator) -> float:
    """Two-sided sign-flip test of paired differences over seeds: the share of sign patterns whose mean difference is as
    far from 0 as the one seen.

    Exact over all 2**S patterns, so it cannot fall below `smallest_p`; from 17 seeds on over 2**16 patterns drawn at
    random, the one seen among them.
    """
    signs_PS = _signs(len(differences_S), rng)
    return _share_as_far(np.abs(signs_PS @ differences_S))


def smallest_p(n_seeds: int) -> float:
    """What a two-sided exact sign-flip test of so many seeds can reach at best: 2 / 2**S."""
    return 2.0 / 2**n_seeds


def _signs(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Sign patterns, the one of no flip first."""
    if n <= 16:
        return np.array(list(itertools.product((1, -1), repeat=n)))
    signs_PS = rng.choice((1, -1), size=(2**16, n))
    signs_PS[0] = 1
    return signs_PS


def _share_as_far(sizes_P: Array) -> float:
    return float(np.mean(sizes_P >= sizes_P[0] * (1 - 1e-12)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p_values, kind="stable")
    factors = len(order) - np.arange(len(order))
    corrected = np.minimum(np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors), 1.0)
    back = np.empty(len(order))
    back[order] = corrected
    return back.tolist()


# ---------------------------------------------------------------------------------------------------------
# Several tasks


def iqm(values: Array) -> float:
    """Interquartile mean: of the middle half of all values (Agarwal et al., NeurIPS 2021; rliable)."""
    return float(trim_mean(values.ravel(), 0.25))


def iqm_estimate(tables: Sequence[Table], rng: np.random.Generator) -> Estimate:
    """The interquartile mean of the paired differences of two arms over all tasks and seeds, with its interval.

    Stratified: seeds and examples are drawn within each task, and both arms get the same ones. Each task's mean is
    spread as in `estimate`; the differences around it are those of the drawn seeds.
    """
    value = iqm(np.concatenate([_run_differences(table) for table in tables]))
    draws_RK, all_parts = [], []
    for table in tables:
        sums_ASG, sizes_G = table.of_groups()
        parts = Parts.of(sums_ASG[0] - sums_ASG[1], sizes_G)
        all_parts.append(parts)
        differences_S = _run_differences(table)
        n_seeds, n_groups = len(differences_S), len(sizes_G)
        drawn_RS = differences_S[rng.integers(n_seeds, size=(RESAMPLES, n_seeds))]
        drawn_RG = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=RESAMPLES)
        sums_G = (sums_ASG[0] - sums_ASG[1]).mean(axis=0)
        of_seeds, of_groups = parts.scales
        mean = differences_S.mean()
        shift_R = (of_seeds - 1) * (drawn_RS.mean(axis=1) - mean)
        shift_R += of_groups * (drawn_RG @ sums_G / (drawn_RG @ sizes_G) - mean)
        draws_RK.append(drawn_RS + shift_R[:, None])
    draws_R = trim_mean(np.concatenate(draws_RK, axis=1), 0.25, axis=1)
    variance = float(np.var(draws_R))
    if variance <= (1e-9 * max(1.0, abs(value))) ** 2:
        return Estimate(value, None, None, None, None)
    # All tasks count alike in the degrees of freedom and the skewness, as they do in the mean.
    whole = sum(parts.variance for parts in all_parts)
    df = whole**2 / sum(parts.variance**2 / parts.df for parts in all_parts)
    widening = float(np.mean([parts.widening for parts in all_parts]))
    skew = sum(parts.acceleration * parts.variance**1.5 for parts in all_parts) / whole**1.5
    low, high = bca(draws_R, value, skew)
    return Estimate(value, low, high, variance**0.5 / widening, df)


def iqm_sign_flip_p(tables: Sequence[Table], rng: np.random.Generator) -> float:
    """Sign-flip test of the interquartile mean: each run's difference may have either sign under the null."""
    differences_K = np.concatenate([_run_differences(table) for table in tables])
    signs_PK = _signs(len(differences_K), rng)
    return _share_as_far(np.abs(trim_mean(signs_PK * differences_K, 0.25, axis=1)))


def _run_differences(table: Table) -> Array:
    """Of the first two arms, one for each seed."""
    means_AS = table.means_AS
    return means_AS[0] - means_AS[1]

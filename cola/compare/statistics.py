"""Paired statistics over seeds, examples and tasks. numpy and scipy only; nothing is drawn; no files, no torch.

Two arms are compared by the differences d_sn of what they score under the same seed s on the same example n. Seeds and
examples are crossed (every seed is scored on the same examples), so that

    d_sn = θ + seed_s + example_n + rest_sn        Var(mean d) = σ²_seed / S + σ²_example / N + σ²_rest / (S N)

An interval has to hold for other seeds *and* other examples. To draw seeds, and examples within them, with replacement
counts σ²_rest about twice and the seeds' part (S - 1) / S times, and with few seeds the normal quantile is too small:
for six seeds such intervals cover 87 % where seeds dominate and 99 % where the rest does. Here both are resampled, each
part is scaled to its unbiased variance (ANOVA of the two-way table; Searle, Casella & McCulloch, Variance Components,
1992, ch. 4) and to Student's t with Satterthwaite's degrees of freedom, and the ends are read off by BCa (Efron, JASA
82, 1987), with the skewness of both parts. The bootstrap's distribution is computed, as the convolution that it is, and
not drawn: the same scores have the same interval to the last digit wherever they are asked for.

Over tasks the estimate is the equal-weight mean of the tasks' means, the tasks held fixed; seeds and examples of
different tasks are independent. `tests/compare/test_statistics.py` measures coverage and size by simulation.

Axes: A arms, S seeds, N examples, G groups of examples that were drawn together, T tasks, K runs (a task and a seed).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import root_scalar
from scipy.special import ndtr, ndtri, stdtrit

POWER = 0.8  # of the smallest difference that counts as detectable
FEWEST_TASKS = 8  # that an interquartile mean is given for: of three tasks it is near the middle one's
FEWEST_RUNS = 6  # that carry a claim: with fewer, and seeds that are skewed, the size of p is not what it says
EXACT_RUNS = 20  # up to so many, all sign patterns are gone through; beyond, as many are drawn
GRID, REACH = 2**14, 8.0  # points of a convolution, and standard errors that they reach to either side
CHUNK = 2**16  # sign patterns in memory at once
RESAMPLES = 50_000  # of an interquartile mean
SMALLEST = 1e-8  # below it no p is looked for

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; no ends where the data cannot give one (no two examples or seeds differ).

    Attributes:
        se: Standard error, over seeds and examples.
        df: Its degrees of freedom.
        p: Two-sided, that the number is 0 over other seeds and examples: the level at which its interval ends at 0.
    """

    value: float
    low: float | None = None
    high: float | None = None
    se: float | None = None
    df: float | None = None
    p: float | None = None

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
    """Scores of some arms, paired by seed and example."""

    scores_ASN: Array
    groups: Sequence[str | int]  # of each of the N examples; those of one group are drawn together
    weights: Sequence[float] | None = None  # of each of the N examples in a mean (a text's tokens); None: all alike

    @property
    def weights_N(self) -> Array:
        return np.ones(self.scores_ASN.shape[2]) if self.weights is None else np.asarray(self.weights, dtype=float)

    @property
    def means_AS(self) -> Array:
        """Each arm's score under each seed."""
        return np.average(self.scores_ASN, axis=2, weights=self.weights_N)

    @cached_property
    def of_groups(self) -> tuple[Array, Array]:
        """Weighted sums of each group (A, S, G), and the groups' weights (G)."""
        names_N = np.asarray([str(group) for group in self.groups])
        order_N = np.argsort(names_N, kind="stable")
        _, first_G = np.unique(names_N[order_N], return_index=True)
        weights_N = self.weights_N[order_N]
        sums_ASG = np.add.reduceat(self.scores_ASN[:, :, order_N] * weights_N, first_G, axis=2)
        return sums_ASG, np.add.reduceat(weights_N, first_G)


@dataclass(frozen=True)
class Parts:
    """What the uncertainty of a mean is made of.

    Attributes:
        seeds_S, groups_G: What each seed, and group of examples, moves the mean by (influence values: their mean is 0).
        of_seeds: Part of the variance that is due to seeds, beyond what the rest makes them differ.
        of_groups: Part due to examples, the rest included.
    """

    seeds_S: Array
    groups_G: Array
    of_seeds: float
    of_groups: float

    @classmethod
    def of(cls, sums_SG: Array, sizes_G: Array) -> "Parts":
        """From the weighted sums of each seed and group."""
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
    def squared_by_df(self) -> float:
        """Σ variance² / degrees of freedom over both parts, of which Satterthwaite's rule is made. Where seeds have a
        part at all, all that was seen of them carries S - 1: to count that part alone would take a chance excess for a
        well-known one."""
        seen = _variance(self.seeds_S) if self.of_seeds else 0.0
        return seen**2 / max(len(self.seeds_S) - 1, 1) + self.of_groups**2 / max(len(self.groups_G) - 1, 1)

    @property
    def third_moment(self) -> float:
        """Of the mean's resampling distribution, both parts scaled as they are in `deviations`."""
        return float(sum(n * np.mean(x_K**3) for x_K, n in self.deviations))

    @property
    def deviations(self) -> list[tuple[Array, int]]:
        """What one draw of a seed, and of a group, adds to the mean (K), and how many are drawn."""
        seeds_S, groups_G = self.seeds_S, self.groups_G
        n_seeds, n_groups = len(seeds_S), len(groups_G)
        drawn = seeds_S @ seeds_S / n_seeds**2
        by_seed = (self.of_seeds / drawn) ** 0.5 if drawn else 0.0
        by_group = (n_groups / (n_groups - 1)) ** 0.5 if n_groups > 1 else 0.0
        return [(by_seed * seeds_S / n_seeds, n_seeds), (by_group * groups_G / n_groups, n_groups)]


def _variance(influence_K: Array) -> float:
    """Of a mean, from what each of K independent parts moves it by."""
    n = len(influence_K)
    return float(influence_K @ influence_K / (n * (n - 1))) if n > 1 else 0.0


@dataclass(frozen=True)
class Resampled:
    """The bootstrap's distribution of a sum of independent draws with replacement, about its mean 0: the probability of
    less than each point of an ascending grid, and half of that of the point itself."""

    points_P: Array
    below_P: Array

    @classmethod
    def of(cls, deviations: Sequence[tuple[Array, int]]) -> "Resampled":
        """By convolution on a grid of what one draw adds, each of K values being as likely, and so many such draws."""
        error = sum(n * float(np.mean(x_K**2)) for x_K, n in deviations) ** 0.5
        step = 2 * REACH * error / GRID
        spectrum = np.ones(GRID // 2 + 1, dtype=complex)
        for x_K, n in deviations:
            # A value between two points is shared by them so that the mean stays what it is.
            left_K, share_K = np.divmod(x_K / step, 1.0)
            places_K = left_K.astype(int)
            mass = np.bincount(places_K % GRID, 1 - share_K, GRID) + np.bincount((places_K + 1) % GRID, share_K, GRID)
            spectrum *= np.fft.rfft(mass / len(x_K)) ** n
        mass_P = np.maximum(np.roll(np.fft.irfft(spectrum), GRID // 2), 0.0)
        below_P = (np.cumsum(mass_P) - mass_P / 2) / mass_P.sum()
        return cls(step * (np.arange(GRID) - GRID // 2), below_P)

    def quantile(self, level: float) -> float:
        return float(np.interp(level, self.below_P, self.points_P))

    @property
    def bias(self) -> float:
        """BCa's: the normal quantile of the share of resamples below what was seen."""
        return float(ndtri(np.interp(0.0, self.points_P, self.below_P)))


def bca_level(z: float, bias: float, acceleration: float) -> float:
    """Which level of the resamples a limit at normal quantile z is read off at (Efron 1987)."""
    shifted = bias + z
    slowed = 1 - acceleration * shifted
    return float(ndtr(bias + shifted / slowed)) if slowed > 0 else float(shifted > 0)


def estimate(coefficients: Sequence[float], tables: Sequence[Table]) -> Estimate:
    """A linear combination of the arms' mean scores, with its interval over seeds and examples: of one task, or the
    equal-weight mean over several, which are held fixed. With one seed over examples alone.

    Args:
        coefficients: One for each arm: (1, -1) is the first less the second.
        tables: The scores on each task.
    """
    parts = [parts_of(coefficients, table) for table in tables]
    value = float(np.mean([np.dot(coefficients, table.means_AS.mean(axis=1)) for table in tables]))
    n_tasks = len(tables)
    variance = sum(part.variance for part in parts) / n_tasks**2
    if variance <= (1e-9 * max(1.0, abs(value))) ** 2:  # nothing but rounding
        return Estimate(value)
    # A task without any variance adds nothing here, neither to the variance nor to its degrees of freedom.
    df = variance**2 / (sum(part.squared_by_df for part in parts) / n_tasks**4)
    drawn = Resampled.of([(x_K / n_tasks, n) for part in parts for x_K, n in part.deviations])
    acceleration = sum(part.third_moment for part in parts) / n_tasks**3 / (6 * variance**1.5)
    bias = drawn.bias

    def end(size: float, side: int) -> float:
        """The lower (side -1) or upper end of the interval of level 1 - size."""
        z = side * ndtri(1 - size / 2)
        # Student's quantile by the normal one, for the size that is asked for.
        wider = stdtrit(df, 1 - size / 2) / ndtri(1 - size / 2)
        return value + float(wider) * drawn.quantile(bca_level(float(z), bias, acceleration))

    return Estimate(value, end(0.05, -1), end(0.05, 1), variance**0.5, df, _inverted(end, value))


def _inverted(end: Callable[[float, int], float], value: float) -> float:
    """The size of the test by intervals that just ends at 0: the p of a true value of 0."""
    sign = 1 if value > 0 else -1

    def away(size: float) -> float:
        return sign * end(size, -sign)

    largest = 1 - 1e-6
    if away(largest) <= 0:
        return 1.0
    return SMALLEST if away(SMALLEST) > 0 else root_scalar(away, bracket=(SMALLEST, largest), xtol=1e-9).root


def parts_of(coefficients: Sequence[float], table: Table) -> Parts:
    sums_ASG, sizes_G = table.of_groups
    return Parts.of(np.tensordot(np.asarray(coefficients, dtype=float), sums_ASG, axes=1), sizes_G)


def closed_share(table: Table) -> Estimate:
    """The share of full fine-tuning's lead over LoRA that an arm has closed, (arm - lora) / (full - lora), by Fieller's
    method: the interval holds every share c for which that of (arm - lora) - c (full - lora) holds 0. So it is as wide
    as it has to be where the lead is small, and finite as long as the lead's own interval leaves out 0.

    Args:
        table: Full fine-tuning, LoRA and the arm; the lead is above 0 and its interval too.
    """
    full, lora, arm = table.means_AS.mean(axis=1)
    value = float((arm - lora) / (full - lora))

    def beyond(share: float) -> Estimate:
        """What the arm has closed beyond that share of the lead."""
        return estimate((-share, share - 1, 1), [table])

    here = beyond(value)
    if here.se is None:
        return Estimate(value)
    error = here.se / float(full - lora)

    def limit(side: int) -> float:
        def away(share: float) -> float:
            found = beyond(share)
            end = found.low if side < 0 else found.high
            return -side * (found.value if end is None else end)

        reach = error
        while away(value + side * reach) <= 0:
            if (reach := 2 * reach) > 1e9 * error:  # the lead's interval ends at 0 itself, but for rounding
                return side * math.inf
        return root_scalar(away, bracket=(value, value + side * reach), xtol=1e-7 * max(1.0, abs(value))).root

    return Estimate(value, limit(-1), limit(1), error, here.df)


# ---------------------------------------------------------------------------------------------------------
# These test rows, other seeds
class SignFlips(NamedTuple):
    """A two-sided sign-flip test of paired differences."""

    p: float  # the share of sign patterns whose statistic is as far from 0 as the one seen
    smallest: float  # what so many runs can reach at best, all of one sign
    error: float | None  # standard error of p, where patterns were drawn; None: all of them were gone through


def sign_flips(tables: Sequence[Table]) -> SignFlips:
    """Sign-flip test over runs of the mean over tasks of the first arm's lead over the second.

    All runs of a task share their test rows, and no pattern of signs changes those: the test speaks of other seeds on
    these rows. As a test for other rows it rejects a true null too often (tests/compare/test_statistics.py). Exact up
    to 20 runs (scipy's `permutation_test` of the mean); beyond, over 2**20 patterns drawn from the differences' own
    content, the one seen among them (Phipson & Smyth, SAGMB 9, 2010).
    """
    shares = [run_differences(table) / (len(tables) * table.scores_ASN.shape[1]) for table in tables]
    share_K = np.sort(np.concatenate(shares))  # whatever order the runs came in
    n_runs, smallest = len(share_K), 2.0 / 2 ** len(share_K)
    seen = abs(share_K.sum()) * (1 - 1e-9)
    if n_runs <= EXACT_RUNS:
        sums_P = np.zeros(1)
        for share in share_K:
            sums_P = np.concatenate([sums_P + share, sums_P - share])
        return SignFlips(float(np.mean(np.abs(sums_P) >= seen)), smallest, None)
    rng, n_drawn = stream_of(share_K), 2**EXACT_RUNS
    drawn = (rng.choice([-1.0, 1.0], size=(CHUNK, n_runs)) for _ in range(n_drawn // CHUNK))
    hits = sum(int(np.sum(np.abs(signs_CK @ share_K) >= seen)) for signs_CK in drawn)
    p = (hits + 1) / (n_drawn + 1)
    return SignFlips(p, smallest, (p * (1 - p) / n_drawn) ** 0.5)


def stream_of(values_K: Array) -> np.random.Generator:
    """Random numbers that the values determine, to the last digit that is printed anywhere, and nothing else does."""
    digest = hashlib.sha256(np.round(values_K, 9).tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p_values, kind="stable")
    factors = len(order) - np.arange(len(order))
    corrected = np.minimum(np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors), 1.0)
    back = np.empty(len(order))
    back[order] = corrected
    return back.tolist()


def run_differences(table: Table) -> Array:
    """Of the first two arms, one for each seed."""
    means_AS = table.means_AS
    return means_AS[0] - means_AS[1]


# ---------------------------------------------------------------------------------------------------------
# Many tasks
def iqm(values: Array) -> float:
    """Interquartile mean: of the middle half of all values (Agarwal et al., NeurIPS 2021; rliable)."""
    return float(_middle_half(values.ravel()))


def _middle_half(values: Array) -> Array:
    """Mean of the middle half along the last axis."""
    from scipy.stats import trim_mean  # half a second to import, and few reports are of so many tasks

    return trim_mean(values, 0.25, axis=-1)


def iqm_estimate(tables: Sequence[Table]) -> Estimate | None:
    """The interquartile mean of the paired differences of two arms over all tasks and seeds, with its interval; None
    with fewer than eight tasks, where it weighs the tasks by their order and is near the middle one's mean.

    Stratified: seeds and examples are drawn within each task, and both arms get the same ones. Each task's mean is
    spread as in `estimate`; the differences around it are those of the drawn seeds. It has no p: patterns of signs
    change nothing of the runs that are trimmed.
    """
    if len(tables) < FEWEST_TASKS:
        return None
    differences = [run_differences(table) for table in tables]
    value = iqm(np.concatenate(differences))
    rng = stream_of(np.concatenate(differences))
    all_parts = [parts_of((1, -1), table) for table in tables]
    variance = sum(part.variance for part in all_parts)
    if not variance:
        return Estimate(value)
    df = variance**2 / sum(part.squared_by_df for part in all_parts)
    draws_RK = []
    for part, differences_S in zip(all_parts, differences, strict=True):
        (by_seed_S, n_seeds), of_groups = part.deviations
        drawn_RS = rng.integers(n_seeds, size=(RESAMPLES, n_seeds))
        # The runs are those of the drawn seeds; their mean is moved to where it is when its spread is unbiased.
        shift_R = by_seed_S[drawn_RS].sum(axis=1) - part.seeds_S[drawn_RS].mean(axis=1)
        if part.of_groups:
            groups = Resampled.of([of_groups])
            shift_R += np.interp(rng.random(RESAMPLES), groups.below_P, groups.points_P)
        draws_RK.append(differences_S[drawn_RS] + shift_R[:, None])
    draws_R = _middle_half(np.concatenate(draws_RK, axis=1))
    error = float(np.std(draws_R))
    if error <= 1e-9 * max(1.0, abs(value)):
        return Estimate(value)
    acceleration = sum(part.third_moment for part in all_parts) / (6 * variance**1.5)
    bias = float(ndtri((np.mean(draws_R < value) + np.mean(draws_R <= value)) / 2))
    wider = float(stdtrit(df, 0.975) / ndtri(0.975))
    levels = [bca_level(float(ndtri(level)), bias, acceleration) for level in (0.025, 0.975)]
    low, high = (value + wider * (np.quantile(draws_R, level) - value) for level in levels)
    return Estimate(value, float(low), float(high), error, df)

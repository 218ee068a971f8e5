"""The interquartile mean over tasks, with its interval."""

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri, stdtrit
from scipy.stats import trim_mean

from cola.compare.statistics import (
    RESAMPLES,
    Array,
    Estimate,
    Resampled,
    Table,
    bca_level,
    parts_of,
    run_differences,
    stream_of,
)

FEWEST_TASKS = 8  # that an interquartile mean is given for: of three tasks it is near the middle one's


# ---------------------------------------------------------------------------------------------------------
# Many tasks
def iqm(values: Array) -> float:
    """Interquartile mean: of the middle half of all values (Agarwal et al., NeurIPS 2021; rliable)."""
    return float(trim_mean(values.ravel(), 0.25))


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
    draws_R = trim_mean(np.concatenate(draws_RK, axis=1), 0.25, axis=1)
    error = float(np.std(draws_R))
    if error <= 1e-9 * max(1.0, abs(value)):
        return Estimate(value)
    acceleration = sum(part.third_moment for part in all_parts) / (6 * variance**1.5)
    bias = float(ndtri((np.mean(draws_R < value) + np.mean(draws_R <= value)) / 2))
    wider = float(stdtrit(df, 0.975) / ndtri(0.975))
    levels = [bca_level(float(ndtri(level)), bias, acceleration) for level in (0.025, 0.975)]
    low, high = (value + wider * (np.quantile(draws_R, level) - value) for level in levels)
    return Estimate(value, float(low), float(high), error, df)

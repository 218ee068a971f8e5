"""Which of the values that a search tries is chosen on validation, and how sure that choice is. numpy alone; no files.

A choice is stable where other trials would have made it too. What they would have said is resampled from those that
there are: validation examples (groups of them, where a passage is shared) are drawn with replacement, the same ones for
all values, and with them the trials' seeds where there are two or more. The share of such draws in which a value is the
best is its share. With one seed nothing is known of another one, so that the share of the chosen value is too large.

Axes: C values tried, S seeds of the trials, N validation examples, G groups of examples, R resamples.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SURE = 0.8  # share of the resamples that a choice is in; below it is said to be uncertain

Array = NDArray[np.float64]


def choose(losses_CR: Array, scores_CR: Array | None) -> NDArray[np.int64]:
    """The place of the best of C values, in each of R columns, by their losses on validation, or by scores: of equal
    ones the lower loss. A value whose loss is not finite has diverged and is the worst, whatever it scores."""
    finite_CR = np.isfinite(losses_CR)
    losses_CR = np.where(finite_CR, losses_CR, np.inf)
    if scores_CR is not None:
        # The same mean over seeds may come out as .6 and as .6000000000000001.
        scores_CR = np.where(finite_CR, scores_CR.round(12), -np.inf)
        losses_CR = np.where(scores_CR == scores_CR.max(axis=0), losses_CR, np.inf)
    return losses_CR.argmin(axis=0)


@dataclass(frozen=True)
class Trials:
    """What each value scored on validation under each seed of the trials, example by example."""

    nats_CSN: Array  # summed over an example's target tokens
    tokens_N: Array  # their number
    scores_CSN: Array | None  # None for plain text
    groups: Sequence[str]  # of each of the N examples; those of one group are drawn together

    def shares(self, select_by: str, of: str) -> list[float]:
        """Of each value, the share of the resamples in which it is chosen by `loss` or `score`. The stream of random
        numbers depends on what is chosen for (`of`) and on the trials, and on nothing else."""
        rng = np.random.default_rng(int.from_bytes(self._digest(of)[:16], "big"))
        n_values, n_seeds, _ = self.nats_CSN.shape
        names, place_N = np.unique(np.asarray(self.groups, dtype=str), return_inverse=True)
        drawn_RG = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
        drawn_RS = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=RESAMPLES)
        weights_NR = drawn_RG.T[place_N].astype(float)
        diverged_CS = np.logical_not(np.isfinite(self.nats_CSN).all(axis=2))
        known_CSN = np.where(diverged_CS[:, :, None], 0.0, self.nats_CSN)
        losses_CR = _over_seeds(known_CSN @ weights_NR / (self.tokens_N @ weights_NR), drawn_RS)
        losses_CR[diverged_CS @ drawn_RS.T > 0] = np.inf
        scores_CR = None
        if select_by == "score" and self.scores_CSN is not None:
            scores_CR = _over_seeds(self.scores_CSN @ weights_NR / weights_NR.sum(axis=0), drawn_RS)
        counts_C = np.bincount(choose(losses_CR, scores_CR), minlength=n_values)
        return [float(count / RESAMPLES) for count in counts_C]

    def _digest(self, of: str) -> bytes:
        running = hashlib.sha256("\n".join([of, *self.groups]).encode())
        for numbers in (self.nats_CSN, self.tokens_N, self.scores_CSN):
            if numbers is not None:
                running.update(np.ascontiguousarray(numbers, dtype="<f8").tobytes())
        return running.digest()


def _over_seeds(means_CSR: Array, drawn_RS: NDArray[np.int64]) -> Array:
    return np.einsum("csr,rs->cr", means_CSR, drawn_RS) / drawn_RS.shape[1]

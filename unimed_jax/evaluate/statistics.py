"""Computes scores of many items from sums, with bootstrap intervals over clusters of items."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclasses.dataclass(frozen=True)
class Measure:
    """Holds a score that depends only on sums over items.

    A bootstrap of it is one matrix product.
    """

    items: np.ndarray  # float64 [n, K]
    score: Callable[[np.ndarray], np.ndarray] = _ratio  # sums [..., K] -> [...]; NaN if no item counts

    @classmethod
    def mean(cls, values: Sequence[float]) -> "Measure":
        """Makes the mean of one value per item."""
        return cls(np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1))

    def where(self, chosen: Sequence[bool] | np.ndarray) -> "Measure":
        """Restricts the score to the chosen items; the others stay in the rows, with weight 0."""
        return Measure(self.items * np.asarray(chosen, np.float64)[:, None], self.score)

    @property
    def value(self) -> float:
        return float(self.score(self.items.sum(0)))


@dataclasses.dataclass(frozen=True)
class Ranked(Measure):
    """Holds a score that depends on the weights of all items, such as one of ranks, and not on sums.

    `items` [n, 1] are those weights, `score` takes how often each item was drawn: [..., n] -> [...].
    """

    def where(self, chosen: Sequence[bool] | np.ndarray) -> "Ranked":
        return Ranked(self.items * np.asarray(chosen, np.float64)[:, None], self.score)

    @property
    def value(self) -> float:
        return float(self.score(self.items[:, 0]))


def resample(
    measures: Sequence[Measure], clusters: Sequence[str], resamples: int, seed: int
) -> list[np.ndarray]:
    """Bootstraps over clusters: float64 [resamples] per measure, all from the same draws.

    Every draw takes as many clusters as there are, with replacement, each with all its items.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    summed = [measure for measure in measures if not isinstance(measure, Ranked)]
    columns = np.concatenate([np.zeros((len(index), 0)), *(m.items for m in summed)], axis=1)
    sums = np.zeros((len(names), columns.shape[1]))  # [G, sum K]
    np.add.at(sums, index, columns)
    rng = np.random.default_rng(seed)
    share = np.full(len(names), 1 / len(names))
    block = max(1, 2**22 // len(names))  # bounds the memory of many clusters
    ranked = {i: m for i, m in enumerate(measures) if isinstance(m, Ranked)}
    blocks, ranks = [np.zeros((0, sums.shape[1]))], {i: [np.zeros(0)] for i in ranked}
    for start in range(0, resamples, block):
        counts = rng.multinomial(len(names), share, size=min(block, resamples - start))  # [b, G]
        blocks.append(counts @ sums)
        for i, measure in ranked.items():
            ranks[i].append(measure.score(counts[:, index] * measure.items[:, 0]))
    drawn = np.concatenate(blocks)  # [resamples, sum K]
    ends = np.cumsum([measure.items.shape[1] for measure in summed])
    parts = iter(np.split(drawn, ends[:-1], axis=1))
    return [
        np.concatenate(ranks[i]) if i in ranked else measure.score(next(parts))
        for i, measure in enumerate(measures)
    ]


def interval(draws: np.ndarray) -> list[float] | None:
    """Returns the 95 % percentile interval [low, high] of draws.

    Draws in which no item counts (NaN) are left out; None if none is left.
    """
    draws = draws[np.isfinite(draws)]
    return [float(q) for q in np.percentile(draws, [2.5, 97.5])] if len(draws) else None


def with_interval(measure: Measure, clusters: Sequence[str], resamples: int, seed: int) -> dict:
    """Returns {"value", "ci95": [low, high]} of a measure; ci95 is None below two clusters."""
    (draws,) = resample([measure], clusters, resamples, seed)
    return {"value": measure.value, "ci95": interval(draws) if len(set(clusters)) > 1 else None}

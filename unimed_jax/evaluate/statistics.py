"""Computes scores of many items from sums, with bootstrap intervals over clusters of items.

Two models that answered the same items are compared here too: `paired`, `mcnemar`, and `verdicts`,
which corrects for many comparisons.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LEVEL = 0.05  # the chance of one wrong verdict in a table whose models do not differ
POWER = 0.8  # the chance with which the smallest detectable difference would be found


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
        return Measure(_weighed(self.items, chosen), self.score)

    def drawn(self, times: np.ndarray) -> np.ndarray:
        """Scores draws, given how often each item was drawn: [..., n] -> [...]."""
        return self.score(times @ self.items)

    def within(self, own: np.ndarray) -> "Measure":
        """Makes a measure of the items of a mask, bool [n], in which the others stay as they are."""
        rest = self.items[~own].sum(0)
        return Measure(self.items[own], lambda sums: self.score(sums + rest))

    @property
    def value(self) -> float:
        return float(self.score(self.items.sum(0)))

    @property
    def counts(self) -> np.ndarray:
        """Says which items count, bool [n]."""
        return (self.items != 0).any(1)

    def varies(self, clusters: Sequence[str]) -> bool:
        """Says whether items of more than one cluster count, without which there is no interval."""
        return len(set(np.asarray(clusters)[self.counts].tolist())) > 1

    @property
    def right(self) -> np.ndarray | None:
        """Says of each item that counts whether it is right; None for a score that is not exact.

        bool [n that count]. A score is exact if it is the share of items that are right.
        """
        if self.score is not _ratio:
            return None
        values, weights = self.items[:, 0], self.items[:, 1]
        exact = np.isin(weights, (0, 1)).all() and np.isin(values, (0, 1)).all()
        return values[weights == 1] == 1 if exact else None


@dataclasses.dataclass(frozen=True)
class Ranked(Measure):
    """Holds a score that depends on the weights of all items, such as one of ranks, and not on sums.

    `items` [n, 1] are those weights, `score` takes how often each item was drawn: [..., n] -> [...].
    """

    def where(self, chosen: Sequence[bool] | np.ndarray) -> "Ranked":
        return Ranked(_weighed(self.items, chosen), self.score)

    def drawn(self, times: np.ndarray) -> np.ndarray:
        return self.score(times * self.items[:, 0])

    def within(self, own: np.ndarray) -> "Ranked":
        rest = np.where(own, 0.0, self.items[:, 0])  # [n]

        def score(weights: np.ndarray) -> np.ndarray:
            every = np.broadcast_to(rest, (*weights.shape[:-1], len(rest))).copy()
            every[..., own] = weights
            return self.score(every)

        return Ranked(self.items[own], score)

    @property
    def value(self) -> float:
        return float(self.score(self.items[:, 0]))


def _weighed(items: np.ndarray, chosen: Sequence[bool] | np.ndarray) -> np.ndarray:
    """Gives the rows that are not chosen the weight 0, also where they hold no number (NaN)."""
    weights = np.asarray(chosen, np.float64)[:, None]
    return np.where(weights != 0, items * weights, 0.0)


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
            few = max(1, 2**22 // len(index))  # draws at once: here each takes a row of all items
            for first in range(0, len(counts), few):
                ranks[i].append(measure.drawn(counts[first : first + few][:, index]))
    drawn = np.concatenate(blocks)  # [resamples, sum K]
    ends = np.cumsum([measure.items.shape[1] for measure in summed])
    parts = iter(np.split(drawn, ends[:-1], axis=1))
    return [
        np.concatenate(ranks[i]) if i in ranked else measure.score(next(parts))
        for i, measure in enumerate(measures)
    ]


def interval(draws: np.ndarray) -> list[float] | None:
    """Returns the 95 % percentile interval [low, high] of draws.

    Draws in which no item counts (NaN) are left out; None if none is left. From few clusters it is too
    narrow (evaluate/report says how much); `paired` allows for their number.
    """
    draws = draws[np.isfinite(draws)]
    return [float(q) for q in np.percentile(draws, [2.5, 97.5])] if len(draws) else None


def with_interval(measure: Measure, clusters: Sequence[str], resamples: int, seed: int) -> dict:
    """Returns {"value", "ci95": [low, high]} of a measure.

    ci95 is None below two clusters with items that count.
    """
    (draws,) = resample([measure], clusters, resamples, seed)
    return {"value": measure.value, "ci95": interval(draws) if measure.varies(clusters) else None}


# ---------------------------------------------------------------------------------------------
# Two models on the same items
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """Holds how far one model is ahead of another, and how sure that is.

    What cannot be said is None: all but the value below two clusters, and the interval where all
    clusters of all seeds show one and the same difference.
    """

    value: float  # ours - theirs
    ci95: list[float] | None = None
    p: float | None = None  # two-sided, for "no difference"
    error: float | None = None  # standard error
    freedom: float | None = None  # degrees of freedom of Student's t, for interval and p

    def detectable(self, level: float = LEVEL, power: float = POWER) -> float | None:
        """Returns the smallest true difference that would be found at this level with this power.

        None if nothing varies from cluster to cluster, which tells nothing of other clusters.
        """
        if not self.error:
            return None
        return float(self.error * (_t(1 - level / 2, self.freedom) + _t(power, self.freedom)))


def paired(
    ours: Sequence[Measure],
    theirs: Sequence[Measure],
    clusters: Sequence[str],
    resamples: int,
    seed: int,
    groups: Sequence[int] = (),
) -> Difference:
    """Compares two models by one score on the same items; several seeds are averaged.

    ours, theirs: a measure for each seed, all of the same items; clusters: of each item; groups:
    numbers of the samples that items belong to, if there are several that share no cluster. The
    variance over clusters comes from a bootstrap of the mean over seeds (times G / (G - 1) for G
    clusters of a sample that count), that over seeds from the seeds' differences, and they are added.
    Interval and p-value are those of Student's t with Satterthwaite's degrees of freedom: few
    clusters or seeds give wide intervals. Where every cluster shows one difference, which tells
    nothing of how others vary, p is what it would be if one more cluster showed none.
    """
    pairs = [*ours, *theirs]
    sides = np.repeat([1.0, -1.0], [len(ours), len(theirs)]) / len(ours)
    apart = np.array([a.value - b.value for a, b in zip(ours, theirs, strict=True)])
    value = float(apart.mean())
    counted = np.any([measure.counts for measure in pairs], axis=0)
    names, samples = np.asarray(clusters), np.asarray(groups if len(groups) else [0] * len(clusters))
    parts = []
    for sample in np.unique(samples[counted]):
        own = (samples == sample) & np.isin(names, names[counted])
        several = len(set(names[own].tolist()))
        if several < 2:
            return Difference(value)
        within = [measure if own.all() else measure.within(own) for measure in pairs]
        drawn = sides @ np.array(resample(within, names[own].tolist(), resamples, seed))  # [resamples]
        parts.append((float(np.nanvar(drawn)) * several / (several - 1), several - 1))
    if not parts or not np.isfinite(value):
        return Difference(value)
    every, fewest = (choose(degrees for _, degrees in parts) for choose in (sum, min))
    if len(apart) > 1:
        parts.append((float(apart.var(ddof=1)) / len(apart), len(apart) - 1))
    variance = sum(part for part, _ in parts)
    if not np.isfinite(variance):  # no draw has a score
        return Difference(value)
    error = variance**0.5
    if error < 1e-12 * max(
        1.0, abs(value)
    ):  # no item sets the models apart, or every cluster does so alike
        if abs(value) < 1e-12:
            return Difference(value, [value, value], 1.0, 0.0, float(every))
        few = fewest + 1  # clusters; with one more of difference 0, t and its degrees are their number
        return Difference(value, None, _two_sided(few, few), 0.0, float(every))
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    wide = error * _t(0.975, freedom)
    return Difference(
        value, [value - wide, value + wide], _two_sided(value / error, freedom), error, freedom
    )


def mcnemar(ours: Sequence[bool] | np.ndarray, theirs: Sequence[bool] | np.ndarray) -> float:
    """Returns the exact two-sided p-value of McNemar's test on items that both models answered.

    Of the items that one model alone has right, half would be each one's if they were equally good.
    It takes items as independent.
    """
    from scipy.stats import binomtest

    mine, yours = np.asarray(ours, bool), np.asarray(theirs, bool)
    apart = int((mine != yours).sum())
    return float(binomtest(int((mine & ~yours).sum()), apart, 0.5).pvalue) if apart else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects the p-values of several comparisons by Holm's step-down rule, in their order.

    All comparisons whose corrected value is below 0.05 may be called different together: the chance
    of even one mistake among them is then at most 5 %.
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.zeros(len(p_values))
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected.tolist()


def verdicts(
    differences: Sequence[Difference], p_values: Sequence[float | None] | None = None
) -> list[dict[str, Any]]:
    """Calls each difference "better", "worse" or "undecided", corrected for their number (Holm).

    p_values: instead of those of the differences. Returns {p_holm, verdict} for each; a difference
    without a p-value is undecided and does not count among the comparisons.
    """
    given = [d.p for d in differences] if p_values is None else list(p_values)
    corrected = iter(holm([p for p in given if p is not None]))
    found = [None if p is None else next(corrected) for p in given]
    return [
        {"p_holm": p, "verdict": _verdict(difference.value, p)}
        for difference, p in zip(differences, found, strict=True)
    ]


def _verdict(value: float, p: float | None) -> str:
    if p is None or p >= LEVEL:
        return "undecided"
    return "better" if value > 0 else "worse"


def _t(share: float, freedom: float | None) -> float:
    """Returns below which value Student's t lies with this probability."""
    from scipy.stats import t

    return float(t.ppf(share, freedom))


def _two_sided(ratio: float, freedom: float) -> float:
    from scipy.stats import t

    return float(2 * t.sf(abs(ratio), freedom))

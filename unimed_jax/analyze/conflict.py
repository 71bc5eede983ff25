"""Measures agreement and conflict between the gradients of tasks, from their inner products alone.

A Gram matrix here is float64 [U, B, U, B]: inner products of the gradients of U units (tasks, or
tasks of a data set) on B batches each. The gradient of a unit is the mean over its batches, so that
everything below is a sum of entries, and a bootstrap over batches reweighs them.
"""

import dataclasses
from itertools import combinations
from typing import Any

import numpy as np

from unimed_jax.evaluate.statistics import interval


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Holds what is measured between each two of K gradients; the arrays are float64 [K, K]."""

    cosine: np.ndarray  # direction similarity: g_i g_j / (|g_i| |g_j|)
    magnitude: np.ndarray  # magnitude similarity: 2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2)
    gram: np.ndarray  # inner products

    @property
    def conflicts(self) -> float:
        """Returns the share of pairs whose cosine is negative (arXiv 2001.06782, definition 1)."""
        pairs = [self.cosine[i, j] for i, j in combinations(range(len(self.cosine)), 2)]
        return float(np.mean(np.array(pairs) < 0))

    @property
    def spectral_entropy(self) -> float:
        """Returns the entropy, in nats, of the eigenvalues' shares of their sum (arXiv 2504.09967).

        It is 0 if all gradients lie on one line, and log K if they are orthogonal and equally long.
        """
        share = self._shares()
        share = share[share > 0]
        return float(-(share * np.log(share)).sum())

    @property
    def dominant_eigenvalue_ratio(self) -> float:
        """Returns the largest eigenvalue's share of their sum (arXiv 2504.09967)."""
        return float(self._shares().max())

    def _shares(self) -> np.ndarray:
        values = np.maximum(np.linalg.eigvalsh(self.gram), 0)
        return values / max(values.sum(), 1e-300)


def conflict(gram: np.ndarray) -> Conflict:
    """Measures a Gram matrix [K, K] of one gradient each; a gradient of zeros has cosine 0."""
    square = np.maximum(np.diagonal(gram), 0)
    norm = np.sqrt(square)
    product = np.outer(norm, norm)
    cosine = np.where(product > 0, gram / np.where(product > 0, product, 1), 0.0)
    total = square[:, None] + square[None]
    magnitude = np.where(total > 0, 2 * product / np.where(total > 0, total, 1), 0.0)
    for similarity in (cosine, magnitude):
        np.fill_diagonal(similarity, np.where(square > 0, 1.0, 0.0))
    return Conflict(np.clip(cosine, -1, 1), magnitude, gram)


def of_means(gram: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Returns the Gram matrix [U, U] of each unit's mean gradient.

    weights [U, B]: of the batches, each row with the sum 1; equal ones by default.
    """
    units, batches = gram.shape[:2]
    if weights is None:
        weights = np.full((units, batches), 1 / batches)
    return np.einsum("ub,ubvc,vc->uv", weights, gram, weights, optimize=True)


def measured(gram: np.ndarray, joined: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Measures the units of a Gram matrix [U, B, U, B], joined to K, with 95 % intervals.

    joined [K, U]: how the gradient of each of the K is made of the units' mean gradients. Intervals
    are percentiles over resampled batches; they are None if a unit has one batch.
    """
    units, batches = gram.shape[:2]
    found = conflict(joined @ of_means(gram) @ joined.T)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples if batches > 1 else 0):
        weights = rng.multinomial(batches, np.full(batches, 1 / batches), size=units) / batches
        drawn.append(conflict(joined @ of_means(gram, weights) @ joined.T))
    # Of the pairs of single batches, which is what a step of training sees.
    single = np.einsum("ku,ubvc,lv->kblc", joined, gram, joined, optimize=True)
    count = len(joined)
    alone = [np.mean(single[i, :, j, :] < 0) for i, j in combinations(range(count), 2)]
    values = {
        "conflicts": [each.conflicts for each in drawn],
        "spectral_entropy": [each.spectral_entropy for each in drawn],
        "dominant_eigenvalue_ratio": [each.dominant_eigenvalue_ratio for each in drawn],
    }
    return {
        "cos": found.cosine.tolist(),
        "magnitude": found.magnitude.tolist(),
        "n": batches,
        "ci": {
            "cos": _intervals(np.array([each.cosine for each in drawn]), count),
            "magnitude": _intervals(np.array([each.magnitude for each in drawn]), count),
        },
        "norm": np.sqrt(np.maximum(np.diagonal(found.gram), 0)).tolist(),
        "gram": found.gram.tolist(),
        "conflicts_of_single_batches": float(np.mean(alone)) if alone else 0.0,
        **{
            name: {"value": getattr(found, name), "ci95": interval(np.array(draws)) if draws else None}
            for name, draws in values.items()
        },
    }


def _intervals(draws: np.ndarray, count: int) -> list | None:
    """Gives [low, high] for each of [count, count] values; None without draws."""
    if not len(draws):
        return None
    return [[interval(draws[:, i, j]) for j in range(count)] for i in range(count)]

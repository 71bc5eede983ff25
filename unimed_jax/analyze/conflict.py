"""Measures agreement and conflict between gradients of tasks, from their inner products alone.

A Gram matrix here is float64 [U, B, U, B]: inner products of the gradients of U units (tasks, or
tasks of a data set) on B batches each. The gradient of a unit is the mean over its batches. Its
inner product with another one is a mean over pairs of batches, and is taken apart into

- pairs of different batches, which estimate the inner product of the expected gradients;
- pairs of the same number, which in a squared norm also hold the noise of single batches.

A bootstrap draws batches and puts the two together as they are in the data. (Drawn as they come,
the same batch would meet itself more often, and every cosine would look smaller than it is.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unimed_jax.evaluate.statistics import interval

FEWEST = 4  # batches of an interval
Values = np.ndarray  # float64 [..., K, K]


def cosines(gram: Values) -> Values:
    """Computes direction similarities g_i g_j / (|g_i| |g_j|); NaN where a norm is not positive."""
    norm = _norms(gram)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.clip(gram / (norm[..., :, None] * norm[..., None, :]), -1, 1)
    return _with_diagonal(found, np.where(norm > 0, 1.0, np.nan))


def magnitudes(gram: Values) -> Values:
    """Computes magnitude similarities 2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2) (arXiv 2001.06782)."""
    norm = _norms(gram)
    a, b = norm[..., :, None], norm[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = 2 * a * b / (a * a + b * b)
    return _with_diagonal(found, np.where(norm > 0, 1.0, np.nan))


def _norms(gram: Values) -> np.ndarray:
    square = np.diagonal(gram, axis1=-2, axis2=-1)
    return np.sqrt(np.where(square > 0, square, np.nan))


def _with_diagonal(matrix: Values, values: np.ndarray) -> Values:
    places = np.arange(matrix.shape[-1])
    matrix[..., places, places] = values
    return matrix


def pairs(matrix: Values) -> np.ndarray:
    """Lists the values above the diagonal: [..., K (K - 1) / 2]."""
    rows, columns = np.triu_indices(matrix.shape[-1], 1)
    return matrix[..., rows, columns]


def _shares(gram: Values) -> np.ndarray:
    """Computes each eigenvalue's share of their sum: [..., K]."""
    values = np.maximum(np.linalg.eigvalsh(gram), 0)
    return values / np.maximum(values.sum(axis=-1, keepdims=True), 1e-300)


def spectral_entropy(gram: Values) -> np.ndarray:
    """Computes the entropy, in nats, of the eigenvalues' shares of their sum (arXiv 2504.09967).

    It is 0 if all gradients lie on one line, and log K if they are orthogonal and equally long.
    """
    share = _shares(gram)
    return -(share * np.log(np.maximum(share, 1e-300))).sum(axis=-1)


def dominant_eigenvalue_ratio(gram: Values) -> np.ndarray:
    """Computes the largest eigenvalue's share of their sum (arXiv 2504.09967)."""
    return _shares(gram).max(axis=-1)


def _mean_known(values: np.ndarray) -> np.ndarray:
    """Averages over the last axis what is not NaN; NaN where nothing is left."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=-1) / known.sum(axis=-1)


# The index whose pairs need not all be known: those of a gradient that is noise alone are not.
WITHOUT_NOISE = "mean_cos_without_noise"
# Each reads the Gram matrix of mean gradients, and that of pairs of different batches only.
INDICES: Mapping[str, Callable[[Values, Values], np.ndarray]] = {
    "mean_cos": lambda gram, apart: pairs(cosines(gram)).mean(axis=-1),
    WITHOUT_NOISE: lambda gram, apart: _mean_known(pairs(cosines(apart))),
    "conflicts": lambda gram, apart: (pairs(gram) < 0).mean(axis=-1),  # arXiv 2001.06782
    "mean_magnitude": lambda gram, apart: pairs(magnitudes(gram)).mean(axis=-1),
    "spectral_entropy": lambda gram, apart: spectral_entropy(gram),
    "dominant_eigenvalue_ratio": lambda gram, apart: dominant_eigenvalue_ratio(gram),
}


def of_means(gram: np.ndarray, weights: np.ndarray) -> tuple[Values, Values]:
    """Computes Gram matrices [R, U, U] of mean gradients, for R ways to weigh the batches.

    weights [R, B]: each row has the sum 1, and no weight is 1. Also returns the means over pairs of
    different batches alone.
    """
    batches = gram.shape[1]
    places = np.arange(batches)
    same = gram[:, places, :, places]  # [B, U, U]
    own = np.einsum("rb,buv->ruv", weights, same)
    squares = np.einsum("rb,buv->ruv", weights**2, same)
    every = np.einsum("rb,ubvc,rc->ruv", weights, gram, weights, optimize=True)
    rest = 1 - (weights**2).sum(axis=1)[:, None, None]
    apart = (every - squares) / np.where(rest > 0, rest, np.nan)
    if batches == 1:
        return own, apart
    return (1 - 1 / batches) * apart + own / batches, apart


def draws(batches: int, resamples: int) -> np.ndarray:
    """Draws batches with replacement: weights [R, B].

    All analyses draw the same, so that two runs on the same batches are compared in pairs. Draws of
    one batch alone are left out.
    """
    drawn = np.random.default_rng(0).multinomial(batches, np.full(batches, 1 / batches), resamples)
    return drawn[drawn.max(axis=1) < batches] / batches


class Measured:
    """Holds what is measured between K gradients, and the same for every bootstrap draw."""

    def __init__(
        self, gram: np.ndarray, joined: np.ndarray, names: Sequence[str], resamples: int = 1000
    ):
        """Measures the units of a Gram matrix [U, B, U, B], joined to K.

        joined [K, U]: how the gradient of each of the K is made of the units' mean gradients. Those
        whose gradient is zero, since they never touch the parameters, are named in `absent`.
        """
        self.batches = gram.shape[1]
        gram = np.einsum("ku,ubvc,lv->kblc", joined, gram, joined, optimize=True)
        touches = np.einsum("kbkb->k", gram) > 0
        self.names = [name for name, there in zip(names, touches, strict=True) if there]
        self.absent = [name for name, there in zip(names, touches, strict=True) if not there]
        self.each = gram[touches][:, :, touches]  # [K, B, K, B]
        found, apart = of_means(self.each, np.full((1, self.batches), 1 / self.batches))
        self.gram, self.apart = found[0], apart[0]
        self.cos, self.magnitude = cosines(self.gram), magnitudes(self.gram)
        enough = self.batches >= FEWEST
        weights = draws(self.batches, resamples if enough else 0)
        self._drawn, self._drawn_apart = of_means(self.each, weights)

    @property
    def compares(self) -> bool:
        """Says whether there are two gradients to compare."""
        return len(self.names) > 1

    @property
    def known(self) -> np.ndarray:
        """Says of which pairs the cosine without noise is known: bool [pairs]."""
        return np.isfinite(pairs(cosines(self.apart)))

    def index(self, name: str, known: np.ndarray | None = None) -> float:
        """Returns an index of INDICES; NaN if it is not defined.

        known: the pairs that WITHOUT_NOISE is the mean of; by default those that are.
        """
        return float(self._index(name, self.gram, self.apart, known))

    def drawn_index(self, name: str, known: np.ndarray | None = None) -> np.ndarray:
        """Returns the index of every draw; empty if there are too few batches."""
        return self._index(name, self._drawn, self._drawn_apart, known)

    def _index(self, name: str, gram: Values, apart: Values, known: np.ndarray | None) -> np.ndarray:
        if name != WITHOUT_NOISE:
            return INDICES[name](gram, apart)
        return _mean_known(pairs(cosines(apart))[..., self.known if known is None else known])

    def plain(self) -> dict[str, Any]:
        """Returns what tug_of_war.json holds; null stands for what is not defined."""
        with np.errstate(invalid="ignore", divide="ignore"):
            signal = np.diagonal(self.apart) / np.diagonal(self.gram)
        single = pairs((self.each < 0).mean(axis=(1, 3)))
        return {
            "names": self.names,
            "absent": self.absent,
            "cos": _plain(self.cos),
            "magnitude": _plain(self.magnitude),
            "n": self.batches,
            "ci": {
                "cos": _intervals(cosines(self._drawn)),
                "magnitude": _intervals(magnitudes(self._drawn)),
            },
            "cos_without_noise": _plain(cosines(self.apart)),
            "norm": _plain(np.sqrt(np.diagonal(self.gram))),
            "signal": _plain(signal),
            "gram": _plain(self.gram),
            "conflicts_of_single_batches": float(single.mean()) if self.compares else None,
            "indices": {name: self._entry(name) for name in INDICES} if self.compares else {},
        }

    def _entry(self, name: str) -> dict[str, Any]:
        value, drawn = self.index(name), self.drawn_index(name)
        entry = {"value": value if np.isfinite(value) else None, "ci95": interval(drawn)}
        if name == WITHOUT_NOISE:
            entry["pairs"] = [int(self.known.sum()), len(self.known)]
        return entry


def difference(one: Measured, other: Measured, name: str) -> dict[str, Any]:
    """Compares an index of two runs on the same batches: the other's minus the first one's.

    Without noise it is taken over the pairs that are known of both.
    """
    known = one.known & other.known
    value = other.index(name, known) - one.index(name, known)
    drawn = other.drawn_index(name, known) - one.drawn_index(name, known)
    return {"value": value if np.isfinite(value) else None, "ci95": interval(drawn)}


def _intervals(drawn: np.ndarray) -> list | None:
    """Gives [low, high] for each of [K, K] values; None without draws."""
    if not len(drawn):
        return None
    count = drawn.shape[-1]
    return [[interval(drawn[:, i, j]) for j in range(count)] for i in range(count)]


def _plain(values: np.ndarray) -> list:
    """Turns an array into lists, with None in place of NaN."""
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    return plain.tolist()

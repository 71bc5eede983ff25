"""Finds nearly equal images, among many by hash tables, without comparing all with all."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unimed_jax.audit.fingerprints import MIRROR, SHAPE

LIKENESS = 0.96  # cosine of two shapes, from which images count as nearly the same
TABLES, BITS = 48, 40  # hash tables, and bits of a hash; those that must agree follow from the number
MOST = 16  # images of a table that one image is compared with on each side
ALIKE = 16  # earlier images that are found for a later one at most, the most alike ones
CODE = 256  # bits of the code by which candidates are sifted
FAR = 88  # of these bits, beyond which candidates are not compared; unlike images differ in 128
SAMPLE = 5_000  # images that the hashes are fitted on
FEW = 1_000  # images that are all compared; hashes fitted on few tell apart what is nearly equal
BLOCK = 1 << 16  # pairs that are compared at a time
_ROWS = 4_096  # images that are hashed at a time


class Hashed(NamedTuple):
    """Holds the shapes of some images with their hashes."""

    shapes: np.ndarray  # float16 [n, SHAPE]; those of length 0 are of one colour
    keys: np.ndarray  # uint64 [n, TABLES]
    codes: np.ndarray  # uint64 [n, CODE / 64]


class Matches(NamedTuple):
    """Holds for each image of a later group the nearly equal ones of an earlier group.

    The most alike stands first, and at most ALIKE are held.
    """

    other: np.ndarray  # int32 [n, ALIKE], -1: no further one was found
    likeness: np.ndarray  # float32 [n, ALIKE]


class Hasher:
    """Hashes shapes so that nearly equal ones agree in most bits, whatever else all have in common.

    Each bit is the side of a random plane through the middle of a sample of the images; the planes
    look most in the directions in which images differ least, since X-rays differ little in most.
    """

    def __init__(self, groups: Sequence[np.ndarray]):
        """Fits planes to groups of shapes, float16 [n, SHAPE]."""
        total = sum(map(len, groups))
        step = max(1, -(-total // SAMPLE))
        sample = np.concatenate([np.empty((0, SHAPE), np.float32), *(some[::step] for some in groups)])
        sample = sample[(sample != 0).any(axis=1)].astype(np.float32)
        self.total = total
        self._middle = sample.mean(axis=0) if len(sample) else np.zeros(SHAPE, np.float32)
        spread, axes = np.linalg.eigh(np.cov(sample.T) if len(sample) > 1 else np.eye(SHAPE))
        # by the fourth root: between planes for all directions alike and those for the widest only
        scale = (np.maximum(spread, 0) + 1e-6 * spread.max() + 1e-12) ** -0.25
        rng = np.random.default_rng(0)
        planes = (axes * scale) @ rng.standard_normal((SHAPE, TABLES * BITS + CODE))
        self._planes = (planes / np.linalg.norm(planes, axis=0)).astype(np.float32)
        self._median = (
            np.median((sample[:SAMPLE] - self._middle) @ self._planes, axis=0)
            if len(sample)
            else np.zeros(self._planes.shape[1], np.float32)
        )

    def hashed(self, shapes: np.ndarray, mirrored: bool = False) -> Hashed:
        """Hashes shapes, or those of the mirror images."""
        keys = np.empty((len(shapes), TABLES), np.uint64)
        codes = np.empty((len(shapes), CODE // 64), np.uint64)
        if mirrored:
            shapes = shapes * MIRROR.astype(np.float16)
        weights = np.uint64(1) << np.arange(BITS, dtype=np.uint64)[::-1]
        for start in range(0, len(shapes), _ROWS):
            some = slice(start, start + _ROWS)
            bits = (shapes[some].astype(np.float32) - self._middle) @ self._planes > self._median
            tables = bits[:, : TABLES * BITS].reshape(-1, TABLES, BITS)
            keys[some] = (tables * weights).sum(axis=2, dtype=np.uint64)
            codes[some] = np.packbits(bits[:, TABLES * BITS :], axis=1).view(np.uint64)
        return Hashed(shapes, keys, codes)

    def matches(self, earlier: Hashed, later: Hashed, among: np.ndarray | None = None) -> Matches:
        """Finds for each later image the nearly equal earlier ones.

        among: numbers of the earlier images that are looked at, int64 [m]; None: all. One of each
        picture is enough, and many copies of it would take the place of others.

        Candidates agree in the first bits of a hash, so many that a table holds a few images of each;
        where more are alike, those next to each other by the other bits are compared. Of planted
        pairs among twice 50,000 shapes with much in common, .98 of those just above LIKENESS are
        found and .997 of those of .97 and more.
        """
        form = len(later.keys), ALIKE
        out = Matches(np.full(form, -1, np.int32), np.zeros(form, np.float32))
        if among is None:
            among = np.arange(len(earlier.keys))
        if not len(among) or not len(later.keys):
            return out
        if self.total <= FEW:
            none = np.zeros(len(later.keys), np.int64)
            self._compare(earlier, later, among, none, none + len(among), CODE, out)
            return out
        agree = int(np.clip(np.ceil(np.log2(max(self.total, 2))) - 3, 4, BITS))
        rest = np.uint64(BITS - agree)
        for table in range(TABLES):
            order = among[np.argsort(earlier.keys[among, table], kind="stable")]
            ranked, wanted = earlier.keys[order, table], later.keys[:, table]
            at = np.searchsorted(ranked, wanted)
            first = (wanted >> rest) << rest
            last = first | np.uint64((1 << int(rest)) - 1)
            low = np.maximum(np.searchsorted(ranked, first), at - MOST)
            high = np.minimum(np.searchsorted(ranked, last, "right"), at + MOST)
            self._compare(earlier, later, order, low, high, FAR, out)
        return out

    def _compare(
        self,
        earlier: Hashed,
        later: Hashed,
        order: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        far: int,
        out: Matches,
    ) -> None:
        """Compares each later image with the earlier ones in places low to high of a table."""
        for start, stop in _blocks(high - low):
            counts = high[start:stop] - low[start:stop]
            j = np.repeat(np.arange(start, stop), counts)
            offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            i = order[np.repeat(low[start:stop], counts) + offset]
            apart = np.bitwise_count(earlier.codes[i] ^ later.codes[j]).sum(axis=1)
            i, j = i[apart <= far], j[apart <= far]
            new = (i[:, None] != out.other[j]).all(axis=1)
            i, j = i[new], j[new]
            likeness = likeness_of(earlier.shapes[i], later.shapes[j])
            better = likeness >= np.maximum(out.likeness[j, -1], LIKENESS)
            _merge(i[better], j[better], likeness[better], out)


def _merge(i: np.ndarray, j: np.ndarray, likeness: np.ndarray, out: Matches) -> None:
    """Puts earlier images i, which are new to the later images j, among their most alike ones."""
    rows = np.unique(j)
    i = np.concatenate([out.other[rows].ravel(), i])
    j = np.concatenate([np.repeat(rows, ALIKE), j])
    likeness = np.concatenate([out.likeness[rows].ravel(), likeness])
    order = np.lexsort((-likeness, j))
    best = order[np.searchsorted(j[order], rows)[:, None] + np.arange(ALIKE)]  # [rows, ALIKE]
    out.other[rows], out.likeness[rows] = i[best], likeness[best]


def likeness_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes the cosine of shapes [n, SHAPE] pairwise to [n]; one colour is like nothing."""
    return np.einsum("nd,nd->n", a.astype(np.float32), b.astype(np.float32))


def _blocks(counts: np.ndarray) -> list[tuple[int, int]]:
    """Cuts rows into blocks of at most BLOCK candidates each (a single row may have more)."""
    ends, start, blocks = np.cumsum(counts), 0, []
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK, side="right")))
        blocks.append((start, stop))
        start = stop
    return blocks

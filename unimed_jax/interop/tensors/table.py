"""One declarative table per family of published weights, read in both directions.

A table says for every published tensor which part of which of our leaves holds the same numbers and in which
layout. Published linears are torch's ([out, in], one module per layer); ours are [in, out] and stacked over layers,
experts concatenated. Everything that crosses the border goes through `check`, `read` and `to_published`.
"""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from unimed_jax.errors import UserError

Region = tuple[slice, ...]  # start and stop in every dimension of a leaf, or of an entry's block of it
FLOATS = tuple(np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64))


class Stored(NamedTuple):
    """A tensor as a file holds it."""

    shape: tuple[int, ...]
    dtype: np.dtype | str  # the file's own word for what numpy cannot hold


class Tensors:
    """Named tensors of a file, or of several; nothing but their names and shapes is in memory."""

    origin: str  # for messages
    stored: Mapping[str, Stored]

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        """A copy of that part of the tensor, in the stored dtype."""
        raise NotImplementedError


class Arrays(Tensors):
    """Arrays that are in memory already, laid over those of `behind`."""

    def __init__(self, arrays: Mapping[str, np.ndarray], behind: Tensors | None = None, origin: str = "memory"):
        self.arrays, self.behind = arrays, behind
        self.origin = behind.origin if behind else origin
        self.stored = {**(behind.stored if behind else {}), **{k: Stored(v.shape, v.dtype) for k, v in arrays.items()}}

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        if name not in self.arrays:
            assert self.behind is not None
            return self.behind.read(name, index)
        return self.arrays[name][index]


class Layout(NamedTuple):
    """How a published tensor holds the block of ours that an entry names."""

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # our block's -> the published tensor's
    # A region of our block -> the index to read, and what is still to be cut out of `ours` of what was read.
    where: Callable[[Region], tuple[Region, Region]]
    ours: Callable[[np.ndarray, int], np.ndarray]  # the second argument is Entry.heads
    published: Callable[[np.ndarray, int], np.ndarray]


ALL = slice(None)


def _patch(part: np.ndarray, _) -> np.ndarray:
    side = math.isqrt(part.shape[0] // 3)
    return part.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)  # [out, 3, p, p]


def _pairs(tensor: np.ndarray, heads: int, halves_first: bool) -> np.ndarray:
    """Rows [heads * d, in], each head's as (2, d / 2) or (d / 2, 2), to the other order."""
    split = (heads, 2, -1) if halves_first else (heads, -1, 2)
    parts = tensor.reshape(*split, *tensor.shape[1:])  # [heads, 2, d / 2, in] or [heads, d / 2, 2, in]
    return parts.swapaxes(1, 2).reshape(tensor.shape)  # [heads * d, in]


LAYOUTS: dict[str, Layout] = {
    "same": Layout(lambda s: s, lambda r: (r, ()), lambda x, _: x, lambda x, _: x),
    "transpose": Layout(lambda s: s[::-1], lambda r: (r[::-1], ()), lambda x, _: x.T, lambda x, _: x.T),
    # [1, 1, c] <-> [c]
    "row": Layout(
        lambda s: (1, 1, *s), lambda r: ((ALL, ALL, *r), ()), lambda x, _: x.reshape(-1), lambda x, _: x[None, None]
    ),
    # [1, n, c] <-> [n, c]
    "batch": Layout(lambda s: (1, *s), lambda r: ((ALL, *r), ()), lambda x, _: x[0], lambda x, _: x[None]),
    # a convolution [out, 3, p, p] <-> [p * p * 3, out]
    "patch": Layout(
        lambda s: (s[1], 3, math.isqrt(s[0] // 3), math.isqrt(s[0] // 3)),
        lambda r: ((r[1],), (r[0],)),
        lambda x, _: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),  # [p * p * 3, out]
        _patch,
    ),
    # [heads * (d / 2, 2), in] <-> [in, heads * (2, d / 2)], or both without `in`: rotary pairs side by side (GGUF)
    "pairs": Layout(
        lambda s: s[::-1],
        lambda r: ((ALL, *r[:-1]), (*(ALL for _ in r[:-1]), r[-1])),
        lambda x, heads: _pairs(x, heads, halves_first=False).T,
        lambda x, heads: _pairs(x.T, heads, halves_first=True),
    ),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published tensor, or a run of its columns, and the part of our leaf that holds the same numbers."""

    name: str
    path: str
    ours: tuple = ()  # index of the block in our leaf: numbers and slices, whole where there is none
    layout: str = "same"  # a key of LAYOUTS
    columns: tuple[int, int] | None = None  # of a transposed tensor (the router's two halves)
    heads: int = 0  # of layout `pairs`

    def block(self, leaf: tuple[int, ...]) -> Region:
        """The block as a region of a leaf of that shape."""
        index = (*self.ours, *(ALL,) * (len(leaf) - len(self.ours)))
        return tuple(
            slice(*i.indices(n)[:2]) if isinstance(i, slice) else slice(i, i + 1)
            for i, n in zip(index, leaf, strict=True)
        )

    def to_published(self, leaf: Any) -> np.ndarray:
        """The tensor, or its columns, from our leaf (numpy or jax). Of a stacked one a layer alone is fetched."""
        ours = self.ours
        if ours and not isinstance(ours[0], slice):
            leaf, ours = leaf[ours[0]], ours[1:]
        return LAYOUTS[self.layout].published(np.asarray(leaf)[ours], self.heads)

    def published_shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        return LAYOUTS[self.layout].shape(tuple(size for size, _ in self._kept(self.block(leaf))))

    def read(self, tensors: Tensors, leaf: tuple[int, ...], region: Region) -> tuple[Region, np.ndarray] | None:
        """What this entry puts into a region of the leaf: (where within the region, values), or None.

        Raises UserError for values that are not finite.
        """
        block = self.block(leaf)
        both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(block, region, strict=True))
        if any(s.start >= s.stop for s in both):
            return None
        layout = LAYOUTS[self.layout]
        local = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(both, block, strict=True))
        index, rest = layout.where(tuple(part for _, part in self._kept(local)))
        if self.columns:
            index = (index[0], slice(index[1].start + self.columns[0], index[1].stop + self.columns[0]))
        values = tensors.read(self.name, index)
        if not is_finite(values):
            raise UserError(f"{tensors.origin}: {self.name} holds NaN or infinite numbers; get the file again.")
        values = layout.ours(values, self.heads)[rest]
        shape = tuple(s.stop - s.start for s in both)
        place = tuple(slice(s.start - r.start, s.stop - r.start) for s, r in zip(both, region, strict=True))
        return place, values.reshape(shape)  # the dimensions that `ours` numbers are there again, of length 1

    def _kept(self, region: Region) -> list[tuple[int, slice]]:
        """(length, part) of the region's dimensions that `ours` does not number away."""
        numbered = {d for d, i in enumerate(self.ours) if not isinstance(i, slice)}
        return [(s.stop - s.start, s) for d, s in enumerate(region) if d not in numbered]


@dataclasses.dataclass(frozen=True)
class Table:
    """Entries, and patterns of tensors that such files may hold besides and that are not needed."""

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()

    def __add__(self, other: "Table") -> "Table":
        return Table(self.entries + other.entries, self.ignored + other.ignored)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def prefixed(self, prefix: str) -> "Table":
        """The same tensors, their names behind a prefix."""
        entries = tuple(dataclasses.replace(entry, name=prefix + entry.name) for entry in self)
        return Table(entries, tuple(prefix + pattern for pattern in self.ignored))

    def paths(self) -> list[str]:
        return list(dict.fromkeys(entry.path for entry in self))

    def under(self, path: str) -> list[Entry]:
        return [entry for entry in self if entry.path == path]

    def by_name(self) -> dict[str, list[Entry]]:
        """Published tensor -> the entries that make it up."""
        out: dict[str, list[Entry]] = {}
        for entry in self:
            out.setdefault(entry.name, []).append(entry)
        return out


def published_shapes(table: Table, leaves: Mapping[str, Any]) -> dict[str, Stored]:
    """Shapes and dtypes of the tensors that `to_published` makes of leaves of these shapes and dtypes."""
    out: dict[str, Stored] = {}
    for entry in table:
        leaf = leaves[entry.path]
        shape = entry.published_shape(tuple(leaf.shape))
        if entry.columns:
            shape = (shape[0], max(entry.columns[1], out[entry.name].shape[1] if entry.name in out else 0))
        out[entry.name] = Stored(shape, np.dtype(leaf.dtype))
    return out


def check(table: Table, tensors: Tensors, leaves: Mapping[str, Any], differences: Iterable[str] = ()) -> None:
    """Raises one UserError that names every missing, unexpected, mis-shaped and unreadable tensor.

    `leaves` (anything with shapes, by path) must hold every path of the table; `differences` is what else does not
    fit, in words.
    """
    expected = {name: stored.shape for name, stored in published_shapes(table, leaves).items()}
    problems = list(differences)
    missing = [name for name in expected if name not in tensors.stored]
    unexpected = [
        name
        for name in tensors.stored
        if name not in expected and not any(fnmatch.fnmatchcase(name, pattern) for pattern in table.ignored)
    ]
    for names, what in ((missing, "missing"), (unexpected, "not known to this model")):
        if names:
            problems.append(f"{', '.join(folded(names))} {'is' if len(names) == 1 else 'are'} {what}")
    wrong: dict[str, list[str]] = {}
    for name, shape in expected.items():
        if name not in tensors.stored:
            continue
        stored = tensors.stored[name]
        if tuple(stored.shape) != shape:
            wrong.setdefault(f"of shape {list(stored.shape)} in place of {list(shape)}", []).append(name)
        elif stored.dtype not in FLOATS:
            wrong.setdefault(f"stored as {stored.dtype}, which is no plain floating-point type", []).append(name)
    problems += [
        f"{', '.join(folded(names))} {'is' if len(names) == 1 else 'are'} {what}" for what, names in wrong.items()
    ]
    if problems:
        raise UserError(f"{tensors.origin} does not fit the model: {'; '.join(problems)}; check config.model.")


def folded(names: Iterable[str]) -> list[str]:
    """Names that differ in one number as one: `layers.{0-3,7}.weight`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        first = re.search(r"\d+", name)
        key = (name[: first.start()], name[first.end() :]) if first else (name, "")
        groups.setdefault(key, []).extend([int(first.group())] if first else [])
    return [f"{a}{_ranges(sorted(set(numbers)))}{b}" for (a, b), numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def read(
    table: Table, tensors: Tensors, path: str, leaf: tuple[int, ...], region: Region, dtype: Any = np.float32
) -> np.ndarray:
    """A region of the leaf at `path`, of shape `leaf`, from what the file holds (which `check` has passed)."""
    out = np.empty(tuple(s.stop - s.start for s in region), dtype)
    filled = 0
    for entry in table.under(path):
        found = entry.read(tensors, leaf, region)
        if found is not None:
            place, values = found
            _copy(out[place], values)
            filled += values.size
    assert filled == out.size, f"the table leaves a part of {path} open"
    return out


def _copy(target: np.ndarray, values: np.ndarray, strip: int = 64) -> None:
    """target[...] = values; a transposed view by strips, which is three times as fast."""
    if values.flags.c_contiguous:
        target[...] = values
        return
    for i in range(0, values.shape[-1], strip):
        target[..., i : i + strip] = values[..., i : i + strip]


def is_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:  # its own isfinite is three times as slow
        return not ((values.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(values).all())


def to_leaves(
    table: Table, tensors: Tensors | Mapping[str, np.ndarray], leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The leaves that the table names, whole and in float32 (`leaves` gives their shapes).

    Raises one UserError for all that does not fit (`check`), and one for a tensor that is not finite.
    """
    tensors = tensors if isinstance(tensors, Tensors) else Arrays(tensors)
    check(table, tensors, leaves)
    shapes = {path: tuple(leaves[path].shape) for path in table.paths()}
    return {path: read(table, tensors, path, shape, whole(shape)) for path, shape in shapes.items()}


def whole(shape: tuple[int, ...]) -> Region:
    return tuple(slice(0, n) for n in shape)


def to_published(table: Table, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every published tensor; the inverse of `to_leaves`."""
    return dict(each_published(table, leaves))


def each_published(table: Table, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every published tensor, one at a time and in the order of `published`."""
    for name, entries in table.by_name().items():
        yield name, assembled(entries, leaves)


def assembled(entries: Iterable[Entry], leaves: Mapping[str, Any]) -> np.ndarray:
    """The published tensor that these entries of one name make up."""
    tensors = [entry.to_published(leaves[entry.path]) for entry in entries]
    return np.ascontiguousarray(tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=1))

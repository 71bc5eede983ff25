"""Maps published tensors to our leaves, by one declarative table per family of weights.

The table is read in both directions.

Published linears are torch's: [out, in], one module per layer. Ours are [in, out], stacked over the
layers, experts concatenated. A table says for each published tensor which block of which leaf holds the
same numbers, and in which layout:

    # Our kernel is [24, 960, 320]; the file holds one [320, 960] tensor per layer.
    Entry("model.layers.7.self_attn.k_proj.weight", "decoder/layers/attention/k/kernel", (7,),
    "transpose")

`check` and `read_region` take weights in, `published_shapes` and `each_published` give them out.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from unimed_jax.errors import UserError
from unimed_jax.interop.tensors.layouts import ALL, LAYOUTS, Region, Shape

STRIP = 64 << 20  # bytes of a tensor that are compared at a time
FLOATS = tuple(np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64))


# --------------------------------------------------------------------------------------------------
# Sources of tensors
# --------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Describes a tensor as a file holds it."""

    shape: Shape
    dtype: np.dtype | str  # the file's own word for a type that numpy cannot hold


class Tensors:
    """Gives named tensors of one or several files; only their names and shapes are in memory."""

    origin: str  # the file or folder, for messages
    stored: Mapping[str, Stored]

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        """Copies a region of the tensor into memory, in the stored dtype."""
        raise NotImplementedError

    def quantisation(self, name: str) -> str:
        """Names the codes (Q4_K, ...) that the file holds in place of a tensor's numbers, or ""."""
        return ""


class Arrays(Tensors):
    """Gives arrays that are in memory already, and for all other names the tensors of `base`."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], base: Tensors | None = None, origin: str = "memory"
    ):
        self.arrays, self.base = arrays, base
        self.origin = base.origin if base else origin
        in_memory = {name: Stored(value.shape, value.dtype) for name, value in arrays.items()}
        self.stored = {**(base.stored if base else {}), **in_memory}

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        if name in self.arrays:
            return self.arrays[name][index]
        assert self.base is not None
        return self.base.read(name, index)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """Says that a published tensor holds the same numbers as a block of one of our leaves."""

    name: str  # name of the published tensor
    path: str  # path of our leaf
    # the block in our leaf; the dimensions that it does not name are whole
    index: tuple[int | slice, ...] = ()
    layout: str = "same"  # a key of LAYOUTS
    # The range of the tensor's columns that the block holds, if several leaves share the tensor (the
    # router's halves).
    columns: tuple[int, int] | None = None
    heads: int = 0  # used only by the layout "pairs"

    def block(self, leaf: Shape) -> Region:
        """Gives the block as a region of a leaf of this shape."""
        index = (*self.index, *(ALL,) * (len(leaf) - len(self.index)))
        return tuple(
            slice(*i.indices(n)[:2]) if isinstance(i, slice) else slice(i, i + 1)
            for i, n in zip(index, leaf, strict=True)
        )

    def published_shape(self, leaf: Shape) -> Shape:
        """Gives the shape of the published tensor (or of its columns) for a leaf of this shape."""
        block = self._without_numbered(self.block(leaf))
        return LAYOUTS[self.layout].published_shape(_shape(block))

    def to_published(self, leaf: Any) -> np.ndarray:
        """Makes the published tensor (or its columns) from our leaf, a numpy or jax array.

        Only the layer that is needed is fetched from a device, not the whole stack.
        """
        index = self.index
        if index and not isinstance(index[0], slice):
            leaf, index = leaf[index[0]], index[1:]
        return LAYOUTS[self.layout].to_published(np.asarray(leaf)[index], self.heads)

    def read(self, tensors: Tensors, leaf: Shape, region: Region) -> tuple[Region, np.ndarray] | None:
        """Reads what this entry contributes to a region of a leaf of this shape.

        Returns the place within the region and the values, or None if the entry's block lies outside it.
        Raises UserError for values that are not finite.
        """
        block = self.block(leaf)
        both = _overlap(block, region)
        if both is None:
            return None
        layout = LAYOUTS[self.layout]
        in_file, kept = layout.to_read(self._without_numbered(_relative(both, block)))
        if self.columns:
            first = self.columns[0]
            in_file = (in_file[0], slice(in_file[1].start + first, in_file[1].stop + first))
        values = tensors.read(self.name, in_file)
        if not is_finite(values):
            raise UserError(
                f"{tensors.origin}: {self.name} holds NaN or infinite numbers; get the file again."
            )
        values = layout.to_ours(values, self.heads)[kept]
        # Re-insert the dimensions that `index` indexes with an integer, with length 1.
        return _relative(both, region), values.reshape(_shape(both))

    def _without_numbered(self, region: Region) -> Region:
        """Drops the dimensions that `index` indexes with an integer.

        The published tensor lacks them.
        """
        numbered = {d for d, i in enumerate(self.index) if not isinstance(i, slice)}
        return tuple(part for d, part in enumerate(region) if d not in numbered)


def _shape(region: Region) -> Shape:
    return tuple(part.stop - part.start for part in region)


def whole(shape: Shape) -> Region:
    """Gives the region that covers all of an array."""
    return tuple(slice(0, n) for n in shape)


def _overlap(a: Region, b: Region) -> Region | None:
    """Gives the region that two regions share, or None if they share nothing."""
    both = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return both if all(part.start < part.stop for part in both) else None


def _relative(part: Region, around: Region) -> Region:
    """Counts the starts and stops of `part` from the start of the region `around` it."""
    return tuple(slice(p.start - a.start, p.stop - a.start) for p, a in zip(part, around, strict=True))


@dataclasses.dataclass(frozen=True)
class Table:
    """Lists the entries of a family, and patterns of tensors in its files that are not needed."""

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()
    # (tensor, the one that it repeats): not needed either, but a file that has it must have the
    # same numbers in it.
    repeated: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: "Table") -> "Table":
        return Table(
            self.entries + other.entries, self.ignored + other.ignored, self.repeated + other.repeated
        )

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def prefixed(self, prefix: str) -> "Table":
        """Puts a prefix before every published name."""
        entries = tuple(dataclasses.replace(entry, name=prefix + entry.name) for entry in self)
        repeated = tuple((prefix + name, prefix + of) for name, of in self.repeated)
        return Table(entries, tuple(prefix + pattern for pattern in self.ignored), repeated)

    def paths(self) -> list[str]:
        """Lists the leaves that the table fills."""
        return list(dict.fromkeys(entry.path for entry in self))

    def of_leaf(self, path: str) -> list[Entry]:
        """Lists the entries that fill one leaf."""
        return [entry for entry in self if entry.path == path]

    def by_name(self) -> dict[str, list[Entry]]:
        """Groups the entries by the published tensor that they make up."""
        out: dict[str, list[Entry]] = {}
        for entry in self:
            out.setdefault(entry.name, []).append(entry)
        return out


# --------------------------------------------------------------------------------------------------
# Checking
# --------------------------------------------------------------------------------------------------


NAMED = 12  # tensors of one kind that a sentence names, at most
LONGEST = 100  # characters of a name in it


def check(
    table: Table, tensors: Tensors, leaves: Mapping[str, Any], differences: Iterable[str] = ()
) -> None:
    """Raises one UserError that names the missing, unexpected, mis-shaped and unreadable tensors.

    leaves: anything with a shape, by path, for every path of the table.
    differences: what else does not fit, in words; it joins the same sentence.
    """
    expected = {name: stored.shape for name, stored in published_shapes(table, leaves).items()}
    problems = [
        *differences,
        *_wrong_names(table, tensors, expected),
        *_wrong_tensors(tensors, expected),
    ]
    if len(problems) > NAMED:
        problems[NAMED:] = [f"{len(problems) - NAMED} more faults"]
    if problems:
        raise UserError(
            f"{tensors.origin} does not fit the model: {'; '.join(problems)}; check config.model."
        )
    for name, of in table.repeated:
        if name in tensors.stored and not _same_numbers(tensors, name, of):
            raise UserError(
                f"{tensors.origin}: {name} differs from {of}, though the settings say that they are "
                "one (tie_word_embeddings); to keep it, say false there and set "
                f"config.model.decoder.tied_head=False, or remove {name} from the file."
            )


def _same_numbers(tensors: Tensors, a: str, b: str) -> bool:
    """Says whether two matrices of a file are equal, in whatever types they are stored.

    They are read a strip at a time.
    """
    one, two = tensors.stored[a], tensors.stored[b]
    if one.shape != two.shape or one.dtype not in FLOATS or two.dtype not in FLOATS:
        return False
    rows = max(1, STRIP // max(1, 8 * int(np.prod(one.shape[1:], dtype=np.int64))))
    for start in range(0, one.shape[0], rows):
        region = (slice(start, min(start + rows, one.shape[0])), *whole(one.shape[1:]))
        left, right = (tensors.read(name, region).astype(np.float64) for name in (a, b))
        if not np.array_equal(left, right):
            return False
    return True


def _wrong_names(table: Table, tensors: Tensors, expected: Mapping[str, Shape]) -> list[str]:
    """Describes the tensors that the file lacks, and those that the model does not know."""
    repeated = {name for name, _ in table.repeated}
    missing = [name for name in expected if name not in tensors.stored]
    unexpected = [
        name
        for name in tensors.stored
        if name not in expected
        and name not in repeated
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in table.ignored)
    ]
    problems = []
    if missing:
        problems.append(_they_are(missing, "missing"))
    if unexpected:
        problems.append(_they_are(unexpected, "not known to this model"))
    return problems


def _wrong_tensors(tensors: Tensors, expected: Mapping[str, Shape]) -> list[str]:
    """Describes the tensors of another shape, and those of a type that is not a float."""
    wrong: dict[str, list[str]] = {}  # what is wrong -> names
    for name, shape in expected.items():
        if name not in tensors.stored:
            continue
        stored = tensors.stored[name]
        if tuple(stored.shape) != shape:
            what = f"of shape {list(stored.shape)} in place of {list(shape)}"
            wrong.setdefault(what, []).append(name)
        elif stored.dtype not in FLOATS:
            what = f"stored as {stored.dtype}, which is not a plain floating-point type"
            wrong.setdefault(what, []).append(name)
    return [_they_are(names, what) for what, names in wrong.items()]


def _they_are(names: list[str], what: str) -> str:
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'} {what}"


def listed(names: Iterable[str]) -> str:
    """Names tensors as a sentence does: alike ones as one, and of very many only the first."""
    return first_of(folded(names))


def first_of(words: Sequence[str]) -> str:
    """Joins the first names of a list and counts the others."""
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return ", ".join(map(_cut, words[:NAMED])) + more


def _cut(name: str) -> str:
    """Leaves the middle of a very long name out."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 20]}...{name[-17:]}"


def folded(names: Iterable[str]) -> list[str]:
    """Writes names that differ only in their first number as one: `layers.{0-3,7}.weight`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        first = re.search("[0-9]{1,9}", name)
        key = (name[: first.start()], name[first.end() :]) if first else (name, "")
        groups.setdefault(key, []).extend([int(first.group())] if first else [])
    return [
        f"{before}{_ranges(sorted(set(numbers)))}{after}" for (before, after), numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Writes increasing numbers as ranges: [0, 1, 2, 7] as "{0-2,7}", [7] as "7"."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def is_finite(values: np.ndarray) -> bool:
    """Says whether an array holds neither NaN nor infinity."""
    # testing the exponent bits is three times as fast as its isfinite
    if values.dtype == ml_dtypes.bfloat16:
        return not ((values.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(values).all())


# --------------------------------------------------------------------------------------------------
# Published -> ours
# --------------------------------------------------------------------------------------------------


def read_region(
    table: Table, tensors: Tensors, path: str, leaf: Shape, region: Region, dtype: Any = np.float32
) -> np.ndarray:
    """Reads a region of the leaf at `path`, of shape `leaf`, from tensors that `check` has passed."""
    out = np.empty(_shape(region), dtype)
    filled = 0
    for entry in table.of_leaf(path):
        found = entry.read(tensors, leaf, region)
        if found is not None:
            place, values = found
            _copy(out[place], values)
            filled += values.size
    assert filled == out.size, f"the table leaves a part of {path} open"
    return out


def _copy(target: np.ndarray, values: np.ndarray, strip: int = 64) -> None:
    """Copies values into an array of the same shape.

    A transposed view is copied in strips, which is three times as fast.
    """
    if values.flags.c_contiguous:
        target[...] = values
        return
    for i in range(0, values.shape[-1], strip):
        target[..., i : i + strip] = values[..., i : i + strip]


def to_leaves(
    table: Table, tensors: Tensors | Mapping[str, np.ndarray], leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Makes whole float32 leaves, of the shapes of `leaves`, for every path of the table.

    Raises one UserError for everything that does not fit (`check`), and one for the first tensor that
    is not finite.
    """
    tensors = tensors if isinstance(tensors, Tensors) else Arrays(tensors)
    check(table, tensors, leaves)
    shapes = {path: tuple(leaves[path].shape) for path in table.paths()}
    return {
        path: read_region(table, tensors, path, shape, whole(shape)) for path, shape in shapes.items()
    }


# --------------------------------------------------------------------------------------------------
# Ours -> published
# --------------------------------------------------------------------------------------------------


def published_shapes(table: Table, leaves: Mapping[str, Any]) -> dict[str, Stored]:
    """Gives shapes and dtypes of the published tensors for leaves of these shapes and dtypes."""
    out: dict[str, Stored] = {}
    for entry in table:
        leaf = leaves[entry.path]
        shape = entry.published_shape(tuple(leaf.shape))
        if entry.columns:  # several leaves share the tensor, which is as wide as the last range says
            width = max(entry.columns[1], out[entry.name].shape[1] if entry.name in out else 0)
            shape = (shape[0], width)
        out[entry.name] = Stored(shape, np.dtype(leaf.dtype))
    return out


def to_published(table: Table, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Makes every published tensor; the inverse of `to_leaves`."""
    return dict(each_published(table, leaves))


def each_published(table: Table, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) for every published tensor, one at a time.

    They come in the order of `published_shapes`.
    """
    for name, entries in table.by_name().items():
        yield name, assembled(entries, leaves)


def assembled(entries: Iterable[Entry], leaves: Mapping[str, Any]) -> np.ndarray:
    """Makes the one published tensor that these entries make up."""
    tensors = [entry.to_published(leaves[entry.path]) for entry in entries]
    return np.ascontiguousarray(tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=1))

"""Holds what the pipeline and filters need of each example as arrays.

The arrays take the place of millions of Python objects.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from unimed_jax.config import TASKS
from unimed_jax.data.example import Dataset, Example

NONE = -1  # the code of an example that has no such value


def hash_of(text: str) -> int:
    """Computes a hash of the text with 64 bits, which is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Strings(Sequence[str]):
    """Holds texts as one array of bytes and their ends; either may be memory-mapped."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        """Takes the bytes of all texts and where each text ends.

        blob: uint8 [bytes], in UTF-8. ends: int64 [n + 1]. Text i is blob[ends[i]:ends[i + 1]].
        """
        self._blob, self._ends = blob, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Strings":
        parts = [text.encode() for text in texts]
        ends = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=ends[1:])
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self._blob, self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._blob[self._ends[i] : self._ends[i + 1]].tobytes().decode()


@dataclasses.dataclass(frozen=True)
class Column:
    """Holds one text of each example as its number in a list of texts.

    `codes` int32 [N] points into `texts`; it is NONE where the example has no such text.
    """

    codes: np.ndarray
    texts: Strings

    def at(self, rows: np.ndarray | slice) -> "Column":
        return Column(self.codes[rows], self.texts)

    def among(self, wanted: Iterable[str]) -> np.ndarray:
        """Marks the examples that have one of the texts, bool [N]."""
        wanted = set(wanted)
        known = np.array([*(text in wanted for text in self.texts), False])  # the last is that of NONE
        return known[self.codes]


@dataclasses.dataclass(frozen=True)
class Columns:
    """Holds the columns of N examples, in the order of `Dataset.examples`.

    Arrays are read as they are used.
    """

    task: np.ndarray  # int8 [N], index in TASKS
    images: np.ndarray  # int16 [N], number of images
    # int32 [N]: examples with the same images, in the same order, share a number; NONE: no image
    image_set: np.ndarray
    ids: np.ndarray  # uint64 [N], `hash_of` each id
    cluster: Column  # `Example.cluster`; NONE: the example itself
    meta_keys: tuple[str, ...]
    load_meta: Callable[[str], Column]

    def __len__(self) -> int:
        return len(self.task)

    def meta(self, key: str) -> Column:
        """Returns the values of `meta[key]`."""
        if key not in self.meta_keys:
            return Column(np.full(len(self), NONE, np.int32), Strings.of(()))
        return self.load_meta(key)

    def at(self, rows: np.ndarray | slice) -> "Columns":
        """Returns the columns of some rows."""
        return Columns(
            self.task[rows],
            self.images[rows],
            self.image_set[rows],
            self.ids[rows],
            self.cluster.at(rows),
            self.meta_keys,
            lambda key: self.load_meta(key).at(rows),
        )


class Coder:
    """Numbers texts in the order in which they come, and remembers the number of each example."""

    def __init__(self):
        self.numbers: dict = {}
        self.codes: list[int] = []

    def add(self, value) -> None:
        self.codes.append(NONE if value is None else self.numbers.setdefault(value, len(self.numbers)))

    def column(self) -> Column:
        return Column(np.array(self.codes, np.int32), Strings.of(self.numbers))


class Collector:
    """Makes columns of examples that come one after another."""

    def __init__(self):
        self._tasks, self._images, self._ids = [], [], []
        self._sets, self._clusters = Coder(), Coder()
        self._meta: dict[str, Coder] = {}

    def add(self, example: Example) -> None:
        self._tasks.append(TASKS.index(example.task))
        self._images.append(len(example.images))
        self._ids.append(hash_of(example.id))
        self._sets.add(example.images or None)
        self._clusters.add(example.cluster or None)
        for key, value in example.meta.items():
            coder = self._meta.setdefault(key, Coder())
            coder.codes += [NONE] * (len(self._tasks) - 1 - len(coder.codes))
            coder.add(value)

    def columns(self) -> Columns:
        count = len(self._tasks)
        for coder in self._meta.values():
            coder.codes += [NONE] * (count - len(coder.codes))
        meta: Mapping[str, Column] = {key: coder.column() for key, coder in self._meta.items()}
        return Columns(
            np.array(self._tasks, np.int8),
            np.array(self._images, np.int16),
            np.array(self._sets.codes, np.int32),
            np.array(self._ids, np.uint64),
            self._clusters.column(),
            tuple(meta),
            meta.__getitem__,
        )


def columns_of(dataset: Dataset, split: str) -> Columns:
    """Returns the columns of a split, and makes them from its examples if the data set has none."""
    own = getattr(dataset, "columns", None)
    if own is not None:
        return own(split)
    collector = Collector()
    for example in dataset.examples(split):
        collector.add(example)
    return collector.columns()

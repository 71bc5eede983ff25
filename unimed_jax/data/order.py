"""Groups the examples of a source by image and task, and orders the draws of all sources."""

import functools
import random
import threading
from collections.abc import Iterator, Sequence

import grain.python as grain
import numpy as np

from unimed_jax.config import TASKS, Config
from unimed_jax.data.columns import NONE, Columns


class Groups:
    """Groups examples by (images, task, weight), in the order of their first.

    Text alone stays single, as does every example of a source that asks one question a draw.
    """

    def __init__(self, members: np.ndarray, starts: np.ndarray):
        """Takes the groups one after the other: group g holds members[starts[g]:starts[g + 1]]."""
        self._members, self._starts = members, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, g: int) -> np.ndarray:
        return self._members[self._starts[g] : self._starts[g + 1]]


def group_examples(
    columns: Columns, weights: np.ndarray, questions: int
) -> tuple[Groups, list[tuple[float, np.ndarray | None]]]:
    """Returns the groups of the examples, and buckets of groups that weigh the same.

    A draw asks at most `questions` of a group; if that is 1, each example is a group, so that examples
    are drawn alike however many questions their image has. A bucket is (share of the source's draws,
    numbers of its groups); None as numbers means all groups.
    """
    count = len(columns)
    levels, level = np.unique(weights, return_inverse=True)
    image = columns.image_set.astype(np.int64) * len(TASKS) + columns.task
    alone = (columns.image_set == NONE) | (questions == 1)
    image[alone] = -1 - np.arange(count)[alone]
    # groups in the order of their keys
    _, first, group = np.unique(image * len(levels) + level, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    group = rank[group]  # [N], in the order of their first
    members = np.argsort(group, kind="stable").astype(np.int32)
    starts = np.zeros(len(first) + 1, np.int64)
    np.cumsum(np.bincount(group), out=starts[1:])
    groups = Groups(members, starts)
    if len(levels) == 1:
        return groups, [(1.0, None)]
    # Without weights each draw of an image gives min(questions, n) of its n examples. `draws`: how often
    # a part of them, which is a group of its own, must be drawn for its examples to come as often.
    leads = members[starts[:-1]]
    _, of_image, sizes = np.unique(image, return_inverse=True, return_counts=True)
    whole, own = sizes[of_image[leads]], np.diff(starts)
    draws = np.minimum(questions, whole) / whole * own / np.minimum(questions, own)
    buckets: list[tuple[float, np.ndarray | None]] = []
    for i, value in enumerate(levels):
        (numbers,) = np.nonzero(level[leads] == i)
        buckets.append((float(value * draws[numbers].sum()), numbers))
    return groups, buckets


def source_order(weights: Sequence[float], seed: int) -> Iterator[int]:
    """Yields the source of step 0, 1, ...

    Under per-batch mixing: the published order of Python's own generator.
    """
    generator = random.Random(seed)
    while True:
        yield generator.choices(range(len(weights)), weights)[0]


class _PerBatchOrder:
    """Orders draws so that each step has one source.

    A source goes on where the last step that had it ended.
    """

    def __init__(self, sources: Sequence, weights: Sequence[float], rows: int, seed: int):
        self._sources, self._rows = sources, rows
        self._choices = source_order(weights, seed)
        self._lock = threading.Lock()
        self._steps: list[tuple[int, int]] = []  # step -> source, and how often it came before
        self._seen = [0] * len(sources)

    def __getitem__(self, draw: int) -> tuple[int, int]:
        step, row = divmod(draw, self._rows)
        with self._lock:
            while len(self._steps) <= step:
                source = next(self._choices)
                self._steps.append((source, self._seen[source]))
                self._seen[source] += 1
            source, before = self._steps[step]
        return self._sources[source][before * self._rows + row]


def global_order(sources: Sequence, config: Config) -> "grain.MapDataset | _PerBatchOrder":
    """Makes the global order, which maps the number of a draw to (source, group)."""
    weights = [source.weight for source in config.data.sources]
    shuffled = []
    for s, source in enumerate(sources):
        parts = []
        for b, (_, numbers) in enumerate(source.buckets):
            words = [config.seed % 2**32, s, b] if b else [config.seed % 2**32, s]
            seed = int(np.random.SeedSequence(words).generate_state(1)[0])
            count = len(source.groups if numbers is None else numbers)
            part = grain.MapDataset.range(count).shuffle(seed=seed).repeat()
            parts.append(part.map(functools.partial(_place, s, numbers)))
        shares = [share for share, _ in source.buckets]
        shuffled.append(parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, shares))
    if config.data.mixing == "per_batch":
        return _PerBatchOrder(shuffled, weights, config.data.rows, config.seed)
    return grain.MapDataset.mix(shuffled, weights)


def _place(source: int, numbers: np.ndarray | None, i: int) -> tuple[int, int]:
    return source, int(i if numbers is None else numbers[i])

"""Selects what the settings take from a data set, by task, template, meta and made splits."""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from unimed_jax import processes
from unimed_jax.config import TASKS, SourceConfig
from unimed_jax.data.columns import NONE, Columns, hash_of
from unimed_jax.data.info import Info
from unimed_jax.data.store import Rows, Store
from unimed_jax.errors import UserError, nearest

_RULE = re.compile(r"(\w+)\[(?:(\d+(?:\.\d+)?)%)?:(?:(\d+(?:\.\d+)?)%)?\](?: by (\w+))?")


class Selection:
    """Shows one data set as the sources that name it see it.

    An example is in it if any of the sources lets it through.
    """

    def __init__(self, store: Store, id: str, info: Info, sources: Sequence[SourceConfig]):
        """Takes sources alike but for tasks, filters and weights.

        Raises UserError for a rule or filter that fails.
        """
        self._store, self.id, self.name, self.info = store, id, id, info
        self._splits = _made_splits(store, sources[0].splits, id)
        for split, numbers in self._splits.items():
            columns = store.all_columns().at(numbers)
            wanted = np.zeros(len(numbers), bool)
            for source in sources:
                wanted |= chosen(columns, source)
            if not wanted.all():
                self._splits[split] = numbers[wanted]
        self._splits = {split: numbers for split, numbers in self._splits.items() if len(numbers)}
        self.splits = tuple(self._splits)
        self.folder, self.skipped = store.folder, store.skipped
        self.checksum = store.checksum
        _check_filters(self, sources)

    def examples(self, split: str) -> Rows:
        return Rows(self._store, self._numbers(split))

    def columns(self, split: str) -> Columns:
        return self._store.all_columns().at(self._numbers(split))

    def image(self, key: str) -> np.ndarray:
        return self._store.image(key)

    def encoded(self, key: str) -> bytes:
        """Returns the image's bytes as they were found."""
        return self._store.encoded(key)

    def digest(self, key: str) -> bytes:
        """Returns 32 bytes that name the image's pixels, see `Store.digest`."""
        return self._store.digest(key)

    def _numbers(self, split: str) -> np.ndarray:
        if split not in self._splits:
            raise UserError(
                f"data set {self.id} has no split {split!r}{nearest(split, self.splits)} "
                f"Choose from {', '.join(self.splits) or 'none'}."
            )
        return self._splits[split]


def chosen(columns: Columns, source: SourceConfig) -> np.ndarray:
    """Marks the examples that pass the source's tasks and filters, bool [N]."""
    keep = np.ones(len(columns), bool)
    if source.tasks:
        keep &= np.isin(columns.task, [TASKS.index(task) for task in source.tasks])
    for key, values in source.only.items():
        keep &= columns.meta(key).among(values)
    return keep


def draw_weights(columns: Columns, source: SourceConfig) -> np.ndarray:
    """Says how often each example is drawn, relative to the others of its source, float64 [N]."""
    weight = np.ones(len(columns))
    for key, of_value in source.weights.items():
        column = columns.meta(key)
        # the last is that of NONE
        table = np.array([*(of_value.get(text, 1.0) for text in column.texts), 1.0])
        weight *= table[column.codes]
    return weight


def _check_filters(data: Selection, sources: Sequence[SourceConfig]) -> None:
    """Raises UserError for a key or value that no example has, which is a misspelling as a rule."""
    where = f"config.data.sources: data set {data.id!r}"
    everything = data._store.all_columns()
    for source in sources:
        lacking = [task for task in source.tasks if TASKS.index(task) not in everything.task]
        if lacking:
            have = [task for task in TASKS if TASKS.index(task) in everything.task]
            raise UserError(
                f"{where}: tasks names {lacking[0]!r}, of which it has no example; choose from "
                f"{', '.join(have)}."
            )
        for setting, given in (("only", source.only), ("weights", source.weights)):
            for key, values in given.items():
                if key not in everything.meta_keys:
                    known = everything.meta_keys
                    raise UserError(
                        f"{where}: {setting} names {key!r}, which no example has{nearest(key, known)} "
                        f"Choose from {', '.join(known) or 'none'}."
                    )
                texts = set(everything.meta(key).texts)
                for value in values:
                    if value not in texts:
                        raise UserError(
                            f"{where}: {setting} matches nothing, because no example has {key}={value!r}"
                            f"{nearest(value, texts)}"
                        )
    if not data.splits:
        raise UserError(f"{where}: tasks and filters together match no example; widen them.")


@functools.cache  # a set is opened for training and again for its scores
def _say_replaced(id: str, name: str, rule: str, own: int) -> None:
    """Says that a rule of the settings replaces a split that the data set has."""
    processes.say(
        f"{id}: split {name!r} is made by the rule {rule!r}, in place of the {own:,} examples that the "
        f"set itself has as {name!r} (a rule such as 'official': '{name}[:]' keeps them)"
    )


def _made_splits(store: Store, rules: Mapping[str, str], id: str) -> dict[str, np.ndarray]:
    """Returns split -> example numbers, int32.

    What a made split takes leaves its origin, unless that is made too. Raises UserError for a rule that
    cannot be followed, and for two made splits that share an example. One that replaces a split of the
    set, from which no rule takes, is said once.
    """
    numbers = {split: np.arange(*store.rows(split), dtype=np.int32) for split in store.splits}
    made: dict[str, np.ndarray] = {}
    taken: dict[str, np.ndarray] = {}
    for name, rule in rules.items():
        where = f"config.data.sources: data set {id!r}, split {name!r}"
        match = _RULE.fullmatch(rule.strip())
        if not match:
            raise UserError(
                f"{where}: rule {rule!r} is not understood; write it as 'train[:90%] by cluster'."
            )
        origin, first, last, by = match.groups()
        if origin not in numbers:
            raise UserError(f"{where} is made of {origin!r}, which it has not{nearest(origin, numbers)}")
        low, high = float(first or 0) / 100, float(last or 100) / 100
        rows = numbers[origin]
        at = _places(store.all_columns().at(rows), by, where)
        inside = (at >= low) & (at < high) if high < 1 else at >= low
        if not inside.any():
            raise UserError(f"{where}: rule {rule!r} leaves it empty; widen it.")
        made[name] = rows[inside]
        taken[origin] = taken.get(origin, np.zeros(len(rows), bool)) | inside
    for one, two in itertools.combinations(made, 2):
        if shared := len(np.intersect1d(made[one], made[two])):
            raise UserError(
                f"config.data.sources: data set {id!r}: splits {one!r} ({rules[one]!r}) and {two!r} "
                f"({rules[two]!r}) share {shared} examples; give them ranges that do not overlap, both "
                "with `by cluster` or both without."
            )
    for name in made:
        own = len(numbers.get(name, ()))
        if own and name not in taken:
            _say_replaced(id, name, rules[name], own)
    for origin, gone in taken.items():
        if origin not in made:
            numbers[origin] = numbers[origin][~gone]
    return numbers | made


def _places(columns: Columns, by: str | None, where: str) -> np.ndarray:
    """Hashes the cluster, meta value or id of each example to float64 [N] in 0..1.

    The value of an example stays as it is when other examples are added.
    """
    own = columns.ids.astype(np.float64) / 2.0**64
    if by is None:
        return own
    column = columns.cluster if by == "cluster" else columns.meta(by)
    if by != "cluster" and by not in columns.meta_keys:
        raise UserError(
            f"{where}: {by!r} is neither 'cluster' nor a meta key{nearest(by, columns.meta_keys)} "
            f"Choose from {', '.join(('cluster', *columns.meta_keys))}."
        )
    table = np.array([*(hash_of(text) / 2.0**64 for text in column.texts), 0.0])
    return np.where(column.codes == NONE, own, table[column.codes])

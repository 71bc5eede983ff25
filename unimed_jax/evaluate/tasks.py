"""Resolves the settings into what is scored: units of (data set, split, task).

Also the choice of a unit's examples and the permutation of their images.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from unimed_jax.config import TASKS, Config, DataConfig, EntryConfig, SourceConfig
from unimed_jax.data import layout
from unimed_jax.data.box_text import text_to_box
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError, nearest
from unimed_jax.evaluate.metrics import Metric, of_task
from unimed_jax.memory import check_answering
from unimed_jax.model.parameters import stored_leaves
from unimed_jax.predict.sizes import slots_of

# Training examples of one set that baselines are fitted on: all, or so many evenly spaced ones.
TRAIN_SAMPLE = 100_000
NAMED = 5  # records that a note names
USUAL = ("val", "test")  # splits that a set may lack, because nobody need have asked for them


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds a data set with the tasks that its sources in the settings let through."""

    id: str
    data: Dataset
    tasks: tuple[str, ...]
    rules: Mapping[str, str]  # made split -> its rule; those of the set itself are not in it
    settings: tuple[SourceConfig, ...] = ()  # its sources


@dataclasses.dataclass(frozen=True)
class Unit:
    """Describes one evaluation: examples of a task on a split of a set, and how they are scored."""

    source: Source
    split: str
    task: str
    metrics: tuple[Metric, ...]  # the primary one first
    examples: Sequence[Example]
    batch: int
    max_new_tokens: int
    every: int = 0  # training steps between its runs while training; 0: only after training
    limit: int = 0  # how many examples were chosen of more; 0: all are there

    @property
    def name(self) -> str:
        return f"{self.source.id}/{self.split}/{self.task}"

    def id_of(self, example: Example) -> str:
        """Returns the example's id for every tool: <set>/<split>/<id within the set>."""
        return f"{self.source.id}/{self.split}/{example.id}"


def open_sets(data: DataConfig) -> dict[str, Source]:
    """Opens the data sets of `data.sources`, each once, with the tasks of all its sources."""
    found: dict[str, Source] = {}
    for source, dataset in zip(data.sources, open_sources(data), strict=True):
        name = dataset.id
        old = found.get(name)
        tasks = {*(source.tasks or dataset.info.tasks), *(old.tasks if old else ())}
        rules = {**(old.rules if old else {}), **source.splits}
        settings = (*(old.settings if old else ()), source)
        found[name] = Source(
            name, dataset, tuple(task for task in TASKS if task in tasks), rules, settings
        )
    return found


def open_held_out(config: Config) -> list[Dataset]:
    """Opens the data sets that are evaluated in addition to those of config.data, if any."""
    if not config.evaluate.sources or not (config.evaluate.entries or config.evaluate.splits):
        return []
    return [source.data for source in open_sets(config.held_out).values()]


def units_of(config: Config, sets: Mapping[str, Source]) -> tuple[list[Unit], list[str]]:
    """Resolves the settings into (units, notes on what was left out).

    Named entries (config.evaluate.entries) are exact: an unknown set, task, split or metric, and an
    entry without an example, raise UserError. By default every task of every set is scored on each
    of config.evaluate.splits; there a split or task that a set lacks is left out with a note,
    unless no set has any of the splits, or none has one that is neither val nor test, which is a
    misspelling as a rule, and unless nothing is left.
    """
    if config.evaluate.entries:
        return [_named(entry, config, sets) for entry in config.evaluate.entries], []
    units, notes = [], []
    for split in config.evaluate.splits:
        having = [source for source in sets.values() if _has(source, split)]
        if not having:
            known = sorted({name for source in sets.values() for name in source.data.splits})
            others = any(
                _has(source, other) for source in sets.values() for other in config.evaluate.splits
            )
            if split in USUAL and others:
                notes += [
                    f"{source.id}: it has no example in split {split!r}" for source in sets.values()
                ]
                continue
            names = ", ".join(map(repr, sets))
            raise UserError(
                f"config.evaluate.splits: data set {names} has no example in split "
                f"{split!r}{nearest(split, known)} Choose another split or check the data."
            )
        for source in sets.values():
            if source not in having:
                notes.append(f"{source.id}: it has no example in split {split!r}")
                continue
            groups = by_task(source, split)
            lacking = [task for task in source.tasks if task not in groups]
            notes += [f"{source.id}/{split}: no example of task {task!r}" for task in lacking]
            for task, examples in groups.items():
                units.append(
                    _unit(EntryConfig(source.id, cast(Any, task), split), config, source, examples)
                )
    if config.evaluate.splits and not units:
        raise UserError(
            f"config.evaluate.splits: nothing is left to score on {', '.join(config.evaluate.splits)} "
            f"({'; '.join(notes) or 'no source lets a task through'}); choose another split, or the "
            "tasks of the sources that it has."
        )
    return units, notes


def _named(entry: EntryConfig, config: Config, sets: Mapping[str, Source]) -> Unit:
    where = "config.evaluate.entries"
    if entry.source not in sets:
        raise UserError(
            f"{where}: {entry.source!r} is not the id of a data set{nearest(entry.source, sets)} "
            f"Choose from {', '.join(sets)}."
        )
    source = sets[entry.source]
    if not _has(source, entry.split):
        known = source.data.splits
        raise UserError(
            f"{where}: data set {source.id!r} has no example in split "
            f"{entry.split!r}{nearest(entry.split, known)}"
        )
    found = by_task(source, entry.split)
    if entry.task not in found:
        raise UserError(
            f"{where}: data set {source.id!r} has no example of task {entry.task!r} in split "
            f"{entry.split!r}; it has "
            f"{', '.join(found) or 'none of the tasks that its source lets through'}."
        )
    return _unit(entry, config, source, found[entry.task])


def _unit(entry: EntryConfig, config: Config, source: Source, examples: Sequence[Example]) -> Unit:
    defaults = config.evaluate
    chosen = select(examples, defaults.limit if entry.limit is None else entry.limit)
    return Unit(
        source=source,
        split=entry.split,
        task=entry.task,
        metrics=of_task(entry.task, entry.metrics),
        examples=chosen,
        batch=entry.batch or defaults.batch,
        max_new_tokens=entry.max_new_tokens or defaults.max_new_tokens,
        every=entry.every,
        limit=len(chosen) if len(chosen) < len(examples) else 0,
    )


def _has(source: Source, split: str) -> bool:
    return split in source.data.splits and len(source.data.examples(split)) > 0


def by_task(source: Source, split: str, most: int = 0) -> dict[str, list[Example]]:
    """Groups the source's examples by task, at most `most` (0: all) of them, evenly spaced."""
    examples = source.data.examples(split)
    count = min(len(examples), most) if most else len(examples)
    step = max(1.0, len(examples) / max(count, 1))
    groups: dict[str, list[Example]] = {task: [] for task in source.tasks}
    for i in range(count):
        example = examples[int(i * step)]
        if example.task in groups:
            groups[example.task].append(example)
    return {task: found for task, found in groups.items() if found}


def data_notes(units: Sequence[Unit]) -> list[str]:
    """Says what is not scored: records that preparing left out, and turns before the question."""
    notes = []
    for source in {unit.source.id: unit.source for unit in units}.values():
        skipped = getattr(source.data, "skipped", 0)
        if skipped:
            notes.append(
                f"{source.id}: {skipped} records were left out when it was prepared (skipped.txt "
                "names them)"
            )
    for unit in units:
        talks = [example for example in unit.examples if example.history]
        if talks:
            named = ", ".join(example.id for example in talks[:NAMED]) + (
                " ..." if len(talks) > NAMED else ""
            )
            notes.append(
                f"{unit.name}: {len(talks)} questions are asked without the turns before them ({named})"
            )
    return notes


class Training:
    """Gives baselines their training examples, which are the scored set's own or those of all sets.

    If the training sources do not open (a run was moved to a machine without them), `notes` says
    so, and baselines are fitted on the training splits of the scored sets.
    """

    def __init__(self, config: Config, sets: Mapping[str, Source]):
        self.notes: list[str] = []
        self.sets = sets
        self.opened = True  # whether `sets` are those of config.data
        if config.held_out != config.data:
            try:
                self.sets = open_sets(config.data)
            except UserError as error:
                self.opened = False
                self.notes.append(
                    "the training data did not open, so baselines are fitted on the scored sets: "
                    f"{error}"
                )
        self._read: dict[str, dict[str, list[Example]]] = {}

    def of(self, unit: Unit) -> list[Example]:
        """Returns the training examples of the unit's task."""
        own = self._of_set(unit.source.id).get(unit.task, []) if unit.source.id in self.sets else []
        return own or [
            example for name in self.sets for example in self._of_set(name).get(unit.task, [])
        ]

    def _of_set(self, name: str) -> dict[str, list[Example]]:
        if name not in self._read:
            source = self.sets[name]
            self._read[name] = by_task(source, "train", TRAIN_SAMPLE) if _has(source, "train") else {}
        return self._read[name]


def check_evaluation(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError for whatever would end the evaluation after training.

    That is an unknown set, split, task or metric, a split without examples, and a test prompt of
    more than config.text.max_prompt tokens.
    """
    if not config.evaluate.entries and not config.evaluate.splits:
        return
    units, _ = units_of(config, open_sets(config.held_out))
    weights = stored_leaves(config)
    for unit in units:
        batch = unit.batch if config.model.answers_depend_on_batch else slots_of(unit.batch)
        rows = min(batch, 1 << (len(unit.examples) - 1).bit_length())
        check_answering(config.model, weights, rows, config.model.tokens_per_image + unit.max_new_tokens)
    encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)
    for unit in units:
        for example in unit.examples:
            if unit.task == "refer" and example.box is None and text_to_box(example.answer) is None:
                raise UserError(
                    f"{unit.name} cannot be evaluated: record {example.id} has neither a box nor an "
                    "answer {<x1><y1><x2><y2>}; mend it."
                )
            try:
                encoder.prompt(example)
            except UserError as error:
                raise UserError(f"{unit.name} cannot be evaluated: {error}") from error


# ---------------------------------------------------------------------------------------------
# Examples of a unit
# ---------------------------------------------------------------------------------------------


def select(examples: Sequence[Example], limit: int) -> list[Example]:
    """Chooses at most `limit` examples (0: all), one of each cluster in turn.

    The order is random but the same for every seed, so that runs are scored on the same examples.
    """
    if not limit or len(examples) <= limit:
        return list(examples)
    rng = np.random.default_rng(0)
    groups = defaultdict(list)
    for i in rng.permutation(len(examples)):
        groups[examples[i].cluster or examples[i].id].append(i)
    turns = sorted(
        (turn, rank, i) for rank, group in enumerate(groups.values()) for turn, i in enumerate(group)
    )
    return [examples[i] for i in sorted(i for *_, i in turns[:limit])]


def permute_images(examples: Sequence[Example], seed: int) -> list[tuple[str, ...]] | None:
    """Gives each example the images of another one with as many, or returns None if that cannot be.

    The images are permuted, none keeps its place, and none stays within its cluster (slab, patient)
    unless one cluster holds more than half of the examples. Where only one example has so many images,
    or few do, they come from all others outside its cluster.
    """
    out: list[tuple[str, ...]] = [()] * len(examples)
    groups = defaultdict(list)
    for i, example in enumerate(examples):
        groups[len(example.images)].append(i)
    for count, places in groups.items():
        permuted = _permuted([examples[i] for i in places], seed) if count else None
        if permuted is None and count and len(groups) > 1:
            permuted = _borrowed([examples[i] for i in places], examples, count, seed)
        if permuted is None:
            return None
        for i, images in zip(places, permuted, strict=True):
            out[i] = images
    return out


def _permuted(examples: Sequence[Example], seed: int) -> list[tuple[str, ...]] | None:
    """Permutes the images of examples that have equally many.

    Sorted by cluster and turned by the size of the largest cluster, each example lands outside its own.
    """
    rng = np.random.default_rng(seed)
    for key in (lambda e: e.cluster or e.id, lambda e: e.images):
        groups = defaultdict(list)
        for i in rng.permutation(len(examples)):
            groups[key(examples[i])].append(int(i))
        turn = max(map(len, groups.values()))
        if 2 * turn > len(examples):
            continue
        order = [i for group in groups.values() for i in group]
        images: list[tuple[str, ...]] = [()] * len(examples)
        for place, i in enumerate(order):
            images[i] = examples[order[(place + turn) % len(order)]].images
        if all(found != example.images for found, example in zip(images, examples, strict=True)):
            return images
    return None


def _borrowed(
    some: Sequence[Example], examples: Sequence[Example], count: int, seed: int
) -> list[tuple[str, ...]] | None:
    """Draws `count` images for each of some examples, from all examples outside its cluster.

    Returns None if there are not so many.
    """
    rng = np.random.default_rng(seed)
    pools: dict[str, list[str]] = {}
    out = []
    for example in some:
        cluster = example.cluster or example.id
        if cluster not in pools:
            others = (e.images for e in examples if (e.cluster or e.id) != cluster)
            pools[cluster] = list(dict.fromkeys(key for images in others for key in images))
        pool = [key for key in pools[cluster] if key not in example.images]
        if len(pool) < count:
            return None
        out.append(tuple(pool[i] for i in rng.choice(len(pool), count, replace=False)))
    return out
